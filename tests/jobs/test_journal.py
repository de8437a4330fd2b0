"""The journal: what was whole on disk is read back, whatever happened to the writer."""

import math
import os
import re
import string
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.jobs import journal
from core.jobs.events import Checkpoint, JobEnded, Note, Step, to_line
from core.jobs.journal import EVENTS, Journal, new_run_id, read, tail, thinned


def note(text):
    return Note(key="said", params={"text": text}, at=1.0)


texts = st.text(max_size=30)
notes = st.lists(texts.map(note), min_size=1, max_size=8)


@settings(deadline=None)
@given(before=notes, after=notes, data=st.data())
def test_a_cut_at_any_byte_costs_at_most_the_torn_line(tmp_path_factory, before, after, data):
    folder = tmp_path_factory.mktemp("run")
    ends, size = [0], 0
    with Journal(folder) as writer:
        for event in before:
            writer.append(event)
            size = (folder / EVENTS).stat().st_size
            ends.append(size)
    cut = data.draw(st.integers(0, size))
    with open(folder / EVENTS, "rb+") as file:
        file.truncate(cut)
    whole = sum(1 for end in ends[1:] if end <= cut)
    assert read(folder) == before[:whole]

    with Journal(folder) as writer:
        for event in after:
            writer.append(event)
    # a line that lost nothing but its line break comes back
    kept = whole + (cut + 1 in ends)
    assert read(folder) == before[:kept] + after


@settings(deadline=None)
@given(before=notes, rest=st.binary(max_size=40), after=notes)
def test_rubbish_at_the_end_costs_nothing_else(tmp_path_factory, before, rest, after):
    folder = tmp_path_factory.mktemp("run")
    with Journal(folder) as writer:
        for event in before:
            writer.append(event)
    with open(folder / EVENTS, "ab") as file:
        file.write(rest)
    with Journal(folder) as writer:
        for event in after:
            writer.append(event)
    events = read(folder)
    assert events[:len(before)] == before
    assert events[-len(after):] == after


@settings(deadline=None)
@given(notes, st.data())
def test_tail_in_any_portions_sees_every_event_once(tmp_path_factory, events, data):
    folder = tmp_path_factory.mktemp("run")
    with Journal(folder) as writer:
        for event in events:
            writer.append(event)
    content = (folder / EVENTS).read_bytes()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    (folder / EVENTS).write_bytes(b"")
    seen, offset, done = [], 0, 0
    for cut in [*cuts, len(content)]:
        with open(folder / EVENTS, "ab") as file:
            file.write(content[done:cut])
        done = cut
        new, offset = tail(folder, offset)
        seen += new
    assert seen == events
    assert tail(folder, offset) == ([], offset)


def test_a_missing_journal_is_empty(tmp_path):
    assert tail(tmp_path, 0) == ([], 0)


def test_a_file_name_that_is_no_text_comes_back(tmp_path):
    with Journal(tmp_path) as writer:
        writer.append(Checkpoint(step=1, path="bad\udcff名"))
    assert read(tmp_path)[0].path == "bad\udcff名"


def test_a_full_disk_tears_one_line_only(tmp_path, monkeypatch):
    real = os.write
    with Journal(tmp_path) as writer:
        writer.append(note("one"))

        def full(handle, data):
            real(handle, data[:9])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(journal.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.append(note("two"))
        monkeypatch.undo()
        writer.append(note("three"))
    assert [event.params["text"] for event in read(tmp_path)] == ["one", "three"]


def test_threads_of_one_writer_do_not_mix_lines(tmp_path):
    with Journal(tmp_path) as writer:
        threads = [threading.Thread(target=lambda name=name: [
            writer.append(note(name * 500)) for _ in range(100)]) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [event.params["text"] for event in read(tmp_path)]
    assert sorted(found) == sorted(name * 500 for name in "abcd" for _ in range(100))


@pytest.mark.parametrize(("event", "synced"), [
    (JobEnded(state="done"), True), (Checkpoint(step=1, path="x"), True), (note("x"), False)])
def test_what_must_survive_a_power_cut_is_synced(tmp_path, monkeypatch, event, synced):
    calls = []
    monkeypatch.setattr(journal.os, "fsync", calls.append)
    with Journal(tmp_path) as writer:
        writer.append(event)
    assert bool(calls) is synced


@given(st.text(max_size=80))
def test_run_ids_are_safe_everywhere(name):
    run_id = new_run_id(name)
    assert set(run_id) <= set(string.ascii_lowercase + string.digits + "-")
    assert re.match(r"\d{8}-\d{6}-\d{3}-.*[0-9a-f]{4}$", run_id)
    assert len(run_id) <= 60


def test_run_ids_sort_by_time_and_differ():
    ids = []
    for _ in range(5):
        ids.append(new_run_id("Mein Stil!"))
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert len({new_run_id("x") for _ in range(50)}) == 50
    assert "-mein-stil-" in ids[0]
    assert "-run-" in new_run_id("水墨")


values = st.floats(-1e6, 1e6)


@given(st.lists(values, max_size=300), st.integers(4, 60))
def test_thinned_keeps_first_last_and_extremes(losses, most):
    series = list(enumerate(losses))
    thin = thinned(series, most)
    assert len(thin) <= most
    assert list(thin) == [point for point in series if point in set(thin)]      # in order
    if series:
        assert (thin[0], thin[-1]) == (series[0], series[-1])
        assert max(v for _, v in thin) == max(losses)
        assert min(v for _, v in thin) == min(losses)


def test_thinning_again_and_again_stays_even():
    """A long run's beginning must not fade from the chart."""
    series = ()
    for step in range(20_000):
        series = (*series, (step, math.sin(step)))
        if len(series) > 200:
            series = thinned(series, 100)
    series = thinned(series, 100)
    first_half = sum(1 for step, _ in series if step < 10_000)
    assert 0.3 < first_half / len(series) < 0.7


def test_thinned_survives_a_step_that_stands_still():
    assert len(thinned([(5, float(v)) for v in range(50)], 10)) <= 10


def test_an_event_of_a_newer_version_is_skipped(tmp_path):
    with Journal(tmp_path) as writer:
        writer.append(note("a"))
        (tmp_path / EVENTS).open("ab").write(b'{"kind": "telepathy", "at": 1}\n')
        writer.append(Step(step=1, total=2, epoch=0.5, loss=None, lr=1e-4, steps_per_s=1.0,
                           eta_s=1.0))
    assert [event.kind for event in read(tmp_path)] == ["note", "step"]


STARTED = '{"kind": "started", "at": 1.7e9, "job": "train", "pid": 1, "config": {}}\n'
DAMAGED = {
    "run.json": ['[]', '5', '', '{"created": "yesterday", "name": 5, "cwd": null, "job": []}'],
    "worker.json": ['{"pid": "abc", "create_time": 1}', '{"pid": -5, "create_time": 1}',
                    '{"pid": 99999999999999999999999, "create_time": 1}', '[]',
                    '{"pid": THIS_PROCESS, "create_time": "x"}'],
    "config.yaml": ["output_dir: 5\n", "output_dir: [a]\n", "\0\0\0"],
    "events.jsonl": [
        '{"kind": "started", "at": 1, "job": "train", "pid": 1, "config": [1]}\n',
        STARTED + '{"kind": "step", "at": 1, "step": 1, "total": 2, "loss": "x"}\n',
        STARTED + f'{{"kind": "step", "at": 1, "step": 1, "total": 2, "loss": 1{"0" * 400}}}\n',
        STARTED + '{"kind": "note", "at": 1, "key": ["a"]}\n',
        STARTED + '{"kind": "ended", "at": 1, "state": ["x"], "result": "x"}\n',
        STARTED + '{"kind": "plan", "at": 1, "plan": {"parts": 5}}\n{"kind": "ended", "at": 1, '
                  '"state": "done", "result": {"lora": 5, "proof": 7, "seconds": "x"}}\n',
        "\0" * 500]}


@pytest.mark.parametrize(("file", "content"), [
    (file, content) for file, contents in DAMAGED.items() for content in contents],
    ids=[f"{file}-{n}" for file, contents in DAMAGED.items() for n in range(len(contents))])
def test_a_damaged_record_harms_no_other(file: str, content: str) -> None:
    """The list, the view and its summary are read as far as they can be."""
    from core.cli import progress
    from core.jobs.runs import create_run, list_runs, load_run
    fine, ill = (create_run("train", "base_model: demo\n", name) for name in ("fine", "ill"))
    (ill / file).write_text(content.replace("THIS_PROCESS", str(os.getpid())))
    assert {view.id for view in list_runs()} == {fine.name, ill.name}
    view = load_run(ill.name)
    progress.summary(view.result)
    (ill / "events.jsonl").unlink(missing_ok=True)
    (ill / "events.jsonl").mkdir()
    assert load_run(ill.name).id == ill.name


def test_a_huge_journal_is_read_in_blocks_and_without_most_steps(tmp_path, monkeypatch):
    """What happens once is never left out, nor the newest step; a chart has points enough."""
    events = []
    for step in range(1, 3001):
        events.append(Step(step=step, total=3000, epoch=0.5, loss=1 / step, lr=1e-4,
                           steps_per_s=1.0, eta_s=1.0,
                           validation=0.5 if step % 1000 == 500 else None))
        if step % 500 == 0:
            events.append(Checkpoint(step=step, path=f"{step}.safetensors"))
    (tmp_path / EVENTS).write_text("".join(to_line(event) + "\n" for event in events))
    size = (tmp_path / EVENTS).stat().st_size
    whole, offset = tail(tmp_path, 0)
    assert (whole, offset) == (events, size)
    monkeypatch.setattr(journal, "_DENSE", size // 10)
    monkeypatch.setattr(journal, "_BLOCK", size // 7)
    read_events, offset = tail(tmp_path, 0)
    assert offset == size
    assert [e for e in read_events if isinstance(e, Checkpoint)] == [
        e for e in events if isinstance(e, Checkpoint)]
    steps = [event for event in read_events if isinstance(event, Step)]
    assert 250 < len(steps) < 320
    assert [step.step for step in steps if step.validation] == [500, 1500, 2500]
    assert steps[-1].step == 3000
    # what comes later is read whole again, also a line longer than a block
    with (tmp_path / EVENTS).open("a") as file:
        file.write(to_line(Note(key="a", params={"x": "y" * size})) + "\n")
    assert [event.kind for event in tail(tmp_path, offset)[0]] == ["note"]
