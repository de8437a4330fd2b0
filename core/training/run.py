"""train(): one run, from a folder of images to a LoRA file that is proven to work.

    scan -> buckets -> cache latents and embeddings -> attach LoRA -> the steps (trainer.py)
         -> checkpoints, previews, validation -> save -> prove that the file works
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import families, importers, paths
from core.adapters import base_loras
from core.config import TrainConfig, resolve
from core.dataset.checks.image_stats import Stopped
from core.dataset.examples import Encoder, find
from core.errors import UserError
from core.failures import one_line, ran_out
from core.families.components import lookup
from core.families.detection import Base
from core.families.loading import load_denoiser, tell_numbers
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from core.jobs.outcome import said_first
from core.lora_files.library import prompts_of
from core.objectives.diffusion import zero_terminal
from core.training import base_check, preflight, regularization, resume, rng
from core.training.callbacks import Callbacks
from core.training.memory_guard import MemoryGuard, memory_data
from core.training.output import OutputWriter, fingerprints
from core.training.output_names import Output
from core.training.previews import Previewer
from core.training.progress import ProgressMeter
from core.training.recovery import Recovery
from core.training.trainer import Trainer
from core.training.verify import verify_run
from core.weights.precision import choose, free_memory

Emit = Callable[[Event], None]


def train(config: TrainConfig, emit: Emit, control: Control) -> dict[str, Any]:
    """Runs a training from a folder of pictures to a proven LoRA file.

    Returns the facts for the summary. Raises UserError for whatever a user can mend.
    """
    folder = paths.expanded(config.output_dir).absolute()
    with (Callbacks(config.callbacks, emit, control) as callbacks,
          Output(folder, config, callbacks) as output):
        result = _train(output, config, callbacks, control)
        callbacks.state = "unproven" if result["state"] == "unproven" else "done"
        return result


def _train(output: Output, config: TrainConfig, emit: Callbacks, control: Control
           ) -> dict[str, Any]:
    """Everything before the first update; TrainingRun does the rest."""
    began = time.time()
    checkpoints = resume.choose(output, config, emit)
    for key, name in importers.named_in(config):
        emit(Note(key="extensions.used", params={"key": key, "name": name}))
    rng.seed(config.seed)

    # The base: its family, number formats and objective are known from headers, before anything
    # large is read.
    if not config.base_model:
        raise UserError("engine.key_missing", key="base_model")
    source = (paths.DEMO / "base" if config.base_model == "demo"
              else resolve(config.base_model, None))
    kind = families.detect(source) if config.family == "auto" else config.family
    family = families.get(kind, lookup.files_from_config(config))
    base_loras.check(config, kind)
    precision = choose(config.precision, config.device, families.outgrows_fp16(kind))
    tell_numbers(config.precision, kind, precision, emit)
    parts = family.load(source, precision, frozenset())
    parts.beside = lookup.announce(family, source, emit)
    if config.prediction_type != "auto" and parts.flow is None:
        parts.objective = config.prediction_type
    if checkpoints:
        resume.check(checkpoints, config, parts.objective, fingerprints(family, source))
    preflight.tell_distilled(config, parts, emit)
    preflight.tell_unused(config, family, parts.flow, emit)
    if config.zero_terminal_snr and parts.flow is None:
        zero_terminal(parts)

    # The pictures, and what the cache lacks of them. VAE and text encoders have left memory again
    # before the denoiser comes.
    if not config.train_data_dir:
        raise UserError("engine.key_missing", key="train_data_dir")
    examples = find(config, resolve(config.train_data_dir, None),
                    resolve(config.metadata_path, None) if config.metadata_path else None,
                    parts.native_size, parts.bucket_step, emit)
    preflight.tell_course(config, examples, emit)
    try:
        if config.regularized:
            regularization.add(config, examples, family, parts, precision, emit, control)
        guard = MemoryGuard(config, Base.of(source, kind), precision.device,
                            memory_data(examples.items, config, kind), emit)
        guard.announce()
        preflight.tell_room(guard.plan, config, output)
        Encoder(family, source, precision, config, emit, control).fill(
            examples, prompts_of(config))
        lookup.tell_scale(parts.beside, examples.latents, config.masked_loss, emit)
    except Stopped:
        return {"state": "stopped", "steps": 0, "seconds": time.time() - began}

    emit(Phase(name="load"))
    parts.denoiser = load_denoiser(config, family, source, precision, emit)
    trainer = Trainer(config, family, parts, precision, examples, emit, control)
    writer = OutputWriter(trainer, output, began)
    with guard, contextlib.closing(writer):
        return TrainingRun(trainer, writer, guard, began, emit.after_update).run(checkpoints)


class TrainingRun:
    """One run, from its first update or its last checkpoint to its proven file."""

    def __init__(self, trainer: Trainer, writer: OutputWriter, guard: MemoryGuard,
                 began: float, after_update: Callable[[Trainer, int], None]) -> None:
        self.trainer, self.writer, self.guard, self.began = trainer, writer, guard, began
        self.after_update = after_update
        self.config, self.emit, self.control = trainer.config, trainer.emit, trainer.control
        self.previewer = Previewer(trainer.family, trainer.parts, trainer.precision, self.config,
                                   trainer.cond, writer.output.folder / "samples", self.emit)
        self.recovery = Recovery(trainer, guard, self.emit)
        self.samples: list[str] = []
        self.base: dict[str, Any] | None = None     # what core/training/base_check.py found

    def run(self, checkpoints: list[Path]) -> dict[str, Any]:
        """`checkpoints`: those to go on from, newest first; none: from the beginning."""
        self.base = base_check.check(self.trainer)
        # How many random numbers the preparations took depends on what the cache held.
        rng.seed(self.config.seed)
        start = self.writer.resume(checkpoints)
        self.guard.go_on(self.trainer)
        progress = ProgressMeter(self.trainer, start, self.guard)
        self.emit(Phase(name="train", done=start, total=self.trainer.total))
        if not start:
            self._preview(0)
        done = self.recovery.begin(start)
        while done < self.trainer.total:
            self.control.wait_while_paused()
            if self.control.stopping:
                if done:
                    self.writer.checkpoint(done, last=True)
                return {"state": "stopped", "steps": done, "seconds": self.writer.seconds(),
                        "checkpoint": str(self.writer.last) if self.writer.last else None,
                        "base": self.base}
            done = self._update(done, progress)
        return self._finish(progress, start)

    def _update(self, done: int, progress: ProgressMeter) -> int:
        """Makes one update and whatever is due after it. Returns how many updates are done then:
        one more, or fewer where the run had to go back to an earlier state."""
        begins = time.perf_counter()
        after = self.recovery.update(done)
        if after == done + 1:
            self.after_update(self.trainer, after)
            progress.tick(after, whole=after == self.trainer.total)
            self.guard.between_steps(self.trainer, time.perf_counter() - begins)
            after = self.recovery.look(after)
        if after <= done:
            progress.go_back(after)
            return after

        config, last = self.config, after == self.trainer.total
        self.writer.tend(after)
        saves = bool(config.save_steps) and after % config.save_steps == 0
        validates = after % config.validation_steps == 0 if config.validation_steps else saves
        # Validation comes before the checkpoint, which remembers the best loss so far.
        if validates or last:
            with self.trainer.averaged():
                loss = self.trainer.validate()
            if loss is not None:
                self.writer.remember(after, loss)
            progress.show(after, loss)
        if saves or last or self.control.take("save"):
            with progress.paused():
                self.writer.checkpoint(after)
        draws = bool(config.sample_every) and (after % config.sample_every == 0 or last)
        if draws or self.control.take("sample"):
            with progress.paused():
                self._preview(after)
        self.recovery.keep(after)
        return after

    def _preview(self, step: int) -> None:
        if self.config.sample_prompts:
            with self.trainer.averaged():
                self.samples += self.previewer.draw(
                    step, self.writer.output.name, self.trainer.text)

    def _finish(self, progress: ProgressMeter, start: int) -> dict[str, Any]:
        """Saves the LoRA and proves it. `state` of the result is "done"; "unproven" where the LoRA
        is saved but the proof that it works failed; "nothing" where all was trained before."""
        trainer, writer = self.trainer, self.writer
        done = max(start, trainer.total)
        self.emit(Phase(name="save"))
        final = writer.final(done)
        trainer.optimizer.zero_grad(set_to_none=True)
        self.emit(Phase(name="verify"))
        with trainer.averaged():
            # The LoRA is saved by now: what keeps it from being proven must not fail the run.
            try:
                proof = verify_run(trainer, final)
            except Exception as error:
                if not (isinstance(error, (UserError, OSError)) or ran_out(error)):
                    raise
                proof = {"ok": False, "file": str(final), "reason": one_line(error)}
        free_memory()
        result: dict[str, Any] = {"state": "done" if proof["ok"] else "unproven"}
        if start >= trainer.total:
            if proof["ok"]:
                result["state"] = "nothing"
            result["nothing"] = {"step": start, "total": trainer.total, "file": str(final)}
        if not (result["state"] == "nothing" and writer.there_already):
            result["lora"] = str(final)
        if proof["ok"]:
            self.emit(Note(key="engine.proof", params=proof))
        for key, params in said_first({**result, "proof": proof}):
            self.emit(Note(key=key, params=dict(params)))
        return {**result, "name": writer.output.name, "steps": done,
                "seconds": writer.seconds(), "best": writer.best(),
                "samples": self.samples, "proof": proof, "base": self.base,
                "base_loras": trainer.base_loras.labels or None,
                "companions": lookup.summary(trainer.parts.beside), "checkpoints": writer.kept(),
                "parameters": sum(p.numel() for p in trainer.parameters),
                **progress.facts(), **self.guard.facts()}
