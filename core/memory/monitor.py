"""Watches a run's memory, heat and neighbours in a thread, so that a plan is lowered in time."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import psutil

from core.jobs.events import Event, Note
from core.system import gpu, machine
from core.system.gpu import GpuUser, Throttle

CALM_S = 60.0               # between two notes of a kind, and until a state counts as over
HOT_C, COOL_C = 87.0, 82.0  # laptops lower their clocks from about 87 °C on
NOTABLE = 256.0, 0.02       # MB, and share of the whole: others' growth that is worth a note
GREW_MB = 64.0              # less may be the driver's own
FULL = 0.03                 # free share of a card that spills
SLOWER = 3.0                # times; buckets of one run differ by less
STEPS = 5                   # in a median


@dataclass(frozen=True, slots=True)
class Reading:
    """Memory as it stands, in MB. None: not told this time."""

    free_mb: float | None = None
    ours_mb: float | None = None
    others_mb: float | None = None          # the driver's own share among it
    temperature_c: float | None = None
    throttled: tuple[Throttle, ...] = ()
    lost: bool = False
    total_mb: float | None = None
    others: tuple[GpuUser, ...] = ()        # other programs, as far as they are known


class Reader(Protocol):
    def read(self) -> Reading: ...
    def close(self) -> None: ...


class NvmlReader:
    """Reads a card.

    `card` is its UUID or NVML's number. `held` returns the MB that this process holds there, its
    CUDA context included. It is called only where NVML doesn't tell (Windows, containers); without
    it others' use, and so pressure, stays unknown there.
    """

    def __init__(self, card: str | int, held: Callable[[], float] | None = None) -> None:
        self.card, self.held = card, held
        self.reader = gpu.Reader().open()

    def read(self) -> Reading:
        state, others = self.reader.poll(self.card), None
        ours = self.held() if state.ours_mb is None and self.held is not None else state.ours_mb
        if ours is not None and state.total_mb is not None and state.free_mb is not None:
            others = max(0.0, state.total_mb - state.free_mb - ours)
        return Reading(
            free_mb=state.free_mb, ours_mb=ours, others_mb=others, total_mb=state.total_mb,
            temperature_c=state.temperature_c, throttled=state.throttled, lost=state.lost,
            others=tuple(user for user in state.users if not self.reader.is_ours(user.pid)))

    def close(self) -> None:
        self.reader.close()


class RamReader:
    """Reads the computer's memory, for training on the CPU.

    Ours is what this process holds for itself: pages of files that it maps count as available.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.process = psutil.Process(pid)

    def read(self) -> Reading:
        total, free = machine.ram()
        ours = machine.private_mb(self.process)
        return Reading(free_mb=free, ours_mb=ours, others_mb=max(0.0, total - free - ours),
                       total_mb=total)

    def close(self) -> None:
        pass


class Watch:
    """`with Watch(reader, plan.peak_mb, 512, emit) as watch:` around a run.

    The engine asks `pressure()` between updates and answers with `lowered()`. Notes go to `emit`
    from the watching thread, each kind at most once in 60 s and only when something changed.
    On leaving, the reader is closed.
    """

    def __init__(self, reader: Reader, planned_mb: float, headroom_mb: float,
                 emit: Callable[[Event], None], every_s: float = 1.0, *,
                 spills: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.reader, self.emit, self.every_s, self.clock = reader, emit, every_s, clock
        self.planned_mb, self.headroom_mb = planned_mb, headroom_mb
        self.spills = (isinstance(reader, NvmlReader) and (sys.platform == "win32"
                       or machine.is_wsl()) if spills is None else spills)
        self.reading = Reading()            # the newest
        self.peak_mb = 0.0                  # the most that we held
        self._held_mb = 0.0                 # the same since the run was lowered last
        # Free + ours - what we need, planned or held before.
        self.margin_mb: float | None = None
        # The first reading that knew others' use, and the last whose others' use was told.
        self._start: Reading | None = None
        self._reported: Reading | None = None
        # Armed: the next shortage counts. Pressed: it came, and `pressure` hasn't told it yet.
        self._armed, self._pressed = True, False
        # By key of a note: when it was emitted last, and, of what lasts, when it was last seen.
        self._emitted: dict[str, float] = {}
        self._active: dict[str, float] = {}
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._best: float | None = None     # s, median
        self._notes: list[Note] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll_until_closed, name="watch", daemon=True)

    def __enter__(self) -> Self:
        with contextlib.suppress(Exception):    # the run matters more than its watch
            self.poll()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=5)        # a lost card may keep the driver
        if not self._thread.is_alive():
            self.reader.close()

    def _poll_until_closed(self) -> None:
        while not self._closed.wait(self.every_s):
            with contextlib.suppress(Exception):
                self.poll()

    def poll(self) -> Reading:
        """Reads once, as the thread does, and emits what is worth a note."""
        reading = self.reader.read()
        with self._lock:
            self.reading = reading
            self.peak_mb = max(self.peak_mb, reading.ours_mb or 0.0)
            self._held_mb = max(self._held_mb, reading.ours_mb or 0.0)
            self._look_at_memory(reading)
            self._look_at_others(reading)
            self._look_at_health(reading)
            notes, self._notes = self._notes, []
        self._tell(notes)
        return reading

    # --- what the engine asks ---

    def pressure(self) -> bool:
        """True once when the margin is below the headroom since others took memory after the start,
        or since we hold more than was planned. Again after `lowered`, or after the margin was back
        and went."""
        with self._lock:
            pressed, self._pressed = self._pressed, False
            return pressed

    def lowered(self, planned_mb: float) -> None:
        """The engine now needs `planned_mb` at its peak."""
        with self._lock:
            self.planned_mb, self._armed, self._pressed = planned_mb, True, False
            self._held_mb = 0.0
            self._steps.clear()
            # Spilling may go on nevertheless, and is told again then.
            self._emitted.pop("watch.spilling", None)

    def spilling(self, step_s: float) -> bool:
        """Called with each step's seconds: True once when steps got several times slower while
        the card is full. Windows then moves memory of the card into RAM and reports no error."""
        with self._lock:
            self._steps.append(step_s)
            if len(self._steps) < STEPS:
                return False
            usual = statistics.median(self._steps)
            slow = self._best is not None and usual > SLOWER * self._best
            before, self._best = self._best, min(usual, self._best or usual)
            free, total = self.reading.free_mb, self.reading.total_mb
            full = free is not None and total is not None and free < FULL * total
            if not (slow and full and self.spills and "watch.spilling" not in self._emitted):
                return False
            self._note(Note(key="watch.spilling", params={
                "times": round(usual / (before or usual)), "free": round(free or 0)}))
            notes, self._notes = self._notes, []
        self._tell(notes)
        return True

    # --- looking ---

    def _look_at_memory(self, reading: Reading) -> None:
        if reading.free_mb is None or reading.ours_mb is None or reading.others_mb is None:
            return
        self._start = start = self._start or reading
        needs = max(self.planned_mb, self._held_mb)
        self.margin_mb = reading.free_mb + reading.ours_mb - needs
        grown = reading.others_mb - (start.others_mb or 0.0)
        if self.margin_mb >= self.headroom_mb:
            if "pressure" in self._active and self._note(Note(key="watch.margin_back", params={
                    "margin": round(self.margin_mb)})):
                del self._active["pressure"]
            self._armed, self._pressed = True, False
        elif self._armed and (grown > GREW_MB or needs > self.planned_mb):
            self._armed, self._pressed = False, True
            self._active["pressure"] = self.clock()
            params = {"margin": round(self.margin_mb), "headroom": round(self.headroom_mb)}
            self._note(Note(key="watch.pressure", params={"taken": round(grown), **params})
                       if grown > GREW_MB else Note(key="watch.more_than_planned", params={
                           "held": round(needs), "planned": round(self.planned_mb), **params}))

    def _look_at_others(self, reading: Reading) -> None:
        """Others' use is measured from what was reported last; what they gave back is no note."""
        if reading.others_mb is None or reading.free_mb is None:
            return
        self._reported = before = self._reported or reading
        notable = max(NOTABLE[0], NOTABLE[1] * (reading.total_mb or 0.0))
        grown = reading.others_mb - (before.others_mb or 0.0)
        if grown <= -notable:
            self._reported = reading
        elif grown >= notable:
            # The programs that grew most, as far as the driver tells: 'game.exe, python'.
            had = {user.pid: user.used_mb or 0.0 for user in before.others}
            growth = {user.pid: (user.used_mb or 0.0) - had.get(user.pid, 0.0)
                      for user in reading.others}
            names: dict[str, None] = {}
            for pid in sorted(growth, key=lambda pid: -growth[pid])[:3]:
                with contextlib.suppress(psutil.Error, ValueError):     # it has ended meanwhile
                    names |= {psutil.Process(pid).name(): None} if growth[pid] > 0 else {}
            who = ", ".join(filter(None, names))
            params = {"taken": round(grown), "free": round(reading.free_mb)}
            if self._note(Note(key="watch.others_named", params=params | {"who": who}) if who
                          else Note(key="watch.others", params=params)):
                self._reported = reading

    def _look_at_health(self, reading: Reading) -> None:
        degrees = reading.temperature_c or 0.0
        limit = COOL_C if "watch.hot" in self._active else HOT_C
        self._while(Note(key="watch.hot", params={"degrees": round(degrees)}), degrees >= limit)
        self._while(Note(key="watch.lost"), reading.lost)
        self._while(Note(key="watch.throttled_thermal"), "thermal" in reading.throttled)
        self._while(Note(key="watch.throttled_hardware"), "hw_slowdown" in reading.throttled)
        # The power limit is usual at full load: told once a run.
        power = Note(key="watch.throttled_power")
        self._while(power, "power" in reading.throttled or power.key in self._emitted)

    def _while(self, note: Note, is_so: bool) -> None:
        """Notes a state when it begins; it has ended once it was away for a while."""
        now = self.clock()
        if is_so:
            if note.key in self._active or self._note(note):
                self._active[note.key] = now
        elif now - self._active.get(note.key, now) >= CALM_S:
            del self._active[note.key]

    def _note(self, note: Note) -> bool:
        """Keeps a note for `_tell`, unless one of its kind was emitted a moment ago."""
        now = self.clock()
        if now - self._emitted.get(note.key, -CALM_S) < CALM_S:
            return False
        self._emitted[note.key] = now
        self._notes.append(note)
        return True

    def _tell(self, notes: list[Note]) -> None:
        """Emits notes; called outside the lock, since listeners may ask this object."""
        for note in notes:
            with contextlib.suppress(OSError):
                self.emit(note)
