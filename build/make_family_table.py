"""Writes the table of families, with planned sizes, into README.md and README.zh-CN.md.

    python build/make_family_table.py [FAMILY ...]

Renews all rows, or those of some families. GB: the whole card during a run at the base's own size,
batch 1, rank 16 on attention, gradient checkpointing, on a 12 GB card.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from core import families, paths  # noqa: E402
from core.config import TrainConfig  # noqa: E402
from core.memory import advisor, plan, plan_inputs  # noqa: E402

READMES = {"en": ROOT / "README.md", "zh-CN": ROOT / "README.zh-CN.md"}
MARKS = "<!-- families: build/make_family_table.py -->", "<!-- /families -->"
PRECISIONS = ("same", "int8", "nf4")
HEAD = {"en": ("Family", "16 bits", "int8", "nf4"), "zh-CN": ("系列", "16 位", "int8", "nf4")}


def gigabytes(family: str, base_precision: str) -> str:
    config = TrainConfig.model_validate({
        "base_precision": base_precision, "gradient_checkpointing": True, "lora_rank": 16,
        "cache_batch_size": 1, "precision": "bf16"})
    needs = plan.plan_run(config, plan_inputs.base_of(family), advisor.card_of(12)).needs_mb
    return f"{needs / 1024:.1f}"


def row(family: str, sizes: list[str]) -> str:
    listed = families.SPECS[family]
    return f"| {listed.title} (`{family}`, {listed.native_size} px) | {' | '.join(sizes)} |"


def known(path: Path) -> dict[str, list[str]]:
    """The table's GB by family."""
    rows = re.findall(r"^\| .*\(`(\w+)`, .*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
                       path.read_text("utf-8"), re.MULTILINE)
    return {family: sizes for family, *sizes in rows}


def write(sizes: dict[str, list[str]]) -> None:
    for lang, path in READMES.items():
        table = "\n".join([f"| {' | '.join(HEAD[lang])} |", "|---" * len(HEAD[lang]) + "|",
                           *(row(family, sizes[family]) for family in families.SPECS
                             if family in sizes)])
        text, (begin, end) = path.read_text("utf-8"), MARKS
        paths.write_atomic(path, f"{text.split(begin)[0]}{begin}\n{table}\n{end}"
                                 f"{text.split(end)[1]}")


def main(names: list[str]) -> None:
    sizes = known(READMES["en"])
    for family in names or families.SPECS:
        sizes[family] = [gigabytes(family, precision) for precision in PRECISIONS]
        print(family, *sizes[family], flush=True)
        # After each family, as a large base takes minutes.
        write(sizes)


if __name__ == "__main__":
    main(sys.argv[1:])
