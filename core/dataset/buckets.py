"""Aspect buckets: the sizes a run trains at, how a picture is cut to one, an epoch's batches.

Kohya's rule: of all sizes with no more pixels than allowed, a picture takes the one of the nearest
aspect, is scaled until it covers it, and loses what hangs over on both sides. Nothing is squashed.
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
    """Returns all bucket sizes that have no more pixels than `area`.

    Their sides are multiples of `step` between `shortest` and `longest` px. An area that is too
    small for `shortest` leaves one square. Raises UserError where not even that is possible.
    """
    most_pixels = area[0] * area[1]
    low, high = -(-max(shortest, 1) // step) * step, longest // step * step
    square = min(isqrt(most_pixels) // step * step, high)
    if square < step:
        raise UserError("dataset.resolution_too_small", width=area[0], height=area[1], step=step)
    if low > high:
        raise UserError("dataset.bucket_sides", shortest=shortest, longest=longest, step=step)
    sizes = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(most_pixels // width // step * step, high)
        if height >= low:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def choose_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Returns the bucket of the nearest width / height; of two equally near ones the larger."""
    aspect = size[0] / size[1]
    return min(buckets, key=lambda b: (abs(b[0] / b[1] - aspect), -b[0] * b[1], b))


def shrink_bucket(size: Size, area: Size, step: int) -> Size:
    """Returns the bucket for which a picture need not be enlarged.

    It is the picture's own size, shrunk to `area` if it has more pixels, with each side rounded
    down to a multiple of `step`, but at least one step.
    """
    most_pixels = area[0] * area[1]
    if most_pixels < step * step:
        raise UserError("dataset.resolution_too_small", width=area[0], height=area[1], step=step)
    width, height = size
    if width * height > most_pixels:
        # In whole numbers: with floats, 768 px may become 511.99 and lose a whole step.
        width, height = isqrt(most_pixels * width // height), isqrt(most_pixels * height // width)
    width, height = (max(side // step, 1) * step for side in (width, height))
    # Where a short side was raised to one step, the long one gives way.
    if width > height:
        return min(width, most_pixels // height // step * step), height
    return width, min(height, most_pixels // width // step * step)


@dataclass(frozen=True, slots=True)
class BucketRule:
    """Decides which bucket a picture takes; the only place that knows the usual sides."""

    area: Size                              # px; no bucket has more pixels
    step: int                               # px; sides of buckets are multiples of it
    shortest: int                           # px
    longest: int                            # px
    no_upscale: bool = False

    @staticmethod
    def of(config: TrainConfig, native_size: float, step: float) -> BucketRule:
        """The rule of a run. `native_size` and `step`, in px, are those of its base."""
        area = size_of(config.max_resolution) or (int(native_size), int(native_size))
        side = isqrt(area[0] * area[1])
        return BucketRule(area, int(step), config.min_bucket_side or side // 2,
                          config.max_bucket_side or side * 2, config.bucket_no_upscale)

    def assign(self, sizes: Sequence[Size]) -> list[Size]:
        """Returns each picture's bucket, in the order of the pictures."""
        if self.no_upscale:
            return [shrink_bucket(size, self.area, self.step) for size in sizes]
        buckets = self.sizes()
        return [choose_bucket(size, buckets) for size in sizes]

    def sizes(self) -> tuple[Size, ...]:
        return bucket_sizes(self.area, self.step, self.shortest, self.longest)

    def largest(self) -> Size:
        """The bucket with the most pixels; of equal ones the one nearest to a square."""
        return max(self.sizes(), key=lambda size: (size[0] * size[1], -abs(size[0] - size[1])))


@dataclass(frozen=True, slots=True)
class Crop:
    """A picture in its bucket: scaled to `resized`, then cut to `size` from `left, top` on."""

    resized: Size
    left: int
    top: int
    size: Size                              # the bucket

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part of the scaled picture that stays: left, top, right, bottom."""
        return self.left, self.top, self.left + self.size[0], self.top + self.size[1]

    def source(self, original: Size) -> tuple[float, float, float, float]:
        """The same part in pixels of the original picture, which is of size `original`."""
        x, y = original[0] / self.resized[0], original[1] / self.resized[1]
        left, top, right, bottom = self.box
        return (left * x, top * y, min(right * x, float(original[0])),
                min(bottom * y, float(original[1])))


def crop_to(size: Size, bucket: Size, focus: Point | None = None) -> Crop:
    """Returns the crop of a picture of `size` for its bucket.

    The picture is scaled as little as covers the bucket and cut at its centre; or `focus` comes as
    near to the middle of what stays as the picture allows.
    """
    (width, height), (wide, high) = size, bucket
    # The side that is shorter than the bucket's aspect asks for decides; the other one is rounded
    # to the nearest px in whole numbers.
    if width * high <= height * wide:
        resized = wide, (2 * height * wide + width) // (2 * width)
    else:
        resized = (2 * width * high + height) // (2 * height), high
    x, y = focus or (0.5, 0.5)
    return Crop(resized, _crop_start(resized[0], wide, x), _crop_start(resized[1], high, y), bucket)


def _crop_start(side: int, kept: int, middle: float) -> int:
    """Where `kept` of `side` px begin, about `middle` (0..1); rounded down as kohya does."""
    return min(max(floor(middle * side - kept / 2), 0), side - kept)


def fit_picture(image: Image.Image, bucket: Size, focus: Point | None = None) -> NDArray[np.uint8]:
    """Returns the picture as (H, W, 3), scaled and cut as crop_to says."""
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
    """Returns one epoch's batches of picture indices, in random order, each from one bucket.

    Every picture comes `repeats` times; those in `spread` are dealt out evenly among the batches
    of their bucket. No picture is dropped: a bucket's last batch may be smaller. The same seed
    gives the same order everywhere; pass another seed for each epoch.
    """
    rng = Random(epoch_seed)
    members: dict[Size, list[int]] = {}
    for index, (bucket, times) in enumerate(zip(bucket_of, repeats, strict=True)):
        members.setdefault(bucket, []).extend([index] * times)
    epoch: list[list[int]] = []
    for indices in members.values():
        rng.shuffle(indices)
        if spread:
            # Each of both shuffled kinds gets places 0..1 at equal distances, then they are merged.
            kinds = [[i for i in indices if (i in spread) is kind] for kind in (False, True)]
            places = [((n + 0.5) / len(kind), i) for kind in kinds for n, i in enumerate(kind)]
            indices = [i for _, i in sorted(places, key=lambda place: place[0])]
        epoch += [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
    rng.shuffle(epoch)
    return epoch
