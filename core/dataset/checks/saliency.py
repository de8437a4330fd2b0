"""Where a picture's subject is, so that a crop keeps it: the area whose colours the rim lacks.

This is saliency only: no well-kept library finds faces without a download, so a face counts as any
other subject. A point set by hand (core/dataset/curation.py) always comes first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.dataset.buckets import Crop, Point, Size

SIDE = 64                       # px of the thumbnail that is measured
RIM = 3                         # px of it; taken as background
STRANGE = 0.3                   # share of the rim that may belong to the subject
SMOOTH = 1.0                    # px; of the map
GRAIN = 25.0                    # variance in Lab that any background has: compression, light
TRIM = 0.02                     # of the area's weight, left out on each side of the box
SOLID = 0.5                     # share of the box that must stand out: below, there is no subject
LOST = 0.1                      # of the subject's area; a crop that cuts more is reported

Box = tuple[float, float, float, float]     # left, top, right, bottom; 0..1 of the picture

# Linear sRGB to CIE XYZ, divided by the white point D65.
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                    [0.0193, 0.1192, 0.9505]]) / np.array([[0.9505], [1.0], [1.089]])
# Light, 0..1, of each 8-bit sRGB value.
_VALUES = np.arange(256) / 255
_LINEAR = np.where(_VALUES <= 0.04045, _VALUES / 12.92, ((_VALUES + 0.055) / 1.055) ** 2.4)
# (64, 64): a Gaussian along one axis, rows of sum 1.
_DISTANCES = np.arange(SIDE)[:, None] - np.arange(SIDE)[None]
_GAUSSIAN = np.exp(-(_DISTANCES / SMOOTH) ** 2 / 2)
_GAUSSIAN /= _GAUSSIAN.sum(1, keepdims=True)


def salient_box(small: NDArray[np.uint8]) -> Box | None:
    """Returns the subject in a (64, 64, 3) sRGB thumbnail, None where nothing stands out.

    Measured is each colour's Mahalanobis distance in CIE Lab from those of the picture's rim (the
    boundary prior of Zhang et al. 2015, "Minimum barrier salient object detection at 80 FPS"); it
    is smoothed and cut at mean + deviation, and the box holds all but 2 % on each side of what is
    left. Textures scatter over their box while subjects fill it: that tells them apart.
    """
    x, y, z = np.moveaxis(np.cbrt(_LINEAR[small] @ _TO_XYZ.T), -1, 0)
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
    rim = np.concatenate([lab[:RIM].reshape(-1, 3), lab[-RIM:].reshape(-1, 3),
                          lab[:, :RIM].reshape(-1, 3), lab[:, -RIM:].reshape(-1, 3)])
    # The subject may itself touch the rim, so the same is done without the rim's strangest part;
    # the box holds what either of both finds.
    strangeness = _distances(rim, rim)
    common = rim[strangeness <= np.quantile(strangeness, 1 - STRANGE)]
    boxes = [box for background in (rim, common) if (box := _box(_distances(lab, background)))]
    if not boxes:
        return None
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _box(distances: NDArray[np.float64]) -> Box | None:
    """The box about what stands out in a map (64, 64)."""
    standing_out = _GAUSSIAN @ distances @ _GAUSSIAN.T
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
    """Returns the share of a box's area that a crop of a picture of `size` px cuts away."""
    left, top, right, bottom = crop.source(size)
    wide = _overlap(box[0], box[2], left / size[0], right / size[0])
    high = _overlap(box[1], box[3], top / size[1], bottom / size[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return min(max(1 - wide * high / area, 0.0), 1.0) if area > 0 else 0.0


def _overlap(a: float, b: float, c: float, d: float) -> float:
    return max(min(b, d) - max(a, c), 0.0)


def _distances(colours: NDArray[np.float64], background: NDArray[np.float64]
               ) -> NDArray[np.float64]:
    """How many deviations each of (..., 3) colours lies from those of (N, 3) `background`."""
    mean = background.mean(0)
    spread = (background - mean).T @ (background - mean) / len(background) + np.eye(3) * GRAIN
    whitened = (colours - mean) @ np.linalg.cholesky(np.linalg.inv(spread))
    distances: NDArray[np.float64] = np.sqrt((whitened * whitened).sum(-1))
    return distances


def _extent(counts: NDArray[np.int_]) -> tuple[int, int]:
    """The first place that matters, and one behind the last: TRIM of the weight is left aside."""
    shares = np.cumsum(counts) / counts.sum()
    return int(np.searchsorted(shares, TRIM, "right")), int(np.searchsorted(shares, 1 - TRIM)) + 1
