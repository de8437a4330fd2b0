"""Copies: hashes that survive saving, all near pairs found, groups whose members are near."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from core.dataset.checks.image_stats import RECORD, Table
from core.dataset.checks.measures import perceptual_hash, small
from core.dataset.checks.near_duplicates import NEAR, Group, group_copies, near_pairs
from tests.drawn import DRAWN, as_jpeg, blurred

BITS = st.integers(0, 2**63 - 1)


@st.composite
def crowds(draw: st.DrawFn) -> list[int]:
    """Random hashes and neighbours of theirs at 0 to 10 bits."""
    hashes = draw(st.lists(BITS, min_size=1, max_size=12))
    for _ in range(draw(st.integers(0, 25))):
        flipped = draw(st.sets(st.integers(0, 62), max_size=10))
        hashes.append(draw(st.sampled_from(hashes)) ^ sum(1 << place for place in flipped))
    return hashes


def hash_of(image: Image.Image) -> int:
    return perceptual_hash(np.asarray(small(small(image.convert("RGB"), 64).convert("L"), 32)))


def table_of(hashes: list[int], **columns: object) -> Table:
    table = np.zeros(len(hashes), RECORD)
    table["hash"], table["contrast"] = hashes, 50
    table["width"] = table["height"] = 100
    table["digest"] = [np.void(index.to_bytes(16, "big")) for index in range(len(hashes))]
    for name, values in columns.items():
        table[name] = values
    return table


def apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


# --- pairs ------------------------------------------------------------------------------------

@settings(deadline=None)
@given(crowds(), st.integers(0, 11))
def test_pairs_are_those_of_comparing_all_with_all(hashes: list[int], within: int) -> None:
    different = np.unique(np.array(hashes, dtype=np.uint64))
    first, second, bits = near_pairs(different, within)
    plain = different.tolist()
    wanted = [(i, j, apart(a, b)) for i, a in enumerate(plain) for j, b in enumerate(plain)
              if i != j and apart(a, b) <= within]
    assert list(zip(first.tolist(), second.tolist(), bits.tolist(), strict=True)) == wanted


def test_no_hashes_no_pairs() -> None:
    assert [len(part) for part in near_pairs(np.zeros(0, dtype=np.uint64), NEAR)] == [0, 0, 0]


def test_fifty_thousand_take_seconds() -> None:
    """All with all would be 1.25 billion comparisons."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 50_000, dtype=np.uint64)
    hashes[-500:] = hashes[:500] ^ np.uint64(0b11)
    began = time.process_time()
    first, _, _ = near_pairs(np.unique(hashes), NEAR)
    assert len(first) >= 1000
    assert time.process_time() - began < 10


def test_pieces_give_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    hashes = np.unique(rng.integers(0, 2**12, 400, dtype=np.uint64))     # crowded bands
    whole = near_pairs(hashes, 2)
    monkeypatch.setattr("core.dataset.checks.near_duplicates.PAIRS_AT_ONCE", 50)
    for a, b in zip(whole, near_pairs(hashes, 2), strict=True):
        np.testing.assert_array_equal(a, b)


# --- groups -----------------------------------------------------------------------------------

def grouped_plainly(table: Table, within: int) -> list[tuple[int, set[int]]]:
    """The rule in the plainest words: the best picture left takes all within reach."""
    order = sorted(range(len(table)), key=lambda i: (
        -int(table["width"][i]) * int(table["height"][i]), -table["detail"][i],
        -(int(table["quality"][i]) or 101), i))
    left, groups = set(order), []
    for best in order:
        if best in left:
            near = {i for i in left - {best}
                    if apart(int(table["hash"][i]), int(table["hash"][best])) <= within}
            left -= near | {best}
            if near:
                groups.append((best, near))
    return sorted(groups)


@settings(deadline=None)
@given(crowds(), st.integers(0, 8), st.randoms(use_true_random=False))
def test_groups_are_those_of_comparing_all_with_all(
        hashes: list[int], within: int, random: object) -> None:
    rng = np.random.default_rng(random.randrange(2**32))  # type: ignore[attr-defined]
    table = table_of(hashes, width=rng.integers(50, 54, len(hashes)),
                     quality=rng.integers(0, 3, len(hashes)))
    groups = group_copies(table, within)
    assert [(g.best, set(g.others)) for g in groups] == grouped_plainly(table, within)
    for group in groups:
        assert len(group.others) == len(group.distances)
        for other, distance in zip(group.others, group.distances, strict=True):
            assert distance == apart(hashes[other], hashes[group.best]) <= within
    members = [i for g in groups for i in (g.best, *g.others)]
    assert len(members) == len(set(members))


def test_identical_files_are_told_apart_from_near_ones() -> None:
    table = table_of([7, 7, 7, 6], width=[100, 100, 100, 90])
    table["digest"][1] = table["digest"][0]
    assert group_copies(table) == [Group(0, (1,), (0,), True), Group(0, (2, 3), (0, 1), False)]


def test_a_chain_is_not_one_group() -> None:
    """a ~ b ~ c, but a and c are far: keeping one must not lose the third."""
    table = table_of([0, 0b1111, 0b1111_1111], width=[100, 90, 80])
    assert group_copies(table, 4) == [Group(0, (1,), (4,), False)]


def test_flat_pictures_and_other_colours_are_no_copies() -> None:
    assert group_copies(table_of([5, 5], contrast=0.5)) == []
    colours = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    colours[1] = (0, 0, 90)
    assert group_copies(table_of([5, 5], colours=colours)) == []


def test_the_best_is_the_largest_then_the_sharpest_then_the_least_compressed() -> None:
    same = [9, 9, 9]
    assert group_copies(table_of(same, width=[10, 30, 20]))[0].best == 1
    assert group_copies(table_of(same, detail=[0.5, 0.25, 1]))[0].best == 2
    assert group_copies(table_of(same, quality=[90, 80, 0]))[0].best == 2     # 0: lossless


# --- hashes of pictures -----------------------------------------------------------------------

CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda i: i.resize((i.width // 2, i.height // 2)),
    "JPEG at 30": lambda i: as_jpeg(i, 30),
    "brighter": lambda i: ImageEnhance.Brightness(i).enhance(1.15),
    "more contrast": lambda i: ImageEnhance.Contrast(i).enhance(1.2),
    "softer": lambda i: blurred(i, 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", DRAWN)
def test_a_copy_stays_near(kind: str, change: str) -> None:
    for seed in range(4):
        image = DRAWN[kind](seed=seed)
        assert apart(hash_of(image), hash_of(CHANGES[change](image))) <= NEAR


@pytest.mark.parametrize("kind", DRAWN)
def test_other_pictures_are_far(kind: str) -> None:
    hashes = [hash_of(DRAWN[kind](seed=seed)) for seed in range(12)]
    assert min(apart(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > NEAR + 2


def test_the_hash_is_the_signs_of_the_lowest_frequencies() -> None:
    """Against a DCT written out in full."""
    grey = np.random.default_rng(3).integers(0, 256, (32, 32)).astype(np.uint8)
    at = np.arange(32)
    full = np.array([[sum(np.cos(np.pi * u * (2 * y + 1) / 64) * (
        grey[y] * np.cos(np.pi * v * (2 * at + 1) / 64)).sum() for y in range(32))
        for v in range(8)] for u in range(8)]).ravel()
    bits = full > np.median(full[1:])
    wanted = sum(int(bit) << (63 - place) for place, bit in enumerate(bits) if place)
    assert perceptual_hash(grey) == wanted
