"""Gentler ways to make the same updates, from the middle of a run on; a checkpoint keeps them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from core.weights.offload import offload_, stage_of

if TYPE_CHECKING:
    from core.training.trainer import Trainer

Changes = dict[str, Any]                # config keys and their new values


def lower(trainer: Trainer, most: int = 0) -> Changes | None:
    """The next gentler way: half the samples at once (`most`: of those that there were), then
    activation checkpointing, then blocks that wait in RAM. -> the config keys that it amounts
    to; None: nothing is left."""
    at_once = min(trainer.micro_batch, most or trainer.micro_batch)
    offload = trainer.lowered.get("offload", trainer.config.offload)
    if at_once > 1:
        return apply(trainer, {"batch_size": -(-at_once // 2)})
    if not getattr(trainer.denoiser, "is_gradient_checkpointing", True):
        return apply(trainer, {"gradient_checkpointing": True})
    if trainer.precision.device.type == "cuda" and offload < 1.0:
        return apply(trainer, {"offload": 0.5 if offload < 0.5 else 1.0})
    return None


def apply(trainer: Trainer, changes: Changes) -> Changes:
    """This run's own changes, or those of the run that it goes on from. -> changes"""
    trainer.lowered |= changes
    trainer.micro_batch = min(trainer.micro_batch, changes.get("batch_size", trainer.micro_batch))
    if changes.get("gradient_checkpointing"):
        trainer.denoiser.enable_gradient_checkpointing()
    if "offload" in changes:
        offload_(trainer.denoiser, changes["offload"], trainer.precision.device)
    if changes.get("precision") == "bf16" and trainer.precision.compute == torch.float16:
        _to_bf16(trainer)
    return changes


def gentler_numbers(trainer: Trainer) -> Changes:
    """For losses that aren't finite: numbers of the same size that don't overflow, else half the
    rate."""
    device = trainer.precision.device
    knows_bf16 = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    if trainer.precision.compute == torch.float16 and knows_bf16:
        return apply(trainer, {"precision": "bf16"})
    rate = trainer.lowered.get("learning_rate", trainer.config.learning_rate)
    return apply(trainer, {"learning_rate": rate / 2})


def abandon(trainer: Trainer) -> None:
    """Forgets an update that failed on its way: its gradients and what they were scaled by."""
    trainer.optimizer.zero_grad(set_to_none=True)
    kept, trainer.scaler = trainer.scaler.state_dict(), trainer.new_scaler()
    if kept:
        trainer.scaler.load_state_dict(kept)
    if stage := stage_of(trainer.denoiser):
        stage.clear()
    trainer.stepping = False


def _to_bf16(trainer: Trainer) -> None:
    for parameter in trainer.denoiser.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.bfloat16()
    trainer.precision = replace(trainer.precision, weights=torch.bfloat16, compute=torch.bfloat16)
    trainer.scaler = trainer.new_scaler()
