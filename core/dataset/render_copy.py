"""One picture's copy for `dataset prepare`: which pixels, which format, and what was done."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np
from PIL import Image

from core.dataset import images
from core.dataset.buckets import Point, Size
from core.dataset.caption_files.places import PLAIN
from core.dataset.captions import one_line
from core.dataset.checks import measures
from core.dataset.checks.report import CropAbout
from core.dataset.crops import BaseFacts, plan_crops
from core.dataset.image_folder import Picture
from core.text_encoding import read

Format = Literal["keep", "png", "jpg", "webp"]
# Suffixes of the formats that we write; others become PNG.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Suffixes of files that stay byte for byte, where nothing is to be mended.
COPIED = {**KEPT, "AVIF": "avif", "TIFF": "tiff", "BMP": "bmp", "DIB": "bmp", "GIF": "gif"}
SAVING: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 4},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "quality": 60, "exact": True}}
SMALLEST = 16                   # px; no crop or shrinking goes below


@dataclass(frozen=True, slots=True)
class Options:
    """What `dataset prepare` is asked to do."""

    convert: Format = "keep"
    resize: int = 0                         # px; shrink to this shorter side; 0: don't
    crop: bool = False                      # to the bucket's part of the picture
    crop_about: CropAbout = "center"
    dedupe: bool = False
    remove_borders: bool = False
    background: str = "white"               # behind transparent parts, where they can't stay


@dataclass(frozen=True, slots=True)
class Task:
    """One picture to copy."""

    picture: Picture
    name: str                               # image_folder.relative_name
    stem: str                               # relative, without suffix; unique in the new folder
    record: Any                             # image_stats.RECORD
    focus: Point | None
    best: str = ""                          # dropped: the name of the copy that is kept
    distance: int = 0

    @property
    def stamp(self) -> str:
        """A text that changes with everything of this picture that its copy depends on."""
        stat = self.picture.path.stat()
        rest = f"{self.picture.caption}\0{self.focus}\0{self.best}".encode("utf-8", "replace")
        return f"{stat.st_size}-{stat.st_mtime_ns}-{crc32(rest):08x}"


def render(task: Task, options: Options,
           facts: BaseFacts | None) -> tuple[bytes, str, list[dict[str, Any]]]:
    """Returns the copy's bytes, its suffix without dot, and what was done, as keys of sentences.

    Raises UserError where the picture can't be decoded.
    """
    kind = task.record["format"].decode()
    suffix = KEPT.get(kind, "png") if options.convert == "keep" else options.convert
    same_kind = options.convert == "keep" or KEPT.get(kind) == suffix
    has_borders = options.remove_borders and bool(task.record["borders"].any())
    turned = bool(task.record["turned"])
    # Opened only where something is to be changed: most files are copied byte for byte.
    image: Image.Image | None = None
    did: list[dict[str, Any]] = []
    if not same_kind or has_borders or turned:
        image = _opened(task, suffix, options, did)
        if turned:
            did.append({"key": "checks.did_turn"})
    size, focus = task.picture.size, task.focus
    if image is not None and has_borders:
        image, focus = _without_borders(image, focus, did)
        size = image.size
    box, new_size = _frame(size, focus, options, facts)
    kept_size = box[2] - box[0], box[3] - box[1]
    if box != (0, 0, *size) or new_size != kept_size:
        image = _opened(task, suffix, options, did) if image is None else image
        if kept_size != image.size:
            did.append({"key": "checks.did_crop", "width": kept_size[0], "height": kept_size[1]})
            image = image.crop(box)
        if new_size != kept_size:
            did.append({"key": "checks.did_resize", "width": new_size[0], "height": new_size[1]})
            image = image.resize(new_size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if image is None:
        return task.picture.path.read_bytes(), COPIED[kind], [{"key": "checks.did_copy"}]
    if not same_kind or KEPT.get(kind) != suffix:
        did.append({"key": "checks.did_convert", "format": suffix})
    # A profile or an orientation that no longer holds.
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, **SAVING[suffix])
    return buffer.getvalue(), suffix, did


def _opened(task: Task, suffix: str, options: Options, did: list[dict[str, Any]]) -> Image.Image:
    # A JPEG has no transparency, all others keep it.
    if not task.picture.has_alpha or suffix != "jpg":
        return images.open_picture(task.picture.path, None)
    did.append({"key": "checks.did_flatten", "background": options.background})
    return images.open_picture(task.picture.path, options.background)


def _without_borders(image: Image.Image, focus: Point | None,
                     did: list[dict[str, Any]]) -> tuple[Image.Image, Point | None]:
    """Returns the picture without its borders, and the focus as it lies in what is left."""
    # Measured again at full size, and a pixel more goes: the last one of a bar is blended.
    left, top, right, bottom = (side + 1 if side else 0 for side in measures.borders(
        np.asarray(images.plain(image.copy()).convert("L"))))
    box = (left, top, image.width - right, image.height - bottom)
    if not any((left, top, right, bottom)) or min(box[2] - left, box[3] - top) < SMALLEST:
        return image, focus
    did.append({"key": "checks.did_borders"})
    if focus is not None:
        # A focus upon the border comes to lie at the edge.
        x = (focus[0] * image.width - left) / (box[2] - left)
        y = (focus[1] * image.height - top) / (box[3] - top)
        focus = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
    return image.crop(box), focus


def _frame(size: Size, focus: Point | None, options: Options,
           facts: BaseFacts | None) -> tuple[tuple[int, int, int, int], Size]:
    """Returns the box that stays, in px of the original, and the size that it gets."""
    box = (0, 0, *size)
    if options.crop and facts is not None:
        [planned] = plan_crops([size], facts, [focus])
        left, top, right, bottom = (round(edge) for edge in planned.crop.source(size))
        box = left, top, max(right, left + 1), max(bottom, top + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    shorter = min(width, height)
    if not options.resize or shorter <= options.resize:
        return box, (width, height)
    return box, (round(width * options.resize / shorter), round(height * options.resize / shorter))


def caption_of(picture: Picture) -> tuple[str, str] | None:
    """Returns suffix and text of the copy's caption file; None where there is none to write.

    The captions that come from the names of `N_name` folders need no file: these names stay.
    """
    file = picture.caption_file
    if file is None:
        return None
    if file.suffix.lower() in PLAIN:
        # Where it can't be read, the scan has said so: dataset.caption_unreadable.
        with contextlib.suppress(OSError, ValueError):
            text = read(file.read_bytes()).text
            # Its lines stay, unless the folder's other files tell another encoding.
            if one_line(text) in ("", picture.caption):
                return file.suffix.lower(), text
    return ".txt", picture.caption + "\n"
