"""Aspect buckets: the sizes a run trains at, how a picture is cut to one, an epoch's batches.

Kohya's rule: of all sizes under the area cap, a picture takes the one of the nearest aspect,
is scaled until it covers it, and loses the overhang on both sides. Nothing is squashed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import floor, isqrt
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.config import TrainConfig, size_of
from core.errors import UserError

Size = tuple[int, int]                      # width, height in px
Point = tuple[float, float]                 # 0..1 of width and height, from the top left


def bucket_sizes(area: Size, step: int, shortest: int, longest: int) -> tuple[Size, ...]:
    """All bucket sizes whose pixels don't exceed those of `area`: sides are multiples of `step`
    between `shortest` and `longest`. An area too small for `shortest` leaves one square."""
    cap = area[0] * area[1]
    low, high = -(-max(shortest, 1) // step) * step, longest // step * step
    square = min(isqrt(cap) // step * step, high)
    if square < step:
        raise UserError("dataset.resolution_too_small", width=area[0], height=area[1], step=step)
    if low > high:
        raise UserError("dataset.bucket_sides", shortest=shortest, longest=longest, step=step)
    sizes = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(cap // width // step * step, high)
        if height >= low:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def choose_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the nearest width / height; the larger one where two are equally near."""
    aspect = size[0] / size[1]
    return min(buckets, key=lambda b: (abs(b[0] / b[1] - aspect), -b[0] * b[1], b))


def shrink_bucket(size: Size, area: Size, step: int) -> Size:
    """The bucket that needs no enlarging: the picture's own size, shrunk to `area` if it has
    more pixels, each side rounded down to `step` (but at least one step)."""
    cap = area[0] * area[1]
    if cap < step * step:
        raise UserError("dataset.resolution_too_small", width=area[0], height=area[1], step=step)
    width, height = size
    if width * height > cap:                # integers: 768 px must not become 511.99
        width, height = isqrt(cap * width // height), isqrt(cap * height // width)
    width, height = (max(side // step, 1) * step for side in (width, height))
    if width > height:                      # a side raised to one step: the cap still holds
        return min(width, cap // height // step * step), height
    return width, min(height, cap // width // step * step)


@dataclass(frozen=True, slots=True)
class Rule:
    """What decides which bucket a picture takes; the only place that knows the usual sides."""

    area: Size                              # px; most pixels of a bucket
    step: int                               # px; sides of buckets are multiples of it
    shortest: int                           # px
    longest: int                            # px
    no_upscale: bool = False

    @staticmethod
    def usual(area: Size, step: int, shortest: int = 0, longest: int = 0,
              no_upscale: bool = False) -> Rule:
        """0: from half to twice the square's side."""
        side = isqrt(area[0] * area[1])
        return Rule(area, step, shortest or side // 2, longest or side * 2, no_upscale)

    @staticmethod
    def of(config: TrainConfig, native: int, step: int) -> Rule:
        """A run's; `native` and `step` px are the base's own."""
        return Rule.usual(size_of(config.max_resolution) or (native, native), step,
                          config.min_bucket_side, config.max_bucket_side, config.bucket_no_upscale)

    def assign(self, sizes: Sequence[Size]) -> list[Size]:
        """Each picture's bucket, in the pictures' order."""
        return assign_buckets(sizes, self.area, self.step, self.shortest, self.longest,
                              self.no_upscale)

    def largest(self) -> Size:
        """The bucket with the most pixels of those that a picture could fall into."""
        sizes = bucket_sizes(self.area, self.step, self.shortest, self.longest)
        return max(sizes, key=lambda s: (s[0] * s[1], -abs(s[0] - s[1])))


def assign_buckets(sizes: Sequence[Size], area: Size, step: int, shortest: int, longest: int,
                   no_upscale: bool = False) -> list[Size]:
    """Each picture's bucket, in the pictures' order."""
    if no_upscale:
        return [shrink_bucket(size, area, step) for size in sizes]
    buckets = bucket_sizes(area, step, shortest, longest)
    return [choose_bucket(size, buckets) for size in sizes]


@dataclass(frozen=True, slots=True)
class Crop:
    """A picture in its bucket: scaled to `resized`, of which `size` is kept from `left, top`."""

    resized: Size
    left: int
    top: int
    size: Size                              # the bucket

    @property
    def box(self) -> tuple[int, int, int, int]:
        """What is kept of the scaled picture: left, top, right, bottom."""
        return self.left, self.top, self.left + self.size[0], self.top + self.size[1]

    def source(self, original: Size) -> tuple[float, float, float, float]:
        """What is kept, in pixels of the original picture (for drawing the frame)."""
        x, y = original[0] / self.resized[0], original[1] / self.resized[1]
        left, top, right, bottom = self.box
        return (left * x, top * y, min(right * x, float(original[0])),
                min(bottom * y, float(original[1])))


def crop_to(size: Size, bucket: Size, focus: Point | None = None) -> Crop:
    """The smallest scaling of `size` that covers `bucket`, cut at its centre, or with `focus` as
    near to the middle of what is kept as the picture allows."""
    (width, height), (wide, high) = size, bucket
    if width * high <= height * wide:       # narrower than the bucket: the width decides
        resized = wide, (2 * height * wide + width) // (2 * width)
    else:
        resized = (2 * width * high + height) // (2 * height), high
    x, y = focus or (0.5, 0.5)
    return Crop(resized, _start(resized[0], wide, x), _start(resized[1], high, y), bucket)


def _start(side: int, kept: int, middle: float) -> int:
    """Where `kept` of `side` px begin, about `middle`; rounded down, as kohya's centre is."""
    return min(max(floor(middle * side - kept / 2), 0), side - kept)


def fit_picture(image: Image.Image, bucket: Size,
                focus: Point | None = None) -> NDArray[np.uint8]:
    """(H, W, 3): the picture scaled to cover its bucket and cut at the centre, or at `focus`."""
    crop = crop_to(image.size, bucket, focus)
    image = image.convert("RGB") if image.mode != "RGB" else image
    if crop.resized == image.size:
        return np.array(image.crop(crop.box), dtype=np.uint8)
    shrinks = crop.resized[0] < image.width
    method = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    # `box` scales only what is kept: a 1 x 20000 picture would need gigabytes otherwise.
    fitted = image.resize(bucket, method, box=crop.source(image.size), reducing_gap=3.0)
    return np.array(fitted, dtype=np.uint8)


def batches(bucket_of: Sequence[Size], repeats: Sequence[int], batch_size: int,
            epoch_seed: int, spread: Collection[int] = ()) -> list[list[int]]:
    """One epoch: every picture `repeats` times, each batch from one bucket, in random order.
    Those in `spread` are dealt out evenly among a bucket's batches.

    No picture is dropped: a bucket's last batch is smaller. The same seed gives the same order
    everywhere; pass another seed for each epoch.
    """
    rng = Random(epoch_seed)
    members: dict[Size, list[int]] = {}
    for index, (bucket, times) in enumerate(zip(bucket_of, repeats, strict=True)):
        members.setdefault(bucket, []).extend([index] * times)
    epoch: list[list[int]] = []
    for indices in members.values():
        rng.shuffle(indices)
        indices = _dealt(indices, spread) if spread else indices
        epoch += [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
    rng.shuffle(epoch)
    return epoch


def _dealt(indices: list[int], spread: Collection[int]) -> list[int]:
    """Two shuffled kinds merged, so that every stretch holds its share of both."""
    kinds = [[i for i in indices if (i in spread) is kind] for kind in (False, True)]
    placed = [((n + 0.5) / len(kind), i) for kind in kinds for n, i in enumerate(kind)]
    return [i for _, i in sorted(placed, key=lambda pair: pair[0])]
