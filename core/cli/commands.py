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

from core import i18n, paths
from core.cli import console
from core.cli import lora as lora_commands
from core.cli.console import FAILED, FINE, INTERRUPTED, add_argument, add_command, answer, tr
from core.errors import UserError

if TYPE_CHECKING:
    from core.config.draw import DrawConfig
    from core.jobs.control import Control
    from core.jobs.events import Event

# --- parsers ---

# How a base is taken, wherever pictures are drawn with it: option -> argparse's arguments.
BASE_OPTIONS: dict[str, dict[str, Any]] = {
    "family": {}, "vae": {"metavar": "FILE"}, "text_encoder": {
        "action": "append", "dest": "text_encoders", "metavar": "FILE"},
    "tokenizer": {}, "prediction_type": {}, "distilled": {}}
DRAW_OPTIONS: dict[str, dict[str, Any]] = {
    "base": {}, "prompt": {}, "negative": {},
    "lora": {"action": "append", "dest": "loras", "metavar": "FILE[:WEIGHT]"},
    "seed": {"type": int}, "steps": {"type": int}, "cfg": {"type": float},
    "size": {"metavar": "W,H"}, "sampler": {}, "clip_skip": {"type": int},
    "max_tokens": {"type": int}, "count": {"type": int}, "sheet": {},
    "out": {"metavar": "DIR"}, "precision": {}, "device": {}, **BASE_OPTIONS}


def add_commands(commands: Any) -> None:
    demo = add_command(commands, "demo", demo_command, line="demo --out my-demo", answers=True)
    add_argument(demo, "--out", "demo_out", type=Path, default=Path("output/demo"), metavar="DIR")

    train = add_command(commands, "train", train_command, answers=True, add_help=False,
                        line="train --config my_style.yaml --set epochs=5")
    train.add_argument("-h", "--help", action=_HelpWithKeys, nargs=0, help=tr("arg_help"))
    add_argument(train, "--config", type=Path, metavar="FILE")
    add_argument(train, "--preset", metavar="NAME")
    add_argument(train, "--purpose", "preset_purpose", default="style")
    add_argument(train, "--set", action="append", default=[], metavar="KEY=VALUE")

    generate = add_command(commands, "generate", generate_command, answers=True,
                           line='generate --prompt "a red apple <lora:my_style:0.8>"')
    _add_draw_options(generate, DRAW_OPTIONS)

    add = console.add_group(commands, "lora", "lora info my_style.safetensors")
    info = add("info", lora_info_command, "lora info my_style.safetensors")
    verify = add("verify", lora_verify_command,
                 "lora verify my_style.safetensors --base model.safetensors")
    lora_commands.add_actions(add)
    for parser in (info, verify):
        add_argument(parser, "file", "lora_file", type=Path, metavar="FILE")
    add_argument(verify, "--base", "lora_base", metavar="MODEL")
    _add_draw_options(verify, BASE_OPTIONS)

    add = console.add_group(commands, "runs", "runs list")
    add("list", runs_list_command, "runs list")
    for name, run in (("show", runs_show_command), ("resume", runs_resume_command),
                      ("stop", runs_stop_command)):
        add_argument(add(name, run, f"runs {name} last"), "id", "run", metavar="RUN")

    doctor = add_command(commands, "doctor", doctor_command, answers=True,
                         line="doctor --base model.safetensors")
    add_argument(doctor, "--base", "doctor_base", metavar="MODEL")


def _add_draw_options(parser: argparse.ArgumentParser, options: Mapping[str, dict[str, Any]]
                      ) -> None:
    """Options that are not given stay away from the result, so that DrawConfig's defaults hold."""
    for name, arguments in options.items():
        add_argument(parser, f"--{name.replace('_', '-')}", f"generate_{name}",
                     default=argparse.SUPPRESS, **arguments)


class _HelpWithKeys(argparse.Action):
    """`train --help` goes on with every key of the config."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from core.config import TrainConfig
        parser.print_help()
        lines = ["", tr("keys")]
        for level in ("basic", "advanced", "expert"):
            lines += ["", f"  {tr(f'level_{level}')}"]
            for key, field in TrainConfig.model_fields.items():
                extra = field.json_schema_extra
                if isinstance(extra, dict) and extra["level"] == level:
                    default = json.dumps(field.default, ensure_ascii=False)
                    lines.append(f"    {key:<29}{default:<15} {field.description}")
        print("\n".join(lines))
        parser.exit()


# --- jobs ---

def demo_command(options: argparse.Namespace) -> int:
    from core.demo.run import run_demo
    with console.unwatched():
        with console.job_terminal() as (terminal, control):
            result = run_demo(paths.expanded(options.out).absolute(), terminal, control)
        return _finish(result, control, options)


def train_command(options: argparse.Namespace) -> int:
    from core import importers
    from core.workspace import presets
    if not _is_first_process():
        return FINE
    path, settings = options.config, overrides(options.set)
    if options.preset:
        config, preset, fields = presets.train_config(options.preset, path, settings,
                                                      options.purpose)
        print(i18n.tr("presets.applied", {"title": preset.localized("title"),
                                          "fields": ", ".join(fields)}), file=sys.stderr)
    elif path:
        config = importers.load_train_config(path, settings)
    else:
        raise UserError("commands.no_config")
    if path and path.suffix.lower() in importers.FOREIGN:
        # what another trainer's config says and is not taken over, line by line
        print("\n".join(importers.report_lines(importers.read(path))), file=sys.stderr)
    if path:
        config = importers.located(config, path.parent)
    return console.run_job("train", config, config.name, options, _finish)


def _is_first_process() -> bool:
    """Refuses a start by torchrun, accelerate launch, mpirun or srun with several processes.

    The first process raises the UserError. The others get False and are to end in silence and as
    if well: the launcher would stop the first one, before it has spoken, at the first failure.
    """
    def number(*names: str) -> int:
        texts = [os.environ.get(name, "").strip() for name in names]
        return max((int(text) for text in texts if text.isdigit()), default=0)
    count = number("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    rank = number("RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    if max(count, rank + 1) > 1 and not (count > 1 and rank):
        raise UserError("commands.several_processes", count=max(count, rank + 1))
    return not rank


def _finish(result: Mapping[str, Any], control: Control, options: argparse.Namespace) -> int:
    from core.cli import progress
    state, lines = result.get("state"), progress.summary(result)
    if state == "stopped":
        lines.append(tr("stopped", run=result["run"]) if "run" in result else tr("demo_stopped"))
    answer(options, {"ok": state not in ("stopped", "unproven"), **result}, lines)
    if control.stopping:
        return INTERRUPTED
    return FAILED if state == "unproven" else FINE


def overrides(pairs: Sequence[str]) -> dict[str, str]:
    """['epochs=5'] -> {'epochs': '5'}. Raises UserError for text without `=`."""
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError("commands.bad_set", given=pair)
        values[key.strip()] = value
    return values


# --- pictures and files ---

def generate_command(options: argparse.Namespace) -> int:
    from core.inference.draw import draw
    from core.jobs.events import Sample
    config = _draw_config(options)
    with console.job_terminal() as (terminal, control):
        def emit(event: Event) -> None:
            # a picture's path is the answer, given below
            if not isinstance(event, Sample):
                terminal(event)
        files = draw(config, emit, control)["files"]
    answer(options, {"ok": not control.stopping, "files": files, "seed": config.seed}, files)
    return INTERRUPTED if control.stopping else FINE


def _draw_config(options: argparse.Namespace) -> DrawConfig:
    from core.config.draw import of_options
    values = vars(options)
    return of_options(values | {"base": str(console.model_path(values.get("base") or "demo"))})


def lora_info_command(options: argparse.Namespace) -> int:
    from core.lora_files.files import describe
    from core.lora_files.formats import weights_file
    info = describe(weights_file(options.file))
    facts = asdict(info)
    # the metadata's facts, on the level of the others; the tensors know the family better
    rows = facts | {"size": f"{info.size / 2**20:.2f} MB"} | facts["facts"] | {
        "family": info.family, "tags": dict(info.facts.tags)}
    return answer(options, {"ok": True, **facts}, console.fact_lines(rows, "info"))


def lora_verify_command(options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.training.verify import verify
    with Terminal() as terminal:
        proof = verify(options.file, _draw_config(options) if options.base else None, terminal)
    answer(options, proof, console.fact_lines(proof, "proof"))
    return FINE if proof.get("ok", True) else FAILED


# --- runs ---

def runs_list_command(options: argparse.Namespace) -> int:
    from core.jobs import runs
    views = runs.list_runs()
    lines = [tr("run_line", id=view.id, state=tr(f"state_{view.state}"), step=view.step,
                total=view.total or "?", name=view.name) for view in views]
    return answer(options, {"ok": True, "runs": [_brief(view) for view in views]},
                  lines or [tr("no_runs")])


def runs_show_command(options: argparse.Namespace) -> int:
    from core.cli import progress
    from core.jobs import runs
    view = runs.load_run(_run_id(options.id))
    # before the lines: a damaged record may hold what can't be put into sentences
    if options.json:
        console.print_json({"ok": True, **asdict(view)})
        return FINE
    lines = console.fact_lines({
        **_brief(view), "state": tr(f"state_{view.state}"),
        "loss": "" if view.loss is None else f"{view.loss:.4f}", "folder": view.folder,
        "checkpoints": [point.path for point in view.checkpoints],
        "pictures": len(view.samples)}, "run")
    if view.plan and "memory" not in view.result:
        # the record of an older version, or a damaged one, may lack parts of a plan
        with contextlib.suppress(TypeError, ValueError, KeyError):
            lines.append(progress.planned(view.plan))
    # an empty line where there is no result yet
    lines.append("\n".join(progress.summary(view.result)))
    if view.fault:
        lines.append(i18n.tr(view.fault.code, view.fault.params))
    print("\n".join(lines))
    return FINE


def runs_resume_command(options: argparse.Namespace) -> int:
    from core.jobs import runs, worker
    from core.jobs.journal import CONFIG
    if not _is_first_process():
        return FINE
    view = runs.load_run(_run_id(options.id))
    if not view.over:
        raise UserError("jobs.still_running", id=view.id, state=view.state)
    config = worker.load_config(view.job, view.folder / CONFIG)
    if view.job == "train":
        config = config.with_changes(resume=runs.resume_of(view.folder, config.resume))
    # relative paths mean what they meant
    with contextlib.suppress(OSError):
        os.chdir(view.cwd)
    return console.run_job(view.job, config, view.name, options, _finish, resumed_from=view.id)


def runs_stop_command(options: argparse.Namespace) -> int:
    from core.jobs import runs
    run_id = _run_id(options.id)
    runs.ask(run_id, "stop")
    return answer(options, {"ok": True, "run": run_id}, [tr("stop_asked", id=run_id)])


def _run_id(text: str) -> str:
    """A run's id, from its unambiguous beginning or end, or from `last`."""
    from core.jobs import runs
    if text == "last" and (views := runs.list_runs()):
        return views[0].id
    fitting = [run_id for run_id in runs.run_ids()
               if run_id.startswith(text) or run_id.endswith(text)]
    return fitting[0] if len(fitting) == 1 else text


def _brief(view: Any) -> dict[str, Any]:
    return {key: getattr(view, key) for key in (
        "id", "name", "job", "state", "step", "total", "created", "output_dir")}


# --- doctor ---

def doctor_command(options: argparse.Namespace) -> int:
    from core.system import doctor
    findings = doctor.examine(console.model_path(options.base) if options.base else None)
    ill = any(finding.level == "error" for finding in findings)
    answer(options, {"ok": not ill, "findings": [doctor.as_dict(f) for f in findings]},
           (line for finding in findings for line in doctor.lines(finding)))
    return FAILED if ill else FINE
