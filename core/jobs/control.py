"""Requests to a running job: stop, pause, go, sample, save. Safe to call from any thread."""

from __future__ import annotations

import threading
import time
from typing import Literal

Request = Literal["stop", "pause", "go", "sample", "save"]


class Control:
    """Requests of a window, a signal handler or a file, which the job polls. A stop can't
    be taken back, and ends a pause."""

    def __init__(self) -> None:
        # reentrant: a signal handler may ask while ask() runs
        self._lock = threading.RLock()
        self._once: set[Request] = set()
        self._stopping = False
        self._paused = False

    def ask(self, request: Request) -> None:
        with self._lock:
            match request:
                case "stop":
                    self._stopping, self._paused = True, False
                case "pause":
                    self._paused = not self._stopping
                case "go":
                    self._paused = False
                case _:
                    self._once.add(request)

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def paused(self) -> bool:
        return self._paused

    def take(self, request: Request) -> bool:
        """True once for each `sample` or `save` that was asked for."""
        with self._lock:
            requested = request in self._once
            self._once.discard(request)
            return requested

    def wait_while_paused(self, poll_s: float = 0.1) -> None:
        while self._paused:
            time.sleep(poll_s)
