"""A job's events in the terminal: bars on a terminal, a line every few seconds elsewhere.

Progress goes to stderr, so that stdout holds answers only.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from core import i18n
from core.jobs.events import (
    Checkpoint,
    Event,
    Faulted,
    JobEnded,
    Note,
    Phase,
    Planned,
    Sample,
    Step,
)
from core.jobs.outcome import said_first

EVERY_S = 5.0                           # between plain lines
SMOOTHING = 0.1                         # share of the newest loss in the shown one


class Screen(Protocol):
    def show(self, name: str, done: int, total: int, facts: str) -> None: ...
    def tr(self, text: str) -> None: ...
    def close(self) -> None: ...


class Terminal:
    """Listens to events: `with Terminal() as terminal: run_job(..., listen=terminal)`."""

    def __init__(self, file: TextIO | None = None, every_s: float = EVERY_S) -> None:
        steady: Any = Steady(file or sys.stderr)
        console = Console(file=steady, highlight=False, soft_wrap=True)
        self.screen: Screen = Bars(console) if console.is_terminal else Lines(console, every_s)
        self.loss = Smooth()
        self.fault: Faulted | None = None               # told by the caller, as the last line
        self.stepped = False
        self.hushed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.screen.close()

    def __call__(self, event: Event) -> None:
        match event:
            case Phase():
                self.screen.show(phase_name(event.name), event.done, event.total, "")
            case Step():
                self.stepped = True
                facts = step_facts(event, self.loss.add(event.loss))
                self.screen.show(phase_name("train"), event.step, event.total, facts)
            case Planned():
                self.screen.tr(planned(event.plan))
            case Note() if event.key not in self.hushed:
                self.screen.tr(i18n.tr(event.key, event.params))
            case Faulted():
                self.fault = event
            case Checkpoint():
                self.screen.tr(i18n.tr("terminal.saved", {"path": event.path}))
            case Sample():
                self.screen.tr(i18n.tr("terminal.picture", {"path": event.path}))
            case JobEnded():
                self.screen.close()

    def tr(self, text: str) -> None:
        self.screen.tr(text)

    def stopping(self, text: str) -> None:
        """Ctrl+C was heard, and the journal's own note of it needn't be told again."""
        self.hushed.add("jobs.stopping")
        self.screen.tr(text)


class Steady:
    """A file that may go away: a pipe that nobody reads any more, a terminal that closed, a log
    on a full disk. What can't be written is lost, the run is not."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):      # ValueError: closed
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Bars:
    """One live bar a phase; finished ones stay above."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}"), TextColumn("{task.fields[facts]}"),
            console=console)
        self.name = ""
        self.task: TaskID | None = None

    def show(self, name: str, done: int, total: int, facts: str) -> None:
        if self.task is None:
            self.progress.start()
        if self.task is None or name != self.name:
            self._finish()
            self.name = name
            self.task = self.progress.add_task(name, total=None, count="", facts="")
        self.progress.update(self.task, completed=done, total=total or None,
                             count=counted(done, total), facts=facts)

    def tr(self, text: str) -> None:
        self.progress.console.print(Text(text))

    def close(self) -> None:
        self._finish()
        self.progress.stop()

    def _finish(self) -> None:
        """A phase of unknown length stands still when the next one begins."""
        if self.task is not None and self.progress.tasks[-1].total is None:
            self.progress.update(self.task, total=1, completed=1)


class Lines:
    """Plain lines for logs and pipes: each new phase, then one every few seconds, and the last."""

    def __init__(self, console: Console, every_s: float) -> None:
        self.console, self.every_s = console, every_s
        self.name, self.shown_at, self.waiting = "", 0.0, ""

    def show(self, name: str, done: int, total: int, facts: str) -> None:
        line = "  ".join(filter(None, (name, counted(done, total), facts)))
        now = time.monotonic()
        if name != self.name:
            self._flush()
        elif now - self.shown_at < self.every_s and not 0 < total <= done:
            self.waiting = line
            return
        self.name, self.shown_at, self.waiting = name, now, ""
        self._print(line)

    def tr(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self.waiting:
            self._print(self.waiting)
        self.waiting = ""

    def _print(self, text: str) -> None:
        self.console.print(Text(f"{time.strftime('%H:%M:%S')}  {text}"))


class Smooth:
    """Exponential mean that is right from the first value on; a loss that is no number is
    skipped."""

    def __init__(self, share: float = SMOOTHING) -> None:
        self.share, self.sum, self.weight = share, 0.0, 0.0

    def add(self, value: float | None) -> float | None:
        if value is not None:
            self.sum = (1 - self.share) * self.sum + self.share * value
            self.weight = (1 - self.share) * self.weight + self.share
        return self.sum / self.weight if self.weight else None


def step_facts(step: Step, loss: float | None) -> str:
    """'loss 0.1234 · 3.1 steps/s · 1:20 left (14:05) · 812 MB'"""
    left = time.strftime("%H:%M", time.localtime(step.at + step.eta_s))
    facts = [i18n.tr("terminal.loss", {"loss": "?" if loss is None else f"{loss:.4f}"})]
    if step.validation is not None:
        facts.append(i18n.tr("terminal.validation", {"loss": f"{step.validation:.4f}"}))
    if step.steps_per_s > 0:
        facts.append(speed(step.steps_per_s))
        facts.append(i18n.tr("terminal.left", {"duration": duration(step.eta_s), "clock": left}))
    if step.memory_mb:
        facts.append(megabytes(step.memory_mb))
    return " · ".join(facts)


def speed(steps_per_s: float) -> str:
    """Slow runs read better the other way round."""
    if steps_per_s >= 1:
        return i18n.tr("terminal.steps_per_s", {"speed": f"{steps_per_s:.1f}"})
    return i18n.tr("terminal.s_per_step", {"speed": f"{1 / steps_per_s:.1f}"})


def duration(seconds: float) -> str:
    """75 -> '1:15'; 3675 -> '1:01:15'"""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def megabytes(mb: float) -> str:
    return f"{mb / 1024:.1f} GB" if mb >= 10_000 else f"{mb:.0f} MB"


def counted(done: int, total: int) -> str:
    return f"{done} / {total}" if total else str(done or "")


def phase_name(name: str) -> str:
    key = f"terminal.phase_{name}"
    text = i18n.tr(key)
    return name if text == key else text


def planned(plan: Mapping[str, Any]) -> str:
    """'Memory: about 2.9 GB at the peak (train), 7.4 GB free: fits.'"""
    return i18n.tr("terminal.planned", {
        "needs": megabytes(plan["needs_mb"]), "free": megabytes(plan["machine"]["free_mb"]),
        "phase": phase_name(plan["peak"]), "verdict": i18n.tr(f"terminal.{plan['verdict']}")})


# --- the end ---

def _share(value: Any) -> str:
    return f"{100 * value:.0f} %"


# a result's key -> how its value reads
def _best(value: Mapping[str, Any]) -> str:
    key = "terminal.best" if value["lora"] else "terminal.best_not_saved"
    return i18n.tr(key, {"path": value["lora"], "step": value["step"],
                         "loss": f"{value['validation']:.4f}"})


def _proof(value: Mapping[str, Any]) -> str:
    return i18n.tr("terminal.proven" if value["ok"] else "terminal.not_proven", value)


def _base(value: Mapping[str, Any]) -> str:
    return i18n.tr(f"terminal.base_{value['verdict']}", {"error": f"{value['error']:.2f}"})


def _memory(value: Mapping[str, Any]) -> str:
    key = "terminal.memory_more" if value.get("more_than_planned") else "terminal.memory"
    return i18n.tr(key, {
        "planned": megabytes(value["planned_mb"]), "real": megabytes(value["real_mb"])})


SHOWN: dict[str, Callable[[Any], str]] = {
    "lora": str, "best": _best, "proof": _proof, "base": _base, "base_loras": ", ".join,
    "sheet": str, "checkpoint": str,
    "steps": str, "seconds": duration, "steps_per_second": "{:.2f}".format,
    "style_covered": _share, "content_kept": _share, "memory": _memory,
}


def summary(result: Mapping[str, Any]) -> list[str]:
    """What a run made, a line each, in a fixed order, below what must be said first; unknown keys
    are for programs."""
    first = [i18n.tr(key, params) for key, params in said_first(result)]
    rows = []
    for key, show in SHOWN.items():
        if result.get(key) is not None:
            with contextlib.suppress(TypeError, ValueError, KeyError):      # a damaged record
                rows.append((key, show(result[key])))
    if pictures := result.get("samples"):
        folder = Path(pictures[-1]).parent
        rows.append(("samples", i18n.tr("terminal.many", {"count": len(pictures),
                                                          "folder": folder})))
    return first + table([(i18n.tr(f"terminal.result_{key}"), text) for key, text in rows])


def table(rows: list[tuple[str, str]]) -> list[str]:
    """Labels in one column, by their width on screen (a Chinese character takes two)."""
    widest = max((Text(label).cell_len for label, _ in rows), default=0)
    return [f"{label}{' ' * (widest - Text(label).cell_len)}  {text}" for label, text in rows]
