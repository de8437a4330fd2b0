"""From a folder of pictures to tensors: scan, buckets, latents and text embeddings.

Latents and embeddings are computed once, in batches, and kept on disk. The encoders are loaded
only if something is missing there, and they leave memory before the training begins.
"""

from __future__ import annotations

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

from core import hashes, plugins, prompt_markup
from core.config import TrainConfig
from core.dataset import buckets, captions, curation, image_folder, images, masks
from core.dataset.batch_fallback import BatchFallback, Way
from core.dataset.cache import Cache, key
from core.dataset.checks import image_stats
from core.dataset.processors import Processors
from core.dataset.text_embeddings import batched, grouped, reading_of, sizes_of, trimmed, unread
from core.errors import UserError
from core.failures import one_line
from core.families.base import Cond, CropInfo, Family, Parts
from core.families.spec import Part
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from core.system.machine import MB
from core.weights import precision_rules
from core.weights.offload import stage_of
from core.weights.precision import Precision, autocast, free_memory, total_memory

_Item = TypeVar("_Item")
_DECODERS = 4               # threads; Pillow decodes outside of the interpreter's lock


@dataclass(frozen=True, slots=True)
class Example:
    """One picture, ready to be cached."""

    picture: image_folder.Picture
    bucket: tuple[int, int]                 # px, width and height
    captions: tuple[str, ...]               # variants; one unless tags are shuffled
    focus: buckets.Point | None = None              # the crop is cut about it; None: the centre
    mask: Path | None = None                # its file, or the picture's own for its transparency

    def frame(self, flipped: bool = False) -> CropInfo:
        """Returns the picture's size and crop, as models like SDXL are conditioned on them."""
        crop = buckets.crop_to(self.picture.size, self.bucket, self.focus)
        left = crop.resized[0] - self.bucket[0] - crop.left if flipped else crop.left
        return CropInfo(self.picture.size, (left, crop.top), self.bucket)


@dataclass(slots=True)
class Examples:
    """Everything that the training loop needs of the dataset, in memory.

    `latents[i]` is (C, h, w), or (2, C, h, w) with the mirrored picture second. With masks, the
    mask is one more channel, the last.
    """

    items: list[Example]
    data: image_folder.Dataset
    held_out: frozenset[int]                # indices used for validation only
    latents: list[Tensor] = field(default_factory=list)
    texts: dict[str, Cond] = field(default_factory=dict)      # caption -> (1, ...) each
    regular: frozenset[int] = frozenset()   # indices of regularisation pictures

    def trained(self) -> list[int]:
        return [i for i in range(len(self.items)) if i not in self.held_out | self.regular]

    def names(self) -> list[str]:
        """Returns the name by which a resumed run knows each picture: its path in its folder."""
        folder = self.data.folder
        return [path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
                for path in (item.picture.path for item in self.items)]

    def captions(self, *more: str) -> list[str]:
        """Returns all different texts, the empty one first, and `more` behind them."""
        used = (caption for item in self.items for caption in item.captions)
        return list(dict.fromkeys(["", *used, *more]))

    def cond(self, texts: Sequence[str], device: torch.device) -> Cond:
        """Returns the embeddings of a batch of captions, (B, ...)."""
        return batched([self.texts[text] for text in texts], device)


def find(config: TrainConfig, folder: Path, metadata: Path | None, native: int, step: int,
         emit: Callable[[Event], None]) -> Examples:
    """Scans the folder and assigns buckets. Pictures that can't be read are named and skipped.

    `native` and `step` are the base's native size and bucket step, in px.
    """
    emit(Phase(name="scan"))
    data, items = _scan(config, folder, metadata, native, step, emit)
    held_out = image_folder.held_out(data.pictures, config.validation_split, config.seed)
    emit(Note(key="engine.found", params={
        "pictures": len(items), "captioned": data.captioned, "held_out": len(held_out),
        "buckets": len({item.bucket for item in items}), "skipped": data.skipped}))
    if config.masked_loss:
        emit(Note(key="engine.masks", params={
            "masks": sum(item.mask is not None for item in items), "pictures": len(items)}))
    return Examples(items, data, held_out)


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
    choices = curation.load(folder)
    looks = image_stats.Looks() if config.crop_about == "subject" else None
    data = image_folder.scan(folder, metadata, left_out=choices.left_out,
                             look_all=looks.look_all if looks else None)
    points = image_stats.focus_points(data, choices, looks.table if looks else None)
    for problem in data.problems:
        # Folders of masks are left out as pictures, which is right where masks are wanted.
        if not (config.masked_loss and problem.code == "dataset.masks_left_out"):
            emit(Note(key=problem.code, params=dict(problem.params)))
    sizes = buckets.BucketRule.of(config, native, step).assign([p.size for p in data.pictures])
    examples = []
    rows = zip(data.pictures, sizes, points, strict=True)
    for index, (picture, bucket, point) in enumerate(rows):
        own = picture.path if picture.has_alpha else None
        mask = (masks.find(picture.path, data.folder) or own) if config.masked_loss else None
        texts = captions.variants(picture.caption, config, index, picture.lines)
        examples.append(Example(picture, bucket, texts, point, mask))
    tell_markup((item.captions[0] for item in examples), config.trigger_word, emit)
    return data, examples


class Encoder:
    """Fills `Examples` from the cache, and the cache from the base's encoders."""

    def __init__(self, family: Family, source: Path, precision: Precision, config: TrainConfig,
                 emit: Callable[[Event], None], control: Control) -> None:
        self.family, self.source, self.precision = family, source, precision
        self.config, self.emit, self.control = config, emit, control
        kind, total = precision.device.type, total_memory(precision.device) / MB
        self.encoders = precision_rules.encoder_settings(config, kind, total)
        self.processors = Processors(config.picture_processors)
        # Parts of cache keys. A family of the user's own encodes as its file says.
        self.marks = (plugins.mark(config.family),) if plugins.is_named(config.family) else ()
        self.text_marks = (reading_of(config),) if family.spec.chunked else ()
        self._noted_overflow = False

    def fill(self, examples: Examples, more_texts: Iterable[str] = ()) -> None:
        """Loads or makes everything that `examples` lack.

        `more_texts` are prompts of previews, which are encoded along with the captions. Raises
        UserError where no picture is left, and Stopped.
        """
        if not self.config.trains_text:
            examples.texts = self.embeddings(examples.captions(*more_texts))
            free_memory()
        cache = self._cache("vae")
        names = [self._latent_keys(item) for item in examples.items]
        entries = [[cache.get(name) for name in row] for row in names]
        examples.latents = [torch.stack([view["latents"] for view in row if view])
                            if row and all(row) else torch.empty(0) for row in entries]
        missing = {i for i, row in enumerate(entries) if row and not all(row)}
        # A second set of all latents, which would stay until the denoiser is loaded.
        del entries
        if missing:
            self._encode_pictures(examples, missing, names, cache)
        if not self.config.flip:
            examples.latents = [views[0] if len(views) else views for views in examples.latents]
        # Pictures that were deleted or broken since the scan are named and left out.
        kept = [i for i, latents in enumerate(examples.latents) if len(latents)]
        for i in sorted({*range(len(examples.items))} - {*kept}):
            self.emit(Note(key="engine.picture_gone", params={
                "file": str(examples.items[i].picture.path)}))
        if not set(kept).intersection(examples.trained()):
            raise UserError("engine.pictures_gone", folder=examples.data.folder)
        examples.items = [examples.items[i] for i in kept]
        examples.latents = [examples.latents[i] for i in kept]
        # Both sets hold indices, which have moved up.
        examples.held_out, examples.regular = (
            frozenset(n for n, i in enumerate(kept) if i in chosen)
            for chosen in (examples.held_out, examples.regular))
        free_memory()

    # --- text ---

    def embeddings(self, texts: list[str]) -> dict[str, Cond]:
        """Returns the embeddings of each text, (1, ...), on the CPU.

        Large encoders are loaded as the memory plan has it for this device.
        """
        cache = self._cache("text")
        quantized = self.encoders.get("quantization")
        marks = (*self.marks, *self.text_marks, *([quantized] if quantized else ()))
        names = {t: key("text", t, str(self.precision.compute), *marks) for t in texts}
        known = {t: entry for t in texts if (entry := cache.get(names[t])) is not None}
        missing = [text for text in texts if text not in known]
        if not missing:
            return known
        fresh: dict[str, Cond] = {text: {} for text in missing}
        # One encoder in memory at a time.
        encoders = self.family.spec.encoders
        for n, encoder in enumerate(encoders):
            self._encode_texts(encoder, texts, fresh, n, len(encoders))
            free_memory()
        for text, cond in fresh.items():
            self._keep(cache, names[text], cond)
        return known | fresh

    def _encode_texts(self, encoder: Part, texts: list[str], fresh: dict[str, Cond], turn: int,
                      turns: int) -> None:
        """Adds what one encoder makes of the texts in `fresh`."""
        parts = self.family.load(self.source, replace(self.precision, **self.encoders),
                                 frozenset({encoder}))
        # Some bases do without one of their family's encoders.
        if not parts.text:
            return
        parts.reading = reading_of(self.config)
        if turn == turns - 1:
            say_too_long(self.family, parts, list(fresh), self.emit)

        def embed(batch: Sequence[str]) -> list[Cond]:
            def encode(indices: list[int]) -> Cond:
                with autocast(self.precision):
                    return self.family.encode_text(parts, [batch[i] for i in indices])
            # Texts of different length must not be padded to the longest: each would then depend
            # on its neighbours.
            sizes = [sizes_of(self.family.tokenize(parts, [text])) if self.family.spec.chunked
                     else 0 for text in batch]
            return [trimmed({name: self._stored(states) for name, states in row.items()})
                    for row in grouped(sizes, encode)]

        size = self.config.cache_batch_size * 2
        run_batch = BatchFallback(size, self._to_cpu(*parts.text.values()), self.emit)
        done = turn * len(fresh)
        for batch in _batches(texts, size, set(fresh)):
            for text, cond in zip(batch, run_batch(embed, batch), strict=True):
                if text in fresh:
                    fresh[text] |= cond
                    done += 1
            self.emit(Phase(name="texts", done=done, total=turns * len(fresh)))

    def _stored(self, states: Tensor) -> Tensor:
        """Returns states of a text encoder on the CPU, in the number format of the run.

        Language models have a few states that are too large for fp16, which would make them
        infinite; they become its largest number.
        """
        limit = torch.finfo(self.precision.compute).max
        large = self.precision.compute == torch.float16 and bool((states.abs() > limit).any())
        if large and not self._noted_overflow:
            self._noted_overflow = True
            self.emit(Note(key="precision.text_outgrows_fp16"))
        return (states.clamp(-limit, limit) if large else states).to("cpu", self.precision.compute)

    # --- pictures ---

    def _encode_pictures(self, examples: Examples, missing: set[int], names: list[list[str]],
                         cache: Cache) -> None:
        """Encodes the pictures at the indices `missing`, in batches of one bucket each."""
        parts = self.family.load(self.source, self.precision, frozenset({"vae"}))
        groups: dict[tuple[int, int], list[int]] = {}
        for i, item in enumerate(examples.items):
            groups.setdefault(item.bucket, []).append(i)
        size = self.config.cache_batch_size
        batches = [b for group in groups.values() for b in _batches(group, size, missing)]
        run_batch = BatchFallback(size, [("engine.cache_tiled", parts.vae.enable_tiling),
                                         *self._to_cpu(parts.vae)], self.emit)
        done = 0
        with ThreadPoolExecutor(_DECODERS) as pool:
            def decode(batch: list[int]) -> list[Future[np.ndarray | None]]:
                return [pool.submit(self._pixels, examples.items[i]) for i in batch]
            # Decoding runs one batch ahead of the encoder.
            ahead = decode(batches[0])
            for n, batch in enumerate(batches):
                pixels = {i: picture for i, future in zip(batch, ahead, strict=True)
                          if (picture := future.result()) is not None}
                ahead = decode(batches[n + 1]) if n + 1 < len(batches) else []
                for i, views in self._encode_batch(parts, examples, pixels, run_batch):
                    if i in missing:
                        examples.latents[i] = views
                        for name, view in zip(names[i], views, strict=True):
                            self._keep(cache, name, {"latents": view})
                done += len(missing.intersection(batch))
                self.emit(Phase(name="cache", done=done, total=len(missing)))
                if self.control.stopping:
                    raise image_stats.Stopped

    def _encode_batch(self, parts: Parts, examples: Examples, pixels: dict[int, np.ndarray],
                      run_batch: BatchFallback) -> Iterator[tuple[int, Tensor]]:
        """Yields the index of each picture with its latents, (1 or 2, C, h, w)."""
        # All of them may have gone since the scan.
        if not pixels:
            return
        x = torch.from_numpy(np.stack([*pixels.values()])).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = run_batch(lambda batch: self._latents(parts, batch), x)
        for place, (i, views) in enumerate(zip(pixels, latents, strict=True)):
            # Some VAEs overflow in fp16: such a picture is encoded once more, in fp32.
            if not torch.isfinite(views).all():
                path = examples.items[i].picture.path
                dtype = parts.vae.dtype
                parts.vae.float()
                views = self._latents(parts, x[place:place + 1])[0]
                parts.vae.to(dtype)
                if not torch.isfinite(views).all():
                    raise UserError("engine.bad_latents", path=path)
                self.emit(Note(key="engine.latents_again", params={"file": str(path)}))
            yield i, views.clone()

    def _latents(self, parts: Parts, x: Tensor) -> list[Tensor]:
        """Encodes (B, 3 or 4, H, W) in [-1, 1]; returns (1 or 2, C, h, w) for each picture.

        The second view is the mirrored one. A fourth channel is the mask: it becomes the last
        channel of the latents, as 0 to 1.
        """
        encoded = []
        views = [x, x.flip(3)] if self.config.flip else [x]
        for view in views:
            latents = self.family.encode_image(parts, view[:, :3]).float().cpu()
            if view.shape[1] > 3:
                mask = F.interpolate((view[:, 3:] + 1) / 2, latents.shape[2:], mode="area")
                latents = torch.cat([latents, mask], 1)
            encoded.append(latents)
        return [*torch.stack(encoded, 1)]

    def _pixels(self, item: Example) -> np.ndarray | None:
        """Returns (H, W, 3), with masks (H, W, 4); None where the picture is gone."""
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
        """Returns the key of each view in the cache; none where the picture is gone."""
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

    # --- the cache and the device ---

    def _cache(self, part: str) -> Cache:
        files = self.family.weight_files(self.source, "vae" if part == "vae" else "text")
        return Cache(part, hashes.fingerprint(files), self.config.cache_to_disk)

    def _keep(self, cache: Cache, name: str, tensors: dict[str, Tensor]) -> None:
        try:
            cache.put(name, tensors)
        except OSError as error:
            # A full disk ends no run: everything is in memory anyway.
            cache.folder = None
            self.emit(Note(key="engine.cache_not_kept", params={"reason": one_line(error)}))

    def _to_cpu(self, *modules: object) -> list[Way]:
        """The last way to encode where a GPU has no room: slowly, beside it."""
        models = [module for module in modules if isinstance(module, torch.nn.Module)]
        # Of a model whose layers come to the GPU one by one, next to nothing is there.
        if self.precision.device.type == "cpu" or any(stage_of(model) for model in models):
            return []
        return [("engine.cache_on_cpu", lambda: [
            model.to("cpu", torch.float32) for model in models])]


def say_too_long(family: Family, parts: Parts, texts: list[str],
                 emit: Callable[[Event], None]) -> None:
    """Warns of captions that are longer than the base reads, with the longest as the example."""
    limit = family.token_limit(parts)
    counts = family.count_tokens(parts, texts)
    too_long = [(text, count) for text, count in zip(texts, counts, strict=True) if count > limit]
    if too_long:
        text, tokens = max(too_long, key=lambda pair: pair[1])
        emit(Note(key="engine.caption_too_long", params={
            "count": len(too_long), "limit": limit, "tokens": tokens, "example": text[:80],
            "rest": unread(family, parts, text)[:200]}))


def tell_markup(texts: Iterable[str], trigger: str, emit: Callable[[Event], None],
                note: str = "engine.caption_markup") -> None:
    """Reports markup of other programs that is read as it stands."""
    found = [parts for text in texts if (parts := prompt_markup.unread_in(text, trigger))]
    if found:
        examples = dict.fromkeys(part for parts in found for part in parts.values())
        emit(Note(key=note, params={"count": len(found), "parts": ", ".join([*examples][:4])}))


def _batches(items: Sequence[_Item], size: int, missing: AbstractSet[_Item]) -> list[list[_Item]]:
    """Returns the batches of `items` that hold something missing."""
    # They are cut from all items, known ones included: numbers depend a little on the size of a
    # batch, and a run that was broken while caching must come to the same latents.
    batches = [list(items[start:start + size]) for start in range(0, len(items), size)]
    return [batch for batch in batches if not missing.isdisjoint(batch)]
