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
KINDS = ("of_one_picture", "may_pass")
MOST_IN_ROW = 5                         # faults that may pass, before they end the job
CONTEXT = "darkroom"                    # key in image.info of what `about` returns


def describe_all(captioner: Captioner, paths: Sequence[Path], batch_size: int,
                 on_result: OnResult, control: Control, on_fault: OnFault | None = None,
                 on_halved: Callable[[int], None] | None = None,
                 about: About | None = None) -> None:
    """Calls on_result with each picture's description, in this thread: in the order of `paths`,
    but for captioners that answer by picture (`each`).

    A picture that can't be read goes to on_fault (without one, its UserError is raised) and the
    others go on; so does a picture that the captioner refuses (`of_one_picture`, fault codes), or
    where it fails in passing (`may_pass`), unless several do one after another.
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
        self.in_row = 0                 # faults that may pass, since the last description

    def describe(self, batch: Sequence[tuple[Path, Any]]) -> None:
        rest = list(batch)
        while rest and not self.control.stopping:
            part = rest[:self.batch_size]
            if self._try(part):
                rest = rest[len(part):]
                continue
            # Here, as it imports torch.
            from core.weights.precision import free_memory
            free_memory()
            if len(part) <= 1:
                raise UserError("captioner.out_of_memory", captioner=self.captioner.title)
            self.batch_size = len(part) // 2
            if self.on_halved:
                self.on_halved(self.batch_size)

    def _try(self, batch: Sequence[tuple[Path, Any]]) -> bool:
        """Returns False where memory ran out.

        The error has to be gone before memory is freed: its frames hold the tensors.
        """
        answers = each_of(self.captioner, [picture for _, picture in batch])
        while True:
            try:
                place, outcome = next(answers)
            except StopIteration:
                return True
            except UserError as fault:
                refused = fault
                break
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
                return False
            if isinstance(outcome, UserError):
                self._on_fault(batch[place][0], outcome)
            else:
                self.in_row = 0
                self.on_result(batch[place][0], outcome)
        if len(batch) == 1:
            self._on_fault(batch[0][0], refused)
            return True
        if not self._is_a_pictures(refused):
            raise refused
        # The whole batch was, for one of them: the others succeed alone.
        for item in batch:
            self.describe([item])
        return True

    def _is_a_pictures(self, fault: UserError) -> bool:
        return self.on_fault is not None and any(
            fault.code in getattr(self.captioner, kind, ()) for kind in KINDS)

    def _on_fault(self, path: Path, fault: UserError) -> None:
        """Raises it where it is the job's."""
        # Who stops a job breaks off what it waits for.
        if self.control.stopping:
            return
        if fault.code in getattr(self.captioner, "may_pass", ()):
            self.in_row += 1
        if self.on_fault is None or self.in_row >= MOST_IN_ROW or not self._is_a_pictures(fault):
            raise fault
        self.on_fault(path, fault)


def in_order(answers: Iterator[tuple[int, Description | UserError]]) -> list[Description]:
    """All answers of a batch by their places; raises the first fault."""
    outcomes = [outcome for _, outcome in sorted(answers, key=lambda answer: answer[0])]
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Description)]


def each_of(captioner: Captioner, batch: Sequence[Any]
            ) -> Iterator[tuple[int, Description | UserError]]:
    """The place of each picture in the batch and its description or fault, as they come."""
    each: Callable[[Sequence[Any]], Iterator[tuple[int, Description | UserError]]] | None
    each = getattr(captioner, "each", None)
    yield from each(batch) if each else zip(range(len(batch)), captioner.describe(batch),
                                            strict=True)
