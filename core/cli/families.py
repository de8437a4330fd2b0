"""`darkroom families [FILE]`: what can be trained on; what a file or folder is."""

from __future__ import annotations

import argparse
from typing import Any

from core import families, i18n
from core.cli.console import BAD_INPUT, FINE, add_argument, add_command, answer, model_path


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "families", families_command, answers=True,
                         line="families model.safetensors")
    add_argument(parser, "file", "families_file", type=model_path, nargs="?", metavar="FILE")


def families_command(options: argparse.Namespace) -> int:
    if options.file is None:
        from core.cli.progress import table
        rows: list[dict[str, Any]] = [
            {"id": name, "title": spec.title, "size": spec.native_size,
             "files": i18n.tr(f"families.files_{spec.file}")}
            for name, spec in families.SPECS.items()]
        return answer(options, {"ok": True, "families": rows}, table([
            (f"{row['id']}  ({row['title']}, {row['size']} px)", row["files"]) for row in rows]))
    from core.families.detection import identify
    base = identify(options.file)
    trains = base.family in families.SPECS
    lines = [i18n.tr("families.told", {"path": options.file, "found": base.description()})]
    if trains:
        lines.append(i18n.tr("families.trains_as", {"family": base.family}))
    answer(options, {"ok": trains, "what": base.what, "family": base.family if trains else "",
                     "said": base.description(), "v_prediction": base.v_prediction,
                     "zero_snr": base.zero_snr}, lines)
    return FINE if trains else BAD_INPUT
