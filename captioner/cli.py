"""The captioner's commands for the launcher: caption and auto_label.

Modules that a command needs are imported when it runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import edit_cli
from captioner.edit_cli import add_common, add_rules, change_line, command, rules_of_lines, tr
from core import i18n
from core.cli import console
from core.cli.console import FAILED, FINE, INTERRUPTED, print_json, stop_on_ctrl_c
from core.errors import UserError

if TYPE_CHECKING:
    from captioner.config import CaptionConfig
    from core.cli.progress import Terminal
    from core.jobs.events import Event

# --- parsers ----------------------------------------------------------------------------------

def add_commands(commands: Any) -> None:
    caption = command(commands, "caption", _caption, "caption photos --with blip --trigger m1a")
    caption.add_argument("folder", type=Path, metavar="DIR", help=tr("arg_folder"))
    _add_captioning(caption)
    caption.add_argument("--existing", choices=("keep", "add", "replace"),
                         help=tr("arg_existing"))
    caption.add_argument("--write-to", choices=("auto", "txt", "caption", "csv", "jsonl"),
                         help=tr("arg_write_to"))
    caption.add_argument("--metadata", dest="metadata_path", metavar="FILE",
                         help=tr("arg_metadata"))
    caption.add_argument("--dry-run", action="store_true", default=None, help=tr("arg_dry_run"))
    _add_label(command(commands, "auto_label", _auto_label,
                       "auto_label --input photos --output photos/metadata.csv"))
    edit_cli.add_commands(commands)


def _add_captioning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--with", dest="captioner", metavar="NAME", help=tr("arg_with"))
    parser.add_argument("--model", action="append", default=[], dest="models",
                        metavar="[NAME=]MODEL", help=tr("arg_model"))
    parser.add_argument("--trigger", dest="trigger_word", metavar="WORD", help=tr("arg_trigger"))
    parser.add_argument("--only", action="append", default=[], metavar="GLOB",
                        help=tr("arg_only"))
    add_rules(parser)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help=tr("arg_set"))


def _add_label(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR",
                        help=tr("arg_folder"))
    parser.add_argument("--output", type=Path, required=True, metavar="FILE",
                        help=tr("arg_output"))
    parser.add_argument("--overwrite", action="store_true", help=tr("arg_overwrite"))
    _add_captioning(parser)


def auto_label_main(argv: Sequence[str] | None = None) -> int:
    """The console script `auto_label`. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="auto_label", description=tr("help_auto_label"),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, answers=True)
    _add_label(parser)
    return console.guarded(lambda: _auto_label(parser.parse_args(arguments)), arguments)


# --- captioning -------------------------------------------------------------------------------

def _caption(options: argparse.Namespace) -> int:
    metadata = options.metadata_path
    return _job(options, options.folder, existing=options.existing, write_to=options.write_to,
                metadata_path=metadata and _absolute(Path(metadata)), dry_run=options.dry_run)


def _auto_label(options: argparse.Namespace) -> int:
    """Writes a table of filename and prompt (UTF-8, with a header), which all known trainers
    read. Existing rows stay, unless --overwrite."""
    if options.output.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError("captions.table_suffix", file=options.output)
    return _job(options, options.input, metadata_path=_absolute(options.output),
                existing="replace" if options.overwrite else "keep")


def _job(options: argparse.Namespace, folder: Path, **more: Any) -> int:
    config = _config(options, folder, more)
    from core.config import dump_yaml
    from core.jobs import runs, worker
    from core.jobs.control import Control
    run = runs.create_run("caption", dump_yaml(config), Path(config.folder).name, queued=False)
    control = Control()
    with _listener() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        # In this process: the terminal shows each caption.
        end = worker.run_job("caption", config, run, control, terminal)
    result = {"run": run.name, "state": end.state, **end.result}
    if end.state != "failed":
        if options.json:
            print_json({"ok": end.state == "done", **result})
        else:
            _print_result(result)
        return INTERRUPTED if control.stopping else FINE
    fault = terminal.fault
    if fault and console.debugging(options):
        print(fault.details, file=sys.stderr)
    sentence = i18n.tr(fault.code, fault.params) if fault else ""
    print(sentence, file=sys.stderr)
    if options.json:
        print_json({"ok": False, **result, "fault": fault and fault.code, "message": sentence})
    # Bad input shows before the first caption.
    crashed = fault is None or fault.code.startswith("jobs.")
    return FAILED if terminal.stepped or crashed else console.BAD_INPUT


def _listener() -> Terminal:
    from core.cli.progress import Terminal
    from core.jobs.events import Captioned

    class Listener(Terminal):
        def __call__(self, event: Event) -> None:
            if isinstance(event, Captioned):
                # From here on an error is no bad input.
                self.stepped = True
                self.screen.write_line(f"{Path(event.path).name}  {event.caption}")
            super().__call__(event)

    return Listener()


def _config(options: argparse.Namespace, folder: Path, more: dict[str, Any]) -> CaptionConfig:
    """The job's config: --set first, then the arguments that have names of their own."""
    from captioner.captions.rule_parser import parse
    from captioner.job import checked
    from core.cli.commands import overrides
    from core.config.flat_yaml import read_flat_yaml
    values: dict[str, Any] = {"folder": _absolute(folder)}
    for key, text in overrides(options.set).items():
        values[key] = read_flat_yaml(f"value: {text}", "--set")[0].get("value", "")
    arguments = {"captioner": options.captioner, "trigger_word": options.trigger_word, **more}
    values |= {key: value for key, value in arguments.items() if value}
    if options.rule:
        values["rules"] = [*values.get("rules", []), *rules_of_lines(options.rule)]
    # Globs and model names can only be resolved with the rest of the config.
    config = checked(values, "--set", {})
    # A wrong rule is reported before a run is made of it.
    parse(config.rules)
    models = dict(config.models) | _models(options.models, config.captioner)
    only = config.only
    if options.only:
        from captioner.captions.store import Store
        from captioner.captions.text import matches
        names = Store(Path(config.folder)).entries
        only = [name for name in names if any(matches(name, glob) for glob in options.only)]
        if not only:
            raise UserError("captions.no_match", given=", ".join(options.only),
                            folder=config.folder, count=len(names))
    return checked(config.model_dump() | {"models": models, "only": only}, "--set", {})


def _absolute(path: Path) -> str:
    return str(path.expanduser().absolute())


def _models(arguments: Sequence[str], captioner: str) -> dict[str, str]:
    """`blip=NAME`, or NAME alone where there is one captioner -> {"blip": NAME}"""
    names = captioner.split("+")
    models = {}
    for text in arguments:
        name, equals, model = text.partition("=")
        if not equals and len(names) == 1:
            name, model = names[0], text
        if name not in names or not model:
            raise UserError("captions.model_of", given=text, names=", ".join(names))
        models[name] = model
    return models


def _print_result(result: dict[str, Any]) -> None:
    counts = {key: result.get(key) or 0 for key in (
        "captioned", "resumed", "kept", "copied", "flattened")}
    counts |= {key: len(result.get(key) or ()) for key in ("skipped", "left")}
    for change in result.get("changes", ()):
        print(change_line(change["path"], change["before"], change["after"]))
    dry = result.get("dry_run")
    print(tr("summary_dry" if dry else "summary", done=counts["captioned"],
             total=result.get("total", 0), folder=result.get("folder", "")))
    for key in ("resumed", "kept", "copied", "flattened", "skipped", "left"):
        if counts[key]:
            print(tr(f"summary_{key}", count=counts[key]))
    if result["state"] == "stopped":
        print(tr("stopped"))
    elif counts["captioned"] and not dry:
        print(tr("can_undo", folder=result["folder"]))
