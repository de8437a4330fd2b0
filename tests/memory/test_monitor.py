"""The watch over a run: real threads and real pynvml on the stub's changing cards, real memory
taken by a real child process; rules of its notes on readings made up."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import i18n, paths
from core.jobs.events import Note
from core.memory import monitor
from core.memory.monitor import NvmlReader, RamReader, Reading, Watch
from core.system import machine
from tests import nvml_stub
from tests.nvml_stub import Card, Fail, Process

CARD = Card.of(8)
US = Process(os.getpid(), 2000)
CALM = Reading(free_mb=4000, ours_mb=2000, others_mb=2000, total_mb=8000, temperature_c=50)


class Faked:
    """A reader whose next reading is set by the test; `now` is its clock."""

    def __init__(self, reading: Reading = CALM, now: float = 0.0) -> None:
        self.reading, self.now, self.closed = reading, now, False

    def read(self) -> Reading:
        return self.reading

    def close(self) -> None:
        self.closed = True


class Desk:
    """A watch without its thread, and what it told."""

    def __init__(self, planned_mb: float = 5000, headroom_mb: float = 500, **more: Any) -> None:
        self.reader = Faked()
        self.notes: list[Note] = []
        self.watch = Watch(self.reader, planned_mb, headroom_mb,
                           self.notes.append,  # type: ignore[arg-type]
                           clock=lambda: self.reader.now, **more)
        self.see()

    def see(self, after: float = 1.0, **changes: Any) -> list[str]:
        """Keys of the notes that this reading brings."""
        self.reader.now += after
        self.reader.reading = replace(self.reader.reading, **changes)
        count = len(self.notes)
        self.watch.poll()
        return [note.key.removeprefix("watch.") for note in self.notes[count:]]


def until(there: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if there():
            return True
        time.sleep(0.01)
    return False


# --- a real thread, real pynvml, a card that changes ---

def test_a_run_on_a_card() -> None:
    notes: list[Note] = []
    keys: Callable[[], set[str]] = lambda: {note.key for note in notes}  # noqa: E731
    with nvml_stub.loaded([replace(CARD, processes=(US,))]) as stub:
        reader = NvmlReader(CARD.uuid)
        with Watch(reader, 5000, 500, notes.append, every_s=0.02) as run:   # type: ignore[arg-type]
            assert run.reading == Reading(5888, 2000, 300, 45, (), False, 8188)
            assert run.margin_mb == 2888
            assert not run.pressure()

            stranger = Process(os.getppid(), 2500)
            stub.write([replace(CARD, processes=(US, stranger), temperature=91, reasons=0x20)])
            assert until(run.pressure)
            assert not run.pressure()
            assert until(lambda: {"watch.pressure", "watch.hot", "watch.throttled_thermal",
                                  "watch.others_named"} <= keys())
            taken = next(note for note in notes if note.key == "watch.others_named")
            assert taken.params["taken"] == 2500
            assert taken.params["who"]

            run.lowered(4000)           # fits: 8188 - 300 - 2500 - 4000 = 1388
            assert until(lambda: "watch.margin_back" in keys())
            assert not run.pressure()
            stub.write([replace(CARD, processes=(replace(US, mb=3500), stranger))])
            assert until(lambda: run.peak_mb == 3500)
            assert run.margin_mb == 1388

            stub.write([CARD], Fail("nvmlDeviceGetMemoryInfo", 15))
            assert until(lambda: "watch.lost" in keys())
            assert run.reading == Reading(lost=True)
            stub.write([replace(CARD, processes=(US,))])
            assert until(lambda: run.reading.free_mb == 5888)
        assert "watch" not in {thread.name for thread in threading.enumerate()}
        assert reader.reader.poll(0).free_mb is None        # closed
    for note in notes:
        for lang in i18n.LANGUAGES:
            assert "{" not in i18n.tr(note.key, note.params, lang)


def test_what_we_hold_comes_from_the_engine_where_nvml_is_silent() -> None:
    silent = replace(CARD, free_mb=5000, processes=(Process(os.getpid(), None),))
    with nvml_stub.loaded([silent]) as stub:
        with contextlib.closing(NvmlReader(0)) as reader:
            assert reader.read() == Reading(5000, None, None, 45, (), False, 8188)
            assert Watch(reader, 9000, 500, lambda _: None).poll().others_mb is None
        with contextlib.closing(NvmlReader(0, held=lambda: 1500.0)) as reader:
            reading = reader.read()
            assert (reading.ours_mb, reading.others_mb) == (1500, 8188 - 5000 - 1500)
            stub.write([replace(CARD, processes=(US,))])
            assert reader.read().ours_mb == 2000


def test_growth_of_our_own_is_no_pressure() -> None:
    """Also beyond the plan, as long as there is room."""
    notes: list[Note] = []
    with (nvml_stub.loaded([replace(CARD, processes=(US,))]) as stub,
          contextlib.closing(NvmlReader(0)) as reader):
        run = Watch(reader, 7000, 500, notes.append)            # type: ignore[arg-type]
        for mb in (2000, 4000, 6000, 7300):
            stub.write([replace(CARD, processes=(replace(US, mb=mb),))])
            run.poll()
            assert not run.pressure()
    assert not notes
    assert run.peak_mb == 7300


def test_cost_of_watching_a_card() -> None:
    """At most 0.1 % of a core at one look a second: 1 ms."""
    strangers = tuple(Process(pid, 10, kind) for pid in range(1, 9) for kind in "CG")
    with (nvml_stub.loaded([replace(CARD, processes=(US, *strangers))]),
          contextlib.closing(NvmlReader(CARD.uuid)) as reader):
        run = Watch(reader, 5000, 500, lambda _: None)
        assert seconds_each(run.poll) < 1e-3
    assert seconds_each(Watch(RamReader(), 5000, 500, lambda _: None).poll) < 1e-3


def seconds_each(look: Callable[[], object], count: int = 200) -> float:
    look()
    began = time.thread_time()
    for _ in range(count):
        look()
    return (time.thread_time() - began) / count


# --- the computer's memory ---

@contextlib.contextmanager
def taking(mb: int) -> Iterator[subprocess.Popen[bytes]]:
    """A child that holds so much memory, once it has said so."""
    code = (f"import sys; held = b'x' * ({mb} << 20); print('held', flush=True); "
            "sys.stdin.readline()")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == b"held"
        yield child
    finally:
        child.communicate(b"\n")


def test_memory_of_a_child() -> None:
    with taking(300) as child:
        reading = RamReader(child.pid).read()
        assert reading.ours_mb == pytest.approx(305, abs=15)
        assert RamReader().read().total_mb == machine.ram()[0]


def test_another_program_takes_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer of 8 GB on which only this process and its children run."""
    us = psutil.Process()

    def ram() -> tuple[float, float]:
        held = 0
        for process in (us, *us.children()):
            with contextlib.suppress(psutil.Error):
                told = process.memory_info()
                held += told.rss - getattr(told, "shared", 0)
        return 8192.0, 8192.0 - held / machine.MB
    monkeypatch.setattr(machine, "ram", ram)
    notes: list[Note] = []
    with Watch(RamReader(), 7442, 500, notes.append,    # type: ignore[arg-type]
               every_s=0.02) as run:    # a margin of 750 MB of which 500 must stay
        assert run.margin_mb == pytest.approx(750, abs=5)
        with taking(400):
            assert until(run.pressure)
            assert until(lambda: {"watch.others", "watch.pressure"} <= {n.key for n in notes})
            assert until(lambda: run.margin_mb == pytest.approx(345, abs=15))
        assert until(lambda: run.margin_mb is not None and run.margin_mb > 740)
    taken = [note.params["taken"] for note in notes if note.key == "watch.others"]
    assert len(taken) == 1              # told while it grows, or when it has grown
    assert 256 <= taken[0] <= 420
    assert run.peak_mb > 20


# --- rules of pressure and notes ---

def test_pressure_comes_once_and_again_after_the_plan_was_lowered() -> None:
    desk = Desk()
    assert desk.watch.margin_mb == 1000
    assert desk.see(free_mb=3300, others_mb=2700) == ["pressure", "others"]
    assert [desk.watch.pressure() for _ in range(3)] == [True, False, False]
    desk.see(free_mb=3000, others_mb=3000)
    assert not desk.watch.pressure()
    desk.watch.lowered(4800)            # not enough yet
    desk.see()
    assert desk.watch.pressure()
    desk.watch.lowered(4000)
    desk.see()
    assert not desk.watch.pressure()


def test_a_margin_that_is_back_needs_no_lower_plan() -> None:
    desk = Desk()
    desk.see(free_mb=3300, others_mb=2700)
    assert desk.see(free_mb=4000, others_mb=2000) == ["margin_back"]
    assert not desk.watch.pressure()
    assert desk.see(61, free_mb=3300, others_mb=2700) == ["pressure", "others"]
    assert desk.watch.pressure()


def test_a_plan_too_large_from_the_start_is_not_others_fault() -> None:
    desk = Desk(planned_mb=7000)
    desk.see(free_mb=3950, others_mb=2050)
    assert not desk.watch.pressure()


@given(st.lists(st.tuples(st.floats(0, 6000), st.floats(0, 6000), st.booleans()), max_size=30))
def test_pressure_only_where_the_margin_is_gone(sampler: list[tuple[float, float, bool]]) -> None:
    desk = Desk()
    lately = True                       # armed
    held = desk.reader.reading.ours_mb or 0.0       # the most since the run was lowered
    for ours, others, lower in sampler:
        others, held = min(others, 8000 - ours), max(held, ours)
        desk.see(ours_mb=ours, others_mb=others, free_mb=8000 - ours - others)
        planned = desk.watch.planned_mb
        short = 8000 - others - max(planned, held) < 500 - 1e-6
        pressed = desk.watch.pressure()
        if pressed:
            assert short
            assert others > 2000 or held > planned
            assert lately
        elif short and lately:
            assert others <= 2000 + monitor.GREW_MB + 1e-6
            assert held <= planned
        lately = (lately and not pressed) or not short
        if lower:
            desk.watch.lowered(desk.watch.planned_mb * 0.9)
            lately, held = True, 0.0


def test_notes_on_change_and_at_most_once_a_minute() -> None:
    desk = Desk()
    assert desk.see(temperature_c=90) == ["hot"]
    assert [desk.see(1) for _ in range(200)] == [[]] * 200      # still hot: no news
    desk.see(temperature_c=60)
    assert desk.see(5, temperature_c=90) == []                  # away for a moment only
    desk.see(temperature_c=60)
    desk.see(60)
    assert desk.see(temperature_c=84) == []
    assert desk.see(temperature_c=90) == ["hot"]
    assert desk.see(throttled=("thermal", "power", "hw_slowdown")) == [
        "throttled_thermal", "throttled_hardware", "throttled_power"]
    desk.see(throttled=())
    desk.see(100)
    assert desk.see(throttled=("thermal", "power")) == ["throttled_thermal"]    # power: once


def test_others_are_told_by_what_they_took_since_the_last_note() -> None:
    desk = Desk(planned_mb=100)
    assert desk.see(others_mb=2200) == []
    assert desk.see(others_mb=2300) == ["others"]
    assert desk.see(others_mb=2900) == []                       # within the minute: later
    assert desk.see(60) == ["others"]
    assert [note.params["taken"] for note in desk.notes] == [300, 600]
    assert desk.see(60, others_mb=1000) == []
    assert desk.see(60, others_mb=1400) == ["others"]


@given(st.lists(st.builds(
    Reading, free_mb=st.none() | st.floats(0, 8000), ours_mb=st.none() | st.floats(0, 8000),
    others_mb=st.none() | st.floats(0, 8000), temperature_c=st.none() | st.floats(-5, 120),
    throttled=st.lists(st.sampled_from(("thermal", "power", "hw_slowdown"))).map(tuple),
    lost=st.booleans(), total_mb=st.none() | st.just(8000.0)), max_size=40),
    st.floats(0.1, 30))
def test_any_course_keeps_a_minute_between_like_notes(sampler: list[Reading],
                                                      every: float) -> None:
    desk = Desk()
    said: dict[str, float] = {}
    for reading in sampler:
        desk.reader.reading = reading
        for key in desk.see(every):
            assert desk.reader.now - said.get(key, -60.0) >= 60 - 1e-6
            said[key] = desk.reader.now


def test_a_reader_or_listener_that_fails_does_not_end_the_watch() -> None:
    class Failing(Faked):
        looks = 0

        def read(self) -> Reading:
            self.looks += 1
            if self.looks in (1, 3):
                raise RuntimeError("driver")
            return replace(CALM, temperature_c=95)

    def full(_: object) -> None:
        raise OSError("disk full")
    reader = Failing()
    with Watch(reader, 5000, 500, full, every_s=0.01) as run:
        assert until(lambda: reader.looks > 6)
        assert run.reading.temperature_c == 95
    assert reader.closed


# --- memory that spills into RAM ---

def test_spilling_is_told_once() -> None:
    desk = Desk(spills=True)
    assert not any(desk.watch.spilling(step) for step in [9.0, *[1.0] * 20, *[5.0] * 9])
    desk.see(free_mb=100)
    told = [desk.watch.spilling(5.0) for _ in range(5)]
    assert told == [True, False, False, False, False]
    assert [(note.key, note.params["times"]) for note in desk.notes] == [("watch.spilling", 5)]


@pytest.mark.parametrize(("spills", "free", "steps"), [
    (False, 100, [1.0] * 9 + [9.0] * 9),        # a system that doesn't spill
    (True, 900, [1.0] * 9 + [9.0] * 9),         # the card isn't full
    (True, 100, [1.0, 1.0, 9.0, 1.0] * 9),      # single slow steps: previews, checkpoints
    (True, 100, [1.0] * 9 + [2.5] * 9),         # a larger bucket
    (True, 100, [9.0] * 9 + [1.0] * 9)])
def test_no_false_alarm_of_spilling(spills: bool, free: float, steps: list[float]) -> None:
    desk = Desk(spills=spills)
    desk.see(free_mb=free)
    assert not any(map(desk.watch.spilling, steps))


def test_every_note_has_its_words() -> None:
    for key in i18n.catalogue("en"):
        if key.startswith("watch."):
            with open(monitor.__file__, encoding="utf-8") as file:
                assert f'"{key}"' in file.read(), key


def test_more_held_than_planned_is_pressure_too() -> None:
    """Nobody else took anything: the plan was too low, and memory runs out."""
    desk = Desk(planned_mb=2500, headroom_mb=500)
    assert desk.see(ours_mb=3500, free_mb=2500) == []   # more, but there is room
    assert desk.watch.margin_mb == 2500
    assert desk.see(ours_mb=5700, free_mb=300) == ["more_than_planned"]
    assert desk.notes[-1].params == {"held": 5700, "planned": 2500, "margin": 300, "headroom": 500}
    assert desk.watch.pressure()
    assert not desk.watch.pressure()
    assert desk.see(ours_mb=4000, free_mb=2000) == []           # a peak comes again: still needed
    assert desk.watch.margin_mb == 300
    desk.watch.lowered(2000)
    assert desk.see(after=100, ours_mb=3000, free_mb=3000) == ["margin_back"]
    assert desk.watch.margin_mb == 3000
    assert not desk.watch.pressure()


def test_pages_of_mapped_files_are_not_held(tmp_path: Any) -> None:
    """150 MB of a file that is read through a map are resident, and nobody's own; an array is."""
    big = tmp_path / "weights"
    big.write_bytes(os.urandom(1) * (150 * machine.MB))
    code = (
        "import mmap, sys, psutil; from core.system import machine\n"
        "def told(): return machine.private_mb(), psutil.Process().memory_info().rss / 2**20\n"
        f"file = open({str(big)!r}, 'rb')\nbefore = told()\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "total = sum(mapped[i] for i in range(0, len(mapped), 4096))\nread = told()\n"
        "own = bytearray(150 * 2**20)\nown[::4096] = b'x' * len(own[::4096])\nheld = told()\n"
        "print(*(round(b - a) for a, b in zip(before, read)), round(held[0] - read[0]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True,
                          text=True, check=True)
    private, resident, own = map(int, done.stdout.split())
    assert private < 15
    assert own > 140
    if sys.platform == "linux":
        assert resident > 140
