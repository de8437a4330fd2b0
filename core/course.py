"""Which samples each update sees: a pure function of the seed and the update's number."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from core import buckets


@dataclass(frozen=True, slots=True)
class Batch:
    indices: tuple[int, ...]        # of the pictures
    numbers: tuple[int, ...]        # of the samples, counted over the whole run

    def parts(self, most: int) -> list[Batch]:
        """The same samples, at most `most` at once."""
        return [Batch(self.indices[i:i + most], self.numbers[i:i + most])
                for i in range(0, len(self.indices), most)]


class Regular:
    """Regularisation pictures: each epoch takes as many as make up `share` of its samples, in
    turn, and of each bucket always as many, so that epochs are equally long."""

    def __init__(self, indices: Sequence[int], bucket_of: Sequence[tuple[int, int]],
                 samples: int, share: float, seed: int) -> None:
        self.members: dict[tuple[int, int], list[int]] = {}
        for index, bucket in zip(indices, bucket_of, strict=True):
            self.members.setdefault(bucket, []).append(index)
        self.each_epoch = max(1, round(samples * share / (1 - share)))
        self.taken = _shares(self.each_epoch, {b: len(m) for b, m in self.members.items()})
        for bucket, members in self.members.items():
            Random(f"{seed}-regular-{bucket}").shuffle(members)

    def of_epoch(self, epoch: int) -> list[tuple[int, tuple[int, int]]]:
        """(index, bucket) of each sample."""
        return [(members[(epoch * self.taken[bucket] + n) % len(members)], bucket)
                for bucket, members in self.members.items() for n in range(self.taken[bucket])]


def _shares(total: int, weights: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """`total` shared out by weight, the largest remainders rounded up."""
    exact = {key: total * weight / sum(weights.values()) for key, weight in weights.items()}
    shares = {key: int(value) for key, value in exact.items()}
    for key in sorted(exact, key=lambda k: shares[k] - exact[k])[:total - sum(shares.values())]:
        shares[key] += 1
    return shares


class Course:
    """Epochs of bucketed batches, cut into updates of `accumulation` batches. The last update of
    an epoch takes what is left: no picture is dropped."""

    def __init__(self, indices: Sequence[int], bucket_of: Sequence[tuple[int, int]],
                 repeats: Sequence[int], batch_size: int, accumulation: int, seed: int,
                 regular: Regular | None = None) -> None:
        self.indices, self.bucket_of, self.repeats = tuple(indices), bucket_of, repeats
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.regular = regular
        self.samples_per_epoch = sum(repeats) + (regular.each_epoch if regular else 0)
        self.batches_per_epoch = len(self._epoch(0))
        self.updates_per_epoch = math.ceil(self.batches_per_epoch / accumulation)

    def update(self, number: int) -> list[Batch]:
        epoch, place = divmod(number, self.updates_per_epoch)
        start = place * self.accumulation
        return self._epoch(epoch)[start:start + self.accumulation]

    def epoch_of(self, updates_done: int) -> float:
        return updates_done / self.updates_per_epoch

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a course lives as long as its run
    def _epoch(self, epoch: int) -> list[Batch]:
        more = self.regular.of_epoch(epoch) if self.regular else []
        indices = [*self.indices, *(index for index, _ in more)]
        chosen = buckets.batches(
            [*self.bucket_of, *(bucket for _, bucket in more)],
            [*self.repeats, *[1] * len(more)], self.batch_size, self.seed * 1_000_003 + epoch,
            range(len(self.indices), len(indices)))
        number = epoch * self.samples_per_epoch
        result = []
        for batch in chosen:
            result.append(Batch(tuple(indices[i] for i in batch),
                                tuple(range(number, number + len(batch)))))
            number += len(batch)
        return result
