"""Batches through an encoder that may not fit: fewer at once, then gentler ways, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from core.errors import UserError
from core.failures import ran_out
from core.jobs.events import Event, Note
from core.weights.precision import free_memory

Way = tuple[str, Callable[[], object]]          # the key of its note, and what switches it on


class BatchFallback:
    """Calls `encode` with at most `at_once` items; what made it fit once stays."""

    def __init__(self, at_once: int, ways: Sequence[Way], emit: Callable[[Event], None]) -> None:
        self.at_once, self.ways, self.emit = at_once, list(ways), emit

    def __call__(self, encode: Callable[[Any], Sequence[Any]], items: Any) -> list[Any]:
        """-> a row for each item. Raises UserError where one alone doesn't fit in any way."""
        rows: list[Any] = []
        while len(rows) < len(items):
            part = items[len(rows):len(rows) + self.at_once]
            made = self._try(encode, part)
            if made is None:
                self.lr_scale(len(part))
            else:
                rows += made
        return rows

    def _try(self, encode: Callable[[Any], Sequence[Any]], part: Any) -> Sequence[Any] | None:
        """None where memory ran out; the error and its frames are gone when this returns."""
        try:
            return encode(part)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return None

    def lr_scale(self, tried: int) -> None:
        free_memory()
        if tried > 1:
            self.at_once = tried // 2
            self.emit(Note(key="engine.cache_fewer", params={"count": self.at_once}))
        elif self.ways:
            key, switch = self.ways.pop(0)
            switch()
            self.emit(Note(key=key))
        else:
            raise UserError("engine.cache_too_big")
