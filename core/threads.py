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
    """Yields call(item) for each item in order, computed in threads (Pillow and numpy release the
    GIL). `known` is asked first, in the caller's thread, for a result that is at hand. Closing the
    generator drops calls that have not begun."""
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    pool = ThreadPoolExecutor(threads, name)
    waiting: deque[Future[Out] | _Known[Out]] = deque()
    try:
        for item in items:
            result = known(item)
            waiting.append(_Known(result) if result is not None else pool.submit(call, item))
            # results that nobody has taken fill memory
            if len(waiting) >= threads * AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Known(Generic[Out]):
    """A finished result in place of a Future, which would cost far more."""

    value: Out

    def result(self) -> Out:
        return self.value
