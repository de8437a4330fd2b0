"""Suggests what to train with: from card, base, pictures and purpose to values that fit, each with
its reason.

Pure functions: memory is the planner's (core.memory.plan), the rest is in the tables below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, sqrt
from typing import Any

from core import i18n
from core.config import TrainConfig
from core.errors import UserError
from core.families.detection import Base
from core.memory import plan, relief
from core.memory.plan import Data, Machine, Plan
from core.memory.relief import Planner
from core.system.machine import MB
from core.units import gigabytes


@dataclass(frozen=True, slots=True)
class Purpose:
    """What one would train a LoRA of this kind with."""

    few_rank: int                       # with fewer than FEW pictures
    rank: int
    effective: int                      # pictures an update
    looks: int                          # times that each picture is seen
    dropout: float                      # share of pictures without their caption


PURPOSES: Mapping[str, Purpose] = {
    #                    few  rank  effective  looks  dropout
    "style":     Purpose(8,   8,    8,         100,   0.10),
    "character": Purpose(16,  16,   4,         100,   0.05),
    "object":    Purpose(8,   16,   4,         80,    0.05),
    "concept":   Purpose(16,  32,   8,         120,   0.10)}

FEW = 15                                # pictures: a larger rank would learn them by heart
PICTURES = 20                           # where no folder is named
LEAST_SAMPLES, MOST_SAMPLES = 1200, 16_000          # pictures seen in a run
# Fewer or more samples than these shares of what the purposes want are worth a note.
FEW_SHARE, MANY_TIMES = 0.5, 2.0
LOW_RANK_LOOKS = 1.5                    # times as many where memory forced the rank down
SMALL_BASE = 100e6                      # parameters
RATE, SMALL_BASE_RATE = 1e-4, 5e-4      # at one picture an update and alpha = rank
MOST_RATE = 10                          # times that
WARMUP, MOST_WARMUP = 0.05, 100         # of the updates
SAVES = 4                               # checkpoints in a run
MIN_SNR = 5.0                           # Hang et al. 2023, arXiv 2303.09556
CACHED_AT_ONCE = 4                      # pictures
DESKTOP_MB = 700.0                      # what a screen and a browser hold of a card
CARDS_GB = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 48, 80)


@dataclass(frozen=True, slots=True)
class Reason:
    """A sentence by its key."""

    key: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def text(self, lang: str | None = None) -> str:
        return i18n.tr(self.key, self.params, lang)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the advisor must know of a base."""

    native: int                         # px a side
    step: int                           # px; sides of buckets are multiples of it
    parameters: int                     # of the denoiser
    weights_mb: float = 0.0
    flow: bool = False                  # min-SNR means nothing there
    family: str = ""

    @staticmethod
    def of(base: Base, machine: Machine) -> Shape:
        facts = plan.ask("base", base, plan.numbers_of("auto", machine, base.family))
        return Shape(int(facts["native"]), int(facts["step"]),
                     int(facts["denoiser_parameters"]), facts["denoiser"] / MB,
                     bool(facts["flow"]), base.family)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Config keys in `values` and their plan. Where `fits` is False, nothing worth training fits:
    they are the nearest thing, and `needs_mb` is the least at half the native area or more."""

    fits: bool
    purpose: str
    values: Mapping[str, Any]
    plan: Plan
    reasons: Mapping[str, Reason]       # by config key
    notes: tuple[Reason, ...]
    needs_mb: float
    room_mb: float                      # what a run may count on
    score: tuple[int, ...]              # larger: nearer to what one would train with everywhere

    def config(self, **more: Any) -> TrainConfig:
        return TrainConfig.model_validate({**self.values, **more})


def suggest(machine: Machine, base: Base, data: Data | None, purpose: str, planner: Planner,
            shape: Shape | None = None) -> Suggestion:
    """The gentlest setting for this purpose that fits the machine. Without `data` (no folder yet)
    the length is in steps instead of epochs. Raises UserError for an unknown purpose and where the
    base can't be used."""
    if purpose not in PURPOSES:
        raise UserError("advisor.unknown_purpose", purpose=purpose, known=", ".join(PURPOSES))
    shape = shape or Shape.of(base, machine)
    can = relief.capabilities(machine, shape.weights_mb, shape.family)
    # What one would train with if memory were no matter.
    want = PURPOSES[purpose]
    pictures = data.pictures if data else PICTURES
    rank = want.few_rank if pictures < FEW else want.rank
    numbers = plan.numbers_of("auto", machine, shape.family)["compute"]
    # Most cards before Volta (7.0) compute fp16 more slowly than fp32.
    slow_half = numbers == "fp16" and (0, 0) < machine.capability < (7, 0)
    wish = TrainConfig.model_validate({
        "max_resolution": f"{shape.native},{shape.native}",
        "batch_size": effective_batch(want, pictures), "lora_rank": rank, "lora_alpha": rank,
        "target_modules": "attention+ff" if shape.parameters >= SMALL_BASE else "all-linear",
        "precision": "fp32" if slow_half else numbers, "cache_batch_size": CACHED_AT_ONCE})

    # What of it fits: at an honest size, else at a poor one, else the least there is.
    make = partial(relief.knobs, wish, can, shape.native, shape.step)
    honest = relief.search(wish, make(), planner)
    poor = None if honest else relief.search(wish, make(sides=relief.POOR_SIDES), planner)
    least = honest or relief.smallest(wish, make(), planner)
    setting, fits, needs_mb = poor or least, honest is not None, least.plan.needs_mb

    memory = {key: getattr(setting.config, key) for key in _MEMORY_KEYS}
    low_rank = setting.chosen["rank"] > 0
    course, course_reasons = _course(want, setting.config, data, low_rank, shape)
    config = setting.config.with_changes(**course)
    reasons = {key: Reason(f"advisor.{name}", params) for key, (name, params) in {
        **_memory_reasons(purpose, config, setting, wish, shape), **course_reasons}.items()}
    score = (int(fits), int(setting.plan.fits),
             *(-option for option in reversed(list(setting.chosen.values()))))
    return Suggestion(fits, purpose, memory | course, setting.plan, reasons,
                      tuple(_notes(fits, setting.plan, needs_mb, config, shape)), needs_mb,
                      plan.room(setting.plan.machine), score)


def nearest_fit(config: TrainConfig, base: Base, machine: Machine, planner: Planner
                ) -> tuple[dict[str, Any], Plan] | None:
    """The gentlest changes that make a config fit with its margin; ({}, plan) where it does,
    None where nothing helps (half the resolution included)."""
    shape = Shape.of(base, machine)
    can = relief.capabilities(machine, shape.weights_mb, shape.family)
    for sides in (relief.HONEST_SIDES, relief.POOR_SIDES):
        knobs = relief.knobs(config, can, shape.native, shape.step, sides)
        if setting := relief.search(config, knobs, planner):
            return relief.config_changes(config, setting.config), setting.plan
    return None


# --- the course of the run ---

def effective_batch(purpose: Purpose, pictures: int) -> int:
    """Pictures an update: a power of two, and at least two updates a round."""
    most = purpose.effective
    while most > 1 and most * 2 > pictures:
        most //= 2
    return most


def learning_rate(effective: int, rank: int, alpha: float, parameters: int) -> float:
    """The learning rate, in two significant digits. Adam's grows with the root of the batch
    (Malladi et al. 2022, arXiv 2205.10287); the adapter's scale alpha / rank multiplies every
    update and is divided out; a small base, whose weights are larger, takes a larger rate."""
    usual = RATE if parameters >= SMALL_BASE else SMALL_BASE_RATE
    return float(f"{min(usual * sqrt(effective) * rank / alpha, usual * MOST_RATE):.2g}")


def samples(purpose: Purpose, pictures: int, low_rank: bool) -> int:
    """Samples of a run: by the number of pictures, but neither too few nor only a cost."""
    ideal = purpose.looks * pictures * (LOW_RANK_LOOKS if low_rank else 1)
    return round(min(max(ideal, LEAST_SAMPLES), MOST_SAMPLES))


def length(config: TrainConfig, repeats: Sequence[int]) -> Reason | None:
    """What to say about a run that sees its pictures far less or far more often than any purpose
    wants, with the length that suits a style; None where it is about right. `repeats`: of each
    picture."""
    effective = config.batch_size * config.gradient_accumulation_steps
    per_update = effective * (1 - config.reg_share if config.regularized else 1)
    planned = config.max_train_steps * per_update or config.epochs * sum(repeats)
    ideal = {name: samples(purpose, len(repeats), False) for name, purpose in PURPOSES.items()}
    few, many = FEW_SHARE * min(ideal.values()), MANY_TIMES * max(ideal.values())
    # A run that goes on from another LoRA may be as short as it likes.
    if not repeats or few <= planned <= many or (planned < few and config.init_lora_weights):
        return None
    advised = ideal["style"]
    key, value = (("max_train_steps", ceil(advised / per_update)) if config.max_train_steps
                  else ("epochs", max(1, round(advised / sum(repeats)))))
    return Reason("advisor.too_few" if planned < few else "advisor.too_many", {
        "looks": f"{planned / len(repeats):.3g}", "pictures": len(repeats), "key": key,
        "usual": round(advised / len(repeats)), "value": value})


def _course(purpose: Purpose, config: TrainConfig, data: Data | None, low_rank: bool,
            shape: Shape) -> tuple[dict[str, Any], Reasons]:
    """The config keys of the run's course: its length, learning rate and what goes with them; and
    why they are so."""
    pictures = data.pictures if data else PICTURES
    effective = config.batch_size * config.gradient_accumulation_steps
    total = samples(purpose, pictures, low_rank)
    epochs = ceil(total / pictures)
    updates = epochs * ceil(pictures / effective) if data else ceil(total / effective)
    rate = learning_rate(effective, config.lora_rank, config.alpha, shape.parameters)
    warmup, saves = min(MOST_WARMUP, round(updates * WARMUP)), max(1, updates // SAVES)
    looks = epochs if data else round(updates * effective / pictures)
    length = {"epochs": epochs if data else config.epochs, "pictures": pictures,
              "updates": updates, "effective": effective, "looks": looks}
    end = "_low_rank" if low_rank else ""
    # Config key -> value, sentence and its parameters.
    course: dict[str, tuple[Any, str, Mapping[str, Any]]] = {
        **({"epochs": (epochs, f"epochs{end}", length)} if data
           else {"max_train_steps": (updates, f"steps{end}", length)}),
        "learning_rate": (rate, "rate", {"rate": f"{rate:g}", "effective": effective}),
        "lr_scheduler": ("cosine", "scheduler", {}),
        "lr_warmup_steps": (warmup, "warmup", {"steps": warmup}),
        "caption_dropout": (purpose.dropout, "dropout", {"share": f"{purpose.dropout:.0%}"}),
        **({} if shape.flow else {
            "min_snr_gamma": (MIN_SNR, "min_snr", {"gamma": f"{MIN_SNR:g}"})}),
        "save_steps": (saves, "saves", {"steps": saves, "count": SAVES})}
    return ({key: value for key, (value, _, _) in course.items()},
            {key: (sentence, params) for key, (_, sentence, params) in course.items()})


# --- the answer with its reasons ---

# Config keys that decide how much memory a run takes.
_MEMORY_KEYS = ("max_resolution", "batch_size", "gradient_accumulation_steps", "lora_rank",
                "lora_alpha", "target_modules", "precision", "base_precision",
                "gradient_checkpointing", "offload", "optimizer", "cache_batch_size")
Reasons = dict[str, tuple[str, Mapping[str, Any]]]         # by config key: sentence, parameters


def _memory_reasons(purpose: str, config: TrainConfig, setting: relief.Setting, wish: TrainConfig,
                    shape: Shape) -> Reasons:
    given_up = setting.without

    def why(knob: str) -> dict[str, str]:
        """What shows that a sacrifice is needed."""
        lack = given_up[knob].needs_mb if knob in given_up else setting.plan.needs_mb
        return {"without": gigabytes(lack), "room": gigabytes(_limit(setting.plan.machine))}
    effective = config.batch_size * config.gradient_accumulation_steps
    split = {"batch": config.batch_size, "times": config.gradient_accumulation_steps,
             "effective": effective, **why("batch")}
    side = relief.side_of(config, shape.native)
    share = 100 * setting.plan.parameters / max(1, setting.plan.base_parameters)
    resolution = ("native" if side >= shape.native
                  else "lower" if 2 * side * side >= shape.native ** 2 else "poor")
    lowered = "rank" in given_up or config.lora_rank < wish.lora_rank
    whole, on = config.batch_size == effective, "on" if config.gradient_checkpointing else "off"
    return {
        "max_resolution": (f"resolution_{resolution}", {
            "side": side, "native": shape.native, **why("resolution")}),
        "batch_size": ("batch_whole" if whole else "batch_part", split),
        "gradient_accumulation_steps": ("accumulation_none" if whole else "accumulation", split),
        "lora_rank": ("rank_lowered" if lowered else f"rank_{purpose}", {
            "rank": config.lora_rank, "usual": wish.lora_rank, **why("rank")}),
        "lora_alpha": ("alpha", {}),
        "target_modules": ("targets" if shape.parameters >= SMALL_BASE else "targets_small", {
            "count": f"{setting.plan.parameters / 1e6:.1f}", "share": f"{share:.2g}"}),
        "precision": (f"precision_{'lowered' if 'precision' in given_up else config.precision}",
                      {"precision": config.precision, **why("precision")}),
        "base_precision": (f"base_{config.base_precision}", why("base")),
        "gradient_checkpointing": (f"checkpointing_{on}", why("checkpointing")),
        "offload": ("offload" if config.offload else "offload_none",
                    {"share": f"{config.offload:.0%}", **why("offload")}),
        "optimizer": (f"optimizer_{config.optimizer}", why("optimizer")),
        "cache_batch_size": ("cache_batch", {"count": config.cache_batch_size})}


def _notes(fits: bool, planned: Plan, needs_mb: float, config: TrainConfig, shape: Shape
           ) -> Iterator[Reason]:
    """The sentences that concern no single value."""
    machine = planned.machine
    if not fits:
        yield Reason("advisor.does_not_fit", {
            "needs": gigabytes(needs_mb), "room": gigabytes(_limit(machine))})
        if planned.fits:
            yield Reason("advisor.would_fit_at", {
                "side": relief.side_of(config, shape.native), "native": shape.native})
        if machine.kind == "cuda" and (card := card_for(needs_mb)):
            yield Reason("advisor.card_needed", {"gb": card})
    encoders = sum(planned.phase("texts").parts.values()) if planned.phases else 0.0
    yield Reason("advisor.cached_texts", {"saved": gigabytes(encoders)})
    if machine.total_mb > machine.free_mb:
        yield Reason("advisor.not_ours", {
            "total": gigabytes(machine.total_mb), "room": gigabytes(plan.room(machine)),
            "held": gigabytes(machine.total_mb - machine.free_mb)})
    for name, params in lacking(planned).items():
        yield Reason(f"advisor.{name}_short", params)


def lacking(planned: Plan) -> dict[str, dict[str, str]]:
    """RAM and disk ("ram", "disk") that the plan needs beyond what is free, where that is known."""
    machine = planned.machine
    sizes = {"disk": (sum(planned.disk.values()), machine.disk_mb)}
    if machine.kind != "cpu":           # there RAM is what the plan itself is about
        sizes = {"ram": (sum(planned.ram.values()), machine.ram_mb), **sizes}
    return {name: {"needs": gigabytes(needs), "free": gigabytes(free)}
            for name, (needs, free) in sizes.items() if 0 < free < needs}


def card_for(needs_mb: float) -> int | None:
    """The smallest usual card, in GB, that holds this with its margin beside a desktop."""
    return next((gb for gb in CARDS_GB if needs_mb <= _limit(card_of(gb))), None)


def card_of(vram_gb: float, capability: tuple[int, int] = (8, 6)) -> Machine:
    """A card of this size that also draws a desktop; what is around it is unknown."""
    total = vram_gb * 1024
    return Machine("cuda", f"{vram_gb:g} GB", total, max(0.0, total - DESKTOP_MB), capability)


def _limit(machine: Machine) -> float:
    """MiB at which a plan fits with its margin."""
    return plan.room(machine) * (1 - plan.MARGIN)


def as_dict(suggestion: Suggestion, lang: str | None = None) -> dict[str, Any]:
    """The suggestion for --json and the window, its reasons as text."""
    return {"fits": suggestion.fits, "verdict": suggestion.plan.verdict(),
            "purpose": suggestion.purpose, "values": dict(suggestion.values),
            "needs_mb": round(suggestion.needs_mb, 1), "room_mb": round(suggestion.room_mb, 1),
            "reasons": {key: reason.text(lang) for key, reason in suggestion.reasons.items()},
            "notes": [note.text(lang) for note in suggestion.notes],
            "plan": plan.as_dict(suggestion.plan)}

