"""From what a run showed to what to change, gentlest first, with the memory that each change saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from core import i18n
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.memory import relief
from core.memory.plan import Plan
from core.memory.relief import Capabilities, Planner, config_changes

WORTH_MB, WORTH = 16.0, 0.01            # savings below both aren't worth a sacrifice
AFTER_OOM = 0.9                         # of the plan that failed: it was too good by something
OTHERS_MB = 1024.0                      # held by other programs: worth closing them
MOST_RANK = 64
LONGER, SHORTER = 1.5, 0.6
MOST_LENGTH = 100_000                   # epochs that a config takes
MOST_TIMES = 4096                       # batches an update


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known besides the config. Without `planner` nothing is said about memory."""

    planner: Planner | None = None
    capabilities: Capabilities = field(default_factory=Capabilities)
    native: int = 512                   # px a side
    step: int = 64                      # px; sides of buckets are multiples of it
    updates: int = 0                    # of the whole run; 0: unknown
    best_step: int = 0                  # with the lowest validation loss; 0: unknown


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to do: a sentence, and the config keys that do it."""

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
    """What to change, the gentlest first. `plan` is that of the run that showed the symptom.
    Raises UserError for an unknown symptom."""
    if symptom not in _ANSWERS:
        raise UserError("advisor.unknown_symptom", symptom=symptom, known=", ".join(_ANSWERS))
    advice = [item for item in _ANSWERS[symptom](config, plan, facts)
              if not item.changes or config.with_changes(**item.changes) != config]
    if plan is None or facts.planner is None:
        return advice
    # With what each change saves; one that costs memory which isn't there is left out.
    possible = []
    for item in advice:
        if item.changes:
            changed = facts.planner(config.with_changes(**item.changes))
            saves = plan.needs_mb - changed.needs_mb
            if saves < 0 and not changed.fits:
                continue
            item = replace(item, saves_mb=round(saves, 1))
        possible.append(item)
    return possible


# --- out of memory ---

def out_of_memory(order: Sequence[str], config: TrainConfig, plan: Plan | None, facts: Facts
                  ) -> Iterator[Advice]:
    """What to give up, in this order, and first what must be given up together."""
    knobs = relief.knobs(config, facts.capabilities, facts.native, facts.step)
    planner = facts.planner
    if plan and (held := plan.machine.total_mb - plan.machine.free_mb) > OTHERS_MB:
        yield Advice("advisor.do_close_others", {"held": round(held)})

    # Where one change isn't enough: all that must change together. The plan that failed was too
    # good by something, so the new one must need clearly less.
    if plan and planner:
        limit = AFTER_OOM * plan.needs_mb
        setting = relief.search(config, knobs, planner,
                              lambda new: new.fits and new.needs_mb <= limit)
        if setting and sum(option > 0 for option in setting.chosen.values()) > 1:
            together = config_changes(config, setting.config)
            yield Advice("advisor.do_together", {"changes": ", ".join(
                f"{key}: {value}" for key, value in together.items())}, together)

    by_name = {knob.name: knob.options[1:] for knob in knobs}
    # The batch goes down to 2 at once, everything else by one step.
    by_name["batch"] = tuple(o for o in by_name["batch"] if o["batch_size"] <= 2)
    for name, changes in ((name, by_name[name][0]) for name in order if by_name[name]):
        if plan and planner:
            saves = plan.needs_mb - planner(config.with_changes(**changes)).needs_mb
            if saves < min(WORTH_MB, WORTH * plan.needs_mb):
                continue
        yield _advice(config, name, changes)


# --- what the pictures and the loss show ---

def loss_swings(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
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


def weak(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
    """The pictures hardly change, and memory is to spare."""
    if config.alpha < config.lora_rank:
        yield _advice(config, "alpha", {"lora_alpha": float(config.lora_rank)})
    rank = min(max(16, config.lora_rank * 2), MOST_RANK)
    if rank > config.lora_rank:
        yield _advice(config, "more_rank", relief.with_rank(config, rank))
    yield _advice(config, "longer", _length(config, LONGER))
    if config.target_modules == "attention":
        yield _advice(config, "more_layers", {"target_modules": "attention+ff"})


def overtrained(config: TrainConfig, plan: Plan | None, facts: Facts) -> Iterator[Advice]:
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
    """Advice whose sentence tells the first change, from `before` to `now`."""
    def shown(value: Any) -> Any:
        return f"{value:g}" if isinstance(value, float) else value

    key, now = next(iter(changes.items()))
    params = {"before": shown(getattr(config, key)), "now": shown(now)}
    if "gradient_accumulation_steps" in changes:
        params["times"] = changes["gradient_accumulation_steps"]
    return Advice(f"advisor.do_{name}", params, changes)


_ANSWERS: dict[str, Callable[[TrainConfig, Plan | None, Facts], Iterator[Advice]]] = {
    **{symptom: partial(out_of_memory, order)
       for symptom, order in relief.AFTER_FAILURE.items()},
    "loss_swings": loss_swings, "weak": weak, "overtrained": overtrained}
