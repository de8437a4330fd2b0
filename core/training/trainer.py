"""The step, for every family: draw noise, predict, weigh the loss, accumulate, clip, update."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.adapters import base_loras, init, lora
from core.adapters.text_encoder import TextTraining
from core.config import TrainConfig
from core.dataset.examples import Examples, say_too_long
from core.dataset.sampler import Batch, BucketSampler, Place, Regular
from core.dataset.text_embeddings import reading_of
from core.errors import Fix, UserError
from core.families.base import Cond, Family, Parts
from core.families.registry import naming
from core.jobs.control import Control
from core.jobs.events import Event
from core.lora_files.library import prompts_of
from core.objectives import diffusion
from core.objectives.diffusion import split_mask
from core.objectives.noise import Draw
from core.optim import optimizers
from core.optim.ema import PREFIX as EMA
from core.optim.ema import Ema
from core.training import rng
from core.training.checkpoint import State
from core.weights.precision import Precision, autocast, free_memory

VALIDATION_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)      # of the noise schedule
_FIXED_SEED = 20_240_607                           # validation noise, the same in every run

Emit = Callable[[Event], None]


class Trainer:
    """The step: everything that touches weights, and nothing else."""

    def __init__(self, config: TrainConfig, family: Family, parts: Parts, precision: Precision,
                 examples: Examples, emit: Emit, control: Control) -> None:
        self.config, self.family, self.parts, self.precision = config, family, parts, precision
        self.examples, self.emit, self.control = examples, emit, control
        self.denoiser = parts.denoiser
        parts.reading = reading_of(config)
        self.base_loras = parts.base_loras = base_loras.attach(
            self.denoiser, config, family.spec.id, precision, emit)
        self.parameters = lora.attach(self.denoiser, config, family.spec)
        self.text = self._text_training() if config.trains_text else None
        if config.init_lora_weights:
            init.start(self.trained_models(), config, family.spec, emit)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        lora.set_training(self.denoiser, True)
        groups = [*lora.groups(self.denoiser, config), *(self.text.groups() if self.text else ())]
        self.optimizer = optimizers.create(config, groups, emit)
        if self.text is not None:
            self.parameters = [*self.parameters, *self.text.parameters]
        self.ema = Ema(self.parameters, config.ema_decay) if config.ema_decay else None
        self.scaler = self.new_scaler()
        self.diffusion = diffusion.create(parts, config, precision.device,
                                          precision.compute)
        self.begin_at(Place())
        self.micro_batch = config.batch_size        # samples at once; see fallbacks.py
        self.lowered: dict[str, Any] = {}           # config keys that this run has changed
        self.stepping = False                       # weights may be half changed
        self._seen: list[tuple[int, Tensor, Tensor]] = []   # update, loss, 1.0 if not finite
        self.skipped: list[int] = []                # updates that were not finite, as far as
        self.read = -1                              # the device was asked
        self.drops = any((config.lora_dropout, config.rank_dropout, config.module_dropout))

    def begin_at(self, start: Place) -> None:
        """Where in the data the run begins: that decides what each update sees and how many
        there are. The learning rate follows the share of the run that is done, in epochs."""
        config = self.config
        self.sampler = self.new_sampler(config, start)
        self.total = config.max_train_steps or self.sampler.updates_until(config.epochs)
        unbroken = config.max_train_steps or config.epochs * self.sampler.updates_per_epoch
        self._schedule_shift = unbroken - self.total

    def new_sampler(self, config: TrainConfig, start: Place | None = None) -> BucketSampler:
        return _course(config, self.examples, start)

    def update(self, number: int) -> None:
        """One optimizer step on the batches of update `number`. Where its loss or gradient isn't
        finite nothing changes, which is found out later: nobody waits for the device here."""
        if self.text is not None and 0 < self.config.text_encoder_stop <= number:
            self._rest_text(self.text)
        shift = self._schedule_shift
        rate = optimizers.rate(self.config, max(0, number + shift), self.total + shift)
        optimizers.set_rate(self.optimizer, rate * self.lr_scale())
        if self.drops:                      # the masks are the only use of torch's own generator
            torch.manual_seed(self.config.seed + number)
        loss = self.accumulate(self.sampler.update(number))
        self.scaler.unscale_(self.optimizer)
        bad = (~torch.isfinite(self._clip() + loss)).float()
        self.stepping = True
        self._step(bad)
        if self.ema is not None:
            self.ema.update(number)
        self.stepping = False
        self.optimizer.zero_grad(set_to_none=True)
        self._seen.append((number, loss, bad))

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Adds the gradient of the mean loss over all samples of all batches. -> that loss"""
        samples = sum(len(b.indices) for b in batches)
        total = torch.zeros((), device=self.precision.device)
        for batch in (part for whole in batches for part in whole.parts(self.micro_batch)):
            latents, weights = self._latents(batch)
            draw = self.diffusion.draw(self.config.seed, batch.numbers, latents.shape[1:])
            losses = self.losses(latents, draw, self._cond(batch), weights)
            loss = losses.sum() / samples
            total += loss.detach()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return total

    def _clip(self) -> Tensor:
        """-> the gradient's norm before clipping."""
        if self.config.max_grad_norm:
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm,
                                                  foreach=True)
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None], foreach=True)

    def _step(self, bad: Tensor) -> None:
        """A step of the optimizer, none where `bad`. Fused kernels look at it on the device."""
        optimizer: Any = self.optimizer
        if self.scaler.is_enabled():                # looks for itself
            self.scaler.step(optimizer)
            self.scaler.update()
        elif bad.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, bad
            optimizer.step()
        elif not bad:
            optimizer.step()

    def new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.precision.device.type,
                                    enabled=self.precision.compute == torch.float16)

    def snapshot(self, update: int) -> State:
        """How training stands after `update` updates; whatever decides how it goes on is here."""
        return State(update, self.state(), optimizers.state(self.optimizer),
                     rng.state(self.precision.device),
                     self.scaler.state_dict() or None, dict(self.lowered))

    def restore(self, state: State) -> None:
        """Puts `state` back, but for what was lowered since. Raises UserError where it is another
        adapter's or optimizer's."""
        self.load_state(state.adapter)
        self.optimizer.state.clear()
        optimizers.load_state(self.optimizer, state.optimizer)
        rng.load_state(state.random, self.precision.device)
        self._seen = []
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)

    def lr_scale(self) -> float:
        """What is left of the rate after it was lowered."""
        rate = self.config.learning_rate
        return float(min(1.0, self.lowered.get("learning_rate", rate) / rate))

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
        self.set_training(False)
        total = 0.0
        for i in held_out:
            latents, weights = self.weighed(self.view(i, False)[None], [i])
            cond = self.cond([self.examples.items[i].captions[0]]) | self.size_conditioning([i],
                                                                                            [False])
            for share in VALIDATION_SHARES:
                draw = self.diffusion.draw_fixed(_FIXED_SEED, [i], latents.shape[1:], share)
                total += float(self.losses(latents, draw, cond, weights))
        self.set_training(True)
        return total / (len(held_out) * len(VALIDATION_SHARES))

    def mean_loss(self) -> float | None:
        """Mean of the finite ones since the last call, None without any; the others' updates are
        in `skipped`. Waits for the device, so it is asked for seldom."""
        if not self._seen:
            return None
        seen, self._seen = self._seen, []
        self.read = seen[-1][0]
        values = torch.stack([one for _, *pair in seen for one in pair]).view(-1, 2).tolist()
        self.skipped += [seen[i][0] for i, (_, bad) in enumerate(values) if bad]
        good = [loss for loss, bad in values if not bad]
        return sum(good) / len(good) if good else None

    def cond(self, texts: Sequence[str]) -> Cond:
        """Embeddings of a batch of captions, (B, ...): cached, or of the encoder in training."""
        if self.text is not None and self.text.live:
            return self.text.cond(texts)
        return self.examples.cond(texts, self.precision.device)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the adapter is what is shown and saved: its average, where one is kept."""
        return self.ema.applied() if self.ema else optimizers.averaged(self.optimizer)

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

    def trained_models(self) -> dict[str, Any]:
        """By part, as LoRA files name them; the denoiser first."""
        texts = self.text.models if self.text is not None else {}
        return {naming(self.family.spec.id)[0].name: self.denoiser, **texts}

    def _text_training(self) -> TextTraining:
        if not self.family.spec.text_targets:
            raise UserError("engine.no_text_training", family=self.family.spec.title, fixes=[
                Fix("fixes.no_text_training", {"text_encoder_lr": 0, "pivotal_tokens": 0})])
        text = self.family.load(self.parts.source, self.precision, frozenset({"text"})).text
        self.parts.text = text
        say_too_long(self.family, self.parts, self.examples.captions(), self.emit)
        return TextTraining(self.config, self.family, self.parts, self.precision)

    def _rest_text(self, text: TextTraining) -> None:
        if text.live:
            if self.ema is not None:
                self.ema.settle(text.parameters)
            self.examples.texts = text.rest(self.examples.captions(*prompts_of(self.config)))
            free_memory()

    def set_training(self, on: bool) -> None:
        lora.set_training(self.denoiser, on)
        if self.text is not None:
            self.text.set_training(on)

    def _latents(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Latents (B, C, h, w), and how much each place counts; None: all the same."""
        stacked = torch.stack([self.view(i, f) for i, f
                               in zip(batch.indices, self._flips(batch), strict=True)])
        return self.weighed(stacked, batch.indices)

    def _flips(self, batch: Batch) -> list[bool]:
        return [self.config.flip and self._dice(n, "flip") < 0.5 for n in batch.numbers]

    def size_conditioning(self, indices: Sequence[int], flips: Sequence[bool]) -> Cond:
        """What the family tells the denoiser of each picture's cut, (B, ...)."""
        rows = [self.family.size_conditioning(self.examples.items[i].frame(flipped))
                for i, flipped in zip(indices, flips, strict=True)]
        return {name: torch.cat([row[name] for row in rows]).to(self.precision.device)
                for name in rows[0]}

    def weighed(self, latents: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        config, regular, weights = self.config, self.examples.regular, None
        if config.masked_loss:
            latents, weights = split_mask(latents, config.unmasked_weight)
        if regular:
            prior = torch.tensor([config.prior_loss_weight if i in regular else 1.0
                                  for i in indices]).view(-1, 1, 1, 1)
            weights = prior if weights is None else weights * prior
        return latents, weights

    def view(self, index: int, flipped: bool) -> Tensor:
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
        return self.cond(texts) | self.size_conditioning(batch.indices, self._flips(batch))

    def _dice(self, number: int, use: str) -> float:
        return random.Random(f"{self.config.seed}-{use}-{number}").random()


def _course(config: TrainConfig, examples: Examples, start: Place | None) -> BucketSampler:
    def buckets(indices: Sequence[int]) -> list[tuple[int, int]]:
        return [examples.items[i].bucket for i in indices]
    chosen, more = examples.trained(), sorted(examples.regular)
    repeats = [examples.items[i].picture.repeats for i in chosen]
    regular = Regular(more, buckets(more), sum(repeats), config.reg_share,
                      config.seed) if more else None
    return BucketSampler(chosen, buckets(chosen), repeats, config.batch_size,
                         config.gradient_accumulation_steps, config.seed, regular, examples.names(),
                         start)
