"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from core.config import TrainConfig


def create(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101): one kernel for all tensors."""
    return torch.optim.AdamW(
        list(parameters), lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay, fused=True)


def rate(config: TrainConfig, update: int, total: int) -> float:
    """The learning rate of update `update` (from 0) of `total`: a pure function, so that a
    resumed run needs no saved schedule."""
    warmup = config.lr_warmup_steps
    if update < warmup:
        return config.learning_rate * (update + 1) / (warmup + 1)
    share = (update - warmup) / max(1, total - warmup)
    match config.lr_scheduler:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - share
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate * factor
