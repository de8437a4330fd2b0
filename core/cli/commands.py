"""The engine's commands for the launcher: demo, train, generate, lora, runs, doctor.

Modules that a command needs are imported when it runs, so that --help answers without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli import lora as lora_commands
from core.cli.console import (
    BAD_INPUT,
    FAILED,
    FINE,
    INTERRUPTED,
    add_command,
    debugging,
    print_json,
    print_rows,
    stop_on_ctrl_c,
    tr,
)
from core.errors import UserError

if TYPE_CHECKING:
    from core.cli.progress import Terminal
    from core.config import TrainConfig
    from core.config.draw import DrawConfig
    from core.jobs.control import Control
    from core.jobs.events import Event

# --- parsers ---

def add_commands(commands: Any) -> None:
    demo = add_command(commands, "demo", _demo, line="demo --out my-demo", answers=True)
    demo.add_argument("--out", type=Path, default=Path("output/demo"), metavar="DIR",
                      help=tr("arg_demo_out"))
    _add_train(commands)
    _add_generate(commands)
    _add_lora(commands)
    _add_runs(commands)
    doctor = add_command(commands, "doctor", _doctor, line="doctor --base model.safetensors",
                         answers=True)
    doctor.add_argument("--base", metavar="MODEL", help=tr("arg_doctor_base"))


def _add_train(commands: Any) -> None:
    train = add_command(commands, "train", _train, answers=True, add_help=False,
                        line="train --config my_style.yaml --set epochs=5")
    train.add_argument("-h", "--help", action=_HelpWithKeys, nargs=0, help=tr("arg_help"))
    train.add_argument("--config", type=Path, default=None, metavar="FILE",
                       help=tr("arg_config"))
    train.add_argument("--preset", metavar="NAME", help=tr("arg_preset"))
    train.add_argument("--purpose", default="style", help=tr("arg_preset_purpose"))
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                       help=tr("arg_set"))


def _add_generate(commands: Any) -> None:
    generate = add_command(commands, "generate", _generate, answers=True,
                           line='generate --prompt "a red apple <lora:my_style:0.8>"')
    arguments: dict[str, dict[str, Any]] = {
        "base": {}, "prompt": {}, "negative": {},
        "lora": {"action": "append", "dest": "loras", "metavar": "FILE[:WEIGHT]"},
        "seed": {"type": int}, "steps": {"type": int}, "cfg": {"type": float},
        "size": {"metavar": "W,H"}, "sampler": {}, "clip_skip": {"type": int},
        "max_tokens": {"type": int}, "count": {"type": int}, "sheet": {},
        "out": {"metavar": "DIR"}, "precision": {}, "device": {}, **_BASE}
    _add_options(generate, arguments)


# How a base is taken, wherever pictures are drawn with it.
_BASE: dict[str, dict[str, Any]] = {
    "family": {}, "vae": {"metavar": "FILE"}, "text_encoder": {
        "action": "append", "dest": "text_encoders", "metavar": "FILE"},
    "tokenizer": {}, "prediction_type": {}, "distilled": {}}


def _add_options(parser: argparse.ArgumentParser, options: Mapping[str, dict[str, Any]]) -> None:
    for name, more in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=tr(f"arg_generate_{name}"), **more)


def _add_lora(commands: Any) -> None:
    lora = add_command(commands, "lora", line="lora info my_style.safetensors")
    inner = lora.add_subparsers(dest="action", metavar="ACTION", required=True)
    info = add_command(inner, "info", _lora_info, key="lora_info", answers=True,
                       line="lora info my_style.safetensors")
    verify = add_command(inner, "verify", _lora_verify, key="lora_verify", answers=True,
                         line="lora verify my_style.safetensors --base model.safetensors")
    lora_commands.add_to(inner)
    for parser in (info, verify):
        parser.add_argument("file", type=Path, metavar="FILE", help=tr("arg_lora_file"))
    verify.add_argument("--base", metavar="MODEL", help=tr("arg_lora_base"))
    _add_options(verify, _BASE)


def _add_runs(commands: Any) -> None:
    runs = add_command(commands, "runs", line="runs list")
    inner = runs.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_command(inner, "list", _runs_list, key="runs_list", answers=True, line="runs list")
    for name, run in (("show", _runs_show), ("resume", _runs_resume), ("stop", _runs_stop)):
        parser = add_command(inner, name, run, key=f"runs_{name}", answers=True,
                             line=f"runs {name} last")
        parser.add_argument("id", metavar="RUN", help=tr("arg_run"))


class _HelpWithKeys(argparse.Action):
    """`train --help` goes on with every key of the config."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        print("\n".join(["", tr("keys"), *_key_lines()]))
        parser.exit()


def _key_lines() -> list[str]:
    from core.config import TrainConfig
    lines = []
    for level in ("basic", "advanced", "expert"):
        lines += ["", f"  {tr(f'level_{level}')}"]
        for key, about in TrainConfig.model_fields.items():
            extra = about.json_schema_extra
            if isinstance(extra, dict) and extra["level"] == level:
                default = json.dumps(about.default, ensure_ascii=False)
                lines.append(f"    {key:<29}{default:<15} {about.description}")
    return lines


# --- jobs ---

def _demo(options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.demo.run import run_demo
    from core.jobs.control import Control
    control = Control()
    with Terminal() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        result = run_demo(options.out.expanduser().absolute(), terminal, control)
    return _finish(result, control, options)


def _train(options: argparse.Namespace) -> int:
    if not _alone():
        return FINE
    from core.importers import load_train_config
    from core.workspace import presets
    given = overrides(options.set)
    if options.preset:
        config, preset, fields = presets.train_config(options.preset, options.config, given,
                                                      options.purpose)
        print(i18n.tr("presets.applied", {"title": preset.said("title"),
                                          "fields": ", ".join(fields)}), file=sys.stderr)
    elif options.config:
        config = load_train_config(options.config, given)
    else:
        raise UserError("commands.no_config")
    _tell_imported(options.config)
    folder = options.config.parent if options.config else Path.cwd()
    return _run("train", found_beside(config, folder), options)


def _alone() -> bool:
    """Refuses a start by torchrun, accelerate launch, mpirun or srun with several processes: the
    first one raises the UserError. False for the others, which end in silence and as if well: the
    launcher would stop the first one, before it has spoken, at the first failure."""
    def told(*names: str) -> int:
        return max((int(text) for name in names
                    if (text := os.environ.get(name, "").strip()).isdigit()), default=0)
    count = told("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    rank = told("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    if max(count, rank + 1) > 1 and not (count > 1 and rank):
        raise UserError("commands.several_processes", count=max(count, rank + 1))
    return not rank


def _tell_imported(path: Path | None) -> None:
    """What another trainer's config said that is not taken over, line by line."""
    from core import importers
    from core.importers import FOREIGN
    if path is not None and path.suffix.lower() in FOREIGN:
        print("\n".join(importers.told(importers.read(path))), file=sys.stderr)


def _run(job: str, config: TrainConfig, options: argparse.Namespace,
         resumed_from: str = "") -> int:
    """Runs a job in this process; its folder under runs/ tells everyone else about it."""
    from core.cli.progress import Terminal
    from core.config import dump_yaml
    from core.jobs import runs, worker
    from core.jobs.control import Control
    folder = runs.create_run(job, dump_yaml(config), config.name, resumed_from=resumed_from,
                             queued=False)
    control = Control()
    with Terminal() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        end = worker.run_job(job, config, folder, control, terminal)
    result = {"run": folder.name, "state": end.state, **end.result}
    return (_failed(result, terminal, options) if end.state == "failed"
            else _finish(result, control, options))


def _failed(result: Mapping[str, Any], terminal: Terminal, options: argparse.Namespace) -> int:
    """What a user can mend before the first step is bad input; all else is a run that failed."""
    fault = terminal.fault
    code, params = (fault.code, fault.params) if fault else ("commands.unexpected", {})
    if fault and debugging(options):
        print(fault.details, file=sys.stderr)
    sentence = i18n.tr(code, params)
    print(sentence, file=sys.stderr)
    if options.json:
        print_json({"ok": False, **result, "fault": code, "message": sentence})
    return FAILED if terminal.stepped or code.startswith(("jobs.", "commands.")) else BAD_INPUT


def _finish(result: Mapping[str, Any], control: Control, options: argparse.Namespace) -> int:
    from core.cli import progress
    if options.json:
        print_json({"ok": result.get("state") not in ("stopped", "unproven"), **result})
    else:
        print("\n".join(progress.summary(result)))
        if result.get("state") == "stopped":
            print(tr("stopped", run=result["run"]) if "run" in result
                  else tr("demo_stopped"))
    if control.stopping:
        return INTERRUPTED
    return FAILED if result.get("state") == "unproven" else FINE


def overrides(pairs: Sequence[str]) -> dict[str, str]:
    """['epochs=5'] -> {'epochs': '5'}"""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError("commands.bad_set", given=pair)
        found[key.strip()] = value
    return found


def found_beside(config: TrainConfig, folder: Path) -> TrainConfig:
    """Paths that lie beside the YAML and not in the working folder, made absolute."""
    from core.adapters import base_loras
    from core.config import COMPANIONS, resolve
    from core.importers import located

    def found(path: str) -> str:
        there = resolve(path, folder)
        return str(there) if path and there.exists() and there != resolve(path, None) else path
    given = {key: getattr(config, key) for key in (
        "train_data_dir", "metadata_path", "base_model", "init_lora_weights", *COMPANIONS)}
    new = {key: [found(one) for one in value] if isinstance(value, list) else found(value)
           for key, value in given.items()}
    changes = {key: value for key, value in new.items() if value != given[key]}
    return base_loras.located(
        located(config.with_changes(**changes) if changes else config, folder), folder)


# --- pictures and files ---

def _generate(options: argparse.Namespace) -> int:
    return _drawn(_drawing(options), options)


def _drawing(options: argparse.Namespace) -> DrawConfig:
    from core.config.draw import of_options
    given = vars(options)
    return of_options(given | {"base": str(_base(given.get("base") or "demo"))})


def _base(name: str) -> Path:
    from core import paths
    return paths.DEMO / "base" if name == "demo" else Path(name).expanduser()


def _drawn(config: DrawConfig, options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.inference.draw import draw
    from core.jobs.control import Control
    from core.jobs.events import Sample
    control = Control()
    with Terminal() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        def emit(event: Event) -> None:
            if not isinstance(event, Sample):         # its path is the answer, told below
                terminal(event)
        files = draw(config, emit, control)["files"]
    if options.json:
        print_json({"ok": not control.stopping, "files": files, "seed": config.seed})
    else:
        print("\n".join(files))
    return INTERRUPTED if control.stopping else FINE


def _lora_info(options: argparse.Namespace) -> int:
    from core.lora_files.files import describe
    from core.lora_files.formats import weights_file
    info = describe(weights_file(options.file))
    facts = asdict(info)
    if options.json:
        print_json({"ok": True, **facts})
        return FINE
    told = facts.pop("facts")
    told.pop("family")                  # the tensors tell it better
    print_rows({**facts, "size": f"{info.size / 2**20:.2f} MB", **told,
                 "tags": dict(info.facts.tags)}, "info")
    return FINE


def _lora_verify(options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.training.verify import verify
    with Terminal() as terminal:
        proof = verify(options.file, _drawing(options) if options.base else None, terminal)
    if options.json:
        print_json(proof)
    else:
        print_rows(proof, "proof")
    return FINE if proof.get("ok", True) else FAILED


# --- runs ---

def _runs_list(options: argparse.Namespace) -> int:
    from core.jobs import runs
    views = runs.list_runs()
    if options.json:
        print_json({"ok": True, "runs": [_brief(view) for view in views]})
    elif not views:
        print(tr("no_runs"))
    else:
        for view in views:
            print(tr("run_line", id=view.id, state=tr(f"state_{view.state}"), step=view.step,
                       total=view.total or "?", name=view.name))
    return FINE


def _runs_show(options: argparse.Namespace) -> int:
    from core.cli import progress
    from core.jobs import runs
    view = runs.load_run(_run_id(options.id))
    if options.json:
        print_json({"ok": True, **asdict(view)})
        return FINE
    loss = "" if view.loss is None else f"{view.loss:.4f}"
    files = [point.path for point in view.checkpoints]
    print_rows({**_brief(view), "state": tr(f"state_{view.state}"), "loss": loss,
                 "folder": view.folder, "checkpoints": files, "pictures": len(view.samples)},
                "run")
    if view.plan and "memory" not in view.result:
        with contextlib.suppress(TypeError, ValueError, KeyError):          # a damaged record
            print(progress.planned(view.plan))
    print("\n".join(progress.summary(view.result)))
    if view.fault:
        print(i18n.tr(view.fault.code, view.fault.params))
    return FINE


def _runs_resume(options: argparse.Namespace) -> int:
    from core.jobs import runs, worker
    from core.jobs.journal import CONFIG
    if not _alone():
        return FINE
    view = runs.load_run(_run_id(options.id))
    if not view.over:
        raise UserError("jobs.still_running", id=view.id, state=view.state)
    config = worker.load_config(view.job, view.folder / CONFIG)
    if view.job == "train":
        config = config.with_changes(resume=runs.resume_of(view.folder, config.resume))
    with contextlib.suppress(OSError):
        os.chdir(view.cwd)              # relative paths mean what they meant
    return _run(view.job, config, options, resumed_from=view.id)


def _runs_stop(options: argparse.Namespace) -> int:
    from core.jobs import runs
    run_id = _run_id(options.id)
    runs.ask(run_id, "stop")
    if options.json:
        print_json({"ok": True, "run": run_id})
    else:
        print(tr("stop_asked", id=run_id))
    return FINE


def _run_id(given: str) -> str:
    """A run's id, its unambiguous beginning or end, or `last`."""
    from core.jobs import runs
    ids = [view.id for view in runs.list_runs()]
    if given == "last" and ids:
        return ids[0]
    fitting = [one for one in ids if one.startswith(given) or one.endswith(given)]
    return fitting[0] if len(fitting) == 1 else given


def _brief(view: Any) -> dict[str, Any]:
    return {key: getattr(view, key) for key in (
        "id", "name", "job", "state", "step", "total", "created", "output_dir")}


# --- doctor ---

def _doctor(options: argparse.Namespace) -> int:
    from core.system import doctor
    findings = doctor.examine(options.base and _base(options.base))
    ill = any(finding.level == "error" for finding in findings)
    if options.json:
        print_json({"ok": not ill, "findings": [doctor.as_dict(f) for f in findings]})
    else:
        print("\n".join(line for finding in findings for line in doctor.lines(finding)))
    return FAILED if ill else FINE
