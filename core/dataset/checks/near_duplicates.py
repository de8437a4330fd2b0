"""Pictures that are the same or nearly so: groups around the best one, with distances.

64-bit perceptual hashes are compared by multi-index hashing (Norouzi, Punjani, Fleet 2012, "Fast
search in Hamming space with multi-index hashing"): two hashes within d bits have, of four bands
of 16 bits, one that differs in at most d // 4. So 100,000 pictures take seconds, not n * n steps.
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
BANDS = 4                       # of 16 bits each
PAIRS_AT_ONCE = 2_000_000       # in memory; some 16 bytes each

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Copies of one picture, as indices of the table.

    Each of `others` is within the limit of the best one, so that nothing else is lost when that
    alone is kept.
    """

    best: int                               # most pixels, then most detail, then best quality
    others: tuple[int, ...]
    distances: tuple[int, ...]              # bits to the best one's hash, for each of `others`
    same_file: bool                         # byte for byte


def group_copies(table: Table, within: int = NEAR) -> list[Group]:
    """Returns groups of image_stats.RECORD rows. A picture is in at most one of them.

    Identical files form groups of their own, and only their best one is compared further. Flat
    pictures have no hash worth comparing.
    """
    # The best picture first, equal ones by their order in the table: lexsort takes the most
    # important key last. What is no JPEG (0) is mostly lossless.
    pixels = table["width"].astype(np.int64) * table["height"]
    quality = np.where(table["quality"] == 0, 101, table["quality"]).astype(np.int64)
    ranked = np.lexsort((np.arange(len(table)), -quality, -table["detail"], -pixels)).tolist()
    members: dict[bytes, list[int]] = {}
    for index in ranked:
        members.setdefault(table["digest"][index].tobytes(), []).append(index)
    groups = [Group(best, tuple(others), (0,) * len(others), True)
              for best, *others in members.values() if others]
    spare = {index for group in groups for index in group.others}
    compared = np.array([i for i in ranked if i not in spare and table["contrast"][i] > FLAT],
                        dtype=np.int64)
    groups += _near_groups(table, compared, within)
    return sorted(groups, key=lambda group: (not group.same_file, group.best))


def _near_groups(table: Table, ranked: Indices, within: int) -> Iterator[Group]:
    """The best picture left takes all that are within reach of it, and so on."""
    hashes, which = np.unique(table["hash"][ranked], return_inverse=True)
    first, second, bits = near_pairs(hashes, within)
    starts = np.searchsorted(first, np.arange(len(hashes) + 1))
    # Positions in `ranked`, by hash: owners[bounds[h]:bounds[h + 1]] are those of hash h.
    owners = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[owners], np.arange(len(hashes) + 1))
    free = np.ones(len(ranked), dtype=bool)
    for at in range(len(ranked)):
        best, code = int(ranked[at]), int(which[at])
        # Most pictures have no other one near.
        alone = starts[code] == starts[code + 1] and bounds[code + 1] - bounds[code] < 2
        if not free[at] or alone:
            continue
        free[at] = False
        around = [(code, 0), *((int(second[k]), int(bits[k]))
                               for k in range(starts[code], starts[code + 1]))]
        near = [(int(position), distance) for other, distance in around
                for position in owners[bounds[other]:bounds[other + 1]] if free[position]]
        if not near:
            continue
        # A hash knows shapes in grey only, so the colours must agree as well.
        others = ranked[[position for position, _ in near]]
        differences = table["colours"][others].astype(np.int16) - table["colours"][best]
        alike = np.abs(differences).mean(axis=(1, 2, 3)) <= ALIKE
        taken = sorted((distance, int(ranked[position]), position) for (position, distance), same
                       in zip(near, alike, strict=True) if same)
        free[[position for _, _, position in taken]] = False
        if taken:
            yield Group(best, tuple(index for _, index, _ in taken),
                        tuple(distance for distance, _, _ in taken), False)


# --- hashes within a distance -----------------------------------------------------------------

def near_pairs(hashes: Hashes, within: int) -> tuple[Indices, Indices, NDArray[np.int64]]:
    """Finds all pairs of different hashes within `within` bits.

    Returns (first, second, distance), each pair in both directions, sorted by first, then second.
    `hashes` is (N,), all different.
    """
    keys: list[Indices] = [np.zeros(0, dtype=np.int64)]
    count = len(hashes)
    for first, second in _candidates(hashes, within // BANDS):
        apart = np.bitwise_count(hashes[first] ^ hashes[second])
        close = (apart <= within) & (first != second)
        # A pair as one number, since some come from several bands.
        keys.append(np.unique(first[close] * count + second[close]))
    pairs = np.unique(np.concatenate(keys))
    first, second = pairs // max(count, 1), pairs % max(count, 1)
    return first, second, np.bitwise_count(hashes[first] ^ hashes[second]).astype(np.int64)


def _candidates(hashes: Hashes, flips: int) -> Iterator[tuple[Indices, Indices]]:
    """Pairs with a band in which at most `flips` bits differ; some come more than once."""
    # All 16-bit numbers with at most `flips` ones.
    masks = [sum(1 << place for place in places) for ones in range(flips + 1)
             for places in combinations(range(16), ones)]
    for band in range(BANDS):
        values = (hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(values, kind="stable")
        bounds = np.searchsorted(values[order], np.arange(2**16 + 1))
        for mask in masks:
            # Each i with each of order[begins[i]:begins[i] + sizes[i]], in pieces that fit into
            # memory.
            begins = bounds[values ^ mask]
            sizes = bounds[(values ^ mask) + 1] - begins
            totals = np.concatenate([[0], np.cumsum(sizes)])
            start = 0
            while start < len(hashes):
                stop = int(np.searchsorted(totals, totals[start] + PAIRS_AT_ONCE, "right")) - 1
                stop = min(max(stop, start + 1), len(hashes))
                first = np.repeat(np.arange(start, stop), sizes[start:stop])
                inside = np.arange(len(first)) - (totals[first] - totals[start])
                yield first, order[begins[first] + inside]
                start = stop
