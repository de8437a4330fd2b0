"""Writes presets/<family>/*.yaml from what core.memory.advisor suggests for each size of card.

    python build/make_presets.py [FAMILY ...]

Run it when the advisor's tables or the plans change; tests/workspace/test_presets.py checks that
the files are up to date.
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
from core.units import gigabytes  # noqa: E402

PURPOSES = ("style", "character", "object")
RAM_GB = (2, 4, 8, 16, 32, 64)
SYSTEM_RAM_GB = 2.0                     # for the system and other programs
LEFT_OPEN = ("precision",)              # auto: it depends on the card's age


@dataclass(frozen=True, slots=True)
class Size:
    slug: str
    vram_gb: int                        # 0: CPU
    title: dict[str, str]
    # What the config gives up, instead of a search, which takes an hour with a large base.
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
    """The smallest machine for a preset of this size."""
    return (advisor.card_of(size.vram_gb) if size.vram_gb
            else Machine("cpu", "CPU", 4096, 3072, ram_mb=3072))


def made(family: str, only: str = "") -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, content) for each preset of a family, or for the one called `only`."""
    for size in FAMILIES[family]:
        for purpose in PURPOSES:
            name = f"{size.slug}-{purpose}"
            if only in ("", name):
                suggested = suggestion(family, size, purpose)
                if not suggested.fits or suggested.plan.verdict() != "fits" or (
                        not suggested.plan.ram):
                    raise SystemExit(f"{family} {name}: nothing fits")
                yield (paths.PRESETS / family / f"{name}.yaml",
                       content(family, size, purpose, suggested))


def suggestion(family: str, size: Size, purpose: str) -> Suggestion:
    base, machine = plan_inputs.base_of(family), machine_for(size)
    if not size.least:
        return advisor.suggest(machine, base, None, purpose,
                               plan_inputs.BatchPlanner(base, machine))
    shape = Shape.of(base, machine)
    shape = replace(shape, native=size.side or shape.native)
    planner = plan_inputs.BatchPlanner(base, machine)

    def planned(config: TrainConfig) -> Plan:
        by_dial = given_up(config, size.least)
        if any(difference < 0 for difference in by_dial):
            return pretended(machine, inf)
        return pretended(machine, 0.0) if any(by_dial) or config.max_resolution != (
            f"{shape.native},{shape.native}") else planner(config)
    return advisor.suggest(machine, base, None, purpose, planned, shape)


def given_up(config: TrainConfig, least: dict[str, Any]) -> list[float]:
    """For each option, 0 if it gives up as much as `least`, below if less, above if more."""
    target = TrainConfig.model_validate({"cache_batch_size": 1} | least)
    order, rank = Capabilities().base_precisions, advisor.PURPOSES["style"].rank
    return [target.batch_size - config.batch_size, config.offload - target.offload,
            config.gradient_checkpointing - target.gradient_checkpointing,
            order.index(config.base_precision) - order.index(target.base_precision),
            target.cache_batch_size - config.cache_batch_size,
            float(config.lora_rank < rank)]


def pretended(machine: Machine, mb: float) -> Plan:
    """A plan of a made-up size: too large or zero, so that the search ends at `least`, whose real
    plan is made then."""
    return Plan(machine, (Phase("train", {"denoiser": mb}),), {}, {}, {}, (0, 0), 0, 0)


def content(family: str, size: Size, purpose: str, suggested: Suggestion) -> dict[str, Any]:
    values = suggested.values

    def about(lang: str) -> str:
        more = "".join(text[lang].format(value=values[key]) for key, text in MORE.items()
                       if values[key] not in (False, 0.0, "same"))
        return ABOUT[lang].format(
            purpose=i18n.tr(f"presets.purpose_{purpose}", lang=lang),
            base=base_name(family, lang), side=relief.side_of(suggested.config(), 0),
            batch=values["batch_size"], times=values["gradient_accumulation_steps"],
            rank=values["lora_rank"], more=more,
            needs=gigabytes(suggested.plan.needs_mb))

    return {"title": size.title, "about": {lang: about(lang) for lang in i18n.LANGUAGES},
            "family": family, "purpose": purpose,
            "needs": {"vram_gb": size.vram_gb, "ram_gb": ram_gb(suggested.plan)},
            "set": {key: value for key, value in values.items() if key not in LEFT_OPEN}}


def ram_gb(planned_run: Plan) -> int:
    """The smallest usual size of RAM that holds the run beside the system."""
    needs = sum(planned_run.ram.values()) / 1024 + SYSTEM_RAM_GB
    return next(gb for gb in RAM_GB if gb >= needs)


def text_of(data: dict[str, Any]) -> str:
    return ("# Made by build/make_presets.py from what `darkroom suggest` finds.\n"
            + yaml.safe_dump(data, allow_unicode=True, sort_keys=False, width=96))


def traces_of(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The questions of a preset's plan (no versions in them) and their answers."""
    traces, ask = {}, plan.ask

    def recorded(what: str, base: Base, numbers: dict[str, str], **settings: Any
                 ) -> dict[str, float]:
        answer = ask(what, base, numbers, **settings)
        traces[trace_key(what, base, numbers, settings)] = answer
        return answer
    # All questions of a plan go through this function.
    plan.ask = recorded                 # type: ignore[assignment]
    try:
        planned(data)
    finally:
        plan.ask = ask
    return traces


def planned(data: dict[str, Any]) -> Plan:
    """A preset's plan on the smallest machine for it."""
    size = next(size for size in FAMILIES[data["family"]]
                if size.vram_gb == data["needs"]["vram_gb"])
    return plan.plan_run(TrainConfig.model_validate(data["set"]),
                         plan_inputs.base_of(data["family"]),
                         machine_for(size))


def trace_key(what: str, base: Base, numbers: dict[str, str], settings: dict[str, Any]) -> str:
    return json.dumps([what, base.digest, numbers, settings], sort_keys=True)


def main(names: list[str]) -> None:
    for family in names or FAMILIES:
        traces: dict[str, dict[str, float]] = {}
        for path, data in made(family):
            paths.write_atomic(path, text_of(data))
            traces |= traces_of(data)
            print(path.relative_to(ROOT), gigabytes(planned(data).needs_mb), flush=True)
        # After each family, as one takes minutes.
        others = json.loads(TRACES.read_text("utf-8")) if TRACES.exists() else {}
        paths.write_atomic(TRACES, json.dumps(others | {family: traces}, indent=0, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1:])
