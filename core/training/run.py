"""The run around the step: progress, requests, checkpoints, previews, rescue, the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import Fault
from core.failures import one_line, ran_out
from core.families import components
from core.jobs.events import Note, Phase
from core.jobs.outcome import said_first
from core.training import base_check, rng
from core.training.memory_guard import Lookout
from core.training.output import Keeper
from core.training.previews import Previewer
from core.training.progress import Meter
from core.training.recovery import Rescue
from core.training.verify import verify_run
from core.weights.precision import free_memory

if TYPE_CHECKING:
    from core.training.trainer import Trainer


class Session:
    """One run, from its first update or its last checkpoint to its proven file."""

    def __init__(self, trainer: Trainer, keeper: Keeper, lookout: Lookout,
                 began: float, after_update: Callable[[Trainer, int], None]) -> None:
        self.trainer, self.keeper, self.lookout, self.began = trainer, keeper, lookout, began
        self.after_update = after_update
        self.config, self.emit, self.control = trainer.config, trainer.emit, trainer.control
        self.previewer = Previewer(trainer.family, trainer.parts, trainer.precision, self.config,
                                   trainer.cond, keeper.output.folder / "samples", self.emit)
        self.rescue = Rescue(trainer, lookout, self.emit)
        self.samples: list[str] = []
        self.base: dict[str, Any] | None = None     # what core/training/base_check.py found

    def run(self, found: list[Path]) -> dict[str, Any]:
        """`found`: the checkpoints to go on from, newest first; none: from the beginning."""
        self.base = base_check.check(self.trainer)
        rng.seed(self.config.seed)
        start = self.keeper.resume(found)
        self.lookout.go_on(self.trainer)
        meter = Meter(self.trainer, start, self.lookout)
        self.emit(Phase(name="train", done=start, total=self.trainer.total))
        if not start:
            self._preview(0)
        done = self.rescue.begin(start)
        while done < self.trainer.total:
            if self._asked_to_stop():
                return self._stopped(done)
            done = self._update(done, meter)
        return self._finish(meter, start)

    def _update(self, done: int, meter: Meter) -> int:
        """-> updates done after this one; fewer where the run had to go back."""
        begins = time.perf_counter()
        after = self.rescue.update(done)
        if after == done + 1:
            self.after_update(self.trainer, after)
            meter.tick(after, whole=after == self.trainer.total)
            self.lookout.between_steps(self.trainer, time.perf_counter() - begins)
            after = self.rescue.look(after)
        if after <= done:
            meter.go_back(after)
            return after
        self._after(after, meter)
        self.rescue.keep(after)
        return after

    def _after(self, done: int, meter: Meter) -> None:
        config, last = self.config, done == self.trainer.total
        self.keeper.tend(done)
        saves = bool(config.save_steps) and done % config.save_steps == 0
        validates = done % config.validation_steps == 0 if config.validation_steps else saves
        if validates or last:
            meter.show(done, self._validate(done))
        if saves or last or self.control.take("save"):
            with meter.paused():
                self.keeper.checkpoint(done)
        draws = bool(config.sample_every) and (done % config.sample_every == 0 or last)
        if draws or self.control.take("sample"):
            with meter.paused():
                self._preview(done)

    def _validate(self, done: int) -> float | None:
        with self.trainer.averaged():
            loss = self.trainer.validate()
        if loss is not None:
            self.keeper.remember(done, loss)
        return loss

    def _preview(self, step: int) -> None:
        if self.config.sample_prompts:
            with self.trainer.averaged():
                self.samples += self.previewer.draw(step, self.keeper.name, self.trainer.text)

    def _asked_to_stop(self) -> bool:
        self.control.wait_while_paused()
        return self.control.stopping

    def _stopped(self, update: int) -> dict[str, Any]:
        if update:
            self.keeper.checkpoint(update, last=True)
        return {"state": "stopped", "steps": update, "seconds": time.time() - self.began,
                "checkpoint": str(self.keeper.last) if self.keeper.last else None,
                "base": self.base}

    def _finish(self, meter: Meter, start: int) -> dict[str, Any]:
        """`state`: done; unproven: the LoRA is saved, but the proof that it works failed;
        nothing: all was trained before. What must be said first is in core/jobs/outcome.py."""
        trainer, keeper = self.trainer, self.keeper
        done = max(start, trainer.total)
        self.emit(Phase(name="save"))
        final = keeper.final(done)
        trainer.optimizer.zero_grad(set_to_none=True)
        self.emit(Phase(name="verify"))
        with trainer.averaged():
            proof = self._prove(final)
        free_memory()
        result: dict[str, Any] = {"state": "done" if proof["ok"] else "unproven"}
        if start >= trainer.total:
            if proof["ok"]:
                result["state"] = "nothing"
            result["nothing"] = {"step": start, "total": trainer.total, "file": str(final)}
        if not (result["state"] == "nothing" and keeper.there_already):
            result["lora"] = str(final)
        if proof["ok"]:
            self.emit(Note(key="engine.proof", params=proof))
        for key, params in said_first({**result, "proof": proof}):
            self.emit(Note(key=key, params=dict(params)))
        return {**result, "name": keeper.name, "steps": done,
                "seconds": time.time() - self.began, "best": keeper.best(),
                "samples": self.samples, "proof": proof, "base": self.base,
                "base_loras": trainer.base_loras.told or None,
                "companions": components.summary(trainer.parts.beside),
                "checkpoints": keeper.kept(),
                "parameters": sum(p.numel() for p in trainer.parameters), **meter.facts(),
                **self.lookout.facts()}

    def _prove(self, final: Path) -> dict[str, Any]:
        """The LoRA is there; what keeps it from being proven must not fail the run."""
        try:
            return verify_run(self.trainer, final)
        except Exception as error:
            if not (isinstance(error, (Fault, OSError)) or ran_out(error)):
                raise
            return {"ok": False, "file": str(final), "reason": one_line(error)}
