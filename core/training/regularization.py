"""Regularisation pictures: what the LoRA must not change without its trigger word (the prior
preservation of Ruiz et al. 2022, arXiv 2208.12242). From a folder, or drawn by the base itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from core import paths
from core.config import TrainConfig, resolve
from core.dataset import captions
from core.dataset.cache import key
from core.dataset.checks.image_stats import Stopped
from core.dataset.examples import Encoder, Examples, add_regular
from core.dataset.text_embeddings import batched, reading_of
from core.errors import UserError
from core.families import distilled
from core.families.base import PARTS, Family, Parts
from core.families.distilled import Distilled
from core.families.loading import load_denoiser
from core.hashes import fingerprint
from core.inference import generate
from core.inference.generate import SampleRequest
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from core.weights.precision import Precision, free_memory


def add(config: TrainConfig, examples: Examples, family: Family, parts: Parts,
        precision: Precision, emit: Callable[[Event], None], control: Control) -> None:
    """Adds regularisation pictures to `examples`, after drawing those that are missing. Raises
    UserError where a folder won't do, and Stopped."""
    folders = [resolve(config.reg_data_dir, None)] if config.reg_data_dir else []
    if folders and not folders[0].is_dir():
        raise UserError("engine.no_regular_folder", folder=folders[0])
    if config.reg_from_base:
        requests = shots(config, examples, family.spec.cfg, parts.distilled)
        folders.append(draw(config, requests, family, parts, precision, emit, control))
    for folder in folders:
        add_regular(config, examples, folder, parts.native_size, parts.bucket_step, emit)


def shots(config: TrainConfig, examples: Examples, guidance: float = 7.0,
          base: Distilled | None = None) -> list[SampleRequest]:
    """What to draw: the captions in turn without the trigger word, each in its picture's own
    bucket, so that the trigger alone tells the two kinds apart. `guidance`: the family's usual."""
    if not config.trigger_word.strip():
        raise UserError("engine.regular_needs_trigger", count=config.reg_from_base)
    items = [examples.items[i] for i in examples.trained()]
    chosen = [items[n % len(items)] for n in range(config.reg_from_base)]
    cfg, steps = distilled.drawing(config.sample_cfg, config.sample_inference_steps, guidance,
                                   distilled.PREVIEW_STEPS, base)
    return [SampleRequest(captions.without_trigger(item.picture.caption, config.trigger_word), "",
                          config.seed + n, steps, cfg, item.bucket, config.sample_sampler)
            for n, item in enumerate(chosen)]


def draw(config: TrainConfig, requests: list[SampleRequest], family: Family, parts: Parts,
         precision: Precision, emit: Callable[[Event], None], control: Control) -> Path:
    """Draws the pictures that no run has drawn yet, and returns their folder in the cache."""
    # The folder is named after all that decides how they look.
    weights = [fingerprint(family.weight_files(parts.source, part)) for part in PARTS]
    folder = paths.cache_dir() / "regular" / key(
        *weights, parts.objective, parts.scheduler, parts.distilled, [*map(astuple, requests)],
        *([reading_of(config)] if family.spec.chunked else []))[:20]
    files = [folder / f"{number:05d}.png" for number in range(len(requests))]
    missing = [pair for pair in zip(requests, files, strict=True) if not pair[1].exists()]
    if not missing:
        return folder
    texts = Encoder(family, parts.source, precision, config, emit, control).embeddings(
        list(dict.fromkeys(["", *(shot.prompt for shot in requests)])))
    free_memory()
    # Parts of their own: those of the run are still without VAE and denoiser.
    loaded = family.load(parts.source, precision, frozenset({"vae"}))
    loaded.scheduler, loaded.objective = parts.scheduler, parts.objective
    loaded.distilled = parts.distilled
    loaded.denoiser = load_denoiser(config, family, parts.source, precision)
    pipeline: Any = family.pipeline(loaded)
    for done, (shot, path) in enumerate(missing, 1):
        if control.stopping:
            raise Stopped
        arguments = family.prompt_arguments(*(
            batched([texts[text]], precision.device) for text in (shot.prompt, "")))
        image = generate.draw(pipeline, loaded, shot, arguments, precision)
        paths.write_atomic(path.with_suffix(".txt"), shot.prompt)
        generate.save_png(image, path, shot.prompt)
        emit(Phase(name="regular", done=done, total=len(missing)))
    del loaded, pipeline
    free_memory()
    return folder
