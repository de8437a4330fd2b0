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

    # The newest question, and the one that `answer` answers.
    asked: dict[str, Any] = field(default_factory=dict)
    question: dict[str, Any] = field(default_factory=dict)
    # {"plan", "suggestion", "fault", ...}
    answer: dict[str, Any] = field(default_factory=dict)
    # What would mend a run, by the key that it was asked under; None: not known yet.
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
        self.now = PlanState()
        # Symptoms that are still to be answered, by key.
        self._mending: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="planning", daemon=True)
        self._thread.start()

    def ask(self, question: dict[str, Any]) -> None:
        """Plans for a config; a question that waits is dropped for this one."""
        with self._changed:
            if question != self.now.asked:
                self._set(asked=question)

    def remedy(self, key: str, question: dict[str, Any]) -> None:
        """Asks once what helps against the question's "symptom"; see PlanState.remedies."""
        with self._changed:
            if key not in self.now.remedies:
                self._mending.append((key, question))
                self._mended(key, None)

    def wait(self, seconds: float) -> PlanState:
        """The state once nothing is pending, or as it stands after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self.now.pending, seconds)
            return self.now

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            child = self._child
        # The thread waits for an answer of the child: it ends with it.
        if child:
            child.kill()
        self._thread.join(5)
        self._drop()

    def _set(self, **changes: Any) -> None:
        """Only called while `_changed` is held."""
        self.now = replace(self.now, **changes)
        self.version += 1
        self._changed.notify_all()

    def _mended(self, key: str, remedies: list[dict[str, Any]] | None) -> None:
        self._set(remedies={**self.now.remedies, key: remedies})

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._mending or self.now.pending)
                if self._closed:
                    return
                question = self.now.asked
                mending = self._mending.pop(0) if self._mending else None
            if mending:
                remedies = self._answer(mending[1]).get("remedies", [])
                with self._changed:
                    self._mended(mending[0], remedies)
                continue
            # The plan first; the suggestion only if nothing else was asked meanwhile.
            for suggest in (False, True):
                answer = self._answer({**question, "suggest": suggest})
                with self._changed:
                    self._set(question=question, answer=answer)
                if self.now.asked != question or self._closed or "fault" in answer:
                    break

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        # A child that died is replaced once.
        for _ in range(2):
            try:
                child = self._child = self._child or subprocess.Popen(
                    list(self._command or processes.command("plan-service")),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    env=processes.environment(), text=True, encoding="utf-8",
                    start_new_session=True,
                    creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
                assert child.stdin is not None
                assert child.stdout is not None
                child.stdin.write(json.dumps(question) + "\n")
                child.stdin.flush()
                if line := child.stdout.readline():
                    return dict(json.loads(line))
            except (OSError, ValueError, TypeError) as error:
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
                # What was not sent yet would be written into a broken pipe.
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
