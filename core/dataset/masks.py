"""Masks: which parts of a picture count. White counts, black doesn't, grey in between.

`01.mask.png` or `01-masklabel.png` (OneTrainer's) beside `01.png`, `masks/01.png` in the
picture's or the data's folder, else the picture's own transparency.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.dataset import buckets, images
from core.dataset.buckets import Point, Size

STEMS = (".mask", "-masklabel")             # behind a picture's own
FOLDERS = ("masks", "mask")
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


def find(picture: Path, folder: Path) -> Path | None:
    """The mask file of a picture of `folder`; None: there is none."""
    return next((path for path in _places(picture, folder) if path.is_file()), None)


def _places(picture: Path, folder: Path) -> Iterator[Path]:
    below = picture.parent.relative_to(folder) if picture.is_relative_to(folder) else Path()
    for suffix in SUFFIXES:
        for stem in STEMS:
            yield picture.with_name(f"{picture.stem}{stem}{suffix}")
        for name in FOLDERS:
            yield picture.parent / name / f"{picture.stem}{suffix}"
            yield folder / name / below / f"{picture.stem}{suffix}"


def fit(mask: Path | None, size: Size, bucket: Size,
        focus: Point | None) -> NDArray[np.uint8]:
    """(H, W): the mask scaled and cut as its picture of `size` is; all white where there is none.
    A picture with transparent parts may be its own mask. Raises UserError where the file can't be
    decoded."""
    if mask is None:
        return np.full((bucket[1], bucket[0]), 255, np.uint8)
    image = images.open_picture(mask, None)
    grey = image.getchannel("A") if image.mode == "RGBA" else image.convert("L")
    crop = buckets.crop_to(size, bucket, focus)
    return np.array(grey.resize(bucket, Image.Resampling.BILINEAR, box=crop.source(grey.size)),
                    dtype=np.uint8)
