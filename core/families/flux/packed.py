"""Transformers whose tokens are 2 x 2 latent pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.families.timestep_sampling import STEPS


def predict(denoiser: Any, noisy: Tensor, t: Tensor, embeddings: Tensor, **inputs: Any) -> Tensor:
    """Calls a denoiser that reads and writes packed latents; `noisy` and the result are unpacked,
    (B, C, h, w)."""
    tokens = denoiser(hidden_states=pack(noisy), timestep=t / STEPS,
                      encoder_hidden_states=embeddings, return_dict=False, **inputs)[0]
    return unpack(tokens, noisy.shape[2] // 2, noisy.shape[3] // 2)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, C * 4): tokens of 2 x 2 latent pixels."""
    b, c, h, w = latents.shape
    split = latents.reshape(b, c, h // 2, 2, w // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C * 4) -> (B, C, height * 2, width * 2): undoes `pack`; height and width
    are counted in tokens."""
    b, _, c = tokens.shape
    split = tokens.reshape(b, height, width, c // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height * 2, width * 2)


def positions(latents: Tensor) -> Tensor:
    """(h/2 * w/2, 3): 0, row and column of each token of latents (B, C, h, w)."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    rows, columns = (torch.arange(side, device=latents.device, dtype=latents.dtype)
                     for side in (height, width))
    grid = torch.stack([latents.new_zeros(height, width), rows[:, None].expand(height, width),
                        columns[None].expand(height, width)], -1)
    return grid.flatten(0, 1)
