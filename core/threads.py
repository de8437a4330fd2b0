"""Work in threads: results in order, only a few items ahead, so that memory stays flat."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

MOST_THREADS = 16
AHEAD = 8                       # items per thread


def in_order(call: Callable[[In], Out], items: Iterable[In], name: str,
             known: Callable[[In], Out | None] = lambda item: None) -> Generator[Out, None, None]:
    """call(item) of each item, computed in threads (Pillow and numpy leave the interpreter's
    lock); `known` is asked first, in the caller's thread. Closing the generator drops what
    hasn't begun."""
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    pool = ThreadPoolExecutor(threads, name)
    waiting: deque[Future[Out] | _Known[Out]] = deque()
    try:
        for item in items:
            found = known(item)
            waiting.append(_Known(found) if found is not None else pool.submit(call, item))
            if len(waiting) >= threads * AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Known(Generic[Out]):
    """A result that needs no thread; far cheaper than a Future."""

    value: Out

    def result(self) -> Out:
        return self.value
