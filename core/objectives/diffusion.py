"""What a step learns: timesteps, noise, target and weighting of diffusion bases.

Every sample's randomness comes from a generator of its own, seeded by (seed, sample number):
the same samples give the same gradient whatever the batch size, and a resumed run needs no
saved generator state. Sources: Ho et al. 2020 (arXiv 2006.11239), v-prediction: Salimans & Ho
2022 (2202.00512), min-SNR: Hang et al. 2023 (2303.09556), zero-terminal SNR: Lin et al. 2023
(2305.08891), debiased estimation: Yu et al. 2023 (2310.08442), scheduled Huber: Khrapov et al.
2024 (2403.16728), pyramid noise: Whitaker 2023 ("Multi-Resolution Noise for Diffusion Model
Training").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from core.config import TrainConfig
from core.errors import Fix, UserError
from core.families.base import Cond, Family, Objective, Parts
from core.objectives.flow import Flow, sampling_of
from core.objectives.noise import Draw, pyramid, sample_generator


def create(parts: Parts, config: TrainConfig, device: torch.device | str = "cpu",
           numbers: torch.dtype = torch.float32) -> Diffusion | Flow:
    """What this base learns, as its family says; `numbers`: in which its denoiser computes."""
    if parts.flow is not None:
        return Flow(sampling_of(parts.flow, config), config.noise_offset, numbers)
    return Diffusion(parts, config, device)


class Diffusion:
    """Noise schedule of a base with its target and per-sample weights."""

    times = torch.int64                     # dtype of a draw's timesteps

    def __init__(self, parts: Parts, config: TrainConfig | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.config = config = config or TrainConfig()
        options = {k: v for k, v in parts.scheduler.items() if not k.startswith("_")}
        alphas = DDPMScheduler.from_config(options).alphas_cumprod.double()
        self.kind: Objective = parts.objective
        self.steps = len(alphas)
        self.signal = alphas.sqrt().float().to(device)
        self.noise_level = (1 - alphas).sqrt().float().to(device)
        snr = alphas / (1 - alphas)
        weights = _min_snr(snr, config.min_snr_gamma, self.kind)
        if config.debiased_estimation:
            weights = weights * _debiased(snr, self.kind)
        self.weights = weights.float().to(device)
        self.weighted = bool(config.min_snr_gamma) or config.debiased_estimation
        self.deltas = (None if config.loss_type == "l2"
                       else huber_deltas(alphas, config).float().to(device))

    def draw(self, seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Draw:
        """Noise and timesteps of samples `numbers`; `shape` (C, h, w) is of one sample."""
        config = self.config
        noise, timesteps = [], []
        for number in numbers:
            generator = sample_generator(seed, number)
            timesteps.append(int(torch.randint(self.steps, (), generator=generator)))
            one = torch.randn(tuple(shape), generator=generator)
            if config.multires_noise_iterations:
                one = pyramid(one, config.multires_noise_iterations,
                              config.multires_noise_discount, generator)
            if config.noise_offset:
                one += config.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
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
               autocast: Callable[[], contextlib.AbstractContextManager[object]],
               weights: Tensor | None = None) -> Tensor:
        """The forward pass of a step: loss of each sample (B,), fp32; all on one device."""
        noisy, target = self.noisy_and_target(latents, draw.noise, draw.timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast():
            predicted = family.predict(denoiser, noisy, draw.timesteps, cond)
        return self.loss(predicted, target, draw.timesteps, weights)

    def loss(self, predicted: Tensor, target: Tensor, t: Tensor,
             weights: Tensor | None = None) -> Tensor:
        """Mean error, weighted by timestep and, with `weights` (B, 1, h, w), by place: one value
        per sample (B,), in fp32."""
        errors = self._errors(predicted.float(), target.float(), t)
        if weights is not None:
            errors = errors * weights
        errors = errors.mean((1, 2, 3))
        return errors * self.weights[t] if self.weighted else errors

    def _errors(self, predicted: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squares; or twice torch's Huber or smooth L1 loss, whose delta goes with the timestep:
        Huber equals the squares below it."""
        if self.deltas is None:
            return (predicted - target).square()
        delta = self.deltas[t].view(-1, 1, 1, 1)
        away = (predicted - target).abs()
        huber = torch.where(away < delta, away.square(), delta * (2 * away - delta))
        return huber if self.config.loss_type == "huber" else huber / delta


def split_mask(latents: Tensor, outside: float) -> tuple[Tensor, Tensor]:
    """(B, C + 1, h, w) -> latents (B, C, h, w) and weights (B, 1, h, w): 1 where the mask is white,
    `outside` where it is black."""
    return latents[:, :-1], outside + (1 - outside) * latents[:, -1:]


def zero_terminal(parts: Parts) -> None:
    """Rescales the base's schedule, for training and pictures alike, so that its last timestep is
    noise alone. Raises UserError for a base that predicts noise: nothing could be learned there."""
    if parts.objective == "epsilon":
        raise UserError("engine.zero_snr_epsilon", fixes=[
            Fix("fixes.no_zero_snr", {"zero_terminal_snr": False}),
            Fix("fixes.predicts", {"prediction_type": "v_prediction"},
                {"prediction": "v_prediction"})])
    parts.scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def huber_deltas(alphas: Tensor, config: TrainConfig) -> Tensor:
    """The error of each timestep from which on the loss grows in a line. `exponential` falls from
    1 to huber_c, `snr` from 1 at no noise to huber_c at noise alone."""
    c, steps = config.huber_c, len(alphas)
    match config.huber_schedule:
        case "exponential":
            return c ** (torch.arange(steps, dtype=torch.float64) / steps)
        case "snr":
            sigmas = ((1 - alphas) / alphas.clamp(min=1e-12)).sqrt()
            return (1 - c) / (1 + sigmas) ** 2 + c
        case "constant":
            return torch.full_like(alphas, c)


def _debiased(snr: Tensor, kind: Objective) -> Tensor:
    """1 / sqrt(SNR) of the squared error in noise; that error is SNR / (SNR + 1) of v's."""
    if kind == "v_prediction":
        return snr.sqrt() / (snr + 1)
    return snr.clamp(min=1e-8).rsqrt()


def _min_snr(snr: Tensor, gamma: float, kind: Objective) -> Tensor:
    if not gamma:
        return torch.ones_like(snr)
    clipped = snr.clamp(max=gamma)
    # Zero terminal SNR: epsilon's weight would be 0/0; the limit of min(snr, g) / snr is 1.
    return clipped / (snr + 1) if kind == "v_prediction" else clipped / snr.clamp(min=1e-8)
