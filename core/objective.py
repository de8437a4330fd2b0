"""What a step learns: timesteps, noise, target and weighting of diffusion bases.

Every sample's randomness comes from a generator of its own, seeded by (seed, sample number):
the same samples give the same gradient whatever the batch size, and a resumed run needs no
saved generator state. Sources: Ho et al. 2020 (arXiv 2006.11239), v-prediction: Salimans & Ho
2022 (2202.00512), min-SNR: Hang et al. 2023 (2303.09556).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from core.families.base import Cond, Family, Objective, Parts

_MIX = 0x9E3779B97F4A7C15


def sample_generator(seed: int, number: int) -> torch.Generator:
    """The generator of one sample; neighbouring numbers give unrelated streams (splitmix64)."""
    z = (seed * 0xD1342543DE82EF95 + (number + 1) * _MIX) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed((z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Draw:
    """Random part of a batch; drawn on the CPU."""

    noise: Tensor          # (B, C, h, w)
    timesteps: Tensor      # (B,) int64

    def to(self, device: torch.device) -> Draw:
        return Draw(self.noise.to(device, non_blocking=True),
                    self.timesteps.to(device, non_blocking=True))


class Diffusion:
    """Noise schedule of a base with its target and per-sample weights."""

    def __init__(self, parts: Parts, min_snr_gamma: float = 0.0, noise_offset: float = 0.0,
                 device: torch.device | str = "cpu") -> None:
        config = {k: v for k, v in parts.scheduler.items() if not k.startswith("_")}
        alphas = DDPMScheduler.from_config(config).alphas_cumprod.double()
        self.kind: Objective = parts.objective
        self.noise_offset = noise_offset
        self.steps = len(alphas)
        self.signal = alphas.sqrt().float().to(device)
        self.noise_level = (1 - alphas).sqrt().float().to(device)
        snr = alphas / (1 - alphas)
        self.weights = _min_snr(snr, min_snr_gamma, self.kind).float().to(device)
        self.weighted = bool(min_snr_gamma)

    def draw(self, seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Draw:
        """Noise and timesteps of samples `numbers`; `shape` (C, h, w) is of one sample."""
        noise, timesteps = [], []
        for number in numbers:
            generator = sample_generator(seed, number)
            timesteps.append(int(torch.randint(self.steps, (), generator=generator)))
            one = torch.randn(tuple(shape), generator=generator)
            if self.noise_offset:
                one += self.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
            noise.append(one)
        return Draw(torch.stack(noise), torch.tensor(timesteps))

    def draw_fixed(self, seed: int, numbers: Sequence[int], shape: Sequence[int],
                   share: float) -> Draw:
        """For validation: the timestep at `share` of the schedule and noise that never changes."""
        noise = [torch.randn(tuple(shape), generator=sample_generator(seed, n)) for n in numbers]
        step = min(self.steps - 1, int(share * self.steps))
        return Draw(torch.stack(noise), torch.full((len(noise),), step))

    def noisy_and_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self.signal[t].view(-1, 1, 1, 1)
        b = self.noise_level[t].view(-1, 1, 1, 1)
        noisy = a * latents + b * noise
        return noisy, a * noise - b * latents if self.kind == "v_prediction" else noise

    def losses(self, family: Family, denoiser: Any, latents: Tensor, draw: Draw, cond: Cond,
               autocast: Callable[[], contextlib.AbstractContextManager[object]]) -> Tensor:
        """The forward pass of a step: loss of each sample (B,), fp32; all on one device."""
        noisy, target = self.noisy_and_target(latents, draw.noise, draw.timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast():
            predicted = family.predict(denoiser, noisy, draw.timesteps, cond)
        return self.loss(predicted, target, draw.timesteps)

    def loss(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error, one value per sample (B,), in fp32."""
        errors = (predicted.float() - target.float()).square().mean((1, 2, 3))
        return errors * self.weights[t] if self.weighted else errors


def _min_snr(snr: Tensor, gamma: float, kind: Objective) -> Tensor:
    if not gamma:
        return torch.ones_like(snr)
    clipped = snr.clamp(max=gamma)
    # Zero terminal SNR: epsilon's weight would be 0/0; the limit of min(snr, g) / snr is 1.
    return clipped / (snr + 1) if kind == "v_prediction" else clipped / snr.clamp(min=1e-8)
