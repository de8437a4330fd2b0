"""Runs batches through an encoder that may not fit into memory.

First fewer items go in at once, then the caller's gentler ways are switched on, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from core.errors import UserError
from core.failures import ran_out
from core.jobs.events import Event, Note
from core.weights.precision import free_memory

# The key of the note that announces a gentler way, and the function that switches it on.
Way = tuple[str, Callable[[], object]]


class BatchFallback:
    """Calls `encode` with at most `at_once` items; what made it fit once stays."""

    def __init__(self, at_once: int, ways: Sequence[Way], emit: Callable[[Event], None]) -> None:
        self.at_once, self.ways, self.emit = at_once, list(ways), emit

    def __call__(self, encode: Callable[[Any], Sequence[Any]], items: Any) -> list[Any]:
        """Returns one row for each item. Raises UserError where not even a single item fits."""
        rows: list[Any] = []
        while len(rows) < len(items):
            batch = items[len(rows):len(rows) + self.at_once]
            try:
                rows += encode(batch)
                continue
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
            # Outside of `except`: the error's frames hold the tensors that are to be freed.
            free_memory()
            if len(batch) > 1:
                self.at_once = len(batch) // 2
                self.emit(Note(key="engine.cache_fewer", params={"count": self.at_once}))
            elif self.ways:
                key, switch = self.ways.pop(0)
                switch()
                self.emit(Note(key=key))
            else:
                raise UserError("engine.cache_too_big")
        return rows
