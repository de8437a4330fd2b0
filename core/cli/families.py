"""`darkroom families [FILE]`: what can be trained on; what a file or folder is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from core import families, i18n
from core.cli.console import BAD_INPUT, FINE, add_command, print_json, tr


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "families", _families, answers=True,
                         line="families model.safetensors")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE",
                        help=tr("arg_families_file"))


def _families(options: argparse.Namespace) -> int:
    if options.file is not None:
        return _identify(options.file, options.json)
    listed = [{"id": name, "title": one.title, "size": one.native_size,
               "files": i18n.tr(f"families.files_{one.file}")}
              for name, one in families.SPECS.items()]
    if options.json:
        print_json({"ok": True, "families": listed})
        return FINE
    from core.cli.progress import table
    print("\n".join(table([(f"{one['id']}  ({one['title']}, {one['size']} px)",
                            str(one["files"])) for one in listed])))
    return FINE


def _identify(path: Path, as_json: bool) -> int:
    from core.families.detection import identify
    found = identify(path.expanduser())
    trains = found.family in families.SPECS
    if as_json:
        print_json({"ok": trains, "what": found.what, "family": found.family if trains else "",
                    "said": found.said(), "v_prediction": found.v_prediction,
                    "zero_snr": found.zero_snr})
    else:
        lines = [i18n.tr("families.told", {"path": path, "found": found.said()})]
        if trains:
            lines.append(i18n.tr("families.trains_as", {"family": found.family}))
        print("\n".join(lines))
    return FINE if trains else BAD_INPUT
