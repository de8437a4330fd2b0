"""Which samples a resumed run sees: none twice, none skipped, whatever has changed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from core.dataset.sampler import Batch, BucketSampler, Place, Regular

SIZES = [(64, 64), (64, 96), (96, 64)]
ROWS = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(1, 3)), min_size=1, max_size=9)


def sampler(rows: list[tuple[tuple[int, int], int]], batch: int, accumulation: int, seed: int,
            start: Place | None = None, names: list[str] | None = None,
            regular: int = 0) -> BucketSampler:
    """`rows`: bucket and repeats of each picture; `regular`: so many of another folder."""
    count = len(rows)
    more = Regular(range(count, count + regular), [SIZES[n % 3] for n in range(regular)],
                   sum(times for _, times in rows), 0.4, seed) if regular else None
    names = names or [f"{n}.png" for n in range(count)]
    return BucketSampler(range(count), [size for size, _ in rows], [times for _, times in rows],
                         batch,
                         accumulation, seed, more, [*names, *(f"reg/{n}" for n in range(regular))],
                         start)


def batches(one: BucketSampler, first: int, last: int) -> list[Batch]:
    return [batch for number in range(first, last) for batch in one.update(number)]


def pictures(one: BucketSampler, found: list[Batch]) -> Counter[str]:
    return Counter(one.names[index] for batch in found for index in batch.indices)


@settings(max_examples=80)
@given(rows=ROWS, batch=st.integers(1, 5), accumulation=st.integers(1, 3),
       seed=st.integers(0, 99), stop=st.integers(0, 30), regular=st.integers(0, 4))
def test_the_same_settings_go_on_as_if_nothing_had_been(
        rows: list[tuple[tuple[int, int], int]], batch: int, accumulation: int, seed: int,
        stop: int, regular: int) -> None:
    whole = sampler(rows, batch, accumulation, seed, regular=regular)
    place = whole.place(stop)
    resumed = sampler(rows, batch, accumulation, seed, place, regular=regular)
    for number in range(stop, stop + 2 * whole.updates_per_epoch + 1):
        assert resumed.update(number) == whole.update(number)
        assert resumed.place(number) == whole.place(number)
        assert abs(resumed.epoch_of(number) - whole.epoch_of(number)) < 1e-9
    assert resumed.order == whole.order
    epochs = place.epoch + 2
    assert resumed.updates_until(epochs) == epochs * whole.updates_per_epoch


@settings(max_examples=120)
@given(rows=ROWS, before=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 9)),
       after=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 9)),
       third=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 9)),
       stop=st.integers(0, 20), more=st.integers(0, 6))
def test_other_batches_learn_what_the_epoch_lacks(
        rows: list[tuple[tuple[int, int], int]], before: tuple[int, int, int],
        after: tuple[int, int, int], third: tuple[int, int, int], stop: int, more: int) -> None:
    """Batch size, accumulation and seed change twice: each epoch still holds every picture once
    per repeat, and samples are numbered without a gap."""
    first = sampler(rows, *before)
    second = sampler(rows, *after, start=first.place(stop))
    end = stop + more
    last = sampler(rows, *third, start=second.place(end))
    final = last.updates_until(last.start.epoch + 2)
    found = batches(first, 0, stop) + batches(second, stop, end) + batches(last, end, final)
    whole = sum(times for _, times in rows)
    assert [n for batch in found for n in batch.numbers] == list(range(
        whole * (last.start.epoch + 2)))
    samples = [index for batch in found for index in batch.indices]
    expected = Counter({n: times for n, (_, times) in enumerate(rows)})
    for epoch in range(last.start.epoch + 2):
        assert Counter(samples[epoch * whole:(epoch + 1) * whole]) == expected
    assert all(len({rows[i][0] for i in batch.indices}) == 1 for batch in found)
    assert all(len(batch.indices) <= max(before[0], after[0], third[0]) for batch in found)


@settings(max_examples=80)
@given(rows=ROWS, kept=st.sets(st.integers(0, 8)), new=ROWS, repeats=st.integers(1, 4),
       stop=st.integers(0, 20), size=st.integers(1, 4), other=st.integers(1, 4))
def test_pictures_that_come_and_go_in_mid_epoch(
        rows: list[tuple[tuple[int, int], int]], kept: set[int],
        new: list[tuple[tuple[int, int], int]], repeats: int, stop: int, size: int,
        other: int) -> None:
    """The epoch goes on with what it lacks of today's pictures, at today's repeats."""
    first = sampler(rows, size, 1, 3)
    place = first.place(stop)
    names = [f"{n}.png" for n in range(len(rows)) if n in kept] + [
        f"new{n}.png" for n in range(len(new))]
    today = [(rows[n][0], repeats) for n in range(len(rows)) if n in kept] + new
    second = sampler(today, other, 1, 3, place, names)
    wanted = dict(zip(names, (times for _, times in today), strict=True))
    head = batches(second, stop, second.updates_until(place.epoch + 1))
    assert pictures(second, head) == Counter({
        name: left for name, times in wanted.items()
        if (left := times - place.seen.get(name, 0)) > 0})
    later = second.updates_until(place.epoch + 1)
    full = batches(second, later, later + second.updates_per_epoch)
    assert pictures(second, full) == Counter(wanted)
    assert [n for batch in [*head, *full] for n in batch.numbers] == list(range(
        place.samples, place.samples + sum(len(batch.indices) for batch in [*head, *full])))


def test_what_makes_another_order() -> None:
    rows = [(SIZES[0], 1)] * 5
    same = sampler(rows, 2, 1, 3)
    assert same.order == sampler(rows, 2, 1, 3).order
    others = [sampler(rows, 3, 1, 3), sampler(rows, 2, 2, 3), sampler(rows, 2, 1, 4),
              sampler([*rows[1:], (SIZES[0], 2)], 2, 1, 3), sampler(rows[1:], 2, 1, 3),
              sampler([*rows[1:], (SIZES[1], 1)], 2, 1, 3), sampler(rows, 2, 1, 3, regular=2),
              sampler(rows, 2, 1, 3, names=["a", "1.png", "2.png", "3.png", "4.png"])]
    assert len({one.order for one in [same, *others]}) == 1 + len(others)


def test_fewer_epochs_than_were_done_leave_nothing_to_do() -> None:
    rows = [(SIZES[0], 1)] * 4
    whole = sampler(rows, 2, 1, 3)
    assert sampler(rows, 2, 1, 3, whole.place(4)).updates_until(1) == 4
    assert sampler(rows, 2, 1, 3, whole.place(4)).updates_until(2) == 4
    assert sampler(rows, 4, 1, 3, whole.place(3)).updates_until(2) == 4
