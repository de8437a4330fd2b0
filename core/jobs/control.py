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
        self.stopping = False
        self.paused = False

    def ask(self, request: Request) -> None:
        with self._lock:
            match request:
                case "stop":
                    self.stopping, self.paused = True, False
                case "pause":
                    self.paused = not self.stopping
                case "go":
                    self.paused = False
                case _:
                    self._once.add(request)

    def take(self, request: Request) -> bool:
        """True once for each `sample` or `save` that was asked for."""
        with self._lock:
            requested = request in self._once
            self._once.discard(request)
            return requested

    def wait_while_paused(self, poll_s: float = 0.1) -> None:
        while self.paused:
            time.sleep(poll_s)
