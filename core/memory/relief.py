"""What a run can give up to fit into memory, in which order, and the search for the gentlest way.

A knob is one thing to give up, option by option; knobs are ordered from the gentlest sacrifice to
the harshest. The answer is the lexicographically gentlest setting that fits, harshest knob first:
a card with more memory fits all that a smaller one fits, so its answer is never worse. Without
torch, since the window asks as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt
from typing import Any

from core.config import TrainConfig, size_of
from core.memory.plan import Machine, Plan, numbers_of

Planner = Callable[[TrainConfig], Plan]
Changes = Mapping[str, Any]

# The orders in which memory is given up: every part of the program that answers "memory ran out"
# asks here (core/jobs/worker.py and core/dataset stand below this floor and follow BEFORE_A_RUN).
BEFORE_A_RUN = ("cache", "batch", "checkpointing", "previews", "precision", "optimizer", "base",
                "offload", "rank", "resolution")
# A running job gives up only what leaves its updates the same ...
WHILE_RUNNING = ("batch", "checkpointing", "offload")
# ... and asks the user for what changes the LoRA.
ASK_FIRST = ("base", "resolution")
# Advice after a failure. At the start nothing has grown yet: the plan itself is too big. Later on a
# preview, a larger bucket or another program took the rest.
AFTER_FAILURE = {
    "oom_start": ("cache", "batch", "checkpointing", "precision", "optimizer", "base", "offload",
                  "resolution", "rank"),
    "oom_run": ("batch", "previews", "checkpointing", "precision", "resolution", "optimizer",
                "base", "offload", "rank")}

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
    """One thing to give up. The first of its options is the setting as it is."""

    name: str
    options: tuple[Changes, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting and its plan."""

    config: TrainConfig
    plan: Plan
    chosen: Mapping[str, int]                   # option by knob; 0: nothing given up
    without: Mapping[str, Plan]                 # by knob turned: the least without its last step


# --- the machine ---

def capabilities(machine: Machine, weights_mb: float = 0.0, family: str = "") -> Capabilities:
    """What can be given up on this machine. `weights_mb` is the size of the base in memory.

    int8 comes before nf4 and fp8 isn't offered: int8 with a scale a row misses a weight by about
    1 % of its row's deviation, fp8 (e4m3, 3 bits of mantissa) by about 2.6 % of the weight itself,
    in the same 8 bits; nf4 by about 10 %, in half of them.
    """
    # Some families outgrow fp16: on cards without bf16 they compute in fp32, and no 16-bit numbers
    # are left to lower them to.
    usual, other = (numbers_of("auto", machine, name)["compute"] for name in (family, ""))
    half = other if usual == other != "fp32" else "bf16" if other == "fp32" else ""
    offloads: tuple[float, ...] = ()
    if machine.kind == "cuda":
        # Half of the free RAM at most: the other half stays with the system and its programs.
        most = machine.ram_mb / 2 if machine.ram_mb else float("inf")
        offloads = tuple(share for share in OFFLOADS if share * weights_mb <= most)
    eight = machine.kind == "cuda" and find_spec("bitsandbytes") is not None
    return Capabilities(half, usual == "fp32", ("adamw", "adamw8bit") if eight else ("adamw",),
                        offloads=offloads)


# --- the knobs ---

def knobs(config: TrainConfig, can: Capabilities, native: int, step: int,
          sides: Sequence[float] = HONEST_SIDES) -> tuple[Knob, ...]:
    """The knobs of a config, from the gentlest to the harshest (BEFORE_A_RUN). `native` and `step`
    are px of the base; `sides` are the shares of the side that pictures may shrink to.

    The text encoder is never among them: its output is cached in any case."""
    # The same pictures an update, in smaller parts: 6 x 1 -> 3 x 2, 2 x 3, 1 x 6.
    batch, times = config.batch_size, config.gradient_accumulation_steps
    batches = [{"batch_size": n, "gradient_accumulation_steps": times * batch // n}
               for n in range(batch - 1, 0, -1) if batch % n == 0]

    rank = max(LEAST_RANK, config.lora_rank // 2)
    width, height = size_of(config.max_resolution) or (native, native)
    sizes = [tuple(max(step, int(side * share) // step * step) for side in (width, height))
             for share in sides]
    # Two shares may round to the same size.
    smaller = dict.fromkeys(size for size in sizes if size[0] * size[1] < width * height)

    is_fp32 = config.precision == "fp32" or (can.full and config.precision == "auto")
    options: dict[str, Sequence[Changes]] = {
        "cache": [{"cache_batch_size": 1}] if config.cache_batch_size > 1 else [],
        "batch": batches,
        "checkpointing": [] if config.gradient_checkpointing
        else [{"gradient_checkpointing": True}],
        "previews": [{"sample_prompts": [], "sample_every": 0}] if config.sample_prompts else [],
        "precision": [{"precision": can.half}] if can.half and is_fp32 else [],
        "optimizer": [{"optimizer": name} for name in _after(can.optimizers, config.optimizer)],
        "base": [{"base_precision": name}
                 for name in _after(can.base_precisions, config.base_precision)],
        "offload": [{"offload": share} for share in can.offloads if share > config.offload],
        "rank": [with_rank(config, rank)] if rank < config.lora_rank else [],
        "resolution": [{"max_resolution": f"{wide},{high}"} for wide, high in smaller]}
    return tuple(Knob(name, ({}, *options[name])) for name in BEFORE_A_RUN)


def with_rank(config: TrainConfig, rank: int) -> dict[str, Any]:
    """Another rank with the same alpha / rank, so that the learning rate stays right."""
    alpha = {} if config.lora_alpha is None else {
        "lora_alpha": config.lora_alpha * rank / config.lora_rank}
    return {"lora_rank": rank, **alpha}


def config_changes(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """The keys of `after` that differ from `before`."""
    old = before.model_dump()
    return {key: value for key, value in after.model_dump().items() if value != old[key]}


def _after(names: Sequence[str], name: str) -> Sequence[str]:
    return names[names.index(name) + 1:] if name in names else ()


def side_of(config: TrainConfig, native: int) -> int:
    """px of the square of the config's area."""
    width, height = size_of(config.max_resolution) or (native, native)
    return isqrt(width * height)


# --- the search ---

def search(config: TrainConfig, knobs: Sequence[Knob], planner: Planner,
           fit: Callable[[Plan], bool] = lambda plan: plan.fits) -> Setting | None:
    """The gentlest setting that fits, in a dozen plans at most; None where nothing does.

    Exact where giving up more never needs more memory; whatever the planner, the answer has been
    planned and fits, and a machine on which more fits gets no worse one.
    """
    tries = _Tries(config, knobs, planner)
    most = tuple(len(knob.options) - 1 for knob in knobs)
    for failed, at in enumerate(_harsher(most)):
        if fit(tries.plan(at)):
            break
        # Planning takes seconds: before going on it is asked whether there is any hope.
        if failed == HOPE and not fit(tries.plan(most)):
            return None
    else:
        return None
    # That was too much, knob by knob: the harshest is taken back first, as far as it goes.
    for place in reversed(range(len(knobs))):
        while at[place] and fit(tries.plan(
                easier := (*at[:place], at[place] - 1, *at[place + 1:]))):
            at = easier
    turned = [place for place, option in enumerate(at) if option]
    without = {knobs[i].name: tries.plan((*most[:i], at[i] - 1, *at[i + 1:])) for i in turned}
    return tries.setting(at, without)


def smallest(config: TrainConfig, knobs: Sequence[Knob], planner: Planner) -> Setting:
    """The setting with everything given up."""
    return _Tries(config, knobs, planner).setting(
        tuple(len(knob.options) - 1 for knob in knobs), {})


def _harsher(most: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Ever harsher settings, knob by knob, with the gentler ones at their end; a knob of many
    options goes to its end at once."""
    yield (0,) * len(most)
    for place, last in enumerate(most):
        for option in range(1 if last <= 2 else last, last + 1):
            yield (*most[:place], option, *(0,) * (len(most) - place - 1))


class _Tries:
    """Plans by the options taken, each made once."""

    def __init__(self, config: TrainConfig, knobs: Sequence[Knob], planner: Planner) -> None:
        self.start, self.knobs, self.planner = config, knobs, planner
        self.plans: dict[tuple[int, ...], Plan] = {}

    def config(self, at: Sequence[int]) -> TrainConfig:
        changes: dict[str, Any] = {}
        for knob, option in zip(self.knobs, at, strict=True):
            changes |= knob.options[option]
        return self.start.with_changes(**changes) if changes else self.start

    def plan(self, at: tuple[int, ...]) -> Plan:
        if at not in self.plans:
            self.plans[at] = self.planner(self.config(at))
        return self.plans[at]

    def setting(self, at: tuple[int, ...], without: Mapping[str, Plan]) -> Setting:
        return Setting(self.config(at), self.plan(at),
                     {knob.name: option for knob, option in zip(self.knobs, at, strict=True)},
                     without)
