"""What a running job changes when memory runs out or losses aren't finite; checkpoints keep it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from core.memory import relief
from core.weights.offload import offload_, stage_of

if TYPE_CHECKING:
    from core.training.trainer import Trainer

Changes = dict[str, Any]                # config keys and their new values


def lower(trainer: Trainer, most: int = 0) -> Changes | None:
    """Applies the next thing to give up, in the order of relief.WHILE_RUNNING. `most`: samples
    that were in memory at once, where that was less than a micro-batch. Returns the config keys
    that the change amounts to; None where nothing is left."""
    at_once = min(trainer.micro_batch, most or trainer.micro_batch)
    offload = trainer.lowered.get("offload", trainer.config.offload)
    # `batch_size` stands for the micro-batch: the update keeps its samples.
    changes: dict[str, Changes] = {}
    if at_once > 1:
        changes["batch"] = {"batch_size": -(-at_once // 2)}
    if not getattr(trainer.denoiser, "is_gradient_checkpointing", True):
        changes["checkpointing"] = {"gradient_checkpointing": True}
    if trainer.precision.device.type == "cuda" and offload < 1.0:
        changes["offload"] = {"offload": 0.5 if offload < 0.5 else 1.0}
    return next((apply(trainer, changes[name]) for name in relief.WHILE_RUNNING
                 if name in changes), None)


def apply(trainer: Trainer, changes: Changes) -> Changes:
    """Makes these changes, this run's own or those of the run that it goes on from, and returns
    them."""
    trainer.lowered |= changes
    trainer.micro_batch = min(trainer.micro_batch, changes.get("batch_size", trainer.micro_batch))
    if changes.get("gradient_checkpointing"):
        trainer.denoiser.enable_gradient_checkpointing()
    if "offload" in changes:
        offload_(trainer.denoiser, changes["offload"], trainer.precision.device)
    if changes.get("precision") == "bf16" and trainer.precision.compute == torch.float16:
        for parameter in trainer.denoiser.parameters():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.bfloat16()
        trainer.precision = replace(trainer.precision, weights=torch.bfloat16,
                                    compute=torch.bfloat16)
        trainer.scaler = trainer.new_scaler()
    return changes


def gentler_numbers(trainer: Trainer) -> Changes:
    """Answers losses that aren't finite: bf16 instead of fp16, else half the learning rate.
    Returns the config keys."""
    device = trainer.precision.device
    # bf16 has the range of fp32 in 16 bits. Cards before Ampere (8.0) only emulate it.
    knows_bf16 = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    if trainer.precision.compute == torch.float16 and knows_bf16:
        return apply(trainer, {"precision": "bf16"})
    rate = trainer.lowered.get("learning_rate", trainer.config.learning_rate)
    return apply(trainer, {"learning_rate": rate / 2})


def abandon(trainer: Trainer) -> None:
    """Forgets an update that failed halfway: its gradients and what they were scaled by."""
    trainer.optimizer.zero_grad(set_to_none=True)
    # A scaler remembers that it has unscaled this update; a new one doesn't, and gets the scale.
    scale, trainer.scaler = trainer.scaler.state_dict(), trainer.new_scaler()
    if scale:
        trainer.scaler.load_state_dict(scale)
    if stage := stage_of(trainer.denoiser):
        stage.clear()
    trainer.stepping = False
