"""`darkroom config import FILE`: other trainers' settings as our YAML; what is lost, by line."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core import i18n
from core.cli.console import FINE, add_group, answer

tr = i18n.translator("config_import")


def add_commands(commands: Any) -> None:
    add = add_group(commands, "config", "config import preset.json")
    parser = add("import", import_command, "config import lora.toml --out style.yaml")
    parser.add_argument("file", type=Path, metavar="FILE", help=tr("arg_file"))
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help=tr("arg_out"))


def import_command(options: argparse.Namespace) -> int:
    from core import importers, paths
    imported = importers.read(options.file)
    out = (options.out or options.file.with_suffix(".yaml")).expanduser()
    out = paths.create(out, lambda path: path.write_text(importers.to_yaml(imported), "utf-8"))
    print("\n".join(importers.told(imported)), file=sys.stderr)
    answer(options, {"ok": True, "file": out, "kind": imported.kind, "values": imported.values,
                     "assumed": imported.assumed,
                     "left": [asdict(entry) for entry in imported.left]},
           [tr("written", file=out)])
    return FINE
