"""When an update fails: again in smaller pieces where memory ran out, back to the last good state
where losses stop being numbers. The run is a function of its state and the update's number, so
that what is done again is what was to be done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from core.errors import Fix, UserError
from core.failures import one_line, ran_out
from core.jobs.events import Event, Note
from core.training import fallbacks
from core.weights.precision import free_memory

if TYPE_CHECKING:
    from core.training.checkpoint import State
    from core.training.memory_guard import MemoryGuard
    from core.training.trainer import Trainer

GOOD_EVERY = 100                    # updates between two states kept in RAM
STREAK = 3                          # updates in a row without a number: more than a bad batch
SCALER_STREAK = 20                  # fp16's scaler skips up to 16 while it looks for its scale
RETURNS = 3                         # then something is wrong that no lower rate mends
MOST_NOTES, MOST_NAMES = 10, 5


class Recovery:
    """`update` instead of the trainer's own; `look` and `keep` after each."""

    def __init__(self, trainer: Trainer, guard: MemoryGuard, emit: Callable[[Event], None]) -> None:
        self.trainer, self.guard, self.emit = trainer, guard, emit
        self._good: list[State] = []        # at most two: the newest may hold the trouble's start
        self._returns = self._notes = 0

    def begin(self, done: int) -> int:
        self._good = [self.trainer.snapshot(done)]
        return done

    def keep(self, done: int) -> None:
        """After a finished update: remembers a good state now and then."""
        rests = done == self.trainer.config.text_encoder_stop       # no way back before that
        if rests or (done % GOOD_EVERY == 0 and not self.trainer.skipped):
            self._good = [*([] if rests else self._good[-1:]), self.trainer.snapshot(done)]

    def update(self, number: int) -> int:
        """-> updates done: number + 1, or fewer where the weights had to go back."""
        while True:
            reason = self._try(number)
            if reason is None:
                return number + 1
            stepping = self.trainer.stepping
            fallbacks.abandon(self.trainer)
            free_memory()
            self._lower(number, reason)
            if stepping:                    # some weights may be new, others old
                self.trainer.restore(self._good[-1])
                return self._good[-1].update

    def _try(self, number: int) -> str | None:
        """None, or why memory ran out; the error and all that its frames hold are gone then."""
        try:
            self.trainer.update(number)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return one_line(error)
        return None

    def _lower(self, number: int, reason: str) -> None:
        most = max(len(batch.indices) for batch in self.trainer.sampler.update(number))
        if not self.guard.lower(self.trainer, "engine.lowered_for_memory", most):
            raise UserError("engine.out_of_memory", reason=reason, step=number + 1,
                            fixes=self._lighter())

    def _lighter(self) -> list[Fix]:
        """What the run can't change by itself, since it changes the LoRA."""
        config, parts = self.trainer.config, self.trainer.parts
        fixes = []
        if config.base_precision == "same":
            fixes.append(Fix("fixes.small_base", {"base_precision": "nf4", "resume": True}))
        sides = [item.bucket for item in self.trainer.examples.items]
        area = max(width * height for width, height in sides)
        side = int(0.75 * math.sqrt(area)) // parts.bucket_step * parts.bucket_step
        if side >= parts.bucket_step:
            fixes.append(Fix("fixes.smaller_pictures", {"max_resolution": f"{side},{side}"}))
        return fixes

    # --- numbers that aren't ---

    def look(self, done: int) -> int:
        """Answers the skipped updates that the last reading of the loss found. -> updates done"""
        trainer, skipped = self.trainer, self.trainer.skipped
        if not skipped:
            return done
        scaled = trainer.scaler.is_enabled()
        limit = SCALER_STREAK if scaled else STREAK
        if len(skipped) >= limit and skipped[-1] - skipped[-limit] == limit - 1:
            return self._return(done)
        if skipped[-1] < trainer.read:          # it has passed
            trainer.skipped = []
            if not scaled and self._notes < MOST_NOTES:
                self._notes += 1
                self.emit(Note(key="engine.skipped", params={
                    "step": skipped[-1] + 1, "pictures": self._pictures(skipped)}))
        return done

    def _return(self, done: int) -> int:
        trainer = self.trainer
        pictures = self._pictures(trainer.skipped)
        if self._returns == RETURNS:
            raise self._not_finite(done, pictures)
        self._returns += 1
        good = self._good[0]
        self._good, trainer.skipped = [good], []
        fallbacks.abandon(trainer)
        trainer.restore(good)
        for key, value in self.guard.ease(trainer).items():
            self.emit(Note(key="engine.went_back", params={
                "step": done, "to": good.update, "key": key, "value": value,
                "pictures": pictures}))
        return good.update

    def _pictures(self, updates: list[int]) -> str:
        items, sampler = self.trainer.examples.items, self.trainer.sampler
        names = dict.fromkeys(items[i].picture.path.name for update in updates
                              for batch in sampler.update(update) for i in batch.indices)
        shown = ", ".join(list(names)[:MOST_NAMES])
        return f"{shown} ... ({len(names)})" if len(names) > MOST_NAMES else shown

    def _not_finite(self, step: int, pictures: str) -> UserError:
        config, compute = self.trainer.config, str(self.trainer.precision.compute)[6:]
        rate = self.trainer.lowered.get("learning_rate", config.learning_rate)
        fixes = [Fix("fixes.half_rate", {"learning_rate": rate / 2})]
        if compute != "float32":
            fixes.insert(0, Fix("fixes.fp32", {"precision": "fp32"}))
        return UserError("engine.not_finite", step=step, rate=f"{rate:g}", precision=compute,
                         pictures=pictures, fixes=fixes)
