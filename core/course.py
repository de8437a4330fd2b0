"""Which samples each update sees: a pure function of the seed and the update's number."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from core import buckets


@dataclass(frozen=True, slots=True)
class Batch:
    indices: tuple[int, ...]        # of the pictures
    numbers: tuple[int, ...]        # of the samples, counted over the whole run

    def parts(self, most: int) -> list[Batch]:
        """The same samples, at most `most` at once."""
        return [Batch(self.indices[i:i + most], self.numbers[i:i + most])
                for i in range(0, len(self.indices), most)]


class Course:
    """Epochs of bucketed batches, cut into updates of `accumulation` batches. The last update of
    an epoch takes what is left: no picture is dropped."""

    def __init__(self, indices: Sequence[int], bucket_of: Sequence[tuple[int, int]],
                 repeats: Sequence[int], batch_size: int, accumulation: int, seed: int) -> None:
        self.indices, self.bucket_of, self.repeats = tuple(indices), bucket_of, repeats
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.samples_per_epoch = sum(repeats)
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
        chosen = buckets.batches(self.bucket_of, self.repeats, self.batch_size,
                                 self.seed * 1_000_003 + epoch)
        number = epoch * self.samples_per_epoch
        result = []
        for batch in chosen:
            result.append(Batch(tuple(self.indices[i] for i in batch),
                                tuple(range(number, number + len(batch)))))
            number += len(batch)
        return result
