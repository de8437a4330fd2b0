"""Writes presets/<family>/*.yaml from what core.memory.advisor suggests for each size of card.

    python build/make_presets.py [FAMILY ...]

Run it when the advisor's tables or the plans change; tests/workspace/test_presets.py holds the
files to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from core import families, i18n, paths  # noqa: E402
from core.config import TrainConfig  # noqa: E402
from core.families.detection import Base  # noqa: E402
from core.memory import advisor, plan, plan_inputs, relief  # noqa: E402
from core.memory.advisor import Shape, Suggestion  # noqa: E402
from core.memory.plan import Machine, Phase, Plan  # noqa: E402
from core.memory.relief import Capabilities  # noqa: E402

PURPOSES = ("style", "character", "object")
RAM_GB = (2, 4, 8, 16, 32, 64)
SYSTEM_RAM_GB = 2.0                     # of the system and what else is open
LEFT_OPEN = ("precision",)              # auto: it depends on the card's age


@dataclass(frozen=True, slots=True)
class Size:
    slug: str
    vram_gb: int                        # 0: CPU
    title: dict[str, str]
    # Given up, as config keys, in place of a search: over a large base's plans it takes an hour.
    least: dict[str, Any] = field(default_factory=dict)
    side: int = 0                       # px; 0: the base's own


def card(gb: int, side: int = 0, **least: Any) -> Size:
    kind = {8: ("8gb-laptop", " laptop", " 笔记本"), 12: ("12gb-desktop", " desktop", " 台式机"),
            24: ("24gb-workstation", " workstation", " 工作站")}.get(
                gb, (f"{gb}gb", "", " 显存"))
    small = (f"-{side}px", f", {side} px", f"，{side} 像素") if side else ("", "", "")
    return Size(kind[0] + small[0], gb, {"en": f"{gb}GB{kind[1]}{small[1]}",
                                         "zh-CN": f"{gb}GB{kind[2]}{small[2]}"}, least, side)


LEAN = {"gradient_checkpointing": True}
INT8, NF4 = LEAN | {"base_precision": "int8"}, LEAN | {"base_precision": "nf4"}
FAMILIES: dict[str, tuple[Size, ...]] = {
    "demo": (Size("cpu", 0, {"en": "CPU", "zh-CN": "仅 CPU"}),),
    "sd15": tuple(map(card, (4, 6, 8, 12, 16, 24))),
    "sd2": (card(8, **LEAN, batch_size=2),),
    "sdxl": (card(6, **NF4, batch_size=2), card(8, **INT8, batch_size=2),
             card(12, **LEAN, batch_size=4)),
    "sd3": (card(12, **LEAN, batch_size=2),),
    "flux": (card(8, 512, **NF4, batch_size=1, offload=0.5), card(12, 512, **NF4, batch_size=2)),
    "zimage": (card(12, **INT8, batch_size=1),)}

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
TRACES = ROOT / "tests" / "data" / "preset_traces.json"     # of the presets' own plans


def base_name(family: str, lang: str) -> str:
    title = families.SPECS[family].title if family in families.SPECS else ""
    return BASES.get(family, {"en": title, "zh-CN": f" {title} "})[lang]


def machine_for(size: Size) -> Machine:
    """The smallest machine that a preset of this size is for."""
    return (advisor.card_of(size.vram_gb) if size.vram_gb
            else Machine("cpu", "CPU", 4096, 3072, ram_mb=3072))


def made(family: str, only: str = "") -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files of a family, or the one called `only`, and what stands in each."""
    for size in FAMILIES[family]:
        for purpose in PURPOSES:
            name = f"{size.slug}-{purpose}"
            if only in ("", name):
                found = suggestion(family, size, purpose)
                if not found.fits or relief.verdict(found.plan) != "fits" or not found.plan.ram:
                    raise SystemExit(f"{family} {name}: nothing fits")
                yield (paths.PRESETS / family / f"{name}.yaml",
                       content(family, size, purpose, found))


def suggestion(family: str, size: Size, purpose: str) -> Suggestion:
    base, machine = plan_inputs.base_of(family), machine_for(size)
    if not size.least:
        return advisor.suggest(machine, base, None, purpose)
    shape = Shape.of(base, machine)
    shape = replace(shape, native=size.side or shape.native)
    planner = advisor.planner_of(base, machine)

    def planned(config: TrainConfig) -> Plan:
        by_dial = given_up(config, size.least)
        if any(one < 0 for one in by_dial):
            return pretended(machine, inf)
        return pretended(machine, 0.0) if any(by_dial) or config.max_resolution != (
            f"{shape.native},{shape.native}") else planner(config)
    return advisor.suggest(machine, base, None, purpose, planned, shape)


def given_up(config: TrainConfig, least: dict[str, Any]) -> list[float]:
    """By dial: 0: as much as was asked for, below: less, above: more."""
    wanted = TrainConfig.model_validate({"cache_batch_size": 1} | least)
    order, rank = Capabilities().base_precisions, advisor.PURPOSES["style"].rank
    return [wanted.batch_size - config.batch_size, config.offload - wanted.offload,
            config.gradient_checkpointing - wanted.gradient_checkpointing,
            order.index(config.base_precision) - order.index(wanted.base_precision),
            wanted.cache_batch_size - config.cache_batch_size,
            float(config.lora_rank < rank)]


def pretended(machine: Machine, mb: float) -> Plan:
    """Too big or nothing, so that the search ends where `least` says; it is planned then."""
    return Plan(machine, (Phase("train", {"denoiser": mb}),), {}, {}, {}, (0, 0), 0, 0)


def content(family: str, size: Size, purpose: str, found: Suggestion) -> dict[str, Any]:
    values = {key: value for key, value in found.values.items() if key not in LEFT_OPEN}
    return {"title": size.title,
            "about": {lang: _about(lang, family, purpose, found) for lang in i18n.LANGUAGES},
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
    side = relief.side_of(found.config(), 0)
    return ABOUT[lang].format(
        purpose=i18n.tr(f"presets.purpose_{purpose}", lang=lang), base=base_name(family, lang),
        side=side, batch=values["batch_size"], times=values["gradient_accumulation_steps"],
        rank=values["lora_rank"], more=more, needs=advisor.gigabytes(found.plan.needs_mb))


def text_of(data: dict[str, Any]) -> str:
    return ("# Made by build/make_presets.py from what `darkroom suggest` finds.\n"
            + yaml.safe_dump(data, allow_unicode=True, sort_keys=False, width=96))


def traces_of(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What a preset's plan asks for, with the answers; the keys name no version."""
    found, asked = {}, plan.ask

    def recorded(what: str, base: Base, numbers: dict[str, str], **settings: Any
                 ) -> dict[str, float]:
        answer = asked(what, base, numbers, **settings)
        found[trace_key(what, base, numbers, settings)] = answer
        return answer
    plan.ask = recorded                 # type: ignore[assignment]
    try:
        planned(data)
    finally:
        plan.ask = asked
    return found


def planned(data: dict[str, Any]) -> Plan:
    """A preset's plan on the smallest machine that it is for."""
    size = next(one for one in FAMILIES[data["family"]]
                if one.vram_gb == data["needs"]["vram_gb"])
    return plan.plan_run(TrainConfig.model_validate(data["set"]),
                         plan_inputs.base_of(data["family"]),
                         machine_for(size))


def trace_key(what: str, base: Base, numbers: dict[str, str], settings: dict[str, Any]) -> str:
    return json.dumps([what, base.digest, numbers, settings], sort_keys=True)


def main(wanted: list[str]) -> None:
    for family in wanted or FAMILIES:
        traces: dict[str, dict[str, float]] = {}
        for path, data in made(family):
            paths.write_atomic(path, text_of(data))
            traces |= traces_of(data)
            print(path.relative_to(ROOT), advisor.gigabytes(planned(data).needs_mb), flush=True)
        kept = json.loads(TRACES.read_text("utf-8")) if TRACES.exists() else {}
        paths.write_atomic(TRACES, json.dumps(kept | {family: traces}, indent=0, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1:])
