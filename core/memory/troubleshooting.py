"""What a run showed -> what to change, gentlest first; with what each change saves, by plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from core import i18n
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.memory import relief
from core.memory.plan import Plan
from core.memory.relief import Capabilities, Planner

Symptom = Literal["oom_start", "oom_run", "loss_swings", "weak", "overtrained"]

WORTH_MB, WORTH = 16.0, 0.01            # savings below both aren't worth a sacrifice
AFTER_OOM = 0.9                         # of the plan that failed: it was too good by something
OTHERS_MB = 1024.0                      # held by other programs: worth closing them
MOST_RANK = 64
LONGER, SHORTER = 1.5, 0.6
MOST_LENGTH = 100_000                   # epochs that a config takes
MOST_TIMES = 4096                       # batches an update


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known beside the config. Without `planner` nothing is said about memory."""

    planner: Planner | None = None
    capabilities: Capabilities = field(default_factory=Capabilities)
    native: int = 512                   # px a side
    step: int = 64                      # px; sides of buckets are multiples of it
    updates: int = 0                    # of the whole run; 0: unknown
    best_step: int = 0                  # with the lowest validation loss; 0: unknown


@dataclass(frozen=True, slots=True)
class Advice:
    key: str
    params: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)    # of the config; empty: by hand
    saves_mb: float | None = None       # below zero: it costs; None: not planned

    @property
    def fix(self) -> Fix:
        return Fix(self.key, dict(self.changes))

    def text(self, lang: str | None = None) -> str:
        return i18n.tr(self.key, self.params, lang)


def answer(symptom: str, config: TrainConfig, plan: Plan | None, facts: Facts) -> list[Advice]:
    """`plan`: of the run that showed it. Raises UserError for a symptom that nobody knows."""
    if symptom not in _ANSWERS:
        raise UserError("advisor.unknown_symptom", symptom=symptom, known=", ".join(_ANSWERS))
    told = [one for one in _ANSWERS[symptom](config, plan, facts)
            if not one.changes or config.with_changes(**one.changes) != config]
    if plan is None or facts.planner is None:
        return told
    weighed = [_weighed(one, config, plan, facts.planner) for one in told]
    return [one for one, possible in weighed if possible]


def _weighed(advice: Advice, config: TrainConfig, plan: Plan, planner: Planner
             ) -> tuple[Advice, bool]:
    """With what it saves; not possible: what costs memory that isn't there."""
    if not advice.changes:
        return advice, True
    changed = planner(config.with_changes(**advice.changes))
    saves = plan.needs_mb - changed.needs_mb
    possible = saves >= 0 or relief.fits(changed)
    return Advice(advice.key, advice.params, advice.changes, round(saves, 1)), possible


# --- out of memory ---

def _oom_start(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
    """While loading or caching, or in the first update: nothing has grown, the plan is too big."""
    yield from _out_of_memory(config, plan, facts, ("cache", "batch", "checkpointing", "precision",
                              "optimizer", "base", "offload", "resolution", "rank"))


def _oom_run(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
    """After good updates: a preview, a larger bucket, or another program took the rest."""
    yield from _out_of_memory(config, plan, facts, ("batch", "previews", "checkpointing",
                              "precision", "resolution", "optimizer", "base", "offload", "rank"))


def _out_of_memory(config: TrainConfig, plan: Plan | None, facts: Facts, order: tuple[str, ...]
                   ) -> Iterator[Advice]:
    if plan and plan.machine.total_mb - plan.machine.free_mb > OTHERS_MB:
        held = plan.machine.total_mb - plan.machine.free_mb
        yield Advice("advisor.do_close_others", {"held": round(held)})
    dials = relief.dials(config, facts.capabilities, facts.native, facts.step)
    if plan and facts.planner:
        yield from _surely(config, plan, facts.planner, dials)
    by_name = {knob.name: knob for knob in dials}
    for name in order:
        if changes := _first_step(by_name[name]):
            if plan and facts.planner and not _worth(config, plan, facts.planner, changes):
                continue
            yield Advice(f"advisor.do_{name}", _shown(config, changes), changes)


def _surely(config: TrainConfig, plan: Plan, planner: Planner, dials: tuple[relief.Knob, ...]
            ) -> Iterator[Advice]:
    """All that must change together, where one change isn't enough."""
    def safer(new: Plan) -> bool:
        return relief.fits(new) and new.needs_mb <= AFTER_OOM * plan.needs_mb
    found = relief.search(config, dials, planner, safer)
    if found and sum(option > 0 for option in found.chosen.values()) > 1:
        before, after = config.model_dump(), found.config.model_dump()
        changes = {key: value for key, value in after.items() if value != before[key]}
        yield Advice("advisor.do_together", {"changes": ", ".join(
            f"{key}: {value}" for key, value in changes.items())}, changes)


def _first_step(knob: relief.Knob) -> Mapping[str, Any]:
    """The batch goes down to 2 at once; all else by one step."""
    if knob.name == "batch":
        small = [one for one in knob.options[1:] if one["batch_size"] <= 2]
        return small[0] if small else {}
    return knob.options[1] if len(knob.options) > 1 else {}


def _worth(config: TrainConfig, plan: Plan, planner: Planner, changes: Mapping[str, Any]) -> bool:
    saves = plan.needs_mb - planner(config.with_changes(**changes)).needs_mb
    return saves >= min(WORTH_MB, WORTH * plan.needs_mb)


# --- what the pictures and the loss show ---

def _loss_swings(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
    """Too few pictures an update for the rate."""
    times = min(config.gradient_accumulation_steps * 2, MOST_TIMES)
    yield _advice(config, "accumulate", {"gradient_accumulation_steps": times})
    yield _advice(config, "half_rate", {"learning_rate": config.learning_rate / 2})
    if not config.lr_warmup_steps:
        yield _advice(config, "warmup", {"lr_warmup_steps": max(10, facts.updates // 20)})
    if not config.max_grad_norm:
        yield _advice(config, "clip", {"max_grad_norm": 1.0})
    if not config.min_snr_gamma:
        yield _advice(config, "min_snr", {"min_snr_gamma": 5.0})


def _weak(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
    """The pictures hardly change, and memory is to spare."""
    if config.alpha < config.lora_rank:
        yield _advice(config, "alpha", {"lora_alpha": float(config.lora_rank)})
    rank = min(max(16, config.lora_rank * 2), MOST_RANK)
    if rank > config.lora_rank:
        alpha = {} if config.lora_alpha is None else {
            "lora_alpha": config.lora_alpha * rank / config.lora_rank}
        yield _advice(config, "more_rank", {"lora_rank": rank, **alpha})
    yield _advice(config, "longer", _length(config, LONGER))
    if config.target_modules == "attention":
        yield _advice(config, "more_layers", {"target_modules": "attention+ff"})


def _overtrained(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
    """It repeats the training pictures: too long, too fast, too large for so few."""
    yield (Advice("advisor.do_best_checkpoint", {"step": facts.best_step}) if facts.best_step
           else Advice("advisor.do_earlier_checkpoint"))
    yield _advice(config, "shorter", _length(config, SHORTER))
    yield _advice(config, "half_rate", {"learning_rate": config.learning_rate / 2})
    if config.caption_dropout < 0.1:
        yield _advice(config, "dropout", {"caption_dropout": 0.1})
    if config.lora_rank > 8:
        alpha = {} if config.lora_alpha is None else {"lora_alpha": config.lora_alpha / 2}
        yield _advice(config, "less_rank", {"lora_rank": config.lora_rank // 2, **alpha})
    yield Advice("advisor.do_better_pictures")


def _length(config: TrainConfig, times: float) -> dict[str, Any]:
    key = "max_train_steps" if config.max_train_steps else "epochs"
    return {key: min(max(1, round(getattr(config, key) * times)), MOST_LENGTH)}


def _advice(config: TrainConfig, name: str, changes: Mapping[str, Any]) -> Advice:
    return Advice(f"advisor.do_{name}", _shown(config, changes), changes)


def _shown(config: TrainConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The first change, for the sentence: from `before` to `now`."""
    key, now = next(iter(changes.items()))
    before = getattr(config, key)
    more = {"times": changes["gradient_accumulation_steps"]} if (
        "gradient_accumulation_steps" in changes) else {}
    return {"before": _plain(before), "now": _plain(now), **more}


def _plain(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


_ANSWERS = {"oom_start": _oom_start, "oom_run": _oom_run, "loss_swings": _loss_swings,
            "weak": _weak, "overtrained": _overtrained}
