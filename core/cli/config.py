"""`darkroom config import FILE`: other trainers' settings as our YAML; what is lost, by line."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core import i18n
from core.cli.console import add_group, answer, argument_adder

tr = i18n.translator("config_import")
add_argument = argument_adder(tr)


def add_commands(commands: Any) -> None:
    add = add_group(commands, "config", "config import preset.json")
    parser = add("import", import_command, "config import lora.toml --out style.yaml")
    add_argument(parser, "file", type=Path, metavar="FILE")
    add_argument(parser, "--out", type=Path, metavar="FILE")


def import_command(options: argparse.Namespace) -> int:
    from core import importers, paths
    imported = importers.read(options.file)
    out = paths.expanded(options.out or options.file.with_suffix(".yaml"))
    out = paths.create(out, lambda path: path.write_text(importers.to_yaml(imported), "utf-8"))
    print("\n".join(importers.report_lines(imported)), file=sys.stderr)
    facts = {"ok": True, "file": out, "kind": imported.kind, "values": imported.values,
             "assumed": imported.assumed, "left": [asdict(entry) for entry in imported.left]}
    return answer(options, facts, [tr("written", file=out)])
