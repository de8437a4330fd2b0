"""Pictures through a captioner: decoding and preparing in threads, a batch ahead of the model.

The threads take what the model leaves idle: Pillow decodes and resizes without Python's lock.
No torch here; a captioner that needs it brings it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
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
CONTEXT = "darkroom"                    # key in image.info of what `about` returns


def describe_all(captioner: Captioner, paths: Sequence[Path], batch_size: int,
                 on_result: OnResult, control: Control, on_fault: OnFault | None = None,
                 on_halved: Callable[[int], None] | None = None,
                 about: About | None = None) -> None:
    """Calls on_result with each picture's description, in the order of `paths`, in this thread.

    A picture that can't be read goes to on_fault (without one, its UserError is raised) and the
    others go on; so does a picture that the captioner refuses (`of_one_picture`, fault codes).
    `about` returns what is known of a picture, for prompts. If memory runs out, the batch is halved
    for the rest of the job and on_halved gets its size; raises
    UserError("captioner.out_of_memory") where one picture alone doesn't fit. A pause waits and a
    stop returns between batches; results before it are complete.
    """
    waiting: Waiting = deque()
    rest = iter(paths)
    describer = _Describer(captioner, on_result, on_fault, on_halved, control, batch_size)

    def prepare(path: Path) -> Any:
        image = images.open_picture(path)
        if about:
            # A captioner's `prepare` gets only the picture.
            image.info[CONTEXT] = about(path)
        return captioner.prepare(image)

    def refill() -> None:
        # One batch is prepared while the model works on the other.
        while len(waiting) < 2 * describer.batch_size and (path := next(rest, None)) is not None:
            waiting.append((path, pool.submit(prepare, path)))

    images.prepare()
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            while not control.stopping:
                control.wait_while_paused()
                refill()
                batch = _collect(waiting, describer.batch_size, on_fault)
                if not batch and not waiting:
                    return
                refill()
                describer.describe(batch)
        finally:
            for _, future in waiting:
                future.cancel()


def _collect(waiting: Waiting, size: int, on_fault: OnFault | None) -> list[tuple[Path, Any]]:
    """Up to `size` pictures that could be read; Ctrl+C and memory errors pass through."""
    batch: list[tuple[Path, Any]] = []
    while waiting and len(batch) < size:
        path, future = waiting.popleft()
        try:
            batch.append((path, future.result()))
        except UserError as fault:
            if on_fault is None:
                raise
            on_fault(path, fault)
    return batch


class _Describer:
    """Describes batches; where memory runs out, it halves the batch size for the rest of the job.

    Not core.dataset.batch_fallback: a stop, results and refused pictures are handled after each
    part here, not after the whole batch.
    """

    def __init__(self, captioner: Captioner, on_result: OnResult, on_fault: OnFault | None,
                 on_halved: Callable[[int], None] | None, control: Control,
                 batch_size: int) -> None:
        self.captioner, self.on_result, self.on_fault = captioner, on_result, on_fault
        self.on_halved, self.control = on_halved, control
        self.batch_size = max(1, batch_size)

    def describe(self, batch: Sequence[tuple[Path, Any]]) -> None:
        start = 0
        while start < len(batch) and not self.control.stopping:
            part = batch[start:start + self.batch_size]
            try:
                descriptions = self._try([picture for _, picture in part])
            except UserError as fault:
                if fault.code not in getattr(self.captioner, "of_one_picture", ()) or (
                        not self.on_fault):
                    raise
                if len(part) == 1:
                    self.on_fault(part[0][0], fault)
                # One of several was refused (a server's filter): the others succeed alone.
                for item in part if len(part) > 1 else ():
                    self.describe([item])
                start += len(part)
                continue
            if descriptions is None:
                # Here, as it imports torch.
                from core.weights.precision import free_memory
                free_memory()
                if len(part) <= 1:
                    raise UserError("captioner.out_of_memory", captioner=self.captioner.title)
                self.batch_size = len(part) // 2
                if self.on_halved:
                    self.on_halved(self.batch_size)
                continue
            for (path, _), description in zip(part, descriptions, strict=True):
                self.on_result(path, description)
            start += len(part)

    def _try(self, batch: Sequence[Any]) -> list[Description] | None:
        """Returns None where memory ran out.

        The error has to be gone before memory is freed: its frames hold the tensors.
        """
        try:
            return self.captioner.describe(batch)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return None
