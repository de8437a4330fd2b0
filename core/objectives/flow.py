"""Flow matching: what a step learns on Flux, SD 3 and their like; the sibling of diffusion.py.

Latents go to noise in a straight line, x = (1 - s) latents + s noise, and the target is its
direction, noise - latents (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, 2210.02747).
How often each s is drawn, and its shift towards noise for large pictures: Esser et al. 2024
(2403.03206), sections 3.1 and 5.3.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.families.timestep_sampling import STEPS, TimestepSampling, shifted
from core.objectives.noise import Draw, fixed_noise, sample_generator

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.families.base import Cond, Family

# Config keys that only a flow has, each with the curve whose parameter it is ("": of all).
KEYS = {"timestep_sampling": "", "flow_shift": "", "logit_mean": "logit_normal",
        "logit_std": "logit_normal", "mode_scale": "mode"}


def sampling_of(family: TimestepSampling, config: TrainConfig) -> TimestepSampling:
    """Returns the family's sampling, with what the config wants otherwise."""
    curve = family.curve if config.timestep_sampling == "auto" else config.timestep_sampling
    sampling = replace(family, curve=curve, logit_mean=config.logit_mean,
                       logit_std=config.logit_std, mode_scale=config.mode_scale)
    # A shift of the user's own is the same for all sizes: it takes the place of the family's line.
    if config.flow_shift:
        sampling = replace(sampling, shift=config.flow_shift, line=None)
    return sampling


def without_effect(config: TrainConfig, family: TimestepSampling | None) -> list[str]:
    """Returns the keys that were set and change nothing.

    They belong to another curve, or to a flow on a base that learns none (None).
    """
    curve = "" if family is None else sampling_of(family, config).curve
    return [key for key, needed in KEYS.items()
            if getattr(config, key) != type(config).model_fields[key].default
            and (family is None or needed not in ("", curve))]


class Flow:
    """Has the interface of diffusion.Diffusion.

    `numbers` is the number format in which the network computes.
    """

    kind = "flow"

    def __init__(self, sampling: TimestepSampling, noise_offset: float = 0.0,
                 numbers: torch.dtype = torch.float32) -> None:
        self.sampling, self.noise_offset, self.numbers = sampling, noise_offset, numbers

    def draw(self, seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Draw:
        """Draws noise and timesteps of samples `numbers`; `shape` (C, h, w) is of one sample."""
        shift = self.sampling.shift_at(shape[1], shape[2])
        noises, times = [], []
        for number in numbers:
            generator = sample_generator(seed, number)
            times.append(STEPS * shifted(self.sampling.draw(generator), shift))
            noise = torch.randn(tuple(shape), generator=generator)
            if self.noise_offset:
                noise += self.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
            noises.append(noise)
        return Draw(torch.stack(noises), self._exact(torch.tensor(times)))

    def draw_fixed(self, seed: int, numbers: Sequence[int], shape: Sequence[int],
                   share: float) -> Draw:
        """For validation: s = `share`, and noise that never changes."""
        times = torch.full((len(numbers),), share * STEPS)
        return Draw(fixed_noise(seed, numbers, shape), self._exact(times))

    def _exact(self, times: Tensor) -> Tensor:
        """Returns the nearest times that the network's number format can tell exactly.

        Otherwise the noise in a picture would be up to 0.4 % off what bf16 makes of its time.
        """
        # Rounding keeps the order, so that this comes to an end.
        while self.numbers != torch.float32 and not torch.equal(
                read := self.sampling.model_times(times, self.numbers), times):
            times = read
        return times

    def noisy_and_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the model's input and target, (B, C, h, w) each, at the times `t` (B,)."""
        s = (t / STEPS).view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise, noise - latents

    def losses(self, family: Family, denoiser: Any, latents: Tensor, draw: Draw, cond: Cond,
               autocast: Callable[[], contextlib.AbstractContextManager[object]],
               weights: Tensor | None = None) -> Tensor:
        """Does the forward pass of a step; returns the loss of each sample (B,) in fp32."""
        noisy, target = self.noisy_and_target(latents, draw.noise, draw.timesteps)
        with autocast():
            predicted = family.predict(denoiser, noisy, draw.timesteps, cond)
        errors = (predicted.float() - target).square()
        return (errors if weights is None else errors * weights).mean((1, 2, 3))
