"""Writes presets/<family>/*.yaml from what core.advisor suggests for each size of card.

    python build/make_presets.py [FAMILY ...]

Run it when the advisor's tables or the plans change; tests/test_presets.py holds the files to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from core import advisor, ladder, paths, plan, weigh, words  # noqa: E402
from core.advisor import Suggestion  # noqa: E402
from core.plan import Machine  # noqa: E402

PURPOSES = ("style", "character", "object")
RAM_GB = (2, 4, 8, 16, 32, 64)
SYSTEM_RAM_GB = 2.0                     # of the system and what else is open
LEFT_OPEN = ("precision",)              # auto: it depends on the card's age


@dataclass(frozen=True, slots=True)
class Size:
    slug: str
    vram_gb: int                        # 0: CPU
    title: dict[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    base: str                           # for weigh.base_of
    sizes: tuple[Size, ...]


FAMILIES = {
    "demo": Family("demo", (
        Size("cpu", 0, {"en": "CPU", "zh-CN": "仅 CPU"}),)),
    "sd15": Family("sd15", (
        Size("4gb", 4, {"en": "4GB", "zh-CN": "4GB 显存"}),
        Size("6gb", 6, {"en": "6GB", "zh-CN": "6GB 显存"}),
        Size("8gb-laptop", 8, {"en": "8GB laptop", "zh-CN": "8GB 笔记本"}),
        Size("12gb-desktop", 12, {"en": "12GB desktop", "zh-CN": "12GB 台式机"}),
        Size("16gb", 16, {"en": "16GB", "zh-CN": "16GB 显存"}),
        Size("24gb-workstation", 24, {"en": "24GB workstation", "zh-CN": "24GB 工作站"})))}

ABOUT = {
    "en": "A LoRA of one {purpose} on {base}: {side} px, batch {batch} x {times}, "
          "rank {rank}{more}; needs {needs}.",
    "zh-CN": "在{base}上训练{purpose} LoRA：{side} 像素，批次 {batch} x {times}，秩 {rank}{more}；"
             "需要 {needs}。"}
MORE = {"base_precision": {"en": ", base in {value}", "zh-CN": "，底模 {value}"},
        "gradient_checkpointing": {"en": ", checkpointing", "zh-CN": "，梯度检查点"},
        "offload": {"en": ", {value:.0%} offloaded", "zh-CN": "，卸载 {value:.0%}"}}
BASES = {"demo": {"en": "the demo base", "zh-CN": "演示底模"},
         "sd15": {"en": "Stable Diffusion 1.5", "zh-CN": " Stable Diffusion 1.5 "}}


def machine_for(size: Size) -> Machine:
    """The smallest machine that a preset of this size is for."""
    return (advisor.card_of(size.vram_gb) if size.vram_gb
            else Machine("cpu", "CPU", 4096, 3072, ram_mb=3072))


def made(family: str, only: str = "") -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of a family, or the one called `only`, and what stands in each."""
    base = weigh.base_of(FAMILIES[family].base)
    for size in FAMILIES[family].sizes:
        for purpose in PURPOSES:
            name = f"{size.slug}-{purpose}"
            if only in ("", name):
                found = advisor.suggest(machine_for(size), base, None, purpose)
                if not found.fits:
                    raise SystemExit(f"{family} {name}: nothing fits")
                yield (paths.PRESETS / family / f"{name}.yaml",
                       content(family, size, purpose, found))


def content(family: str, size: Size, purpose: str, found: Suggestion) -> dict[str, Any]:
    values = {key: value for key, value in found.values.items() if key not in LEFT_OPEN}
    return {"title": size.title,
            "about": {lang: _about(lang, family, purpose, found) for lang in words.LANGUAGES},
            "family": family, "purpose": purpose,
            "needs": {"vram_gb": size.vram_gb, "ram_gb": ram_gb(found.plan)}, "set": values}


def ram_gb(found: plan.Plan) -> int:
    """The usual size of RAM that holds the run beside the system."""
    needs = sum(found.ram.values()) / 1024 + SYSTEM_RAM_GB
    return next(gb for gb in RAM_GB if gb >= needs)


def _about(lang: str, family: str, purpose: str, found: Suggestion) -> str:
    values = found.values
    more = "".join(text[lang].format(value=values[key]) for key, text in MORE.items()
                   if values[key] not in (False, 0.0, "same"))
    side = ladder.side_of(found.config(), 0)
    return ABOUT[lang].format(
        purpose=words.say(f"presets.purpose_{purpose}", lang=lang), base=BASES[family][lang],
        side=side, batch=values["batch_size"], times=values["gradient_accumulation_steps"],
        rank=values["lora_rank"], more=more, needs=advisor.gigabytes(found.plan.needs_mb))


def text_of(data: dict[str, Any]) -> str:
    return ("# Made by build/make_presets.py from what `darkroom suggest` finds.\n"
            + yaml.safe_dump(data, allow_unicode=True, sort_keys=False, width=96))


def main(families: list[str]) -> None:
    for family in families or FAMILIES:
        for path, data in made(family):
            paths.write_atomic(path, text_of(data))
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
