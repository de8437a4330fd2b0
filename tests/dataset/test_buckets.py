"""Buckets and batches: kohya's rule, nothing squashed, nobody left behind."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.dataset.buckets import (
    BucketRule,
    Crop,
    batches,
    bucket_sizes,
    choose_bucket,
    crop_to,
    fit_picture,
    shrink_bucket,
)
from core.errors import UserError

SIDES = st.integers(1, 20_000)
SIZES = st.tuples(SIDES, SIDES)
FAMILIES = ((64, 8, 32, 128), (512, 64, 256, 1024), (1024, 64, 512, 2048), (768, 64, 256, 1024))


def rules() -> st.SearchStrategy[tuple[tuple[int, int], int, int, int]]:
    """Areas, steps and sides that leave at least one size."""
    steps = st.sampled_from((8, 16, 32, 64))
    side = st.integers(64, 2048)
    return st.tuples(st.tuples(side, side), steps, st.integers(1, 512),
                     st.integers(0, 2048)).map(
        lambda r: (r[0], r[1], r[2], -(-r[2] // r[1]) * r[1] + r[3]))


# --- sizes ------------------------------------------------------------------------------------

def test_sizes_of_512_are_kohyas() -> None:
    assert bucket_sizes((512, 512), 64, 256, 1024) == (
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640),
        (448, 576), (512, 512), (576, 448), (640, 384), (704, 320), (768, 320), (832, 256),
        (896, 256), (960, 256), (1024, 256))


def test_sizes_of_the_demo_base() -> None:
    sizes = bucket_sizes((64, 64), 8, 32, 128)
    assert {(64, 64), (32, 128), (128, 32), (56, 72), (80, 48)} <= set(sizes)
    assert all(32 <= side <= 128 and side % 8 == 0 for size in sizes for side in size)


@settings(deadline=None)
@given(rules())
def test_sizes_stay_within_area_sides_and_step(
        rule: tuple[tuple[int, int], int, int, int]) -> None:
    area, step, shortest, longest = rule
    sizes = bucket_sizes(*rule)
    assert len(set(sizes)) == len(sizes) >= 1
    assert set(sizes) == {(h, w) for w, h in sizes}
    small = len(sizes) == 1                                 # the area may be too small for shortest
    for width, height in sizes:
        assert width * height <= area[0] * area[1]
        assert width % step == height % step == 0
        assert max(width, height) <= longest
        assert small or min(width, height) >= shortest


def test_an_area_below_the_shortest_side_leaves_one_square() -> None:
    assert bucket_sizes((200, 200), 64, 256, 1024) == ((192, 192),)


def test_an_unequal_resolution_counts_by_its_area() -> None:
    assert bucket_sizes((512, 512), 64, 256, 1024) == bucket_sizes((1024, 256), 64, 256, 1024)


@pytest.mark.parametrize(("rule", "code"), [
    (((32, 32), 64, 256, 1024), "dataset.resolution_too_small"),
    (((512, 512), 64, 600, 630), "dataset.bucket_sides"),
])
def test_rules_without_a_size_are_refused(
        rule: tuple[tuple[int, int], int, int, int], code: str) -> None:
    with pytest.raises(UserError) as caught:
        bucket_sizes(*rule)
    assert caught.value.code == code
    assert "{" not in str(caught.value)


# --- the choice -------------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "bucket"), [
    ((512, 512), (512, 512)), ((3000, 3000), (512, 512)), ((10, 10), (512, 512)),
    ((1920, 1080), (640, 384)), ((1080, 1920), (384, 640)), ((4000, 3000), (576, 448)),
    ((20000, 1), (1024, 256)), ((1, 20000), (256, 1024)), ((416, 1280), (256, 832)),
])
def test_choice_at_512(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert choose_bucket(size, bucket_sizes((512, 512), 64, 256, 1024)) == bucket


@settings(deadline=None)
@given(SIZES, st.sampled_from(FAMILIES))
def test_the_chosen_bucket_has_the_nearest_aspect(
        size: tuple[int, int], family: tuple[int, int, int, int]) -> None:
    side, step, shortest, longest = family
    sizes = bucket_sizes((side, side), step, shortest, longest)
    chosen = choose_bucket(size, sizes)
    error = abs(chosen[0] / chosen[1] - size[0] / size[1])
    assert all(error <= abs(w / h - size[0] / size[1]) for w, h in sizes)
    assert choose_bucket(chosen, sizes) == chosen


@settings(deadline=None)
@given(SIZES, st.tuples(st.integers(64, 2048), st.integers(64, 2048)),
       st.sampled_from((8, 16, 32, 64)))
def test_no_upscale_needs_no_enlarging(
        size: tuple[int, int], area: tuple[int, int], step: int) -> None:
    bucket = shrink_bucket(size, area, step)
    assert bucket[0] % step == bucket[1] % step == 0
    assert min(bucket) >= step
    assert bucket[0] * bucket[1] <= area[0] * area[1]
    if min(size) >= step:
        assert bucket[0] <= max(size[0], step)
        assert bucket[1] <= max(size[1], step)
    shrink = min(1.0, (area[0] * area[1] / (size[0] * size[1])) ** 0.5)
    if min(size) * shrink >= step:                          # less than one step is lost
        assert all(b > s * shrink - step - 1e-6 for b, s in zip(bucket, size, strict=True))
        assert all(r <= s for r, s in zip(crop_to(size, bucket).resized, size, strict=True))


@pytest.mark.parametrize(("size", "bucket"), [
    ((768, 768), (512, 512)), ((512, 512), (512, 512)), ((300, 500), (256, 448)),
    ((2000, 1000), (704, 320)), ((40, 40), (64, 64)), ((20_000, 10), (4096, 64)),
])
def test_no_upscale_examples(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert shrink_bucket(size, (512, 512), 64) == bucket


def test_no_upscale_refuses_an_area_below_one_step() -> None:
    with pytest.raises(UserError, match="64"):
        shrink_bucket((500, 500), (32, 32), 64)


def test_assign_keeps_the_order() -> None:
    sizes = [(100, 100), (400, 100), (100, 400)]
    assert BucketRule((64, 64), 8, 32, 128).assign(sizes) == [(64, 64), (128, 32), (32, 128)]
    assert BucketRule((64, 64), 8, 32, 128, no_upscale=True).assign(sizes) == [
        (64, 64), (128, 32), (32, 128)]
    assert BucketRule((64, 64), 8, 32, 128, True).assign([(50, 40)]) == [(48, 40)]


# --- the crop ---------------------------------------------------------------------------------

@settings(deadline=None)
@given(SIZES, st.sampled_from(FAMILIES), st.booleans())
def test_the_crop_covers_and_squashes_nothing(
        size: tuple[int, int], family: tuple[int, int, int, int], no_upscale: bool) -> None:
    side, step, shortest, longest = family
    bucket, = BucketRule((side, side), step, shortest, longest, no_upscale).assign([size])
    crop = crop_to(size, bucket)
    (width, height), (wide, high) = crop.resized, bucket
    assert width >= wide
    assert height >= high
    # One side fits exactly, so it is no larger than covering needs; the other is right to half
    # a pixel, so nothing is squashed.
    assert ((width == wide and abs(height - wide * size[1] / size[0]) <= 0.5 + 1e-6)
            or (height == high and abs(width - high * size[0] / size[1]) <= 0.5 + 1e-6))
    left, top, right, bottom = crop.box
    assert (right - left, bottom - top) == bucket
    assert 0 <= left <= width - right <= left + 1           # centred to a pixel
    assert 0 <= top <= height - bottom <= top + 1
    box = crop.source(size)
    assert 0 <= box[0] < box[2] <= size[0]
    assert 0 <= box[1] < box[3] <= size[1]


def test_crop_examples() -> None:
    assert crop_to((200, 100), (64, 64)) == Crop((128, 64), 32, 0, (64, 64))
    assert crop_to((200, 100), (64, 64)).source((200, 100)) == (50, 0, 150, 100)
    assert crop_to((64, 64), (64, 64)) == Crop((64, 64), 0, 0, (64, 64))


def test_fit_takes_the_middle() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("lime", (100, 0, 200, 100))
    pixels = fit_picture(image, (64, 64))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert (pixels[:, 4:-4] == (0, 255, 0)).all()


def test_fit_keeps_circles_round() -> None:
    """A disc stays a disc: its extents across and down differ by a pixel at most."""
    y, x = np.mgrid[:400, :900]
    disc = ((x - 450) ** 2 + (y - 200) ** 2 < 150 ** 2).astype(np.uint8) * 255
    pixels = fit_picture(Image.fromarray(disc).convert("RGB"), (120, 64))[..., 0] > 127
    across, down = pixels.any(0).sum(), pixels.any(1).sum()
    assert abs(int(across) - int(down)) <= 1
    assert abs(int(across) - 48) <= 1                       # 300 px of 400 px, at 64


def test_fit_equals_scaling_the_whole_and_cutting() -> None:
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 255, (30, 50, 3), dtype=np.uint8))
    image = small.resize((500, 300), Image.Resampling.BICUBIC)
    for bucket in ((96, 64), (64, 96), (640, 320)):         # down, down, up
        crop = crop_to(image.size, bucket)
        method = Image.Resampling.LANCZOS if bucket[0] < 500 else Image.Resampling.BICUBIC
        whole = np.array(image.resize(crop.resized, method).crop(crop.box)).astype(int)
        assert np.abs(fit_picture(image, bucket).astype(int) - whole).max() <= 2


def test_fit_without_scaling_changes_no_pixel() -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 255, (64, 72, 3), dtype=np.uint8)
    assert (fit_picture(Image.fromarray(pixels), (72, 64)) == pixels).all()
    assert (fit_picture(Image.fromarray(pixels), (64, 64)) == pixels[:, 4:68]).all()


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1), (3, 2), (9000, 40)])
def test_fit_of_strange_sizes(size: tuple[int, int]) -> None:
    bucket, = BucketRule((512, 512), 64, 256, 1024).assign([size])
    pixels = fit_picture(Image.new("RGB", size, (10, 200, 30)), bucket)
    assert pixels.shape == (bucket[1], bucket[0], 3)
    assert (pixels == (10, 200, 30)).all()


def test_fit_of_a_huge_picture_is_close_to_the_fair_way() -> None:
    y, x = np.mgrid[:3000, :3000]
    waves = ((np.sin(x / 90) + np.cos(y / 70)) * 60 + 128).astype(np.uint8)
    image = Image.fromarray(waves).convert("RGB")
    fair = np.array(image.resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(fit_picture(image, (64, 64)).astype(int) - fair).max() <= 2


# --- batches ----------------------------------------------------------------------------------

BUCKETS = st.sampled_from(((64, 64), (48, 80), (80, 48), (32, 128)))
ITEMS = st.lists(st.tuples(BUCKETS, st.integers(1, 5)), max_size=60)


@settings(deadline=None)
@given(ITEMS, st.integers(1, 9), st.integers(0, 2**63))
def test_every_picture_appears_as_often_as_it_repeats(
        items: list[tuple[tuple[int, int], int]], batch_size: int, seed: int) -> None:
    bucket_of, repeats = [b for b, _ in items], [n for _, n in items]
    epoch = batches(bucket_of, repeats, batch_size, seed)
    assert Counter(i for batch in epoch for i in batch) == Counter(dict(enumerate(repeats)))
    assert all(1 <= len(batch) <= batch_size for batch in epoch)
    assert all(len({bucket_of[i] for i in batch}) == 1 for batch in epoch)
    short = Counter(bucket_of[batch[0]] for batch in epoch if len(batch) < batch_size)
    assert all(count == 1 for count in short.values())      # one smaller batch a bucket
    assert batches(bucket_of, repeats, batch_size, seed) == epoch


def test_the_order_is_the_same_everywhere() -> None:
    """A literal: the seed's order must not depend on the platform or the Python."""
    bucket_of = [(64, 64)] * 4 + [(48, 80)] * 3
    assert batches(bucket_of, [1, 1, 2, 1, 1, 1, 1], 2, 7) == [
        [2, 1], [5, 6], [4], [3, 0], [2]]


def test_epochs_differ() -> None:
    orders = {tuple(map(tuple, batches([(64, 64)] * 20, [1] * 20, 4, seed)))
              for seed in range(20)}
    assert len(orders) == 20


def test_batches_of_different_buckets_mix() -> None:
    bucket_of = [(64, 64)] * 20 + [(48, 80)] * 20
    firsts = [bucket_of[batch[0]] for batch in batches(bucket_of, [1] * 40, 2, 3)]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_lists_of_different_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="shorter"):
        batches([(64, 64)] * 3, [1, 1], 2, 0)
