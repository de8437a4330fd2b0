"""A run's folder: runs/<id>/ with events.jsonl (append-only, the truth), config.yaml, log.txt.

One process appends, any number read. A line counts once its line break is on disk, so that a
reader never sees half an event and a writer killed in mid-line costs that one line.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from core.jobs.events import Checkpoint, Event, Faulted, JobEnded, from_line, to_line

EVENTS = "events.jsonl"
CONFIG = "config.yaml"
LOG = "log.txt"

Point = tuple[float, float]                       # step, value
# What must survive a power cut. Syncing every step would cost more than some steps take.
_SYNCED = (Checkpoint, Faulted, JobEnded)
# Bytes of which every Step is read: about 8,000 of them, and a chart keeps 800.
_DENSE = 2**21
_BLOCK = 2**23                                    # bytes of a journal in memory at once
# a line of a Step that measured nothing beside its loss, as to_line writes it
_STEP, _NO_VALIDATION = '{"kind": "step"', '"validation": null}'
_ENDS = 2**14                                     # bytes at a journal's end that tell how it ended


def new_run_id(name: str) -> str:
    """'20260116-142530-123-my-style-x7k2': UTC, so that ids sort; plain ASCII in lower case, so
    that every file system keeps it as it is."""
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)) + f"-{int(now * 1000) % 1000:03d}"
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain)[:32].strip("-") or "run"
    return f"{stamp}-{slug}-{secrets.token_hex(2)}"


class Journal(AbstractContextManager["Journal"]):
    """Writes a run's events. Threads of the one writing process may share it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / EVENTS, "ab+", buffering=0)  # noqa: SIM115 - closed by close()
        self._torn = _ends_torn(self._file.fileno())
        self._lock = threading.Lock()

    def append(self, event: Event) -> None:
        with self._lock:
            # If writing fails on a full disk, half a line may be there.
            torn, self._torn = self._torn, True
            _write_line(self._file.fileno(), to_line(event), torn)
            self._torn = False
            if isinstance(event, _SYNCED):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: Path) -> list[Event]:
    return tail(folder, 0)[0]


def tail(folder: Path, offset: int) -> tuple[list[Event], int]:
    """Events from byte `offset` on, and the offset for the next call.

    Where very much was written since, only every n-th Step without a validation is read, and the
    last one of each block: a journal of 200 MB must not hold up a start.
    """
    path = folder / EVENTS
    news: list[Event] = []
    every = 0
    with contextlib.suppress(OSError):
        every = (path.stat().st_size - offset) // _DENSE
    while True:
        lines, offset = tail_lines(path, offset, _BLOCK)
        if every:
            steps = [number for number, line in enumerate(lines)
                     if line.startswith(_STEP) and line.endswith(_NO_VALIDATION)]
            unread = set(steps[:-1]) - set(steps[::every + 1])
            lines = [line for number, line in enumerate(lines) if number not in unread]
        if not lines:
            return news, offset
        news += [event for line in lines if (event := from_line(line)) is not None]


def ends(folder: Path) -> list[Event]:
    """The first event of a journal and its last few, which tell how a run began and ended."""
    try:
        with open(folder / EVENTS, "rb") as file:
            first, after = file.readline(_BLOCK), file.tell()
            size = file.seek(0, os.SEEK_END)
            file.seek(max(after, size - _ENDS))
            last = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return []
    # what is cut in two at the beginning is no event; of Steps the last one is enough
    steps = [line for line in last if line.startswith(_STEP)][-1:]
    lines = [first.decode("utf-8", "replace"), *steps,
             *(line for line in last[-8:] if not line.startswith(_STEP))]
    return [event for line in lines if (event := from_line(line))]


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file to which several processes may write."""
    with open(path, "ab+", buffering=0) as file:
        _write_line(file.fileno(), line, _ends_torn(file.fileno()))


def tail_lines(path: Path, offset: int, most: int = -1) -> tuple[list[str], int]:
    """Whole lines from byte `offset` on, and the next offset: of `most` bytes, or of all. What
    follows the last line break waits for the next call."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(most)
            if len(data) == most and b"\n" not in data:
                # one endless line of a damaged file
                data += file.read()
    except OSError:
        # not there yet, or no file at all
        return [], offset
    whole = data[:data.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace").split("\n")[:-1], offset + len(whole)


def thinned(series: Sequence[Point], most: int = 400) -> tuple[Point, ...]:
    """At most `most` points (4 or more) for a chart: the first, the last, and the lowest and
    highest of equal stretches of steps, so that thinning again and again keeps the shape."""
    if len(series) <= most:
        return tuple(series)
    start, end = series[0][0], series[-1][0]
    stretches = max(1, (most - 2) // 2)
    scale = stretches / (end - start) if end > start else 0.0
    lowest: dict[int, int] = {}
    highest: dict[int, int] = {}
    for index, (step, value) in enumerate(series):
        stretch = min(int((step - start) * scale), stretches - 1)
        if value < series[lowest.setdefault(stretch, index)][1]:
            lowest[stretch] = index
        if value > series[highest.setdefault(stretch, index)][1]:
            highest[stretch] = index
    kept = {0, len(series) - 1, *lowest.values(), *highest.values()}
    return tuple(series[index] for index in sorted(kept))


def _ends_torn(handle: int) -> bool:
    """Whether a writer died in mid-line: the next line must not be glued onto its rest."""
    size = os.lseek(handle, 0, os.SEEK_END)
    if size == 0:
        return False
    os.lseek(handle, size - 1, os.SEEK_SET)
    return os.read(handle, 1) != b"\n"


def _write_line(handle: int, line: str, torn: bool) -> None:
    # backslashreplace: a file name that is no valid text becomes a JSON escape and comes back
    data = (b"\n" if torn else b"") + line.encode("utf-8", "backslashreplace") + b"\n"
    # the system may take only a part at once
    while data:
        data = data[os.write(handle, data):]
