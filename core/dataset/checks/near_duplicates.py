"""Pictures that are the same or nearly so: groups around the best one, with distances.

64-bit perceptual hashes are compared by multi-index hashing (Norouzi, Punjani, Fleet 2012, "Fast
search in Hamming space with multi-index hashing"): two hashes within d bits have, of four bands
of 16 bits, one that differs in at most d // 4. 100,000 pictures take seconds, not n * n looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from core.dataset.checks.image_stats import Table
from core.dataset.checks.measures import FLAT

NEAR = 6                        # bits of 63; scaling, recompression, brightness stay below
ALIKE = 20.0                    # grey levels: mean difference of two pictures at 8 x 8 px
BANDS = 4
PAIRS_AT_ONCE = 2_000_000

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Copies of one picture. Indices are those of the table; each of `others` is within the
    limit of the best one, so that nothing else is lost when that alone is kept."""

    best: int                               # most pixels, then most detail, then best quality
    others: tuple[int, ...]
    distances: tuple[int, ...]              # bits to the best one's hash, for each of `others`
    same_file: bool                         # byte for byte


def group_copies(table: Table, within: int = NEAR) -> list[Group]:
    """Groups of looks.RECORD rows, by their best picture. A picture is in at most one.

    Identical files form groups of their own, and only their best one is compared further. Flat
    pictures have no hash worth comparing.
    """
    ranks = _ranked(table)
    groups = list(_same_files(table, ranks))
    spare = {index for group in groups for index in group.others}
    compared = np.array([i for i in ranks if i not in spare and table["contrast"][i] > FLAT],
                        dtype=np.int64)
    groups += _near(table, compared, within)
    return sorted(groups, key=lambda group: (not group.same_file, group.best))


def _ranked(table: Table) -> Indices:
    """Indices, the best picture first; equal ones by their order in the table."""
    pixels = table["width"].astype(np.int64) * table["height"]
    quality = np.where(table["quality"] == 0, 101, table["quality"])     # lossless, mostly
    order = np.lexsort((np.arange(len(table)), -quality.astype(np.int64), -table["detail"],
                        -pixels))
    return order.astype(np.int64)


def _same_files(table: Table, ranks: Indices) -> Iterator[Group]:
    members: dict[bytes, list[int]] = {}
    for index in ranks.tolist():
        members.setdefault(table["digest"][index].tobytes(), []).append(index)
    for best, *others in members.values():
        if others:
            yield Group(best, tuple(others), (0,) * len(others), True)


def _near(table: Table, ranked: Indices, within: int) -> Iterator[Group]:
    """The best picture left takes all that are within reach of it, and so on."""
    hashes, which = np.unique(table["hash"][ranked], return_inverse=True)
    first, second, bits = near_pairs(hashes, within)
    starts = np.searchsorted(first, np.arange(len(hashes) + 1))
    owners = np.argsort(which, kind="stable")               # positions in `ranked`, by hash
    bounds = np.searchsorted(which[owners], np.arange(len(hashes) + 1))
    free = np.ones(len(ranked), dtype=bool)
    for at in range(len(ranked)):
        own = int(which[at])
        if not free[at] or (starts[own] == starts[own + 1] and bounds[own + 1] - bounds[own] < 2):
            continue
        free[at] = False
        around = [(own, 0), *((int(second[k]), int(bits[k]))
                              for k in range(starts[own], starts[own + 1]))]
        found = [(int(position), distance) for other, distance in around
                 for position in owners[bounds[other]:bounds[other + 1]] if free[position]]
        alike = _alike(table, int(ranked[at]), ranked[[position for position, _ in found]])
        taken = sorted((distance, int(ranked[position]), position) for (position, distance), same
                       in zip(found, alike, strict=True) if same)
        free[[position for _, _, position in taken]] = False
        if taken:
            yield Group(int(ranked[at]), tuple(index for _, index, _ in taken),
                        tuple(distance for distance, _, _ in taken), False)


def _alike(table: Table, one: int, others: Indices) -> NDArray[np.bool_]:
    """Whether the colours agree as well: a hash knows shapes in grey only."""
    if not len(others):
        return np.zeros(0, dtype=bool)
    colours = table["colours"][others].astype(np.int16) - table["colours"][one]
    agree: NDArray[np.bool_] = np.abs(colours).mean(axis=(1, 2, 3)) <= ALIKE
    return agree


# --- hashes within a distance -----------------------------------------------------------------

def near_pairs(hashes: Hashes, within: int) -> tuple[Indices, Indices, NDArray[np.int64]]:
    """All pairs of different hashes within `within` bits: (first, second, distance), each pair
    in both directions, sorted by first, then second. `hashes`: (N,), all different."""
    keys: list[Indices] = [np.zeros(0, dtype=np.int64)]
    count = len(hashes)
    for first, second in _candidates(hashes, within // BANDS):
        apart = np.bitwise_count(hashes[first] ^ hashes[second])
        close = (apart <= within) & (first != second)
        keys.append(np.unique(first[close] * count + second[close]))
    pairs = np.unique(np.concatenate(keys))
    first, second = pairs // max(count, 1), pairs % max(count, 1)
    return first, second, np.bitwise_count(hashes[first] ^ hashes[second]).astype(np.int64)


def _candidates(hashes: Hashes, flips: int) -> Iterator[tuple[Indices, Indices]]:
    """Pairs with a band in which at most `flips` bits differ, some of them often."""
    for band in range(BANDS):
        values = (hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(values, kind="stable")
        bounds = np.searchsorted(values[order], np.arange(2**16 + 1))
        for mask in _masks(flips):
            wanted = values ^ mask
            yield from _joined(order, bounds[wanted], bounds[wanted + 1])


def _joined(order: Indices, begins: Indices, ends: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Each i with each of order[begins[i]:ends[i]], in pieces that fit into memory."""
    totals = np.concatenate([[0], np.cumsum(ends - begins)])
    start = 0
    while start < len(begins):
        stop = int(np.searchsorted(totals, totals[start] + PAIRS_AT_ONCE, "right")) - 1
        stop = min(max(stop, start + 1), len(begins))
        sizes = (ends - begins)[start:stop]
        first = np.repeat(np.arange(start, stop), sizes)
        inside = np.arange(len(first)) - np.repeat(totals[start:stop] - totals[start], sizes)
        yield first, order[begins[first] + inside]
        start = stop


def _masks(flips: int) -> Iterator[int]:
    """All 16-bit numbers with at most `flips` ones."""
    for ones in range(flips + 1):
        for places in combinations(range(16), ones):
            yield sum(1 << place for place in places)
