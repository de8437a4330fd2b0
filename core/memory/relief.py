"""What a run can give up so that it fits, and the gentlest way to do so. Without torch.

A dial is one thing to give up, option by option; dials stand from the gentlest sacrifice to the
harshest. The answer is the lexicographically gentlest setting that fits, harshest dial first: a
card with more memory fits all that a smaller one fits, so its answer is never worse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt
from typing import Any

from core.config import TrainConfig, size_of
from core.memory.plan import MARGIN, Machine, Plan, Verdict, numbers_of

Planner = Callable[[TrainConfig], Plan]
Changes = Mapping[str, Any]

GROWTH, MOST_GROWTH_MB = 0.25, 512.0    # what other programs may take on top of what they hold
LEAST_RANK = 4
OFFLOADS = (0.25, 0.5, 0.75, 1.0)       # shares of the base that wait in RAM
HONEST_SIDES = (7 / 8, 3 / 4)           # of the native side; 3/4: 56 % of the area
HOPE = 5                                # failures before it is asked whether anything can fit
POOR_SIDES = (5 / 8, 1 / 2)             # less than half the area: named, never called a fit


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the engine can do on a machine to save memory."""

    half: str = "bf16"                          # 16-bit numbers of this machine; empty: none fit
    full: bool = False                          # whether `precision: auto` means fp32 there
    optimizers: tuple[str, ...] = ("adamw",)
    base_precisions: tuple[str, ...] = ("same", "int8", "nf4")      # the gentlest first
    offloads: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Knob:
    name: str
    options: tuple[Changes, ...]                # the first is the setting as it is


@dataclass(frozen=True, slots=True)
class Found:
    config: TrainConfig
    plan: Plan
    chosen: Mapping[str, int]                   # by dial; 0: nothing given up
    without: Mapping[str, Plan]                 # by dial given up: the least without this step


# --- the machine ---

def capabilities(machine: Machine, weights_mb: float = 0.0, family: str = "") -> Capabilities:
    """`weights_mb`: of the base as it lies in memory; of what waits in RAM at most half the free
    RAM is taken.

    int8 stands before nf4 and fp8 isn't offered: int8 with a scale a row misses a weight by about
    1 % of its row's deviation, fp8 (e4m3, 3 bits of mantissa) by about 2.6 % of the weight itself,
    in the same 8 bits; nf4 by about 10 %, in half of them.
    """
    usual, other = (numbers_of("auto", machine, one)["compute"]
                    for one in (family, ""))
    half = other if usual == other != "fp32" else "bf16" if other == "fp32" else ""
    offloads: tuple[float, ...] = ()
    if machine.kind == "cuda":
        most = machine.ram_mb / 2 if machine.ram_mb else float("inf")
        offloads = tuple(share for share in OFFLOADS if share * weights_mb <= most)
    eight = machine.kind == "cuda" and _has("bitsandbytes")
    return Capabilities(half=half, full=usual == "fp32",
                        optimizers=("adamw", "adamw8bit") if eight else ("adamw",),
                        offloads=offloads)


@functools.cache
def _has(package: str) -> bool:
    return find_spec(package) is not None


def room(machine: Machine) -> float:
    """MiB that a run may count on: free, less what other programs may yet take (a desktop, a
    browser). On a card that draws no screen next to nothing is held, and little is kept back."""
    others = max(0.0, machine.total_mb - machine.free_mb)
    return max(0.0, machine.free_mb - min(GROWTH * others, MOST_GROWTH_MB))


def verdict(plan: Plan) -> Verdict:
    """tight: it fits now, and another program's next window may end that."""
    if plan.needs_mb > plan.machine.free_mb:
        return "too_big"
    return "fits" if plan.needs_mb <= room(plan.machine) * (1 - MARGIN) else "tight"


def fits(plan: Plan) -> bool:
    return verdict(plan) == "fits"


# --- the dials ---

def dials(config: TrainConfig, can: Capabilities, native: int, step: int,
          sides: Sequence[float] = HONEST_SIDES) -> tuple[Knob, ...]:
    """From the gentlest to the harshest: caching in smaller batches, accumulation for batch,
    checkpointing, previews, 16 bits, 8-bit optimizer, quantised base, offload, rank, resolution.
    The text encoder is never among them: its output is cached in any case."""
    return tuple(Knob(name, ({}, *options)) for name, options in (
        ("cache", [{"cache_batch_size": 1}] if config.cache_batch_size > 1 else []),
        ("batch", _batches(config)),
        ("checkpointing", [] if config.gradient_checkpointing
         else [{"gradient_checkpointing": True}]),
        ("previews", [{"sample_prompts": [], "sample_every": 0}] if config.sample_prompts else []),
        ("precision", [{"precision": can.half}] if can.half and (config.precision == "fp32" or (
            can.full and config.precision == "auto")) else []),
        ("optimizer", [{"optimizer": name} for name in _after(can.optimizers, config.optimizer)]),
        ("base", [{"base_precision": name}
                  for name in _after(can.base_precisions, config.base_precision)]),
        ("offload", [{"offload": share} for share in can.offloads if share > config.offload]),
        ("rank", _ranks(config)),
        ("resolution", _areas(config, native, step, sides))))


def _batches(config: TrainConfig) -> list[Changes]:
    """The same pictures an update in smaller parts: 6 x 1 -> 3 x 2, 2 x 3, 1 x 6."""
    batch, times = config.batch_size, config.gradient_accumulation_steps
    return [{"batch_size": n, "gradient_accumulation_steps": times * batch // n}
            for n in range(batch - 1, 0, -1) if batch % n == 0]


def _ranks(config: TrainConfig) -> list[Changes]:
    lower = max(LEAST_RANK, config.lora_rank // 2)
    if lower >= config.lora_rank:
        return []
    kept = {} if config.lora_alpha is None else {
        "lora_alpha": config.lora_alpha * lower / config.lora_rank}
    return [{"lora_rank": lower, **kept}]


def _areas(config: TrainConfig, native: int, step: int, shares: Sequence[float]) -> list[Changes]:
    width, height = size_of(config.max_resolution) or (native, native)
    sizes = [tuple(max(step, int(side * share) // step * step) for side in (width, height))
             for share in shares]
    smaller = dict.fromkeys(size for size in sizes if size[0] * size[1] < width * height)
    return [{"max_resolution": f"{wide},{high}"} for wide, high in smaller]


def _after(names: Sequence[str], name: str) -> Sequence[str]:
    return names[names.index(name) + 1:] if name in names else ()


def side_of(config: TrainConfig, native: int) -> int:
    """px of the square of the config's area."""
    width, height = size_of(config.max_resolution) or (native, native)
    return isqrt(width * height)


# --- the search ---

def search(config: TrainConfig, dials: Sequence[Knob], planner: Planner,
           fit: Callable[[Plan], bool] = fits) -> Found | None:
    """The gentlest setting that fits, in a dozen plans at most; None where nothing does.

    Exact where giving up more never needs more memory; whatever the planner, the answer has been
    planned and fits, and a machine on which more fits gets no worse one.
    """
    tries = _Tries(config, dials, planner)
    most = tuple(len(knob.options) - 1 for knob in dials)
    for failed, at in enumerate(_harsher(most)):
        if fit(tries.plan(at)):
            break
        if failed == HOPE and not fit(tries.plan(most)):
            return None
    else:
        return None
    for place in reversed(range(len(dials))):           # the harshest is taken back first
        while at[place] and fit(tries.plan(
                easier := (*at[:place], at[place] - 1, *at[place + 1:]))):
            at = easier
    given_up = [place for place, option in enumerate(at) if option]
    without = {dials[i].name: tries.plan((*most[:i], at[i] - 1, *at[i + 1:])) for i in given_up}
    return Found(tries.config(at), tries.plan(at),
                 {knob.name: option for knob, option in zip(dials, at, strict=True)}, without)


def _harsher(most: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Dial by dial, the gentler ones at their end; a dial of many options goes there at once."""
    yield (0,) * len(most)
    for place, last in enumerate(most):
        for option in range(1 if last <= 2 else last, last + 1):
            if option:
                yield (*most[:place], option, *(0,) * (len(most) - place - 1))


def smallest(config: TrainConfig, dials: Sequence[Knob], planner: Planner) -> Found:
    """With everything given up."""
    tries, most = _Tries(config, dials, planner), tuple(len(knob.options) - 1 for knob in dials)
    return Found(tries.config(most), tries.plan(most),
                 {knob.name: option for knob, option in zip(dials, most, strict=True)}, {})


class _Tries:
    """Plans by the options taken, each made once."""

    def __init__(self, config: TrainConfig, dials: Sequence[Knob], planner: Planner) -> None:
        self.start, self.dials, self.planner = config, dials, planner
        self.plans: dict[tuple[int, ...], Plan] = {}

    def config(self, at: Sequence[int]) -> TrainConfig:
        changes: dict[str, Any] = {}
        for knob, option in zip(self.dials, at, strict=True):
            changes |= knob.options[option]
        return self.start.with_changes(**changes) if changes else self.start

    def plan(self, at: tuple[int, ...]) -> Plan:
        if at not in self.plans:
            self.plans[at] = self.planner(self.config(at))
        return self.plans[at]
