"""Pictures through a captioner: decoding and preparing in threads, a batch ahead of the model.

The threads take what the model leaves idle: Pillow decodes and resizes without Python's lock.
No torch here; a captioner that needs it brings it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from captioner.base import Captioner, Description
from core.dataset import images
from core.errors import UserError
from core.failures import ran_out
from core.jobs.control import Control

OnResult = Callable[[Path, Description], None]
OnFault = Callable[[Path, UserError], None]
About = Callable[[Path], dict[str, str]]
Waiting = deque[tuple[Path, Future[Any]]]
MOST_THREADS = 8
CONTEXT = "darkroom"                    # key in image.info of what `about` tells


def describe_all(captioner: Captioner, paths: Sequence[Path], batch_size: int,
                 on_result: OnResult, control: Control, on_fault: OnFault | None = None,
                 on_halved: Callable[[int], None] | None = None,
                 about: About | None = None) -> None:
    """Tells on_result each picture's description, in the order of `paths`, from this thread.

    A picture that can't be read goes to on_fault (without one, its UserError is raised) and the
    others go on; so does one that the captioner refuses (`of_one_picture`, fault codes). `about`
    tells what is known of a picture, for prompts. Out of memory halves the batch for
    the rest of the job, told to on_halved; UserError("captioner.out_of_memory") where one picture
    alone doesn't fit. Between batches a pause waits and a stop returns; what was told before is
    whole.
    """
    images.prepare()
    run = _Run(captioner, on_result, on_fault, on_halved, batch_size)
    with ThreadPoolExecutor(max_workers=_threads(), thread_name_prefix="decode") as pool:
        waiting: Waiting = deque()
        rest = iter(paths)
        try:
            while not control.stopping:
                control.wait_while_paused()
                _refill(pool, captioner, waiting, rest, 2 * run.size, about)
                batch = list(_collect(waiting, run.size, on_fault))
                if not batch and not waiting:
                    return
                _refill(pool, captioner, waiting, rest, 2 * run.size, about)
                run.tell(batch, control)
        finally:
            for _, future in waiting:
                future.cancel()


def _threads() -> int:
    return min(MOST_THREADS, os.cpu_count() or 1)


def _refill(pool: ThreadPoolExecutor, captioner: Captioner, waiting: Waiting,
            rest: Iterator[Path], ahead: int, about: About | None) -> None:
    while len(waiting) < ahead and (path := next(rest, None)) is not None:
        waiting.append((path, pool.submit(_prepared, captioner, path, about)))


def _prepared(captioner: Captioner, path: Path, about: About | None) -> Any:
    image = images.open_picture(path)
    if about:
        image.info[CONTEXT] = about(path)
    return captioner.prepare(image)


def _collect(waiting: Waiting, size: int, on_fault: OnFault | None) -> Iterator[tuple[Path, Any]]:
    """Up to `size` pictures that could be read; Ctrl+C and memory errors pass through."""
    found = 0
    while waiting and found < size:
        path, future = waiting.popleft()
        try:
            picture = future.result()
        except UserError as fault:
            if on_fault is None:
                raise
            on_fault(path, fault)
            continue
        found += 1
        yield path, picture


class _Run:
    """The batch size that fits, found by halving."""

    def __init__(self, captioner: Captioner, on_result: OnResult, on_fault: OnFault | None,
                 on_halved: Callable[[int], None] | None, size: int) -> None:
        self.captioner, self.on_result, self.on_halved = captioner, on_result, on_halved
        self.on_fault = on_fault
        self.size = max(1, size)

    def tell(self, batch: Sequence[tuple[Path, Any]], control: Control) -> None:
        start = 0
        while start < len(batch) and not control.stopping:
            part = batch[start:start + self.size]
            try:
                described = self._try([picture for _, picture in part])
            except UserError as fault:
                self._refused(part, fault, control)
                start += len(part)
                continue
            if described is None:
                self._halve(len(part))
                continue
            for (path, _), description in zip(part, described, strict=True):
                self.on_result(path, description)
            start += len(part)

    def _refused(self, part: Sequence[tuple[Path, Any]], fault: UserError,
                 control: Control) -> None:
        """A captioner that refuses one picture (a server's filter) describes the others alone."""
        if fault.code not in getattr(self.captioner, "of_one_picture", ()) or not self.on_fault:
            raise fault
        if len(part) == 1:
            self.on_fault(part[0][0], fault)
            return
        for one in part:
            self.tell([one], control)

    def _try(self, batch: Sequence[Any]) -> list[Description] | None:
        """None where memory ran out; the error and its frames are gone when this returns."""
        try:
            return self.captioner.describe(batch)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return None

    def _halve(self, tried: int) -> None:
        _free_memory()
        if tried <= 1:
            raise UserError("captioner.out_of_memory", captioner=self.captioner.spec.title)
        self.size = max(1, tried // 2)
        if self.on_halved:
            self.on_halved(self.size)


def _free_memory() -> None:
    from core.weights.precision import free_memory
    free_memory()
