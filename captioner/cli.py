"""The captioner's commands for the launcher: caption and auto_label.

Modules that a command needs are imported when it runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import edit_cli
from captioner.edit_cli import add_argument, add_rules, change_line, rules_of_lines, tr
from core import paths
from core.cli import console
from core.cli.console import FINE, INTERRUPTED, add_command, answer
from core.errors import UserError

if TYPE_CHECKING:
    from captioner.config import CaptionConfig
    from core.jobs.control import Control

# --- parsers ----------------------------------------------------------------------------------

def add_commands(commands: Any) -> None:
    caption = add_command(commands, "caption", _caption, answers=True, says=tr,
                          line="caption photos --with blip --trigger m1a")
    add_argument(caption, "folder", type=Path, metavar="DIR")
    _add_captioning(caption)
    add_argument(caption, "--existing", choices=("keep", "add", "replace"))
    add_argument(caption, "--write-to", choices=("auto", "txt", "caption", "csv", "jsonl"))
    add_argument(caption, "--metadata", dest="metadata_path", metavar="FILE")
    add_argument(caption, "--dry-run", action="store_true", default=None)
    _add_label(add_command(commands, "auto_label", _auto_label, answers=True, says=tr,
                           line="auto_label --input photos --output photos/metadata.csv"))
    edit_cli.add_commands(commands)


def _add_captioning(parser: argparse.ArgumentParser) -> None:
    add_argument(parser, "--with", dest="captioner", metavar="NAME")
    add_argument(parser, "--model", action="append", default=[], dest="models",
                 metavar="[NAME=]MODEL")
    add_argument(parser, "--trigger", dest="trigger_word", metavar="WORD")
    add_argument(parser, "--only", action="append", default=[], metavar="GLOB")
    add_rules(parser)
    add_argument(parser, "--set", action="append", default=[], metavar="KEY=VALUE")


def _add_label(parser: argparse.ArgumentParser) -> None:
    add_argument(parser, "--input", "folder", type=Path, required=True, metavar="DIR")
    add_argument(parser, "--output", type=Path, required=True, metavar="FILE")
    add_argument(parser, "--overwrite", action="store_true")
    _add_captioning(parser)


def auto_label_main(argv: Sequence[str] | None = None) -> int:
    """The console script `auto_label`. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="auto_label", description=tr("help_auto_label"),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    console.add_common(parser, answers=True)
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
    return console.run_job("caption", config, Path(config.folder).name, options, _finish)


def _finish(result: Mapping[str, Any], control: Control, options: argparse.Namespace) -> int:
    counts = {key: result.get(key) or 0 for key in ("resumed", "kept", "copied", "flattened")}
    counts |= {key: len(result.get(key) or ()) for key in ("skipped", "left", "failed")}
    captioned, dry = result.get("captioned") or 0, result.get("dry_run")
    lines = [*(change_line(**change) for change in result.get("changes", ())),
             tr("summary_dry" if dry else "summary", done=captioned, total=result.get("total", 0),
                folder=result.get("folder", "")),
             *(tr(f"summary_{key}", count=count) for key, count in counts.items() if count)]
    if result["state"] == "stopped":
        lines.append(tr("stopped"))
    elif captioned and not dry:
        lines.append(tr("can_undo", folder=result["folder"]))
    answer(options, {"ok": result["state"] == "done", **result}, lines)
    return INTERRUPTED if control.stopping else FINE


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
    return str(paths.expanded(path).absolute())


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
