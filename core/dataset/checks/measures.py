"""What can be told from a picture's pixels in milliseconds: detail, compression, borders, hash.

These are pure functions on numpy arrays; image_stats.py calls them once for each file. Thresholds
lie where generated pictures (discs, 1/f noise, drawings) of known blur and quality part; see tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.uint8]                    # (H, W)
Borders = tuple[int, int, int, int]         # px: left, top, right, bottom

NO_DETAIL = 0.2                 # a level with less of the next coarser one's energy is empty
NOISE = 4.0                     # Laplacian variance (grey levels squared) of rounding and grain
COARSEST = 16                   # px; a smaller level says nothing
BLOCKS = 128                    # px a side, below which 8 x 8 blocks can't be told from chance
BAR_SPREAD = 3.5                # grey levels: a bar's own standard deviation, JPEG noise included
BAR_STEP = 14                   # grey levels from a bar to the picture
BAR_EDGE = 0.6                  # share of the edge that has this step: a margin has less
LEAST_BAR = 0.015               # of the side; thinner ones are a line, no letterbox
FLAT = 2.0                      # grey levels of standard deviation: nothing to recognise
HASH_SIDE = 32                  # px


# --- detail -----------------------------------------------------------------------------------

def detail(grey: Grey) -> float:
    """Returns the scale to which the picture could shrink without loss of detail: 1, 1/2, 1/4 ...

    In a natural picture the variance of the Laplacian is about the same on every level of a
    pyramid (1/f spectra; Field 1987), in a drawing it halves from level to level. Blur empties
    the fine levels: their variance falls to 1/8 of the next coarser one's and below. The ratio
    needs no reference and depends on neither contrast nor size; a sharp subject before a soft
    background keeps it high. Grain over a blurred picture isn't taken for detail. A picture
    without structure, or of less than 32 px, counts as 1.
    """
    # The mean square of the Laplacian on each level, the finest first.
    level, energies = grey.astype(np.float32), []
    while min(level.shape) >= COARSEST:
        # Step by step in one array, which is the fastest way.
        edges = level[1:-1, 1:-1] * np.float32(4)
        edges -= level[:-2, 1:-1]
        edges -= level[2:, 1:-1]
        edges -= level[1:-1, :-2]
        edges -= level[1:-1, 2:]
        flat = edges.ravel()
        energies.append(float(np.dot(flat, flat)) / flat.size)
        height, width = (side // 2 * 2 for side in level.shape)
        level = level[:height:2, :width] + level[1:height:2, :width]
        level = (level[:, ::2] + level[:, 1::2]) * np.float32(0.25)
    empty = [n for n, (fine, coarse) in enumerate(pairwise(energies))
             if coarse > NOISE and fine < NO_DETAIL * coarse]
    return 0.5 ** (empty[-1] + 1) if empty else 1.0


# --- compression ------------------------------------------------------------------------------

# Luminance table of the JPEG standard (ITU-T T.81, annex K.1), in zigzag order as files have it.
_STANDARD = np.array([
    16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40, 26, 24, 22, 22, 24, 49, 35,
    37, 29, 40, 58, 51, 61, 60, 57, 51, 56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109,
    81, 87, 95, 98, 103, 104, 103, 62, 77, 113, 121, 112, 100, 120, 92, 101, 103, 99])


# The mean of the table that the IJG library makes of it at quality 1..100.
_QUALITIES = np.arange(1, 101)[:, None]
_SCALES = np.where(_QUALITIES < 50, 5000 // _QUALITIES, 200 - 2 * _QUALITIES)
_MEANS = np.clip((_STANDARD * _SCALES + 50) // 100, 1, 255).mean(1)


def jpeg_quality(tables: Mapping[int, Sequence[int]]) -> int:
    """Returns a file's quality from its quantisation tables: 1..100 as the IJG library counts.

    It is 0 where there is no table for luminance. Those of other encoders get the quality whose
    mean is nearest.
    """
    table = tables.get(0)
    if table is None or len(table) != 64:
        return 0
    return 1 + int(np.abs(_MEANS - sum(table) / 64).argmin())


def blocking(grey: Grey) -> float:
    """Returns how much stronger the steps between 8 x 8 blocks are than those inside of them.

    It is about 1 in a clean picture and above 1.4 where JPEG at quality 30 or less shows. It stays
    through a later save at high quality, but not through scaling. Pictures of less than 128 px
    count as 1.
    """
    if min(grey.shape) < BLOCKS:
        return 1.0
    return min(_steps(grey), _steps(grey.T))


def _steps(grey: Grey) -> float:
    """The same along one axis: the strongest of 8 phases by the usual one."""
    steps = np.abs(np.diff(grey.astype(np.int16), axis=1)).mean(0)
    # Medians: one hard edge of the picture itself must not count as a grid.
    phases = np.median(steps[:len(steps) // 8 * 8].reshape(-1, 8), axis=0)
    return float((phases.max() + 0.1) / (np.median(phases) + 0.1))


# --- borders ----------------------------------------------------------------------------------

def borders(grey: Grey) -> Borders:
    """Finds bars of one colour along the sides (letterbox, frame), in px of `grey`.

    A bar ends in a straight hard edge along most of its length; so the plain background of a
    product picture is no bar, nor is a floor or a sky alone. A picture of one colour has none.
    """
    left = top = right = bottom = 0
    # Twice: bars at the sides may hide behind those above and below, and the other way round.
    for _ in range(2):
        inner = grey[top:grey.shape[0] - bottom, left:grey.shape[1] - right]
        more_top, more_bottom = _bars(inner)
        inner = inner[more_top:inner.shape[0] - more_bottom]
        more_left, more_right = _bars(inner.T)
        if not (more_top or more_bottom or more_left or more_right):
            break
        top, bottom = top + more_top, bottom + more_bottom
        left, right = left + more_left, right + more_right
    return left, top, right, bottom


def _bars(grey: Grey) -> tuple[int, int]:
    """Rows of the bars above and below. They come in pairs: one alone is a floor or a sky."""
    above = _bar(grey)
    below = _bar(grey[::-1]) if above else 0
    return (above, below) if below else (0, 0)


def _bar(grey: Grey) -> int:
    """Rows of the bar at the top."""
    height, width = grey.shape
    # Most pictures end here, before anything slow.
    if height < 8 or width < 8 or np.ptp(grey[0]) > 8 * BAR_SPREAD:
        return 0
    colour = float(np.median(grey[0]))
    # Less than half: two bars leave something between them.
    most = height * 9 // 20
    soft = min(max(height // 64, 2), 8)     # rows of ringing or scaling about the edge
    rows = grey[:most + soft].astype(np.float32)
    plain = np.sqrt(((rows - colour) ** 2).mean(1)) <= BAR_SPREAD
    end = int(plain.argmin()) if not plain.all() else 0
    if not LEAST_BAR * height <= end <= most:
        return 0
    edge = np.abs(rows[end:end + soft] - colour).max(0) >= BAR_STEP
    return end if edge.mean() >= BAR_EDGE else 0


def deviation(luma: Image.Image) -> float:
    """Standard deviation of an "L" picture, in grey levels."""
    counts = np.array(luma.histogram(), dtype=np.float64)
    levels = np.arange(256)
    mean = counts @ levels / counts.sum()
    return float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum()))


# --- hash -------------------------------------------------------------------------------------

# (8, 32): the first rows of the DCT-II matrix.
_COSINES = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(HASH_SIDE)[None] + 1)
                  / (2 * HASH_SIDE))


def perceptual_hash(grey: Grey) -> int:
    """Returns the 64 bits of the picture's hash; `grey` is 32 x 32 px.

    A bit says whether one of the lowest 8 x 8 frequencies (DCT-II) lies above their median; the
    mean brightness counts for nothing. Scaling, recompression and brightness change few bits; see
    `near_duplicates.NEAR`.
    """
    low = (_COSINES @ grey.astype(np.float64) @ _COSINES.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def small(image: Image.Image, side: int) -> Image.Image:
    """Scales to `side` x `side` px whatever the aspect: two copies may differ a little in it."""
    return image.resize((side, side), Image.Resampling.BOX)
