"""The training step of every family: noise, prediction, weighted loss, gradient, optimizer.

`Trainer.update` is the step; core/training/run.py is the run around it.
"""

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

# Shares of the noise schedule at which the validation loss is measured.
VALIDATION_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
# Validation noise is the same in every run, so that the losses of two runs can be compared.
_FIXED_SEED = 20_240_607

Emit = Callable[[Event], None]


class Trainer:
    """Everything that touches weights between two updates, and nothing else."""

    def __init__(self, config: TrainConfig, family: Family, parts: Parts, precision: Precision,
                 examples: Examples, emit: Emit, control: Control) -> None:
        self.config, self.family, self.parts, self.precision = config, family, parts, precision
        self.examples, self.emit, self.control = examples, emit, control
        self.denoiser = parts.denoiser
        parts.reading = reading_of(config)
        # LoRAs of the base are frozen and come first: the new adapter learns on top of them.
        self.base_loras = parts.base_loras = base_loras.attach(
            self.denoiser, config, family.spec.id, precision, emit)
        self.parameters = lora.attach(self.denoiser, config, family.spec)
        # Text encoders that learn stay in memory; the cache needed them only for a moment.
        self.text: TextTraining | None = None
        if config.trains_text:
            parts.text = family.load(parts.source, precision, frozenset({"text"})).text
            say_too_long(family, parts, examples.captions(), emit)
            self.text = TextTraining(config, family, parts, precision)
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
        self.diffusion = diffusion.create(parts, config, precision.device, precision.compute)
        self.begin_at(Place())

        # What a run lowers when memory runs out (core/training/fallbacks.py): samples that go
        # through the denoiser at once, and the config keys that it has changed.
        self.micro_batch = config.batch_size
        self.lowered: dict[str, Any] = {}
        # True while the optimizer steps: a failure then leaves some weights new and others old.
        self.stepping = False
        # Losses stay on the device until `mean_loss` asks for them: (update, loss, 1.0 if not
        # finite). `skipped` are the updates that turned out not finite, up to update `read`.
        self._seen: list[tuple[int, Tensor, Tensor]] = []
        self.skipped: list[int] = []
        self.read = -1
        self.uses_dropout = any((config.lora_dropout, config.rank_dropout, config.module_dropout))

    def update(self, number: int) -> None:
        """Makes one optimizer step on the batches of update `number`.

        Where the loss or the gradient isn't finite, no weight changes. That is found out later, by
        `mean_loss`: nothing here waits for the device."""
        # The text encoder stops learning at this update: its captions are embedded for the last
        # time, and its memory is free for the rest of the run.
        if self.text and self.text.live and 0 < self.config.text_encoder_stop <= number:
            if self.ema is not None:
                self.ema.settle(self.text.parameters)
            self.examples.texts = self.text.rest(self.examples.captions(*prompts_of(self.config)))
            free_memory()

        # Less where the run has lowered its learning rate.
        usual = self.config.learning_rate
        lowered = float(min(1.0, self.lowered.get("learning_rate", usual) / usual))
        optimizers.set_rate(self.optimizer, self.planned_rate(number) * lowered)

        # Dropout masks are the only use of torch's own generator: seeded by the update's number,
        # they are the same in a resumed run.
        if self.uses_dropout:
            torch.manual_seed(self.config.seed + number)
        loss = self.accumulate(self.sampler.update(number))

        # fp16 gradients are scaled up against underflow; they are clipped at their real size.
        self.scaler.unscale_(self.optimizer)
        if self.config.max_grad_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm,
                                                  foreach=True)
        else:
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters if p.grad is not None], foreach=True)
        not_finite = (~torch.isfinite(norm + loss)).float()

        optimizer: Any = self.optimizer
        self.stepping = True
        if self.scaler.is_enabled():
            # GradScaler looked for itself in `unscale_`.
            self.scaler.step(optimizer)
            self.scaler.update()
        elif not_finite.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            # Fused kernels look at the flag on the device, so that the CPU need not wait.
            optimizer.grad_scale, optimizer.found_inf = None, not_finite
            optimizer.step()
        elif not not_finite:
            optimizer.step()
        if self.ema is not None:
            self.ema.update(number)
        self.stepping = False
        self.optimizer.zero_grad(set_to_none=True)
        self._seen.append((number, loss, not_finite))

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Adds the gradient of the mean loss over all samples of all batches, micro-batch by
        micro-batch, and returns that loss, without waiting for the device."""
        samples = sum(len(b.indices) for b in batches)
        total = torch.zeros((), device=self.precision.device)
        for batch in (part for whole in batches for part in whole.parts(self.micro_batch)):
            # What happens to a sample is decided by its number alone, so that batch size,
            # accumulation and resuming change nothing.
            flips = [self.config.flip and self._dice(n, "flip") < 0.5 for n in batch.numbers]
            latents, weights = self.weighed(
                torch.stack(list(map(self.view, batch.indices, flips))), batch.indices)
            cond = self.cond(self.captions_of(batch)) | self.size_conditioning(batch.indices, flips)
            draw = self.diffusion.draw(self.config.seed, batch.numbers, latents.shape[1:])
            losses = self.losses(latents, draw, cond, weights)
            # Divided by all samples of the update and not by this part's: parts may differ in size.
            loss = losses.sum() / samples
            total += loss.detach()
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return total

    # --- a batch ---

    def view(self, index: int, flipped: bool) -> Tensor:
        """Latents of one picture (C, h, w); with `flip` the cache holds both ways round."""
        latents = self.examples.latents[index]
        return latents[int(flipped)] if self.config.flip else latents

    def weighed(self, latents: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Splits the mask off the latents (B, C, h, w). Returns them with the weight of each place
        in the loss, (B, 1, h, w) or (B, 1, 1, 1); None where all places count the same."""
        config, regular, weights = self.config, self.examples.regular, None
        if config.masked_loss:
            latents, weights = split_mask(latents, config.unmasked_weight)
        if regular:
            prior = torch.tensor([config.prior_loss_weight if i in regular else 1.0
                                  for i in indices]).view(-1, 1, 1, 1)
            weights = prior if weights is None else weights * prior
        return latents, weights

    def captions_of(self, batch: Batch) -> list[str]:
        """The caption that each sample is learned with: one of its variants, or none."""
        texts = []
        for index, number in zip(batch.indices, batch.numbers, strict=True):
            variants = self.examples.items[index].captions
            dropped = self._dice(number, "drop") < self.config.caption_dropout
            choice = int(self._dice(number, "caption") * len(variants))
            texts.append("" if dropped else variants[choice])
        return texts

    def cond(self, texts: Sequence[str]) -> Cond:
        """Embeddings of a batch of captions, (B, ...): cached, or of the encoder in training."""
        if self.text is not None and self.text.live:
            return self.text.cond(texts)
        return self.examples.cond(texts, self.precision.device)

    def size_conditioning(self, indices: Sequence[int], flips: Sequence[bool]) -> Cond:
        """What the family tells the denoiser about each picture's crop, (B, ...)."""
        rows = [self.family.size_conditioning(self.examples.items[i].frame(flipped))
                for i, flipped in zip(indices, flips, strict=True)]
        return {name: torch.cat([row[name] for row in rows]).to(self.precision.device)
                for name in rows[0]}

    def plain_sample(self, index: int) -> tuple[Tensor, Tensor | None, Cond]:
        """Latents, weights and embeddings of one picture (1, ...), nothing of it left to chance."""
        cond = self.cond([self.examples.items[index].captions[0]])
        return (*self.weighed(self.view(index, False)[None], [index]),
                cond | self.size_conditioning([index], [False]))

    def _dice(self, number: int, use: str) -> float:
        """A random number from 0 to 1 of sample `number`, another one for each use."""
        return random.Random(f"{self.config.seed}-{use}-{number}").random()

    # --- the loss ---

    def losses(self, latents: Tensor, draw: Draw, cond: Cond,
               weights: Tensor | None = None) -> Tensor:
        """Loss of each sample (B,), fp32; `weights` (B, 1, h, w) or (B, 1, 1, 1): of places."""
        device = self.precision.device
        return self.diffusion.losses(
            self.family, self.denoiser, latents.to(device, non_blocking=True), draw.to(device),
            cond, lambda: autocast(self.precision),
            None if weights is None else weights.to(device, non_blocking=True))

    def mean_loss(self) -> float | None:
        """Mean of the finite losses since the last call; None without any. Updates whose loss was
        not finite are appended to `skipped`. Waits for the device, so it is called seldom."""
        if not self._seen:
            return None
        seen, self._seen = self._seen, []
        self.read = seen[-1][0]
        # Stacked on the device: one transfer for all of them.
        values = torch.stack([value for _, *pair in seen for value in pair]).view(-1, 2).tolist()
        self.skipped += [seen[i][0] for i, (_, bad) in enumerate(values) if bad]
        finite = [loss for loss, bad in values if not bad]
        return sum(finite) / len(finite) if finite else None

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the held-out pictures at fixed timesteps and noise: comparable between
        steps and runs. None without held-out pictures."""
        if not self.examples.held_out:
            return None
        self.set_training(False)
        losses = []
        for i in sorted(self.examples.held_out):
            latents, weights, cond = self.plain_sample(i)
            for share in VALIDATION_SHARES:
                draw = self.diffusion.draw_fixed(_FIXED_SEED, [i], latents.shape[1:], share)
                losses.append(float(self.losses(latents, draw, cond, weights)))
        self.set_training(True)
        return sum(losses) / len(losses)

    # --- the course of the run ---

    def begin_at(self, start: Place) -> None:
        """Sets where in the data the run begins, and with it what each update sees and how many
        updates there are. The learning rate follows the share of the run that is done, in
        epochs."""
        config = self.config
        self.sampler = self.new_sampler(config, start)
        self.total = config.max_train_steps or self.sampler.updates_until(config.epochs)
        unbroken = config.max_train_steps or config.epochs * self.sampler.updates_per_epoch
        self._schedule_shift = unbroken - self.total

    def planned_rate(self, number: int) -> float:
        """The learning rate of update `number` by the config's schedule."""
        shift = self._schedule_shift
        return optimizers.rate(self.config, max(0, number + shift), self.total + shift)

    def new_sampler(self, config: TrainConfig, start: Place | None = None) -> BucketSampler:
        """The order in which a run with this config sees the pictures."""
        examples = self.examples

        def buckets(indices: Sequence[int]) -> list[tuple[int, int]]:
            return [examples.items[i].bucket for i in indices]

        chosen, regular = examples.trained(), sorted(examples.regular)
        repeats = [examples.items[i].picture.repeats for i in chosen]
        prior = Regular(regular, buckets(regular), sum(repeats), config.reg_share,
                        config.seed) if regular else None
        return BucketSampler(chosen, buckets(chosen), repeats, config.batch_size,
                             config.gradient_accumulation_steps, config.seed, prior,
                             examples.names(), start)

    def new_scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler that does nothing unless the run computes in fp16."""
        return torch.amp.GradScaler(self.precision.device.type,
                                    enabled=self.precision.compute == torch.float16)

    # --- what is learned ---

    def trained_models(self) -> dict[str, Any]:
        """The models with an adapter by part, as LoRA files name them; the denoiser first."""
        texts = self.text.models if self.text is not None else {}
        return {naming(self.family.spec.id)[0].name: self.denoiser, **texts}

    def set_training(self, on: bool) -> None:
        """Switches the adapters' dropout on or off."""
        lora.set_training(self.denoiser, on)
        if self.text is not None:
            self.text.set_training(on)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the adapter is what is shown and saved: its average, where one is kept."""
        return self.ema.applied() if self.ema else optimizers.averaged(self.optimizer)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that is learned, for a checkpoint."""
        tensors = lora.state(self.denoiser)
        for more in (self.text, self.ema):
            tensors |= more.state() if more is not None else {}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `state` returned."""
        averages = {k: v for k, v in tensors.items() if k.startswith(EMA)}
        texts = {k: v for k, v in tensors.items() if self.text is not None and self.text.owns(k)}
        others = averages.keys() | texts.keys()
        lora.load_state(self.denoiser, {k: v for k, v in tensors.items() if k not in others})
        if self.text is not None:
            self.text.load_state(texts)
        if self.ema is not None:
            self.ema.load_state(averages)

    def snapshot(self, update: int) -> State:
        """The state of the training after `update` updates: all that decides how it goes on."""
        return State(update, self.state(), optimizers.state(self.optimizer),
                     rng.state(self.precision.device), self.scaler.state_dict() or None,
                     dict(self.lowered))

    def restore(self, state: State) -> None:
        """Puts `state` back, except for what was lowered since. Raises UserError where the state
        is of another adapter or optimizer."""
        self.load_state(state.adapter)
        self.optimizer.state.clear()
        optimizers.load_state(self.optimizer, state.optimizer)
        rng.load_state(state.random, self.precision.device)
        self._seen = []
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
