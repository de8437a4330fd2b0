"""Where a picture's subject is, so that a crop keeps it: the area whose colours the rim lacks.

Saliency only: no well-kept library finds faces without a download, so a face counts as any other
subject. A point set by hand (core/dataset/curation.py) always comes first.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from core.dataset.buckets import Crop, Point, Size

SIDE = 64                       # px of the picture that is looked at
RIM = 3                         # px of it; taken as background
STRANGE = 0.3                   # of the rim; may belong to the subject
SMOOTH = 1.0                    # px; of the map
GRAIN = 25.0                    # variance in Lab that any background has: compression, light
TRIM = 0.02                     # of the area's weight, left out on each side of the box
SOLID = 0.5                     # share of the box that must stand out: below, there is no subject
LOST = 0.1                      # of the subject's area; a crop that takes more is worth a word

Box = tuple[float, float, float, float]     # left, top, right, bottom; 0..1 of the picture

_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                    [0.0193, 0.1192, 0.9505]]) / np.array([[0.9505], [1.0], [1.089]])


def salient_box(small: NDArray[np.uint8]) -> Box | None:
    """The subject in a (64, 64, 3) sRGB thumbnail, None where nothing stands out as a whole.

    Each colour's Mahalanobis distance in CIE Lab from those of the picture's rim (the boundary
    prior of Zhang et al. 2015, "Minimum barrier salient object detection at 80 FPS"), smoothed,
    cut at mean + deviation; the box holds all but 2 % on each side of what is left. Textures
    scatter over their box, subjects fill it: that tells them apart. A subject may itself touch
    the rim, so this is done with the whole rim and without its strangest part; what either finds
    is in the box.
    """
    lab = _lab(small)
    rim = np.concatenate([lab[:RIM].reshape(-1, 3), lab[-RIM:].reshape(-1, 3),
                          lab[:, :RIM].reshape(-1, 3), lab[:, -RIM:].reshape(-1, 3)])
    own = _distances(rim, rim)
    common = rim[own <= np.quantile(own, 1 - STRANGE)]
    found = [box for ground in (rim, common) if (box := _box(_distances(lab, ground)))]
    if not found:
        return None
    left, top, right, bottom = zip(*found, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _box(distances: NDArray[np.float64]) -> Box | None:
    blur = _blur()
    standing_out = blur @ distances @ blur.T
    strong = standing_out > standing_out.mean() + standing_out.std()
    if not strong.any():
        return None
    left, right = _extent(strong.sum(0))
    top, bottom = _extent(strong.sum(1))
    if strong.sum() < SOLID * (right - left) * (bottom - top):
        return None
    return left / SIDE, top / SIDE, right / SIDE, bottom / SIDE


def centre(box: Box) -> Point:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def lost(box: Box, crop: Crop, size: Size) -> float:
    """The share of a box's area that a crop cuts away; `size` in px of the picture."""
    left, top, right, bottom = crop.source(size)
    wide = _overlap(box[0], box[2], left / size[0], right / size[0])
    high = _overlap(box[1], box[3], top / size[1], bottom / size[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return min(max(1 - wide * high / area, 0.0), 1.0) if area > 0 else 0.0


def _overlap(a: float, b: float, c: float, d: float) -> float:
    return max(min(b, d) - max(a, c), 0.0)


def _distances(colours: NDArray[np.float64], ground: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many deviations each of (..., 3) colours lies from those of (N, 3) `ground`."""
    mean = ground.mean(0)
    spread = (ground - mean).T @ (ground - mean) / len(ground) + np.eye(3) * GRAIN
    white = (colours - mean) @ np.linalg.cholesky(np.linalg.inv(spread))
    found: NDArray[np.float64] = np.sqrt((white * white).sum(-1))
    return found


def _lab(small: NDArray[np.uint8]) -> NDArray[np.float64]:
    xyz = _linear()[small] @ _TO_XYZ.T
    x, y, z = np.moveaxis(np.cbrt(xyz), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@cache
def _linear() -> NDArray[np.float64]:
    """Light of each 8-bit sRGB value, 0..1."""
    value = np.arange(256) / 255
    light: NDArray[np.float64] = np.where(value <= 0.04045, value / 12.92,
                                          ((value + 0.055) / 1.055) ** 2.4)
    return light


@cache
def _blur() -> NDArray[np.float64]:
    """(64, 64): a Gaussian along one axis, rows of sum 1."""
    at = np.arange(SIDE)
    weights = np.exp(-((at[:, None] - at[None]) / SMOOTH) ** 2 / 2)
    blur: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return blur


def _extent(counts: NDArray[np.int_]) -> tuple[int, int]:
    """First and one past the last place that matter."""
    sampler = np.cumsum(counts) / counts.sum()
    return (int(np.searchsorted(sampler, TRIM, "right")),
            int(np.searchsorted(sampler, 1 - TRIM)) + 1)
