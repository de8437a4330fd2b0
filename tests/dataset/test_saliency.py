"""The subject is found where there is one, crops keep it, and points set by hand come first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core import paths
from core.dataset import curation
from core.dataset.buckets import Crop, crop_to, fit_picture
from core.dataset.checks.measures import small
from core.dataset.checks.saliency import SIDE, Box, centre, lost, salient_box
from core.dataset.crops import plan_crops
from core.dataset.curation import Choices
from core.errors import UserError
from tests.drawn import blurred, clouds, discs, drawing, facts_for, subject

SIDES = st.integers(16, 4000)
SIZES = st.tuples(SIDES, SIDES)
SHARES = st.floats(0, 1)
POINTS = st.tuples(SHARES, SHARES)
BUCKETS = st.tuples(st.integers(1, 32), st.integers(1, 32)).map(lambda b: (b[0] * 8, b[1] * 8))


def found(image: Image.Image) -> Box | None:
    return salient_box(np.asarray(small(image, SIDE)))


# --- the subject ------------------------------------------------------------------------------

@pytest.mark.parametrize("at", [(0.25, 0.3), (0.5, 0.5), (0.75, 0.6), (0.3, 0.75)])
@pytest.mark.parametrize("size", [(320, 240), (240, 320), (400, 200)])
def test_a_subject_is_found_within_a_few_percent(
        size: tuple[int, int], at: tuple[float, float]) -> None:
    radius = 0.2 * min(size)
    for seed in range(3):
        box = found(subject(size, at, radius, ground=clouds(size, seed)))
        assert box is not None
        wanted = (at[0] - radius / size[0], at[1] - radius / size[1],
                  at[0] + radius / size[0], at[1] + radius / size[1])
        assert np.abs(np.subtract(box, wanted)).max() < 0.08
        assert np.abs(np.subtract(centre(box), at)).max() < 0.04


def test_a_figure_that_touches_the_rim_keeps_its_head() -> None:
    image = Image.new("RGB", (240, 360), (90, 130, 170))
    image.paste((40, 60, 40), (80, 150, 160, 360))
    image.paste((224, 180, 150), (100, 60, 140, 150))
    box = found(image)
    assert box is not None
    assert box[1] == pytest.approx(60 / 360, abs=0.04)
    assert 0.3 < centre(box)[0] < 0.7


@pytest.mark.parametrize("seed", range(4))
def test_a_subject_that_touches_the_side_is_found(seed: int) -> None:
    box = found(subject((600, 220), (0.08, 0.5), 55, ground=clouds((600, 220), seed)))
    assert box is not None
    np.testing.assert_allclose(box, (0, 0.25, 103 / 600, 0.75), atol=0.06)


@pytest.mark.parametrize("image", [
    clouds(seed=1), discs(seed=2), blurred(discs(seed=3), 5), Image.new("RGB", (99, 99), "teal"),
    Image.linear_gradient("L").convert("RGB")], ids=["clouds", "discs", "soft", "flat", "ramp"])
def test_textures_have_no_subject(image: Image.Image) -> None:
    assert found(image) is None


# --- crops ------------------------------------------------------------------------------------

@settings(deadline=None)
@given(SIZES, BUCKETS, POINTS)
def test_a_crop_lies_within_and_holds_the_point(
        size: tuple[int, int], bucket: tuple[int, int], focus: tuple[float, float]) -> None:
    crop = crop_to(size, bucket, focus)
    left, top, right, bottom = crop.box
    assert 0 <= left <= right <= crop.resized[0]
    assert 0 <= top <= bottom <= crop.resized[1]
    assert (right - left, bottom - top) == bucket
    assert crop.resized == crop_to(size, bucket).resized
    x, y = focus[0] * crop.resized[0], focus[1] * crop.resized[1]
    assert left <= x <= right
    assert top <= y <= bottom
    for begin, kept, side, middle in ((left, bucket[0], crop.resized[0], x),
                                      (top, bucket[1], crop.resized[1], y)):
        if 0 < begin < side - kept:         # not stopped by the rim: in the middle
            assert abs(begin + kept / 2 - middle) <= 1


@settings(deadline=None)
@given(SIZES, BUCKETS)
def test_the_centre_is_the_default(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    crop = crop_to(size, bucket)
    assert crop == crop_to(size, bucket, (0.5, 0.5))
    assert crop.left == (crop.resized[0] - bucket[0]) // 2
    assert crop.top == (crop.resized[1] - bucket[1]) // 2


def test_pixels_follow_the_point() -> None:
    image = Image.new("RGB", (96, 32), "black")
    image.paste("red", (64, 0, 96, 32))
    assert not fit_picture(image, (32, 32)).any()
    assert (fit_picture(image, (32, 32), (0.9, 0.5)) == (255, 0, 0)).all()
    np.testing.assert_array_equal(fit_picture(image, (32, 32)),
                                  fit_picture(image, (32, 32), (0.5, 0.5)))


@settings(deadline=None)
@given(SIZES, st.sampled_from([(512, 512), (256, 1024), (832, 256)]))
def test_what_a_plan_says_is_what_training_cuts(
        size: tuple[int, int], area: tuple[int, int]) -> None:
    [one] = plan_crops([size], facts_for(area, 64), [None])
    assert isinstance(one.crop, Crop)
    kept = one.crop.size[0] * one.crop.size[1]
    assert one.cut == pytest.approx(1 - kept / (one.crop.resized[0] * one.crop.resized[1]))
    assert 0 <= one.top_cut < 1
    assert one.top_cut == one.crop.box[1] / one.crop.resized[1]


def test_a_box_is_lost_as_far_as_it_is_cut() -> None:
    crop = crop_to((300, 100), (100, 100))                  # keeps 1/3 .. 2/3 of the width
    assert lost((0.4, 0.1, 0.6, 0.9), crop, (300, 100)) == pytest.approx(0, abs=1e-9)
    assert lost((0.0, 0.0, 0.2, 1.0), crop, (300, 100)) == 1
    assert lost((1 / 6, 0, 1 / 2, 1), crop, (300, 100)) == pytest.approx(0.5)


# --- choices ----------------------------------------------------------------------------------

def test_choices_are_kept_outside_of_the_folder(tmp_path: Path) -> None:
    assert curation.load(tmp_path) == Choices()
    curation.set_focus(tmp_path, {"a.png": (0.2, 0.9), "b/小.png": (0, 1)})
    curation.leave_out(tmp_path, ["c.png", "d.png"])
    curation.take_in(tmp_path, ["c.png"])
    after = curation.set_focus(tmp_path, {"a.png": None})
    assert after == curation.load(tmp_path / ".." / tmp_path.name) == Choices(
        frozenset({"d.png"}), {"b/小.png": (0.0, 1.0)})
    assert list(tmp_path.iterdir()) == []
    [file] = (paths.data_dir() / "datasets").glob("*.json")
    assert json.loads(file.read_text("utf-8"))["folder"] == str(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"focus": {"a": [2, 0]}}', '{"left_out": 5}'])
def test_damaged_choices_are_no_empty_choices(tmp_path: Path, text: str) -> None:
    curation.leave_out(tmp_path, ["a.png"])
    [file] = (paths.data_dir() / "datasets").glob("*.json")
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        curation.load(tmp_path)
    assert caught.value.code == "checks.choices_unreadable"
    assert str(file) in str(caught.value)


def test_a_point_outside_of_the_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside"):
        curation.set_focus(tmp_path, {"a.png": (1.5, 0)})


def test_drawings_with_a_figure_are_cropped_about_it() -> None:
    """At the centre the ball would be lost; about the subject it is kept."""
    image = subject((600, 200), (0.12, 0.5), 60, ground=Image.blend(
        drawing((600, 200)), Image.new("RGB", (600, 200), "white"), 0.9))
    box = found(image)
    assert box is not None
    size, bucket = (600, 200), (256, 256)
    assert lost(box, crop_to(size, bucket), size) > 0.9
    assert lost(box, crop_to(size, bucket, centre(box)), size) < 0.02
