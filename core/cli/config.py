"""`darkroom config import FILE`: other trainers' settings as our YAML; what is lost, by line."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core import i18n
from core.cli.console import FINE, add_command, print_json


def add_commands(commands: Any) -> None:
    config = add_command(commands, "config", line="config import preset.json")
    inner = config.add_subparsers(dest="action", metavar="ACTION", required=True)
    take = add_command(inner, "import", _import, key="config_import", answers=True,
                       line="config import lora.toml --out style.yaml")
    take.add_argument("file", type=Path, metavar="FILE", help=_tr("arg_file"))
    take.add_argument("--out", type=Path, default=None, metavar="FILE", help=_tr("arg_out"))


def _import(options: argparse.Namespace) -> int:
    from core import importers, paths
    imported = importers.read(options.file)
    wanted = (options.out or options.file.with_suffix(".yaml")).expanduser()
    out = paths.create(wanted, lambda path: path.write_text(importers.to_yaml(imported), "utf-8"))
    print("\n".join(importers.told(imported)), file=sys.stderr)
    if options.json:
        print_json({"ok": True, "file": out, "kind": imported.kind, "values": imported.values,
                    "assumed": imported.assumed, "left": [asdict(one) for one in imported.left]})
    else:
        print(_tr("written", file=out))
    return FINE


def _tr(key: str, **params: Any) -> str:
    return i18n.tr(f"config_import.{key}", params)
