"""From a folder of pictures to tensors: scan, buckets, latents and text embeddings.

Latents and embeddings are computed once, in batches, and kept on disk; the encoders are loaded
only if something is missing there, and leave memory before the training begins.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core import hashes, plugins
from core.config import TrainConfig
from core.dataset import buckets, captions, curation, image_folder, images, masks
from core.dataset.batch_fallback import BatchFallback, Way
from core.dataset.buckets import Point
from core.dataset.cache import Cache, key
from core.dataset.checks import image_stats
from core.dataset.checks.image_stats import Looks
from core.dataset.processors import Processors
from core.dataset.text_embeddings import batched, grouped, reading_of, sizes_of, trimmed, unread
from core.errors import UserError
from core.failures import one_line
from core.families.base import Cond, CropInfo, Family, Parts
from core.families.spec import Part
from core.hashes import fingerprint
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from core.system.machine import MB
from core.weights import precision_rules
from core.weights.offload import stage_of
from core.weights.precision import Precision, autocast, free_memory, total_memory

MOST_SHUFFLES = 8           # caption variants kept for each picture when tags are shuffled
_Item = TypeVar("_Item")
_DECODERS = 4               # threads; Pillow decodes outside the interpreter's lock


@dataclass(frozen=True, slots=True)
class Example:
    """One picture, ready to be cached."""

    picture: image_folder.Picture
    bucket: tuple[int, int]                 # px, width and height
    captions: tuple[str, ...]               # variants; one unless tags are shuffled
    focus: Point | None = None              # what the crop keeps; None: the centre
    mask: Path | None = None                # its file, or the picture's own for its transparency

    def frame(self, flipped: bool = False) -> CropInfo:
        cut = buckets.crop_to(self.picture.size, self.bucket, self.focus)
        left = cut.resized[0] - self.bucket[0] - cut.left if flipped else cut.left
        return CropInfo(self.picture.size, (left, cut.top), self.bucket)


@dataclass(slots=True)
class Examples:
    """Everything the loop needs, in memory. `latents[i]` is (C, h, w), or (2, C, h, w) with the
    mirrored picture second; with masks, the mask is one channel more, the last."""

    items: list[Example]
    data: image_folder.Dataset
    held_out: frozenset[int]                # indices used for validation only
    latents: list[Tensor] = field(default_factory=list)
    texts: dict[str, Cond] = field(default_factory=dict)      # caption -> (1, ...) each
    regular: frozenset[int] = frozenset()   # indices of regularisation pictures

    def trained(self) -> list[int]:
        return [i for i in range(len(self.items)) if i not in self.held_out | self.regular]

    def names(self) -> list[str]:
        """What a resumed run knows each picture by: its path in its folder."""
        folder = self.data.folder
        return [path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
                for path in (item.picture.path for item in self.items)]

    def captions(self, *more: str) -> list[str]:
        """All different texts, the empty one first."""
        used = (c for item in self.items for c in item.captions)
        return list(dict.fromkeys(["", *used, *more]))

    def cond(self, texts: Sequence[str], device: torch.device) -> Cond:
        """Embeddings of a batch of captions, (B, ...)."""
        return batched([self.texts[t] for t in texts], device)


def find(config: TrainConfig, folder: Path, metadata: Path | None, native: int, step: int,
         emit: Callable[[Event], None]) -> Examples:
    """Scans the folder and plans buckets. Pictures that can't be read are named and skipped."""
    emit(Phase(name="scan"))
    data, items = _scan(config, folder, metadata, native, step, emit)
    _, held_out = image_folder.split_validation(data.pictures, config.validation_split, config.seed)
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
          emit: Callable[[Event], None]) -> tuple[image_folder.Dataset, list[Example]]:
    chosen = curation.load(folder)
    looks = Looks() if config.crop_about == "subject" else None
    data = image_folder.scan(folder, metadata, left_out=chosen.left_out,
                             look_all=looks.look_all if looks else None)
    points = image_stats.focus_points(data, chosen, looks.table if looks else None)
    for problem in data.problems:
        if not (config.masked_loss and problem.code == "dataset.masks_left_out"):
            emit(Note(key=problem.code, params=dict(problem.params)))
    sizes = buckets.Rule.of(config, native, step).assign([p.size for p in data.pictures])
    return data, [Example(p, bucket, _captions(p, config, i), point, _mask(p, config, data.folder))
                  for i, (p, bucket, point)
                  in enumerate(zip(data.pictures, sizes, points, strict=True))]


def _mask(picture: image_folder.Picture, config: TrainConfig, folder: Path) -> Path | None:
    if not config.masked_loss:
        return None
    return masks.find(picture.path, folder) or (picture.path if picture.has_alpha else None)


def _captions(picture: image_folder.Picture, config: TrainConfig, index: int) -> tuple[str, ...]:
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
        kind, total = precision.device.type, total_memory(precision.device) / MB
        self.encoders = precision_rules.encoder_settings(config, kind, total)
        self.processors = Processors(config.picture_processors)
        own = plugins.is_named(config.family)
        self.marks = (plugins.mark(config.family),) if own else ()      # it encodes as it likes
        self.text_marks = (reading_of(config),) if family.spec.chunked else ()
        self._outgrown = False              # whether that was said

    def fill(self, examples: Examples, more_texts: Iterable[str] = ()) -> None:
        """`more_texts`: prompts of previews, encoded along with the captions."""
        if not self.config.trains_text:
            examples.texts = self.embeddings(examples.captions(*more_texts))
            free_memory()
        self._fill_latents(examples)
        free_memory()

    def embeddings(self, texts: list[str]) -> dict[str, Cond]:
        """(1, ...) each, on the CPU; of large encoders as the plan has it for this device."""
        cache = self._cache("text")
        kept = self.encoders.get("kept")
        marks = (*self.marks, *self.text_marks, *([kept] if kept else ()))
        names = {t: key("text", t, str(self.precision.compute), *marks) for t in texts}
        known = {t: found for t in texts if (found := cache.get(names[t])) is not None}
        missing = [t for t in texts if t not in known]
        if not missing:
            return known
        fresh: dict[str, Cond] = {text: {} for text in missing}
        encoders = self.family.spec.encoders
        for n, encoder in enumerate(encoders):      # one in memory at a time
            self._encode_texts(encoder, texts, fresh, n, len(encoders))
            free_memory()
        for text, one in fresh.items():
            self._keep(cache, names[text], one)
        return known | fresh

    def _encode_texts(self, encoder: Part, texts: list[str], fresh: dict[str, Cond], turn: int,
                      turns: int) -> None:
        """One encoder's entries for the texts in `fresh`."""
        parts = self.family.load(self.source, replace(self.precision, **self.encoders),
                                 frozenset({encoder}))
        if not parts.text:                          # an encoder that this base does without
            return
        parts.reading = reading_of(self.config)
        if turn == turns - 1:
            say_too_long(self.family, parts, list(fresh), self.emit)
        size = self.config.cache_batch_size * 2
        gently = BatchFallback(size, self._to_cpu(*parts.text.values()), self.emit)
        done = turn * len(fresh)
        for chunk in _batches(texts, size, set(fresh)):
            rows = gently(lambda some: self._embed(parts, some), chunk)
            for text, one in zip(chunk, rows, strict=True):
                if text in fresh:
                    fresh[text] |= one
                    done += 1
            self.emit(Phase(name="texts", done=done, total=turns * len(fresh)))

    def _embed(self, parts: Parts, texts: Sequence[str]) -> list[Cond]:
        def encode(some: list[int]) -> Cond:
            with autocast(self.precision):
                return self.family.encode_text(parts, [texts[i] for i in some])
        sizes = [sizes_of(self.family.tokenize(parts, [text])) if self.family.spec.chunked else 0
                 for text in texts]
        return [trimmed({k: self._stored(v) for k, v in row.items()})
                for row in grouped(sizes, encode)]

    def _stored(self, states: Tensor) -> Tensor:
        """On the CPU, in the run's numbers. Language models have a few states that outgrow fp16,
        whose next larger number is infinite."""
        most = torch.finfo(self.precision.compute).max
        large = self.precision.compute == torch.float16 and bool((states.abs() > most).any())
        if large and not self._outgrown:
            self._outgrown = True
            self.emit(Note(key="precision.text_outgrows_fp16"))
        return (states.clamp(-most, most) if large else states).to("cpu", self.precision.compute)

    def _to_cpu(self, *modules: object) -> list[Way]:
        """The last way to encode where a GPU has no room: slowly, beside it."""
        if self.precision.device.type == "cpu":
            return []
        models = [module for module in modules if isinstance(module, torch.nn.Module)]
        if any(stage_of(model) for model in models):        # next to nothing of it is there
            return []
        return [("engine.cache_on_cpu", lambda: [
            model.to("cpu", torch.float32) for model in models])]

    def _keep(self, cache: Cache, name: str, tensors: dict[str, Tensor]) -> None:
        """A cache that takes no more is done without: all is in memory anyway."""
        try:
            cache.put(name, tensors)
        except OSError as error:
            cache.folder = None
            self.emit(Note(key="engine.cache_not_kept", params={"reason": one_line(error)}))

    def _fill_latents(self, examples: Examples) -> None:
        cache = self._cache("vae")
        names = [self._latent_keys(item) for item in examples.items]
        found = [[cache.get(n) for n in row] for row in names]
        examples.latents = [torch.stack([f["latents"] for f in row if f]) if row and all(row)
                            else torch.empty(0) for row in found]
        missing = {i for i, row in enumerate(found) if row and not all(row)}
        if missing:
            self._encode_pictures(examples, missing, names, cache)
        if not self.config.flip:
            examples.latents = [x[0] if len(x) else x for x in examples.latents]
        self._drop_gone(examples)

    def _drop_gone(self, examples: Examples) -> None:
        """Pictures that were deleted or broken since the scan are told and left out."""
        kept = [i for i, latents in enumerate(examples.latents) if len(latents)]
        for i in sorted({*range(len(examples.items))} - {*kept}):
            self.emit(Note(key="engine.picture_gone", params={
                "file": str(examples.items[i].picture.path)}))
        if not set(kept).intersection(examples.trained()):
            raise UserError("engine.pictures_gone", folder=examples.data.folder)
        examples.items = [examples.items[i] for i in kept]
        examples.latents = [examples.latents[i] for i in kept]
        examples.held_out, examples.regular = (
            frozenset(n for n, i in enumerate(kept) if i in chosen)
            for chosen in (examples.held_out, examples.regular))

    def _encode_pictures(self, examples: Examples, missing: set[int], names: list[list[str]],
                         cache: Cache) -> None:
        """Decoding in threads, a batch ahead of the encoder; each batch is of one bucket."""
        parts = self.family.load(self.source, self.precision, frozenset({"vae"}))
        groups: dict[tuple[int, int], list[int]] = {}
        for i, item in enumerate(examples.items):
            groups.setdefault(item.bucket, []).append(i)
        size = self.config.cache_batch_size
        batches = [b for group in groups.values() for b in _batches(group, size, missing)]
        gently = BatchFallback(size, [("engine.cache_tiled", parts.vae.enable_tiling),
                                      *self._to_cpu(parts.vae)], self.emit)
        done = 0
        with ThreadPoolExecutor(_DECODERS) as pool:
            def decode(batch: list[int]) -> list[Future[np.ndarray | None]]:
                return [pool.submit(self._pixels, examples.items[i]) for i in batch]
            ahead = decode(batches[0])
            for n, batch in enumerate(batches):
                pixels = {i: one for i, f in zip(batch, ahead, strict=True)
                          if (one := f.result()) is not None}
                ahead = decode(batches[n + 1]) if n + 1 < len(batches) else []
                for i, rows in self._encode_batch(parts, examples, pixels, gently):
                    if i in missing:
                        examples.latents[i] = rows
                        for name, one in zip(names[i], rows, strict=True):
                            self._keep(cache, name, {"latents": one})
                done += len(missing.intersection(batch))
                self.emit(Phase(name="cache", done=done, total=len(missing)))
                if self.control.stopping:
                    raise Stopped

    def _encode_batch(self, parts: Parts, examples: Examples, pixels: dict[int, np.ndarray],
                      gently: BatchFallback) -> Iterator[tuple[int, Tensor]]:
        """-> index of each picture with its latents, (1 or 2, C, h, w)."""
        if not pixels:
            return
        x = torch.from_numpy(np.stack([*pixels.values()])).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = gently(lambda some: self._latents(parts, some), x)
        for place, (i, rows) in enumerate(zip(pixels, latents, strict=True)):
            path = examples.items[i].picture.path
            if not torch.isfinite(rows).all():
                rows = self._in_full(parts, x[place:place + 1], path)
            yield i, rows.clone()

    def _latents(self, parts: Parts, x: Tensor) -> list[Tensor]:
        views = [x, x.flip(3)] if self.config.flip else [x]
        return [*torch.stack([self._encoded(parts, v) for v in views], 1)]

    def _in_full(self, parts: Parts, x: Tensor, path: Path) -> Tensor:
        """Once more in fp32: some VAEs overflow in fp16."""
        numbers = parts.vae.dtype
        parts.vae.float()
        rows = self._latents(parts, x)[0]
        parts.vae.to(numbers)
        if not torch.isfinite(rows).all():
            raise UserError("engine.bad_latents", path=path)
        self.emit(Note(key="engine.latents_again", params={"file": str(path)}))
        return rows

    def _encoded(self, parts: Parts, view: Tensor) -> Tensor:
        """(B, 3 or 4, H, W) in [-1, 1] -> latents, and the mask of 0 to 1 as their last channel."""
        latents = self.family.encode_image(parts, view[:, :3]).float().cpu()
        if view.shape[1] == 3:
            return latents
        mask = F.interpolate((view[:, 3:] + 1) / 2, latents.shape[2:], mode="area")
        return torch.cat([latents, mask], 1)

    def _pixels(self, item: Example) -> np.ndarray | None:
        """(H, W, 3), with masks (H, W, 4); None where the picture is gone."""
        try:
            image = images.open_picture(item.picture.path, self.config.alpha_background)
        except (OSError, UserError):
            return None
        image = self.processors(image, item.picture.path)
        fitted = buckets.fit_picture(image, item.bucket, item.focus)
        if not self.config.masked_loss:
            return fitted
        mask = masks.fit(item.mask, item.picture.size, item.bucket, item.focus)
        return np.dstack([fitted, mask])

    def _latent_keys(self, item: Example) -> list[str]:
        """One a view; none where the picture is gone."""
        background = self.config.alpha_background if item.picture.has_alpha else ""
        crop = buckets.crop_to(item.picture.size, item.bucket, item.focus).box
        try:
            digest = hashes.sha256(item.picture.path)
            mask = (("mask", item.mask and hashes.sha256(item.mask))
                    if self.config.masked_loss else ())
        except OSError:
            return []
        return [key("latents", digest, item.bucket, background, flip, str(self.precision.vae),
                    *((crop,) if item.focus else ()), *self.marks,
                    *self.processors.marks(item.picture.path), *mask)
                for flip in ((False, True) if self.config.flip else (False,))]

    def _cache(self, part: str) -> Cache:
        files = self.family.weight_files(self.source, "vae" if part == "vae" else "text")
        return Cache(part, fingerprint(files), self.config.cache_to_disk)


def say_too_long(family: Family, parts: Parts, texts: list[str],
                 emit: Callable[[Event], None]) -> None:
    limit = family.token_limit(parts)
    counts = family.count_tokens(parts, texts)
    long = [(t, n) for t, n in zip(texts, counts, strict=True) if n > limit]
    if long:
        text, tokens = max(long, key=lambda one: one[1])
        emit(Note(key="engine.caption_too_long", params={
            "count": len(long), "limit": limit, "tokens": tokens, "example": text[:80],
            "rest": unread(family, parts, text)[:200]}))


def _batches(items: Sequence[_Item], size: int, missing: AbstractSet[_Item]) -> list[list[_Item]]:
    """Batches that hold something missing. They are cut from all items: numbers in a batch depend
    a little on its size, and a run that is broken while caching must come to the same."""
    cut = [list(items[start:start + size]) for start in range(0, len(items), size)]
    return [batch for batch in cut if not missing.isdisjoint(batch)]


class Stopped(Exception):
    """The user stopped the job before there was anything to save."""
