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
from core.memory import relief
from core.training import fallbacks
from core.weights.precision import free_memory

if TYPE_CHECKING:
    from core.training.checkpoint import State
    from core.training.memory_guard import MemoryGuard
    from core.training.trainer import Trainer

GOOD_EVERY = 100                    # updates between two states kept in RAM
# So many updates in a row without a finite loss are more than a bad batch; fp16's scaler alone
# skips up to 16 while it looks for its scale.
STREAK, SCALER_STREAK = 3, 20
RETURNS = 3                         # then something is wrong that no lower rate mends
MOST_NOTES, MOST_NAMES = 10, 5      # of skipped updates, and of pictures in one


class Recovery:
    """The run calls `update` here instead of the trainer's own, then `look` and `keep`."""

    def __init__(self, trainer: Trainer, guard: MemoryGuard, emit: Callable[[Event], None]) -> None:
        self.trainer, self.guard, self.emit = trainer, guard, emit
        # Good states, at most two: the newest may already hold the start of the trouble.
        self._good: list[State] = []
        self._returns = self._notes = 0

    def begin(self, done: int) -> int:
        """Remembers the state that the run starts from, and returns `done`."""
        self._good = [self.trainer.snapshot(done)]
        return done

    def keep(self, done: int) -> None:
        """Called after a finished update: remembers a good state now and then."""
        # Once the text encoder has left memory there is no way back to an earlier state.
        rests = done == self.trainer.config.text_encoder_stop
        if rests or (done % GOOD_EVERY == 0 and not self.trainer.skipped):
            self._good = [*([] if rests else self._good[-1:]), self.trainer.snapshot(done)]

    def update(self, number: int) -> int:
        """Makes update `number`; where memory runs out, again and gentler until it fits. Returns
        how many updates are done then: number + 1, or fewer where the weights had to go back.
        Raises UserError where nothing is left to give up."""
        while True:
            # Only the message is kept: the error's frames hold the tensors that must go.
            try:
                self.trainer.update(number)
                return number + 1
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
                reason = one_line(error)
            stepping = self.trainer.stepping
            fallbacks.abandon(self.trainer)
            free_memory()
            # Halving starts at the samples that were there at once: buckets may be small.
            most = max(len(batch.indices) for batch in self.trainer.sampler.update(number))
            if not self.guard.lower(self.trainer, "engine.lowered_for_memory", most):
                raise UserError("engine.out_of_memory", reason=reason, step=number + 1,
                                fixes=self._lighter_fixes())
            if stepping:                    # some weights may be new, others old
                self.trainer.restore(self._good[-1])
                return self._good[-1].update

    def _lighter_fixes(self) -> list[Fix]:
        """What the run can't change by itself, since it changes the LoRA (relief.ASK_FIRST)."""
        config, parts = self.trainer.config, self.trainer.parts
        fixes = {}
        if config.base_precision == "same":
            fixes["base"] = Fix("fixes.small_base", {"base_precision": "nf4", "resume": True})
        # Three quarters of the side: 56 % of the area, and about as much less memory.
        area = max(math.prod(item.bucket) for item in self.trainer.examples.items)
        side = int(0.75 * math.sqrt(area)) // parts.bucket_step * parts.bucket_step
        if side:
            fixes["resolution"] = Fix("fixes.smaller_pictures",
                                      {"max_resolution": f"{side},{side}"})
        return [fixes[name] for name in relief.ASK_FIRST if name in fixes]

    # --- numbers that aren't ---

    def look(self, done: int) -> int:
        """Answers the skipped updates that the last reading of the loss found: a note for a bad
        batch; for a streak, back to a good state. Returns how many updates are done then."""
        trainer, skipped = self.trainer, self.trainer.skipped
        if not skipped:
            return done
        scaled = trainer.scaler.is_enabled()
        limit = SCALER_STREAK if scaled else STREAK
        if len(skipped) >= limit and skipped[-1] - skipped[-limit] == limit - 1:
            return self._go_back(done)
        if skipped[-1] < trainer.read:          # it has passed
            trainer.skipped = []
            if not scaled and self._notes < MOST_NOTES:
                self._notes += 1
                self.emit(Note(key="engine.skipped", params={
                    "step": skipped[-1] + 1, "pictures": self._pictures(skipped)}))
        return done

    def _go_back(self, done: int) -> int:
        """Restores the older of the good states, with gentler numbers or half the rate. Raises
        UserError after too many returns."""
        trainer = self.trainer
        pictures = self._pictures(trainer.skipped)
        if self._returns == RETURNS:
            compute = str(trainer.precision.compute).removeprefix("torch.")
            rate = trainer.lowered.get("learning_rate", trainer.config.learning_rate)
            fp32 = [] if compute == "float32" else [Fix("fixes.fp32", {"precision": "fp32"})]
            raise UserError("engine.not_finite", step=done, rate=f"{rate:g}", precision=compute,
                            pictures=pictures, fixes=[
                                *fp32, Fix("fixes.half_rate", {"learning_rate": rate / 2})])
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
