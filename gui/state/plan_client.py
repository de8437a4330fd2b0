"""Plans and suggestions from a child process, which alone imports torch: the window never waits.

The newest question wins; an answer is a plain dict (core/memory/service.py) that the next paint
shows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.system import processes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanState:
    """The last answers and what they answer."""

    asked: dict[str, Any] = field(default_factory=dict)     # the question that is under way
    question: dict[str, Any] = field(default_factory=dict)  # the one that `answer` answers
    answer: dict[str, Any] = field(default_factory=dict)    # {"plan", "suggestion", "fault", ...}
    # what would mend a run, by the key that it was asked under; None: not known yet
    remedies: dict[str, list[dict[str, Any]] | None] = field(default_factory=dict)

    @property
    def pending(self) -> bool:
        return self.asked != self.question


class Planning:
    """One thread, one child. `ask` returns at once; the plan comes before the suggestion, which
    weighs many plans."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self.version = 0
        self._command = command
        self._child: subprocess.Popen[str] | None = None
        self._forecast = PlanState()
        self._mending: list[tuple[str, dict[str, Any]]] = []    # symptoms to be answered
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="planning", daemon=True)
        self._thread.start()

    @property
    def now(self) -> PlanState:
        return self._forecast

    def ask(self, question: dict[str, Any]) -> None:
        with self._changed:
            if question != self._forecast.asked:
                self._set(question, self._forecast.question, self._forecast.answer)

    def remedy(self, key: str, question: dict[str, Any]) -> None:
        """Asks once what helps against the question's "symptom"; see Forecast.remedies."""
        with self._changed:
            if key not in self._forecast.remedies:
                self._mending.append((key, question))
                self._mended(key, None)

    def wait(self, seconds: float) -> PlanState:
        """The forecast once nothing is pending, or as it stands after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._forecast.pending, seconds)
            return self._forecast

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            child = self._child
        if child:
            child.kill()                # what the thread waits for ends with it
        self._thread.join(5)
        self._drop()

    def _set(self, asked: dict[str, Any], question: dict[str, Any], answer: dict[str, Any]
             ) -> None:
        self._forecast = PlanState(asked, question, answer, self._forecast.remedies)
        self.version += 1
        self._changed.notify_all()

    def _mended(self, key: str, found: list[dict[str, Any]] | None) -> None:
        remedies = {**self._forecast.remedies, key: found}
        self._forecast = replace(self._forecast, remedies=remedies)
        self.version += 1
        self._changed.notify_all()

    def _publish(self, question: dict[str, Any], answer: dict[str, Any]) -> None:
        with self._changed:
            self._set(self._forecast.asked, question, answer)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._mending
                                       or self._forecast.pending)
                if self._closed:
                    return
                question = self._forecast.asked
                mending = self._mending.pop(0) if self._mending else None
            if mending:
                found = self._answer(mending[1]).get("remedies", [])
                with self._changed:
                    self._mended(mending[0], found)
                continue
            answer = self._answer({**question, "suggest": False})
            self._publish(question, answer)
            if self._forecast.asked == question and not self._closed and "fault" not in answer:
                self._publish(question, self._answer({**question, "suggest": True}))

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        for _ in range(2):                      # a child that died is replaced once
            try:
                child = self._child = self._child or self._spawn()
                assert child.stdin is not None
                assert child.stdout is not None
                child.stdin.write(json.dumps(question) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
                if line:
                    found: dict[str, Any] = json.loads(line)
                    return found
            except (OSError, ValueError) as error:
                _log.warning("planning: %s", error)
            self._drop()
        return {"fault": {"code": "gui.no_plan", "params": {}}}

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child:
            with contextlib.suppress(OSError):
                child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):          # what was not sent is lost with it
                    assert pipe is not None
                    pipe.close()

    def _spawn(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            list(self._command or processes.command("plan-service")), stdin=subprocess.PIPE,
            env=processes.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, encoding="utf-8", start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
