"""Which samples each update sees.

That is a pure function of the seed, the update's number, and the place where a resumed run began
with settings or pictures other than before.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from core.dataset import buckets


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run stands in its pictures, whatever its batch size is."""

    update: int = 0                 # optimizer steps done
    samples: int = 0                # learned so far
    epoch: int = 0                  # the one that is going on
    # Name of a picture -> how often it was learned in this epoch.
    seen: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one bucket that go through the model at once."""

    indices: tuple[int, ...]        # of the pictures
    numbers: tuple[int, ...]        # of the samples, counted over the whole run

    def parts(self, most: int) -> list[Batch]:
        """Returns the same samples as batches of at most `most`."""
        return [Batch(self.indices[i:i + most], self.numbers[i:i + most])
                for i in range(0, len(self.indices), most)]


class Regular:
    """Regularisation pictures, of which each epoch takes some in turn.

    They make up `share` of an epoch's samples, and each bucket gives the same number to every
    epoch, so that epochs are equally long.
    """

    def __init__(self, indices: Sequence[int], bucket_of: Sequence[tuple[int, int]],
                 samples: int, share: float, seed: int) -> None:
        self.members: dict[tuple[int, int], list[int]] = {}
        for index, bucket in zip(indices, bucket_of, strict=True):
            self.members.setdefault(bucket, []).append(index)
        self.each_epoch = max(1, round(samples * share / (1 - share)))
        # Samples per epoch of each bucket, by its number of pictures; largest remainder method.
        exact = {bucket: self.each_epoch * len(members) / len(indices)
                 for bucket, members in self.members.items()}
        self.taken = {bucket: int(share) for bucket, share in exact.items()}
        missing = self.each_epoch - sum(self.taken.values())
        for bucket in sorted(exact, key=lambda b: self.taken[b] - exact[b])[:missing]:
            self.taken[bucket] += 1
        for bucket, members in self.members.items():
            Random(f"{seed}-regular-{bucket}").shuffle(members)

    def of_epoch(self, epoch: int) -> list[tuple[int, tuple[int, int]]]:
        """Returns (index, bucket) of each sample."""
        return [(members[(epoch * self.taken[bucket] + n) % len(members)], bucket)
                for bucket, members in self.members.items() for n in range(self.taken[bucket])]


class BucketSampler:
    """Epochs of bucketed batches, cut into updates of `accumulation` batches each.

    The last update of an epoch takes what is left: no picture is dropped. `names` are those of all
    pictures, by index: a picture of the same name is the same one to a resumed run. Such a run
    begins at `start` with what that epoch has not learned yet, and goes on with whole epochs.
    """

    def __init__(self, indices: Sequence[int], bucket_of: Sequence[tuple[int, int]],
                 repeats: Sequence[int], batch_size: int, accumulation: int, seed: int,
                 regular: Regular | None = None, names: Sequence[str] = (),
                 start: Place | None = None) -> None:
        """`indices` are those of the pictures to train on, with their buckets and repeats."""
        self.indices, self.bucket_of, self.repeats = tuple(indices), bucket_of, repeats
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.regular, self.names, self.start = regular, names, start or Place()
        self.samples_per_epoch = sum(repeats) + (regular.each_epoch if regular else 0)
        first = self._batches(0)
        self.batches_per_epoch = len(first)
        self.updates_per_epoch = math.ceil(self.batches_per_epoch / accumulation)
        # `head`: the first epoch of this run, of which a resumed one may see the end only.
        head = self._batches(self.start.epoch) if self.start.epoch else first
        self._head = self._numbered(self._rest(head), self.start.samples)
        self._head_updates = math.ceil(len(self._head) / accumulation)

    def update(self, number: int) -> list[Batch]:
        """Returns the batches of an update, which is counted from 0 over the whole run."""
        batches, done, _ = self._at(number)
        return batches[done:done + self.accumulation]

    def updates_until(self, epochs: int) -> int:
        """Returns the updates of a run of so many epochs, those before `start` included."""
        whole = epochs - self.start.epoch - 1
        if whole < 0:
            return self.start.update
        return self.start.update + self._head_updates + whole * self.updates_per_epoch

    def epoch_of(self, updates_done: int) -> float:
        """Returns the epochs done, as a broken number."""
        left = self.start.update + self._head_updates - updates_done
        if left > 0:
            # With smaller batches, the rest of an epoch may have more updates than a whole one.
            length = max(self._head_updates, self.updates_per_epoch)
            return self.start.epoch + (length - left) / length
        return self.start.epoch + 1 - left / self.updates_per_epoch

    def place(self, updates_done: int) -> Place:
        """Returns where the run stands after so many updates; it can go on with any batch size."""
        batches, done, epoch = self._at(updates_done)
        learned = [index for batch in batches[:done] for index in batch.indices]
        seen = Counter(self.start.seen if epoch == self.start.epoch else {})
        seen.update(self._name(index) for index in learned)
        first = batches[0].numbers[0] if batches else self.start.samples
        return Place(updates_done, first + len(learned), epoch, dict(seen))

    @functools.cached_property
    def data(self) -> str:
        """A digest of the pictures: names, buckets, repeats, and those of regularisation."""
        rows: Iterable[object] = zip(map(self._name, self.indices), self.bucket_of, self.repeats,
                                     strict=True)
        # Files of earlier versions hold this digest: its form must not change.
        more = self.regular and (self.regular.each_epoch, [
            (bucket, sorted(map(self._name, members)))
            for bucket, members in sorted(self.regular.members.items())])
        return hashlib.sha256(repr((sorted(rows, key=repr), more)).encode()).hexdigest()[:16]

    @property
    def order(self) -> str:
        """Runs of the same order go through the same batches."""
        return f"{self.data} {self.batch_size} x {self.accumulation}, seed {self.seed}"

    def _at(self, number: int) -> tuple[list[Batch], int, int]:
        """Returns an update's epoch: its batches, how many of them come before, its number."""
        number -= self.start.update
        if number < self._head_updates:
            return self._head, number * self.accumulation, self.start.epoch
        epochs, place = divmod(number - self._head_updates, self.updates_per_epoch)
        return self._epoch(epochs), place * self.accumulation, self.start.epoch + 1 + epochs

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a course lives as long as its run
    def _epoch(self, after: int) -> list[Batch]:
        """Returns the batches of the `after`-th whole epoch behind the head."""
        number = self.start.samples + sum(len(batch.indices) for batch in self._head)
        return self._numbered(self._batches(self.start.epoch + 1 + after),
                              number + after * self.samples_per_epoch)

    def _batches(self, epoch: int) -> list[list[int]]:
        """Returns a whole epoch's batches, as indices of pictures."""
        more = self.regular.of_epoch(epoch) if self.regular else []
        indices = [*self.indices, *(index for index, _ in more)]
        # A prime: seeds that are neighbours must not share epochs.
        batches = buckets.batches(
            [*self.bucket_of, *(bucket for _, bucket in more)],
            [*self.repeats, *[1] * len(more)], self.batch_size, self.seed * 1_000_003 + epoch,
            range(len(self.indices), len(indices)))
        return [[indices[place] for place in batch] for batch in batches]

    def _rest(self, batches: list[list[int]]) -> list[list[int]]:
        """Returns what the head has not learned yet.

        Batches that are wholly new keep their order; what is left of the others is cut anew by
        bucket and comes after them.
        """
        if not self.start.seen:
            return batches
        seen, whole = Counter(self.start.seen), []
        leftovers: dict[tuple[int, int], list[int]] = {}
        buckets_of = dict(zip(self.indices, self.bucket_of, strict=True))
        if self.regular:
            buckets_of |= {index: bucket for bucket, members in self.regular.members.items()
                           for index in members}
        for batch in batches:
            left = []
            for index in batch:
                name = self._name(index)
                if seen[name] > 0:
                    seen[name] -= 1
                else:
                    left.append(index)
            if len(left) == len(batch):
                whole.append(batch)
            elif left:
                leftovers.setdefault(buckets_of[left[0]], []).extend(left)
        size = self.batch_size
        return whole + [left[i:i + size] for left in leftovers.values()
                        for i in range(0, len(left), size)]

    def _numbered(self, batches: list[list[int]], number: int) -> list[Batch]:
        """Numbers the samples of `batches` from `number` on."""
        numbers = itertools.count(number)
        return [Batch(tuple(batch), tuple(itertools.islice(numbers, len(batch))))
                for batch in batches]

    def _name(self, index: int) -> str:
        return self.names[index] if self.names else str(index)
