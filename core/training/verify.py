"""The proof that a LoRA file works: diffusers' own loader reads it into a fresh pipeline, or
core/adapters/from_file.py where that loader doesn't know the format.

It shows that every module of the file is found in the pipeline, that the picture changes, and
(after a training) that it is the picture of the adapter in memory, within the rounding to the
file's number format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from core.adapters import lora
from core.config import GenerateConfig
from core.errors import UserError
from core.families.base import Family, Parts
from core.families.loading import load_denoiser
from core.families.registry import SPECS
from core.inference import generate
from core.jobs.events import Event, Phase
from core.lora_files import formats, textual_inversion
from core.lora_files.files import describe
from core.lora_files.formats import weights_file
from core.lora_files.library import Lora
from core.memory.plan import PROOF_SIDE
from core.safetensors_header import read_header
from core.weights.precision import Precision, free_memory

if TYPE_CHECKING:
    from core.training.trainer import Trainer

# Mean difference of 8-bit values. fp16 keeps 11 bits of each weight, which moves single values
# by a step or two; another adapter moves the mean by tens.
TOLERANCE = 1.5
FAINT = TOLERANCE           # a change below it can't be told from rounding: almost no effect
_STEPS, _SEED = 6, 1


def verify(path: Path, config: GenerateConfig | None, emit: Callable[[Event], None]
           ) -> dict[str, Any]:
    """Checks any LoRA file. `config` says on which base pictures are drawn with it; without it only
    the file is read."""
    file = weights_file(path)
    info = describe(file)
    report: dict[str, Any] = {"file": str(path), "format": info.format, "family": info.family}
    try:
        found = formats.read(path, info.family if info.family in SPECS else "")
    except UserError as error:
        # of a family without a table nothing but keys is known
        if config is not None or error.code != "lora_convert.no_names":
            raise
    else:
        report["modules"] = len(found.layers)
        if all(key.startswith(("lora_", "lycoris_")) for key in read_header(file).tensors):
            report["kohya_unread"] = formats.beyond_kohya(found)
    if config is None:
        return report | {"ok": True, "keys": len(read_header(file).tensors), "drawn": False}
    studio = generate.PipelineSession(Path(config.base), config, emit)
    emit(Phase(name="load"))
    studio.load()
    studio.read_as(config, [Lora(path, 1.0)])
    studio.predict_as(config, [Lora(path, 1.0)])
    return report | _draw_and_compare(studio.family, studio.parts, studio.precision, path, "", None)


def verify_run(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Proves the final file of a run against its adapter in memory, which is gone afterwards."""
    family, precision, parts = trainer.family, trainer.precision, trainer.parts
    prompt = trainer.examples.items[0].captions[0]
    parts.denoiser.eval()
    parts.vae = family.load(parts.source, precision, frozenset({"vae"})).vae
    with torch.no_grad():
        arguments = family.prompt_arguments(trainer.cond([prompt]), trainer.cond([""]))
    lora.set_weight(parts.denoiser, 1.0)
    # LoRAs of the base are no part of the file.
    if parts.base_loras is not None:
        parts.base_loras.on = False
    in_memory = _picture(family.pipeline(parts), parts, arguments, precision)
    # A large base doesn't fit twice.
    parts.denoiser = trainer.denoiser = None
    free_memory()
    parts.denoiser = load_denoiser(trainer.config, family, parts.source, precision)
    if trainer.text is not None:
        parts.text = family.load(parts.source, precision, frozenset({"text"})).text
    return _draw_and_compare(family, parts, precision, path,
                             arguments if trainer.text is None else prompt, in_memory)


def _draw_and_compare(family: Family, parts: Parts, precision: Precision, path: Path,
                      prompt: str | dict[str, Any], expected: np.ndarray | None
                      ) -> dict[str, Any]:
    """Draws without and with the file. `prompt` is a text, or the pipeline's arguments for one."""
    pipeline, words = family.pipeline(parts), dict[str, str]()

    def picture() -> np.ndarray:
        arguments = prompt if isinstance(prompt, dict) else generate.read_prompt(
            family, parts, precision, textual_inversion.expand(prompt, words))
        return _picture(pipeline, parts, arguments, precision)

    plain = picture()
    generate.load_adapter(pipeline, path, "proof", family.spec.id)
    modules = generate.modules_in(path, family.spec.id)
    matched = lora.count(pipeline.components.values(), "proof")
    words |= generate.load_words(parts, path)
    drawn = picture()
    change = _difference(plain, drawn)
    report = {"modules": modules, "matched": matched, "drawn": True, "change": change,
              "faint": change < FAINT}
    ok = matched == modules and not np.array_equal(plain, drawn)
    if expected is not None:
        distance = _difference(expected, drawn)
        report |= {"from_memory": distance, "tolerance": TOLERANCE}
        ok = ok and distance <= TOLERANCE
    return report | {"ok": ok}


def _picture(pipeline: Any, parts: Parts, arguments: dict[str, Any],
             precision: Precision) -> np.ndarray:
    """A small, quick picture (H, W, 3), 0 to 255: the proof is the same at any size."""
    side = min(parts.native_size, PROOF_SIDE[precision.device.type])
    shot = generate.SampleRequest("", "", _SEED, _STEPS, 1.0, (side, side))
    image: Image.Image = generate.draw(pipeline, parts, shot, arguments, precision)
    return np.asarray(image, dtype=np.float32)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return round(float(np.abs(a - b).mean()), 4)
