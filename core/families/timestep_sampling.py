"""How often each noise level is drawn when a family learns a flow, and which timestep its network
reads there.

Curves and the shift towards noise for large pictures: Esser et al. 2024 (arXiv 2403.03206),
sections 3.1 and 5.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STEPS = 1000                                # timesteps are s x 1000, as the models count them
Curve = Literal["uniform", "logit_normal", "mode", "parabola"]
Line = tuple[tuple[int, float], tuple[int, float]]
FLUX_LINE: Line = ((256, 0.5), (4096, 1.15))        # Flux.1's (tokens, mu), and of its heirs


def exactly(t: Tensor, numbers: torch.dtype) -> Tensor:
    """For networks that read the timestep in fp32."""
    return t


def by_share(t: Tensor, numbers: torch.dtype) -> Tensor:
    """For networks that round t / 1000 to the dtype in which they compute."""
    return (t / STEPS).to(numbers).to(t.dtype) * STEPS


def by_share_and_step(t: Tensor, numbers: torch.dtype) -> Tensor:
    """For networks that round t / 1000 to that dtype and multiply it by 1000 in it."""
    return ((t / STEPS).to(numbers) * STEPS).to(t.dtype)


@dataclass(frozen=True, slots=True)
class TimestepSampling:
    """How often a family learns each noise level.

    This is a rule of its own: the sampler that draws pictures mostly has other levels.
    """

    curve: Curve = "logit_normal"
    logit_mean: float = 0.0                 # "logit_normal": logit(s) ~ N(mean, std^2)
    logit_std: float = 1.0
    mode_scale: float = 1.29                # "mode": weight of the middle; -1 to 1.75 (eq. 20)
    bend: float = 7.7                       # "parabola": density 2 - bend (s - 1/2)^2
    shift: float = 1.0                      # towards noise; 1: none
    # For a shift that grows with the picture: it is e^mu, mu on the line through two (tokens, mu).
    line: Line | None = None
    patch: int = 2                          # side of a token in latent pixels
    # (t of 0 to 1000, the network's dtype) -> the timestep that the network reads in fact.
    model_times: Callable[[Tensor, torch.dtype], Tensor] = exactly

    def shift_at(self, height: int, width: int) -> float:
        """The shift for latents of this size."""
        if self.line is None:
            return self.shift
        (low, base), (high, top) = self.line
        tokens = (height // self.patch) * (width // self.patch)
        return math.exp(base + (top - base) * (tokens - low) / (high - low))

    def draw(self, generator: torch.Generator) -> float:
        """Draws a noise level s in (0, 1), before the shift."""
        if self.curve == "logit_normal":
            normal = float(torch.randn((), generator=generator))
            return 1 / (1 + math.exp(-(self.logit_mean + self.logit_std * normal)))
        u = float(torch.rand((), generator=generator))
        # By rejection: 2 is the density's maximum.
        while self.curve == "parabola" and (
                2 * float(torch.rand((), generator=generator)) > 2 - self.bend * (u - 0.5) ** 2):
            u = float(torch.rand((), generator=generator))
        if self.curve == "mode":
            u = 1 - u - self.mode_scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        return min(max(u, 1e-5), 1 - 1e-5)


def shifted(s: float, shift: float) -> float:
    """The level at which a picture of `shift`^2 times the pixels is as noisy as this one at `s`
    (2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)
