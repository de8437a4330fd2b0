"""Previews while training: the same prompts and seeds every time, drawn by generate.draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core import generate, lora
from core.config import TrainConfig, size_of
from core.events import Event, Sample
from core.examples import Examples
from core.families.base import Family, Parts, Precision
from core.precision import free_memory


class Previewer:
    """Draws with the adapter in training. Only the VAE is read again, and dropped after: the
    prompts' embeddings are cached."""

    def __init__(self, family: Family, parts: Parts, precision: Precision, config: TrainConfig,
                 examples: Examples, folder: Path, emit: Callable[[Event], None]) -> None:
        self.family, self.parts, self.precision = family, parts, precision
        self.config, self.examples, self.folder, self.emit = config, examples, folder, emit

    def draw(self, step: int, name: str) -> list[str]:
        """-> the files; training's randomness and adapter weight are left as they were."""
        config = self.config
        self.parts.vae = self.family.load(
            self.parts.source, self.precision, frozenset({"vae"})).vae
        lora.set_weight(self.parts.denoiser, config.sample_weight)
        lora.set_training(self.parts.denoiser, False)
        try:
            return [self._one(i, prompt, step, name)
                    for i, prompt in enumerate(config.sample_prompts)]
        finally:
            lora.set_training(self.parts.denoiser, True)
            lora.set_weight(self.parts.denoiser, 1.0)
            self.parts.vae = None
            free_memory()

    def _one(self, index: int, prompt: str, step: int, name: str) -> str:
        config, device = self.config, self.precision.device
        side = self.parts.native_size
        shot = generate.Shot(prompt, "", config.seed + index, config.sample_inference_steps,
                             config.sample_cfg, size_of(config.sample_size) or (side, side),
                             config.sample_sampler)
        arguments = self.family.prompt_arguments(self.examples.cond([prompt], device),
                                                 self.examples.cond([""], device))
        image = generate.draw(self.family.pipeline(self.parts), self.parts, shot, arguments,
                              self.precision)
        path = self.folder / f"{name}-{step:06d}-{index}.png"
        facts = (f"{prompt} <lora:{name}:{config.sample_weight:g}>\nSteps: {shot.steps}, "
                 f"CFG scale: {shot.cfg:g}, Seed: {shot.seed}, "
                 f"Size: {shot.size[0]}x{shot.size[1]}")
        generate.save_png(image, path, facts)
        self.emit(Sample(step=step, path=str(path), prompt=prompt, seed=shot.seed))
        return str(path)
