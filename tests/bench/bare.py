"""The yardstick: the shortest loop that trains the same LoRA. Nothing that a user would miss is
in here, and nothing that the mathematics needs is missing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from core.training.trainer import Trainer
from core.weights.precision import autocast


class BareLoop:
    """Same UNet, same peft LoRA, cached latents and embeddings, fused AdamW; nothing else."""

    def __init__(self, trainer: Trainer) -> None:
        self.unet = trainer.denoiser
        self.parameters = trainer.parameters
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        config = {k: v for k, v in trainer.parts.scheduler.items() if not k.startswith("_")}
        self.schedule = DDPMScheduler.from_config(config)
        batch = max((trainer.sampler.update(n)[0] for n in range(8)), key=lambda b: len(b.indices))
        self.latents = torch.stack([trainer.examples.latents[i] for i in batch.indices])
        self.cond = trainer.cond(trainer.captions_of(batch)) | trainer.size_conditioning(
            batch.indices, [False] * len(batch.indices))
        self.predict = trainer.family.predict
        self.precision = trainer.precision
        self.velocity = trainer.parts.objective == "v_prediction"

    def step(self) -> None:
        noise = torch.randn_like(self.latents)
        t = torch.randint(0, 1000, (len(noise),))
        noisy = self.schedule.add_noise(self.latents, noise, t)
        target = (self.schedule.get_velocity(self.latents, noise, t) if self.velocity else noise)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast(self.precision):
            predicted = self.predict(self.unet, noisy, t, self.cond)
        F.mse_loss(predicted.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
