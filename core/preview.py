"""Previews while training: the same prompts and seeds every time, drawn by generate.draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from core import generate, lora
from core.config import TrainConfig, size_of
from core.events import Event, Sample
from core.families.base import Cond, Family, Parts, Precision
from core.precision import free_memory
from core.text_training import TextTraining


class Previewer:
    """Draws with the adapter in training. Only the VAE is read again, and dropped after: the
    prompts' embeddings are cached."""

    def __init__(self, family: Family, parts: Parts, precision: Precision, config: TrainConfig,
                 cond: Callable[[Sequence[str]], Cond], folder: Path,
                 emit: Callable[[Event], None]) -> None:
        self.family, self.parts, self.precision = family, parts, precision
        self.config, self.cond, self.folder, self.emit = config, cond, folder, emit

    def draw(self, step: int, name: str, text: TextTraining | None = None) -> list[str]:
        """-> the files; training's randomness and adapter weight are left as they were."""
        config = self.config
        self.parts.vae = self.family.load(
            self.parts.source, self.precision, frozenset({"vae"})).vae
        learning = [self.parts.denoiser, *(text.models.values() if text else ())]
        for model in learning:
            lora.set_weight(model, config.sample_weight)
            lora.set_training(model, False)
        try:
            return [self._one(i, prompt, step, name)
                    for i, prompt in enumerate(config.sample_prompts)]
        finally:
            for model in learning:
                lora.set_training(model, True)
                lora.set_weight(model, 1.0)
            self.parts.vae = None
            free_memory()

    def _one(self, index: int, prompt: str, step: int, name: str) -> str:
        config = self.config
        side = self.parts.native_size
        shot = generate.Shot(prompt, "", config.seed + index, config.sample_inference_steps,
                             config.sample_cfg, size_of(config.sample_size) or (side, side),
                             config.sample_sampler)
        with torch.no_grad():
            arguments = self.family.prompt_arguments(self.cond([prompt]), self.cond([""]))
        image = generate.draw(self.family.pipeline(self.parts), self.parts, shot, arguments,
                              self.precision)
        path = self.folder / f"{name}-{step:06d}-{index}.png"
        facts = (f"{prompt} <lora:{name}:{config.sample_weight:g}>\nSteps: {shot.steps}, "
                 f"CFG scale: {shot.cfg:g}, Seed: {shot.seed}, "
                 f"Size: {shot.size[0]}x{shot.size[1]}")
        generate.save_png(image, path, facts)
        self.emit(Sample(step=step, path=str(path), prompt=prompt, seed=shot.seed))
        return str(path)
