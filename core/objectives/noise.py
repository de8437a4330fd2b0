"""The random part of a step.

Every sample has a generator of its own, seeded by (seed, sample number): the same samples give the
same gradient whatever the batch size, and a resumed run needs no saved generator state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_MIX = 0x9E3779B97F4A7C15


def sample_generator(seed: int, number: int) -> torch.Generator:
    """Returns the generator of one sample, on the CPU, so that every device draws the same."""
    # Neighbouring numbers must give unrelated streams, hence splitmix64.
    z = (seed * 0xD1342543DE82EF95 + (number + 1) * _MIX) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return torch.Generator().manual_seed((z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Draw:
    """The random part of a batch; drawn on the CPU."""

    noise: Tensor          # (B, C, h, w)
    timesteps: Tensor      # (B,) int64; of flows float32

    def to(self, device: torch.device) -> Draw:
        return Draw(self.noise.to(device, non_blocking=True),
                    self.timesteps.to(device, non_blocking=True))


def fixed_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Returns plain noise (B, C, h, w) of the samples `numbers`; `shape` (C, h, w) is of one."""
    return torch.stack([torch.randn(tuple(shape), generator=sample_generator(seed, number))
                        for number in numbers])


def pyramid(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Adds ever coarser noise to white noise (C, h, w), each level `discount` of the last.

    The sum is scaled back to a deviation of 1.
    """
    (height, width), scale = noise.shape[1:], 1.0
    for level in range(1, iterations + 1):
        # Each level is two to four times smaller than the one before.
        scale *= 2 + 2 * float(torch.rand((), generator=generator))
        size = max(1, int(height / scale)), max(1, int(width / scale))
        coarse = torch.randn((1, noise.shape[0], *size), generator=generator)
        noise = noise + discount ** level * F.interpolate(
            coarse, (height, width), mode="bilinear")[0]
        # Coarser than one pixel there is nothing.
        if size == (1, 1):
            break
    return noise / noise.std()
