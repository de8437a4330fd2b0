"""Progress of a run: speed, time left, memory; shown often enough to watch, never every step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from core.jobs.events import Step
from core.memory.monitor import Reading
from core.training.memory_guard import MemoryGuard, held_mb

if TYPE_CHECKING:
    from core.training.trainer import Trainer

SHOW_EVERY_S = 0.5          # asking for the loss waits for the GPU, so not at every step
_SMOOTH = 0.7               # of the speed shown


class ProgressMeter:
    """Measures a run and emits its Step events."""

    def __init__(self, trainer: Trainer, start: int, guard: MemoryGuard) -> None:
        self.trainer, self.start, self.guard = trainer, start, guard
        self.shown = self.began = time.perf_counter()
        self.shown_step = self.done = start
        self.speed = 0.0                    # steps/s, smoothed
        self.training_s, self.steps = 0.0, 0
        self.losses: list[float] = []

    def tick(self, done: int, whole: bool = False) -> None:
        """Called after every update; shows now and then. `whole`: after the run's last update, when
        no loss may stay unread."""
        self.done = done
        late = time.perf_counter() - self.shown >= SHOW_EVERY_S
        if late or whole or done == self.start + 1:
            self.show(done)

    def go_back(self, done: int) -> None:
        """The run goes on from an earlier state."""
        self.done = self.shown_step = done
        self.shown = time.perf_counter()

    def show(self, done: int, validation: float | None = None) -> None:
        """Emits a Step; nothing where there is neither a new update nor a validation loss."""
        trainer, updates = self.trainer, done - self.shown_step
        if updates:
            if (loss := trainer.mean_loss()) is not None:
                self.losses.append(loss)
            self.steps += updates
            now = time.perf_counter()
            fresh = updates / max(1e-9, now - self.shown)
            self.speed = _SMOOTH * self.speed + (1 - _SMOOTH) * fresh if self.speed else fresh
            self.training_s += now - self.shown
            self.shown, self.shown_step = now, done
        elif validation is None:
            return
        reading = self.guard.watch.reading if self.guard.watch else Reading()
        trainer.emit(Step(
            step=done, total=trainer.total, epoch=trainer.sampler.epoch_of(done),
            loss=self.losses[-1] if self.losses else None, validation=validation,
            lr=float(trainer.optimizer.param_groups[0]["lr"]), steps_per_s=self.speed,
            eta_s=(trainer.total - done) / max(self.speed, 1e-9),
            memory_mb=held_mb(trainer.precision.device), free_mb=reading.free_mb,
            temperature_c=reading.temperature_c))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around previews and checkpoints, whose time doesn't count as the step's."""
        self.show(self.done)
        yield
        self.shown = time.perf_counter()

    def facts(self) -> dict[str, Any]:
        """Speed and last loss, for the run's summary."""
        return {"steps_per_second": self.steps / self.training_s if self.training_s else 0.0,
                "loss": self.losses[-1] if self.losses else None}
