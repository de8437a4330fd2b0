"""Masks: which parts of a picture count. White counts fully, black not at all, grey in between.

The mask of `01.png` is `01.mask.png` or `01-masklabel.png` (OneTrainer's) beside it, or
`masks/01.png` in the picture's or the dataset's folder, else the picture's own transparency.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.dataset import buckets, images
from core.dataset.buckets import Point, Size

STEMS = (".mask", "-masklabel")             # what follows the picture's own stem
FOLDERS = ("masks", "mask")
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


def find(picture: Path, folder: Path) -> Path | None:
    """Returns the mask file of a picture of the dataset in `folder`, or None."""
    below = picture.parent.relative_to(folder) if picture.is_relative_to(folder) else Path()
    places = [picture.with_name(f"{picture.stem}{stem}") for stem in STEMS]
    for name in FOLDERS:
        places += [picture.parent / name / picture.stem, folder / name / below / picture.stem]
    paths = (place.with_name(place.name + suffix) for suffix in SUFFIXES for place in places)
    return next((path for path in paths if path.is_file()), None)


def fit(mask: Path | None, size: Size, bucket: Size, focus: Point | None) -> NDArray[np.uint8]:
    """Returns the mask as (H, W), scaled and cut as its picture of `size` is.

    It is all white where there is none. Raises UserError where the file can't be decoded.
    """
    if mask is None:
        return np.full((bucket[1], bucket[0]), 255, np.uint8)
    image = images.open_picture(mask, None)
    # A picture with transparent parts may be its own mask.
    grey = image.getchannel("A") if image.mode == "RGBA" else image.convert("L")
    crop = buckets.crop_to(size, bucket, focus)
    return np.array(grey.resize(bucket, Image.Resampling.BILINEAR, box=crop.source(grey.size)),
                    dtype=np.uint8)
