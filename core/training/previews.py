"""Previews while training: the same prompts and seeds every time, so that they can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from core import paths
from core.adapters import base_loras, lora
from core.adapters.text_encoder import TextTraining
from core.config import TrainConfig, size_of
from core.dataset.examples import tell_markup
from core.failures import one_line, ran_out
from core.families import distilled
from core.families.base import Cond, Family, Parts
from core.inference import generate
from core.jobs.events import Event, Note, Sample
from core.lora_files.library import prompts_of, split_prompt
from core.training import rng
from core.weights.offload import stage_of
from core.weights.precision import Precision, free_memory


class Previewer:
    """Draws with the adapter in training. Only the VAE is loaded again, and dropped afterwards:
    the prompts' embeddings are cached."""

    def __init__(self, family: Family, parts: Parts, precision: Precision, config: TrainConfig,
                 cond: Callable[[Sequence[str]], Cond], folder: Path,
                 emit: Callable[[Event], None]) -> None:
        self.family, self.parts, self.precision = family, parts, precision
        self.config, self.cond, self.folder, self.emit = config, cond, folder, emit
        self.tiled = False
        tags = [tag.name for prompt in config.sample_prompts for tag in split_prompt(prompt)[1]]
        if tags:
            emit(Note(key="engine.preview_tags", params={
                "names": ", ".join(dict.fromkeys(tags)), "weight": config.sample_weight}))
        tell_markup(prompts_of(config), config.trigger_word, emit, "engine.preview_markup")

    def draw(self, step: int, name: str, text: TextTraining | None = None) -> list[str]:
        """Draws a picture of each prompt and returns the files. Training's randomness and adapter
        weights are left as they were. A failure becomes a note: it never ends a run."""
        models = [self.parts.denoiser, *(text.models.values() if text else ())]
        files, reason, out_of_memory = self._try(step, name, models)
        # Where memory ran out, the VAE decodes in tiles from now on, and all is drawn anew.
        if out_of_memory and not self.tiled:
            self.tiled = True
            files, reason, _ = self._try(step, name, models)
        if reason:
            self.emit(Note(key="engine.no_preview", params={"step": step, "reason": reason}))
        return files

    def _try(self, step: int, name: str, models: Sequence[Any]) -> tuple[list[str], str, bool]:
        """Returns the files, why it failed (or an empty text), and whether memory ran out. The
        error itself is gone by then: its frames hold tensors."""
        config, files = self.config, list[str]()
        before = rng.state(self.precision.device)
        try:
            self.parts.vae = self.family.load(
                self.parts.source, self.precision, frozenset({"vae"})).vae
            if self.tiled:
                self.parts.vae.enable_slicing()
                self.parts.vae.enable_tiling()
            for model in models:
                lora.set_weight(model, config.sample_weight)
                lora.set_training(model, False)
            attached = self.parts.base_loras
            with attached.switched(config.base_loras_in_previews) if attached else nullcontext():
                for i, prompt in enumerate(prompts_of(config)):
                    files.append(self._one(i, prompt, step, name))
            return files, "", False
        except Exception as error:
            return files, one_line(error), ran_out(error)
        finally:
            for model in models:
                lora.set_training(model, True)
                lora.set_weight(model, 1.0)
            if stage := stage_of(self.parts.denoiser):
                stage.clear()
            rng.load_state(before, self.precision.device)
            self.parts.vae = None
            free_memory()

    def _one(self, index: int, prompt: str, step: int, name: str) -> str:
        """Draws one prompt and returns the file."""
        config, side = self.config, self.parts.native_size
        cfg, steps = distilled.drawing(
            config.sample_cfg, config.sample_inference_steps, self.family.spec.cfg,
            distilled.PREVIEW_STEPS, self.parts.distilled)
        shot = generate.SampleRequest(prompt, "", config.seed + index, steps, cfg,
                                      size_of(config.sample_size) or (side, side),
                                      config.sample_sampler)
        with torch.no_grad():
            arguments = self.family.prompt_arguments(self.cond([prompt]), self.cond([""]))
        image = generate.draw(self.family.pipeline(self.parts), self.parts, shot, arguments,
                              self.precision)
        upon = base_loras.tags(self.parts.base_loras) if config.base_loras_in_previews else ""
        # The words that other programs write into their PNG files, and read.
        facts = (f"{prompt} <lora:{name}:{config.sample_weight:g}>{upon}\nSteps: {shot.steps}, "
                 f"CFG scale: {shot.cfg:g}, Seed: {shot.seed}, "
                 f"Size: {shot.size[0]}x{shot.size[1]}"
                 + (f", Clip skip: {skip}" if (skip := self.parts.reading.clip_skip) > 1 else ""))
        paths.mark(self.folder)
        path = paths.create(self.folder / f"{name}-{step:06d}-{index}.png",
                            lambda fresh: generate.write_png(image, fresh, facts), once=True)
        self.emit(Sample(step=step, path=str(path), prompt=prompt, seed=shot.seed))
        return str(path)
