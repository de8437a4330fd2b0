"""From a folder of pictures to tensors: scan, buckets, latents and text embeddings.

Latents and embeddings are computed once, in batches, and kept on disk; the encoders are loaded
only if something is missing there, and leave memory before the training begins.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core import buckets, captions, choices, crops, dataset, extensions, masks, pictures
from core.buckets import Point
from core.cache import Cache, file_digest, fingerprint, key
from core.config import TrainConfig, size_of
from core.control import Control
from core.events import Event, Note, Phase
from core.families.base import Cond, Family, Parts, Precision
from core.faults import Fault
from core.looks import Looks
from core.precision import autocast, free_memory
from core.processors import Processors

MOST_SHUFFLES = 8           # caption variants kept for each picture when tags are shuffled
_DECODERS = 4               # threads; Pillow decodes outside the interpreter's lock


@dataclass(frozen=True, slots=True)
class Example:
    """One picture, ready to be cached."""

    picture: dataset.Picture
    bucket: tuple[int, int]                 # px, width and height
    captions: tuple[str, ...]               # variants; one unless tags are shuffled
    focus: Point | None = None              # what the crop keeps; None: the centre
    mask: Path | None = None                # its file, or the picture's own for its transparency


@dataclass(slots=True)
class Examples:
    """Everything the loop needs, in memory. `latents[i]` is (C, h, w), or (2, C, h, w) with the
    mirrored picture second; with masks, the mask is one channel more, the last."""

    items: list[Example]
    data: dataset.Dataset
    held_out: frozenset[int]                # indices used for validation only
    latents: list[Tensor] = field(default_factory=list)
    texts: dict[str, Cond] = field(default_factory=dict)      # caption -> (1, ...) each
    regular: frozenset[int] = frozenset()   # indices of regularisation pictures

    def trained(self) -> list[int]:
        return [i for i in range(len(self.items)) if i not in self.held_out | self.regular]

    def captions(self, *more: str) -> list[str]:
        """All different texts, the empty one first."""
        used = (c for item in self.items for c in item.captions)
        return list(dict.fromkeys(["", *used, *more]))

    def cond(self, texts: Sequence[str], device: torch.device) -> Cond:
        """Embeddings of a batch of captions, (B, ...)."""
        rows = [self.texts[t] for t in texts]
        return {k: torch.cat([r[k] for r in rows]).to(device, non_blocking=True)
                for k in rows[0]}


def find(config: TrainConfig, folder: Path, metadata: Path | None, native: int, step: int,
         emit: Callable[[Event], None]) -> Examples:
    """Scans the folder and plans buckets. Pictures that can't be read are named and skipped."""
    emit(Phase(name="scan"))
    data, items = _scan(config, folder, metadata, native, step, emit)
    _, held_out = dataset.split_validation(data.pictures, config.validation_split, config.seed)
    emit(Note(key="engine.found", params={
        "pictures": len(items), "captioned": data.captioned, "held_out": len(held_out),
        "buckets": len({item.bucket for item in items}), "skipped": data.skipped}))
    if config.masked_loss:
        emit(Note(key="engine.masks", params={
            "masks": sum(item.mask is not None for item in items), "pictures": len(items)}))
    return Examples(items, data, frozenset(held_out))


def add_regular(config: TrainConfig, examples: Examples, folder: Path, native: int, step: int,
                emit: Callable[[Event], None]) -> None:
    """Adds a folder of regularisation pictures; their captions get no trigger word."""
    data, items = _scan(config.with_changes(trigger_word=""), folder, None, native, step, emit)
    first = len(examples.items)
    examples.items += items
    examples.regular |= frozenset(range(first, len(examples.items)))
    emit(Note(key="engine.found_regular", params={
        "pictures": len(items), "captioned": data.captioned, "folder": str(folder)}))


def _scan(config: TrainConfig, folder: Path, metadata: Path | None, native: int, step: int,
          emit: Callable[[Event], None]) -> tuple[dataset.Dataset, list[Example]]:
    chosen = choices.load(folder)
    looks = Looks() if config.crop_about == "subject" else None
    data = dataset.scan(folder, metadata, left_out=chosen.left_out,
                        look_all=looks.look_all if looks else None)
    points = crops.focus_points(data, chosen, looks.table if looks else None)
    for problem in data.problems:
        if not (config.masked_loss and problem.code == "dataset.masks_left_out"):
            emit(Note(key=problem.code, params=dict(problem.params)))
    area = size_of(config.max_resolution) or (native, native)
    side = isqrt(area[0] * area[1])
    shortest, longest = config.min_bucket_side or side // 2, config.max_bucket_side or side * 2
    sizes = buckets.assign_buckets([p.size for p in data.pictures], area, step, shortest, longest,
                                   config.bucket_no_upscale)
    return data, [Example(p, bucket, _captions(p, config, i), point, _mask(p, config, data.folder))
                  for i, (p, bucket, point)
                  in enumerate(zip(data.pictures, sizes, points, strict=True))]


def _mask(picture: dataset.Picture, config: TrainConfig, folder: Path) -> Path | None:
    if not config.masked_loss:
        return None
    return masks.find(picture.path, folder) or (picture.path if picture.has_alpha else None)


def _captions(picture: dataset.Picture, config: TrainConfig, index: int) -> tuple[str, ...]:
    """The caption, or its shuffles; the trigger word goes in front after shuffling."""
    texts = [picture.caption]
    if config.shuffle_tags:
        rng = random.Random(f"{config.seed}-{index}")
        texts = [captions.shuffle_tags(picture.caption, config.keep_tokens, rng)
                 for _ in range(MOST_SHUFFLES)]
    return tuple(dict.fromkeys(captions.with_trigger(t, config.trigger_word) for t in texts))


class Encoder:
    """Fills `Examples` from the cache, and the cache from the base's encoders."""

    def __init__(self, family: Family, source: Path, precision: Precision, config: TrainConfig,
                 emit: Callable[[Event], None], control: Control) -> None:
        self.family, self.source, self.precision = family, source, precision
        self.config, self.emit, self.control = config, emit, control
        self.processors = Processors(config.picture_processors)
        own = extensions.is_named(config.family)
        self.marks = (extensions.mark(config.family),) if own else ()      # it encodes as it likes

    def fill(self, examples: Examples, more_texts: Iterable[str] = ()) -> None:
        """`more_texts`: prompts of previews, encoded along with the captions."""
        if not self.config.trains_text:
            self._fill_texts(examples, examples.captions(*more_texts))
            free_memory()
        self._fill_latents(examples)
        free_memory()

    def _fill_texts(self, examples: Examples, texts: list[str]) -> None:
        cache = self._cache("text")
        names = {t: key("text", t, str(self.precision.compute), *self.marks) for t in texts}
        examples.texts = {t: found for t in texts if (found := cache.get(names[t])) is not None}
        missing = [t for t in texts if t not in examples.texts]
        if not missing:
            return
        parts = self.family.load(self.source, self.precision, frozenset({"text"}))
        say_too_long(self.family, parts, missing, self.emit)
        size = self.config.cache_batch_size * 2
        for start in range(0, len(missing), size):
            chunk = missing[start:start + size]
            with autocast(self.precision):
                cond = self.family.encode_text(parts, chunk)
            for i, text in enumerate(chunk):
                one = {k: v[i:i + 1].to("cpu", self.precision.compute) for k, v in cond.items()}
                examples.texts[text] = one
                cache.put(names[text], one)
            self.emit(Phase(name="texts", done=start + len(chunk), total=len(missing)))

    def _fill_latents(self, examples: Examples) -> None:
        cache = self._cache("vae")
        flips = (False, True) if self.config.flip else (False,)
        names = [[self._latent_key(item, flip) for flip in flips] for item in examples.items]
        found = [[cache.get(n) for n in row] for row in names]
        examples.latents = [torch.stack([f["latents"] for f in row if f]) if all(row)
                            else torch.empty(0) for row in found]
        missing = [i for i, row in enumerate(found) if not all(row)]
        if missing:
            self._encode_pictures(examples, missing, names, cache)
        if not self.config.flip:
            examples.latents = [x[0] for x in examples.latents]

    def _encode_pictures(self, examples: Examples, missing: list[int], names: list[list[str]],
                         cache: Cache) -> None:
        """Decoding in threads, a batch ahead of the encoder; each batch is of one bucket."""
        parts = self.family.load(self.source, self.precision, frozenset({"vae"}))
        groups: dict[tuple[int, int], list[int]] = {}
        for i in missing:
            groups.setdefault(examples.items[i].bucket, []).append(i)
        size = self.config.cache_batch_size
        batches = [g[s:s + size] for g in groups.values() for s in range(0, len(g), size)]
        done = 0
        with ThreadPoolExecutor(_DECODERS) as pool:
            def decode(batch: list[int]) -> list[object]:
                return [pool.submit(self._pixels, examples.items[i]) for i in batch]
            ahead = decode(batches[0])
            for n, batch in enumerate(batches):
                pixels = np.stack([f.result() for f in ahead])  # type: ignore[attr-defined]
                ahead = decode(batches[n + 1]) if n + 1 < len(batches) else []
                self._encode_batch(parts, examples, batch, pixels, names, cache)
                done += len(batch)
                self.emit(Phase(name="cache", done=done, total=len(missing)))
                if self.control.stopping:
                    raise Stopped

    def _encode_batch(self, parts: Parts, examples: Examples, batch: list[int],
                      pixels: np.ndarray, names: list[list[str]], cache: Cache) -> None:
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        views = [x, x.flip(3)] if self.config.flip else [x]
        latents = torch.stack([self._encoded(parts, v) for v in views], 1)
        if not torch.isfinite(latents).all():
            raise Fault("engine.bad_latents", path=examples.items[batch[0]].picture.path)
        for i, rows in zip(batch, latents, strict=True):
            examples.latents[i] = rows.clone()
            for name, one in zip(names[i], rows, strict=True):
                cache.put(name, {"latents": one})

    def _encoded(self, parts: Parts, view: Tensor) -> Tensor:
        """(B, 3 or 4, H, W) in [-1, 1] -> latents, and the mask of 0 to 1 as their last channel."""
        latents = self.family.encode_image(parts, view[:, :3]).float().cpu()
        if view.shape[1] == 3:
            return latents
        mask = F.interpolate((view[:, 3:] + 1) / 2, latents.shape[2:], mode="area")
        return torch.cat([latents, mask], 1)

    def _pixels(self, item: Example) -> np.ndarray:
        """(H, W, 3), with masks (H, W, 4)."""
        image = pictures.open_picture(item.picture.path, self.config.alpha_background)
        image = self.processors(image, item.picture.path)
        fitted = buckets.fit_picture(image, item.bucket, item.focus)
        if not self.config.masked_loss:
            return fitted
        mask = masks.fit(item.mask, item.picture.size, item.bucket, item.focus)
        return np.dstack([fitted, mask])

    def _latent_key(self, item: Example, flip: bool) -> str:
        background = self.config.alpha_background if item.picture.has_alpha else ""
        crop = buckets.crop_to(item.picture.size, item.bucket, item.focus).box
        return key("latents", file_digest(item.picture.path), item.bucket, background, flip,
                   str(self.precision.vae), *((crop,) if item.focus else ()), *self.marks,
                   *self.processors.marks(item.picture.path),
                   *(("mask", item.mask and file_digest(item.mask))
                     if self.config.masked_loss else ()))

    def _cache(self, part: str) -> Cache:
        files = self.family.weight_files(self.source, "vae" if part == "vae" else "text")
        return Cache(part, fingerprint(files), self.config.cache_to_disk)


def say_too_long(family: Family, parts: Parts, texts: list[str],
                 emit: Callable[[Event], None]) -> None:
    limit = family.token_limit(parts)
    counts = family.count_tokens(parts, texts)
    long = [(t, n) for t, n in zip(texts, counts, strict=True) if n > limit]
    if long:
        emit(Note(key="engine.caption_too_long", params={
            "count": len(long), "limit": limit, "tokens": long[0][1],
            "example": long[0][0][:80]}))


class Stopped(Exception):
    """The user stopped the job before there was anything to save."""
