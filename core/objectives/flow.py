"""Flow matching: what a step learns on Flux, SD 3 and their like; the sibling of objective.py.

Latents go to noise in a straight line, x = (1 - s) latents + s noise, and the target is its
direction, noise - latents (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, 2210.02747).
How often each s is drawn, and its shift towards noise for large pictures: Esser et al. 2024
(2403.03206), sections 3.1 and 5.3.2; a sample's draw is a function of (seed, sample number).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.families.timestep_sampling import STEPS, TimestepSampling, shifted
from core.objectives.noise import Draw, sample_generator

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.families.base import Cond, Family

# Config keys that only a flow has; of a curve's own parameters: the curve.
KEYS = {"timestep_sampling": "", "flow_shift": "", "logit_mean": "logit_normal",
        "logit_std": "logit_normal", "mode_scale": "mode"}


def sampling_of(own: TimestepSampling, config: TrainConfig) -> TimestepSampling:
    """The family's, with what the user wants otherwise. A curve takes its own parameters only."""
    curve = own.curve if config.timestep_sampling == "auto" else config.timestep_sampling
    own = replace(own, curve=curve, logit_mean=config.logit_mean, logit_std=config.logit_std,
                  mode_scale=config.mode_scale)
    if config.flow_shift:
        own = replace(own, shift=config.flow_shift, line=None)
    return own


def without_effect(config: TrainConfig, own: TimestepSampling | None) -> list[str]:
    """The keys that were set and change nothing: of another curve, or on a base that learns no
    flow (None)."""
    curve = "" if own is None else sampling_of(own, config).curve
    return [key for key, wanted in KEYS.items()
            if getattr(config, key) != type(config).model_fields[key].default
            and (own is None or wanted not in ("", curve))]


class Flow:
    """The interface of objective.Diffusion; `numbers` are those in which the network computes."""

    kind = "flow"
    times = torch.float32                   # dtype of a draw's timesteps

    def __init__(self, sampling: TimestepSampling, noise_offset: float = 0.0,
                 numbers: torch.dtype = torch.float32) -> None:
        self.sampling, self.noise_offset, self.numbers = sampling, noise_offset, numbers

    def draw(self, seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Draw:
        """Noise and timesteps of samples `numbers`; `shape` (C, h, w) is of one sample."""
        shift = self.sampling.shift_at(shape[1], shape[2])
        noise, times = [], []
        for number in numbers:
            generator = sample_generator(seed, number)
            times.append(STEPS * shifted(self.sampling.draw(generator), shift))
            one = torch.randn(tuple(shape), generator=generator)
            if self.noise_offset:
                one += self.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
            noise.append(one)
        return Draw(torch.stack(noise), self._held(torch.tensor(times)))

    def draw_fixed(self, seed: int, numbers: Sequence[int], shape: Sequence[int],
                   share: float) -> Draw:
        """For validation: s = `share`, and noise that never changes."""
        noise = [torch.randn(tuple(shape), generator=sample_generator(seed, n)) for n in numbers]
        return Draw(torch.stack(noise), self._held(torch.full((len(noise),), share * STEPS)))

    def _held(self, times: Tensor) -> Tensor:
        """The nearest times of which the network reads exactly what it is told: else the noise in
        a picture were up to 0.4 % off what bf16 makes of its time. Rounding keeps the order, so
        that it settles."""
        while self.numbers != torch.float32 and not torch.equal(
                read := self.sampling.told(times, self.numbers), times):
            times = read
        return times

    def noisy_and_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s = (t / STEPS).view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise, noise - latents

    def losses(self, family: Family, denoiser: Any, latents: Tensor, draw: Draw, cond: Cond,
               autocast: Callable[[], contextlib.AbstractContextManager[object]],
               weights: Tensor | None = None) -> Tensor:
        """The forward pass of a step: loss of each sample (B,), fp32; all on one device."""
        noisy, target = self.noisy_and_target(latents, draw.noise, draw.timesteps)
        with autocast():
            predicted = family.predict(denoiser, noisy, draw.timesteps, cond)
        errors = (predicted.float() - target).square()
        return (errors if weights is None else errors * weights).mean((1, 2, 3))
