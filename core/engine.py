"""train(): the one loop, for every family.

    scan -> buckets -> cache latents and embeddings -> attach LoRA
         -> noise -> predict -> weighted loss -> accumulate -> clip -> step
         -> checkpoint, preview, validate -> save -> prove that the file works
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import extensions, families, lora, lora_init, optim, regularise
from core.callbacks import Callbacks
from core.config import TrainConfig, resolve
from core.control import Control
from core.course import Batch, Course, Regular
from core.ema import PREFIX as EMA
from core.ema import Ema
from core.events import Event, Note, Phase
from core.examples import Encoder, Examples, Stopped, find, say_too_long
from core.families.base import Cond, Family, Parts, Precision
from core.faults import Fault
from core.lookout import Lookout, weigh
from core.meter import Meter
from core.naming import NAMINGS
from core.objective import Diffusion, Draw, split_mask, zero_terminal
from core.plan import Base
from core.precision import autocast, choose, free_memory, load_denoiser
from core.preview import Previewer
from core.saving import Keeper
from core.text_training import TextTraining
from core.verify import verify_run

VALIDATION_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)      # of the noise schedule
_FIXED_SEED = 20_240_607                           # validation noise, the same in every run

Emit = Callable[[Event], None]


def train(config: TrainConfig, emit: Emit, control: Control,
          beside: Path | None = None) -> dict[str, Any]:
    """Runs a training from a folder of pictures to a proven LoRA file.

    `beside` is the folder that relative paths are looked up in first (the config's own).
    Returns the facts for the summary. Raises Fault for whatever a user can mend.
    """
    config = extensions.located(config, beside)
    with Callbacks(config.callbacks, emit, control) as callbacks:
        return _train(config, callbacks, control, beside)


def _train(config: TrainConfig, emit: Callbacks, control: Control, beside: Path | None
           ) -> dict[str, Any]:
    began = time.time()
    for key, name in extensions.named_in(config):
        emit(Note(key="extensions.used", params={"key": key, "name": name}))
    torch.manual_seed(config.seed)
    source = _source(config, beside)
    kind = families.detect(source) if config.family == "auto" else config.family
    family = families.get(kind)
    precision = choose(config.precision, config.device)
    parts = family.load(source, precision, frozenset())
    if config.prediction_type != "auto":
        parts.objective = config.prediction_type
    if config.zero_terminal_snr:
        zero_terminal(parts)
    examples = find(config, *_picture_paths(config, beside), parts.native_size,
                    parts.bucket_step, emit)
    try:
        if config.regularised:
            regularise.add(config, examples, family, parts, precision, beside, emit, control)
        lookout = Lookout(config, Base.of(source, kind), precision.device,
                          weigh(examples.items, config), emit)
        lookout.announce()
        Encoder(family, source, precision, config, emit, control).fill(
            examples, config.sample_prompts)
    except Stopped:
        return {"state": "stopped", "steps": 0, "seconds": time.time() - began}
    emit(Phase(name="load"))
    parts.denoiser = load_denoiser(config, family, source, precision, emit)
    trainer = Trainer(config, family, parts, precision, examples, emit, control)
    keeper = Keeper(trainer, _output(config), began)
    with lookout:
        return Session(trainer, keeper, lookout, began, emit.after_update).run()


class Trainer:
    """The step: everything that touches weights, and nothing else."""

    def __init__(self, config: TrainConfig, family: Family, parts: Parts, precision: Precision,
                 examples: Examples, emit: Emit, control: Control) -> None:
        self.config, self.family, self.parts, self.precision = config, family, parts, precision
        self.examples, self.emit, self.control = examples, emit, control
        self.denoiser = parts.denoiser
        self.parameters = lora.attach(self.denoiser, config, family.spec)
        self.text = self._text_training() if config.trains_text else None
        if config.init_lora_weights:
            lora_init.start(self._trained_models(), config, family.spec, emit)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        lora.set_training(self.denoiser, True)
        groups = [*lora.groups(self.denoiser, config), *(self.text.groups() if self.text else ())]
        self.optimizer = optim.create(config, groups, emit)
        if self.text is not None:
            self.parameters = [*self.parameters, *self.text.parameters]
        self.ema = Ema(self.parameters, config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(
            precision.device.type, enabled=precision.compute == torch.float16)
        self.diffusion = Diffusion(parts, config, precision.device)
        self.course = _course(config, examples)
        self.total = config.max_train_steps or config.epochs * self.course.updates_per_epoch
        self.loss_sum = torch.zeros((), device=precision.device)
        self.micro_batch = config.batch_size        # samples at once; see `lower`
        self.drops = any((config.lora_dropout, config.rank_dropout, config.module_dropout))

    def update(self, number: int) -> None:
        """One optimizer step on the batches of update `number`."""
        if self.text is not None and 0 < self.config.text_encoder_stop <= number:
            self._rest_text(self.text)
        optim.set_rate(self.optimizer, optim.rate(self.config, number, self.total))
        if self.drops:                      # the masks are the only use of torch's own generator
            torch.manual_seed(self.config.seed + number)
        self.accumulate(self.course.update(number))
        if self.config.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm,
                                           foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(number)

    def accumulate(self, batches: Sequence[Batch]) -> None:
        """Adds the gradient of the mean loss over all samples of all batches."""
        samples = sum(len(b.indices) for b in batches)
        for batch in (part for whole in batches for part in whole.parts(self.micro_batch)):
            latents, weights = self._latents(batch)
            draw = self.diffusion.draw(self.config.seed, batch.numbers, latents.shape[1:])
            losses = self.losses(latents, draw, self._cond(batch), weights)
            loss = losses.sum() / samples
            self.loss_sum += loss.detach()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def lower(self) -> dict[str, Any] | None:
        """The next gentler way to make the same updates: half the samples at once, then
        activation checkpointing. -> the config keys that it amounts to; None: nothing is left."""
        if self.micro_batch > 1:
            self.micro_batch = -(-self.micro_batch // 2)
            return {"batch_size": self.micro_batch}
        if not getattr(self.denoiser, "is_gradient_checkpointing", True):
            self.denoiser.enable_gradient_checkpointing()
            return {"gradient_checkpointing": True}
        return None

    def losses(self, latents: Tensor, draw: Draw, cond: Cond,
               weights: Tensor | None = None) -> Tensor:
        """Loss of each sample (B,), fp32; `weights` (B, 1, h, w) or (B, 1, 1, 1): of places."""
        device = self.precision.device
        return self.diffusion.losses(
            self.family, self.denoiser, latents.to(device, non_blocking=True), draw.to(device),
            cond, lambda: autocast(self.precision),
            None if weights is None else weights.to(device, non_blocking=True))

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the held-out pictures at fixed timesteps and noise: comparable between
        steps and runs. None without held-out pictures."""
        held_out = sorted(self.examples.held_out)
        if not held_out:
            return None
        self._set_training(False)
        total = 0.0
        for i in held_out:
            latents, weights = self._weighed(self._view(i, False)[None], [i])
            cond = self.cond([self.examples.items[i].captions[0]])
            for share in VALIDATION_SHARES:
                draw = self.diffusion.draw_fixed(_FIXED_SEED, [i], latents.shape[1:], share)
                total += float(self.losses(latents, draw, cond, weights))
        self._set_training(True)
        return total / (len(held_out) * len(VALIDATION_SHARES))

    def mean_loss(self, updates: int) -> float:
        """Mean since the last call. Waits for the device, so it is asked for seldom."""
        value = float(self.loss_sum) / max(1, updates)
        self.loss_sum.zero_()
        return value

    def cond(self, texts: Sequence[str]) -> Cond:
        """Embeddings of a batch of captions, (B, ...): cached, or of the encoder in training."""
        if self.text is not None and self.text.live:
            return self.text.cond(texts)
        return self.examples.cond(texts, self.precision.device)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the adapter is what is shown and saved: its average, where one is kept."""
        return self.ema.applied() if self.ema else optim.averaged(self.optimizer)

    def state(self) -> dict[str, Tensor]:
        """All that is learned, for a checkpoint."""
        found = lora.state(self.denoiser)
        for more in (self.text, self.ema):
            found |= more.state() if more is not None else {}
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        averages = {k: v for k, v in tensors.items() if k.startswith(EMA)}
        texts = {k: v for k, v in tensors.items() if self.text is not None and self.text.owns(k)}
        lora.load_state(self.denoiser, {k: v for k, v in tensors.items()
                                        if k not in averages and k not in texts})
        if self.text is not None:
            self.text.load_state(texts)
        if self.ema is not None:
            self.ema.load_state(averages)

    def _trained_models(self) -> dict[str, Any]:
        """By part, as LoRA files name them; the denoiser first."""
        texts = self.text.models if self.text is not None else {}
        return {NAMINGS[self.family.spec.id][0].name: self.denoiser, **texts}

    def _text_training(self) -> TextTraining:
        text = self.family.load(self.parts.source, self.precision, frozenset({"text"})).text
        self.parts.text = text
        say_too_long(self.family, self.parts, self.examples.captions(), self.emit)
        return TextTraining(self.config, self.family, self.parts, self.precision)

    def _rest_text(self, text: TextTraining) -> None:
        if text.live:
            if self.ema is not None:
                self.ema.settle(text.parameters)
            self.examples.texts = text.rest(self.examples.captions(*self.config.sample_prompts))
            free_memory()

    def _set_training(self, on: bool) -> None:
        lora.set_training(self.denoiser, on)
        if self.text is not None:
            self.text.set_training(on)

    def _latents(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Latents (B, C, h, w), and how much each place counts; None: all the same."""
        flips = ([self._dice(n, "flip") < 0.5 for n in batch.numbers] if self.config.flip
                 else [False] * len(batch.numbers))
        stacked = torch.stack([self._view(i, f)
                               for i, f in zip(batch.indices, flips, strict=True)])
        return self._weighed(stacked, batch.indices)

    def _weighed(self, latents: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        config, regular, weights = self.config, self.examples.regular, None
        if config.masked_loss:
            latents, weights = split_mask(latents, config.unmasked_weight)
        if regular:
            prior = torch.tensor([config.prior_loss_weight if i in regular else 1.0
                                  for i in indices]).view(-1, 1, 1, 1)
            weights = prior if weights is None else weights * prior
        return latents, weights

    def _view(self, index: int, flipped: bool) -> Tensor:
        latents = self.examples.latents[index]
        return latents[int(flipped)] if self.config.flip else latents

    def _cond(self, batch: Batch) -> Cond:
        texts = []
        for index, number in zip(batch.indices, batch.numbers, strict=True):
            variants = self.examples.items[index].captions
            dropped = (self.config.caption_dropout > 0
                       and self._dice(number, "drop") < self.config.caption_dropout)
            choice = (int(self._dice(number, "caption") * len(variants)) if len(variants) > 1
                      else 0)
            texts.append("" if dropped else variants[choice])
        return self.cond(texts)

    def _dice(self, number: int, use: str) -> float:
        return random.Random(f"{self.config.seed}-{use}-{number}").random()


class Session:
    """A run around the step: progress, requests, checkpoints, previews, the end."""

    def __init__(self, trainer: Trainer, keeper: Keeper, lookout: Lookout,
                 began: float, after_update: Callable[[Trainer, int], None]) -> None:
        self.trainer, self.keeper, self.lookout, self.began = trainer, keeper, lookout, began
        self.after_update = after_update
        self.config, self.emit, self.control = trainer.config, trainer.emit, trainer.control
        self.previewer = Previewer(trainer.family, trainer.parts, trainer.precision, self.config,
                                   trainer.cond, keeper.output / "samples", self.emit)
        self.samples: list[str] = []
        self.first_step_s = 0.0

    def run(self) -> dict[str, Any]:
        start = self.keeper.resume() if self.config.resume else 0
        meter = Meter(self.trainer, start, self.lookout)
        self.emit(Phase(name="train", done=start, total=self.trainer.total))
        if not start:
            self._preview(0)
        for update in range(start, self.trainer.total):
            if self._asked_to_stop(update):
                return self._stopped(update, meter)
            begins = time.perf_counter()
            self.trainer.update(update)
            self.after_update(self.trainer, update + 1)
            meter.tick(update + 1)
            self.lookout.between_steps(self.trainer, time.perf_counter() - begins)
            self._after(update + 1, meter)
        return self._finish(meter)

    def _after(self, done: int, meter: Meter) -> None:
        config, last = self.config, done == self.trainer.total
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

    def _asked_to_stop(self, update: int) -> bool:
        self.control.wait_while_paused()
        return self.control.stopping

    def _stopped(self, update: int, meter: Meter) -> dict[str, Any]:
        if update:
            self.keeper.checkpoint(update)
        return {"state": "stopped", "steps": update, "seconds": time.time() - self.began,
                "checkpoint": str(self.keeper.last) if self.keeper.last else None}

    def _finish(self, meter: Meter) -> dict[str, Any]:
        trainer, keeper = self.trainer, self.keeper
        self.emit(Phase(name="save"))
        final = keeper.final()
        trainer.optimizer.zero_grad(set_to_none=True)
        self.emit(Phase(name="verify"))
        with trainer.averaged():
            proof = verify_run(trainer, final)
        free_memory()
        self.emit(Note(key="engine.proof" if proof["ok"] else "engine.proof_failed",
                       params=proof))
        return {"state": "done", "lora": str(final), "name": keeper.name,
                "steps": trainer.total, "seconds": time.time() - self.began,
                "best": keeper.best(), "samples": self.samples, "proof": proof,
                "checkpoints": keeper.kept(), "parameters": sum(
                    p.numel() for p in trainer.parameters), **meter.facts(),
                **self.lookout.facts()}


def _course(config: TrainConfig, examples: Examples) -> Course:
    def buckets(indices: Sequence[int]) -> list[tuple[int, int]]:
        return [examples.items[i].bucket for i in indices]
    chosen, more = examples.trained(), sorted(examples.regular)
    repeats = [examples.items[i].picture.repeats for i in chosen]
    regular = Regular(more, buckets(more), sum(repeats), config.reg_share,
                      config.seed) if more else None
    return Course(chosen, buckets(chosen), repeats, config.batch_size,
                  config.gradient_accumulation_steps, config.seed, regular)


def _source(config: TrainConfig, beside: Path | None) -> Path:
    if not config.base_model:
        raise Fault("engine.key_missing", key="base_model")
    if config.base_model == "demo":
        from core import paths
        return paths.DEMO / "base"
    return resolve(config.base_model, beside)


def _picture_paths(config: TrainConfig, beside: Path | None) -> tuple[Path, Path | None]:
    if not config.train_data_dir:
        raise Fault("engine.key_missing", key="train_data_dir")
    metadata = resolve(config.metadata_path, beside) if config.metadata_path else None
    return resolve(config.train_data_dir, beside), metadata


def _output(config: TrainConfig) -> Path:
    return Path(config.output_dir).expanduser().absolute()
