"""What a step learns on diffusion bases: timesteps, noise, target and weighting of the loss.

Sources: Ho et al. 2020 (arXiv 2006.11239), v-prediction: Salimans & Ho 2022 (2202.00512), min-SNR:
Hang et al. 2023 (2303.09556), zero-terminal SNR: Lin et al. 2023 (2305.08891), debiased
estimation: Yu et al. 2023 (2310.08442), scheduled Huber: Khrapov et al. 2024 (2403.16728), pyramid
noise: Whitaker 2023 ("Multi-Resolution Noise for Diffusion Model Training").
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
from core.objectives.noise import Draw, fixed_noise, pyramid, sample_generator


def create(parts: Parts, config: TrainConfig, device: torch.device | str = "cpu",
           numbers: torch.dtype = torch.float32) -> Diffusion | Flow:
    """Returns what this base learns, as its family says.

    `numbers` is the number format in which its denoiser computes.
    """
    if parts.flow is not None:
        return Flow(sampling_of(parts.flow, config), config.noise_offset, numbers)
    return Diffusion(parts, config, device)


class Diffusion:
    """The noise schedule of a base, with the target and the weight of each timestep."""

    def __init__(self, parts: Parts, config: TrainConfig | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.config = config = config or TrainConfig()
        # Keys with an underscore are diffusers' own notes, such as _class_name.
        options = {k: v for k, v in parts.scheduler.items() if not k.startswith("_")}
        alphas = DDPMScheduler.from_config(options).alphas_cumprod.double()
        self.kind: Objective = parts.objective
        self.steps = len(alphas)
        self.signal = alphas.sqrt().float().to(device)
        self.noise_level = (1 - alphas).sqrt().float().to(device)
        self.weights = loss_weights(alphas, config, self.kind).float().to(device)
        self.weighted = bool(config.min_snr_gamma) or config.debiased_estimation
        self.deltas = (None if config.loss_type == "l2"
                       else huber_deltas(alphas, config).float().to(device))

    def draw(self, seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Draw:
        """Draws noise and timesteps of samples `numbers`; `shape` (C, h, w) is of one sample."""
        config = self.config
        noises, timesteps = [], []
        for number in numbers:
            generator = sample_generator(seed, number)
            timesteps.append(int(torch.randint(self.steps, (), generator=generator)))
            noise = torch.randn(tuple(shape), generator=generator)
            if config.multires_noise_iterations:
                noise = pyramid(noise, config.multires_noise_iterations,
                                config.multires_noise_discount, generator)
            # One number for each channel: without it, a model never learns to change brightness.
            if config.noise_offset:
                noise += config.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
            noises.append(noise)
        return Draw(torch.stack(noises), torch.tensor(timesteps))

    def draw_fixed(self, seed: int, numbers: Sequence[int], shape: Sequence[int],
                   share: float) -> Draw:
        """For validation: the timestep at `share` of the schedule and noise that never changes."""
        step = min(self.steps - 1, int(share * self.steps))
        return Draw(fixed_noise(seed, numbers, shape), torch.full((len(numbers),), step))

    def noisy_and_target(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the model's input and target, (B, C, h, w) each, at the timesteps `t` (B,)."""
        a = self.signal[t].view(-1, 1, 1, 1)
        b = self.noise_level[t].view(-1, 1, 1, 1)
        noisy = a * latents + b * noise
        return noisy, a * noise - b * latents if self.kind == "v_prediction" else noise

    def losses(self, family: Family, denoiser: Any, latents: Tensor, draw: Draw, cond: Cond,
               autocast: Callable[[], contextlib.AbstractContextManager[object]],
               weights: Tensor | None = None) -> Tensor:
        """Does the forward pass of a step; returns the loss of each sample (B,) in fp32.

        All tensors are on one device.
        """
        noisy, target = self.noisy_and_target(latents, draw.noise, draw.timesteps)
        # Convolutions are faster with the channels last.
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast():
            predicted = family.predict(denoiser, noisy, draw.timesteps, cond)
        return self.loss(predicted, target, draw.timesteps, weights)

    def loss(self, predicted: Tensor, target: Tensor, t: Tensor,
             weights: Tensor | None = None) -> Tensor:
        """Returns the mean error of each sample (B,) in fp32.

        It is weighted by timestep and, with `weights` (B, 1, h, w), by place.
        """
        away = predicted.float() - target.float()
        if self.deltas is None:
            errors = away.square()
        else:
            # Twice torch's Huber or smooth L1 loss, so that below delta Huber equals the square.
            delta = self.deltas[t].view(-1, 1, 1, 1)
            away = away.abs()
            errors = torch.where(away < delta, away.square(), delta * (2 * away - delta))
            if self.config.loss_type != "huber":
                errors = errors / delta
        errors = (errors if weights is None else errors * weights).mean((1, 2, 3))
        return errors * self.weights[t] if self.weighted else errors


def split_mask(latents: Tensor, outside: float) -> tuple[Tensor, Tensor]:
    """Splits (B, C + 1, h, w) into latents (B, C, h, w) and weights (B, 1, h, w).

    Weights are 1 where the mask is white, and `outside` where it is black.
    """
    return latents[:, :-1], outside + (1 - outside) * latents[:, -1:]


def zero_terminal(parts: Parts) -> None:
    """Rescales the base's schedule so that its last timestep is noise alone.

    This holds for training and pictures alike. Raises UserError for a base that predicts noise:
    at that timestep it would have nothing to learn.
    """
    if parts.objective == "epsilon":
        raise UserError("engine.zero_snr_epsilon", fixes=[
            Fix("fixes.no_zero_snr", {"zero_terminal_snr": False}),
            Fix("fixes.predicts", {"prediction_type": "v_prediction"},
                {"prediction": "v_prediction"})])
    parts.scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def huber_deltas(alphas: Tensor, config: TrainConfig) -> Tensor:
    """Returns, for each timestep, the error from which on the loss grows only linearly.

    `exponential` falls from 1 to huber_c, `snr` from 1 at no noise to huber_c at noise alone.
    """
    c, steps = config.huber_c, len(alphas)
    if config.huber_schedule == "exponential":
        return c ** (torch.arange(steps, dtype=torch.float64) / steps)
    if config.huber_schedule == "snr":
        sigmas = ((1 - alphas) / alphas.clamp(min=1e-12)).sqrt()
        return (1 - c) / (1 + sigmas) ** 2 + c
    return torch.full_like(alphas, c)


def loss_weights(alphas: Tensor, config: TrainConfig, kind: Objective) -> Tensor:
    """Returns the weight of each timestep in the loss, by min-SNR and debiased estimation."""
    snr = alphas / (1 - alphas)
    weights = torch.ones_like(snr)
    if gamma := config.min_snr_gamma:
        clipped = snr.clamp(max=gamma)
        # With zero terminal SNR, epsilon's weight would be 0/0; min(snr, g) / snr has the limit 1.
        weights = clipped / (snr + 1 if kind == "v_prediction" else snr.clamp(min=1e-8))
    if config.debiased_estimation:
        # 1 / sqrt(SNR) of the squared error in noise, which is SNR / (SNR + 1) of the error in v.
        weights = weights * (snr.sqrt() / (snr + 1) if kind == "v_prediction"
                             else snr.clamp(min=1e-8).rsqrt())
    return weights
