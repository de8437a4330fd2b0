"""The user's own callbacks: they are called with a run's events, and may ask it for something.

A callback is a function of one event (core/jobs/events.py), or a class whose object is one. It may
return a request: stop, pause, save, sample. A method `after_update(trainer, done)` is called with
the trainer itself after every update.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, get_args

from core import plugins
from core.errors import UserError
from core.jobs.control import Control, Request
from core.jobs.events import Event, JobEnded
from core.plugins import Extension

if TYPE_CHECKING:
    from core.training.trainer import Trainer


class Callbacks:
    """`with Callbacks(...) as emit:` around a run; it ends with a JobEnded. Events of other threads
    wait for the next event of the run's own thread, so that callbacks need no locks."""

    def __init__(self, names: list[str], emit: Callable[[Event], None], control: Control) -> None:
        self.emit, self.control, self.state = emit, control, "done"
        self.heard: list[tuple[Extension, Any]] = [
            (extension, extension() if inspect.isclass(extension.found) else extension.found)
            for extension in [plugins.load(name, "callbacks") for name in names]]
        self._waiting: deque[Event] = deque()
        self._thread = threading.get_ident()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            while self._waiting:
                self._tell(self._waiting.popleft())
            self._tell(JobEnded(state="stopped" if self.control.stopping else self.state))
            return
        # The run's own failure is the one to tell, not a callback's.
        with contextlib.suppress(UserError):
            self._tell(JobEnded(state="failed"))

    def __call__(self, event: Event) -> None:
        self.emit(event)
        if not self.heard:
            return
        self._waiting.append(event)
        while self._waiting and threading.get_ident() == self._thread:
            self._tell(self._waiting.popleft())

    def after_update(self, trainer: Trainer, done: int) -> None:
        """Hands the trainer to the callbacks that want it."""
        for extension, callback in self.heard:
            if hasattr(callback, "after_update"):
                self._call(extension, callback.after_update, trainer, done)

    def _tell(self, event: Event) -> None:
        for extension, callback in self.heard:
            self._call(extension, callback, event)

    def _call(self, extension: Extension, function: Callable[..., Any], *args: Any) -> None:
        try:
            answer = extension.run(function, *args)
            if answer is None:
                return
            if answer not in get_args(Request):
                raise extension.wrong(f"None, {', '.join(get_args(Request))}", answer)
        except UserError:
            # The JobEnded that follows is not for a callback that has failed.
            self.heard = []
            raise
        self.control.ask(answer)
