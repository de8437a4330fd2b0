"""A job's events in the terminal: bars on a terminal, a line every few seconds elsewhere.

Progress goes to stderr, so that stdout holds answers only.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from core import i18n
from core.jobs import events
from core.jobs.outcome import said_first
from core.units import MovingAverage, duration, gigabytes, speed

EVERY_S = 5.0                           # between plain lines
SMOOTHING = 0.1                         # weight of the newest loss in the shown one

tr = i18n.translator("terminal")


class Terminal:
    """Listens to events: `with Terminal() as terminal: run_job(..., listen=terminal)`."""

    def __init__(self, file: TextIO | None = None, every_s: float = EVERY_S) -> None:
        # rich asks for a TextIO; Steady passes on what it lacks itself
        file = file or sys.stderr
        # Bars are drawn by the terminal's commands; what others wrote is checked by each line.
        steady: Any = Steady(getattr(file, "beneath", file))
        console = Console(file=steady, highlight=False, soft_wrap=True)
        plain = Lines(console, every_s)
        self.screen: Bars | Lines = Bars(console) if console.is_terminal else plain
        self.loss = MovingAverage(SMOOTHING)
        # The caller prints the fault, as the last line.
        self.fault: events.Faulted | None = None
        # After a first step or a first caption, a fault is no longer bad input.
        self.stepped = False
        # keys of notes that are not printed
        self.hushed: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.screen.close()

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Phase():
                self.screen.show(label("terminal.phase", event.name), event.done, event.total, "")
            case events.Step():
                self.stepped = True
                facts = step_facts(event, self.loss.add(event.loss))
                self.screen.show(label("terminal.phase", "train"), event.step, event.total, facts)
            case events.Planned():
                self.screen.write_line(planned(event.plan))
            case events.Note() if event.key not in self.hushed:
                self.screen.write_line(i18n.tr(event.key, event.params))
            case events.Faulted():
                self.fault = event
            case events.Checkpoint():
                self.screen.write_line(tr("saved", path=event.path))
            case events.Sample():
                self.screen.write_line(tr("picture", path=event.path))
            case events.Captioned():
                self.stepped = True
                self.screen.write_line(f"{Path(event.path).name}  {event.caption}")
            case events.JobEnded():
                self.screen.close()

    def stopping(self, text: str) -> None:
        """Says that Ctrl+C was heard; the journal's own note of it is then not printed again."""
        self.hushed.add("jobs.stopping")
        self.screen.write_line(text)


class Steady:
    """A text file whose errors are ignored: a pipe that nobody reads any more, a terminal that
    closed, a log on a full disk, no file at all must not end the run."""

    def __init__(self, file: TextIO | None) -> None:
        self.file = file

    def write(self, text: str) -> int:
        # AttributeError: there is none (`2>&-`); ValueError: it is closed
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.file.write(text)           # type: ignore[union-attr]
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.file.flush()               # type: ignore[union-attr]

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self.file.isatty()       # type: ignore[union-attr]
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Bars:
    """One live bar for each phase; finished bars stay above."""

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

    def write_line(self, text: str) -> None:
        self.progress.console.print(Text(i18n.printable(text)))

    def close(self) -> None:
        self._finish()
        self.progress.stop()

    def _finish(self) -> None:
        """Stops the animation of a phase of unknown length when the next one begins."""
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
            self.close()
        elif now - self.shown_at < self.every_s and not 0 < total <= done:
            self.waiting = line
            return
        self.name, self.shown_at, self.waiting = name, now, ""
        self.write_line(line)

    def close(self) -> None:
        """Writes the line that waits, so that the last state of a phase is never lost."""
        if self.waiting:
            self.write_line(self.waiting)
        self.waiting = ""

    def write_line(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        self.console.print(Text(i18n.printable(line)))


def step_facts(step: events.Step, loss: float | None) -> str:
    """'loss 0.1234 · 3.1 steps/s · 1:20 left (14:05) · 812 MB'"""
    left = time.strftime("%H:%M", time.localtime(step.at + step.eta_s))
    facts = [tr("loss", loss="?" if loss is None else f"{loss:.4f}")]
    if step.validation is not None:
        facts.append(tr("validation", loss=f"{step.validation:.4f}"))
    if step.steps_per_s > 0:
        facts += [speed(step.steps_per_s), tr("left", duration=duration(step.eta_s), clock=left)]
    if step.memory_mb:
        facts.append(megabytes(step.memory_mb))
    return " · ".join(facts)


def megabytes(mb: float) -> str:
    """Memory for a line of progress: MB below 10 000, as a tenth of a GB would hide changes."""
    return gigabytes(mb, least_mb=10_000)


def counted(done: int, total: int) -> str:
    return f"{done} / {total}" if total else str(done or "")


def label(group: str, name: str) -> str:
    """The name in the user's language; a family's own phase or part has none and keeps its
    name."""
    key = f"{group}_{name}"
    text = i18n.tr(key)
    return name if text == key else text


def planned(plan: Mapping[str, Any]) -> str:
    """'Memory: about 2.9 GB at the peak (train), 7.4 GB free: fits.'"""
    return tr("planned", needs=megabytes(plan["needs_mb"]), verdict=tr(plan["verdict"]),
              free=megabytes(plan["machine"]["free_mb"]),
              phase=label("terminal.phase", plan["peak"]))


# --- the end ---

def _percent(value: Any) -> str:
    return f"{100 * value:.0f} %"


# A result's key -> how its value reads, in the order in which they are printed.
SHOWN: dict[str, Callable[[Any], str]] = {
    "lora": str,
    "best": lambda best: tr("best" if best["lora"] else "best_not_saved", path=best["lora"],
                            step=best["step"], loss=f"{best['validation']:.4f}"),
    "proof": lambda proof: i18n.tr(
        "terminal.proven" if proof["ok"] else "terminal.not_proven", proof),
    "base": lambda base: tr(f"base_{base['verdict']}", error=f"{base['error']:.2f}"),
    "base_loras": ", ".join,
    "sheet": str, "checkpoint": str,
    "steps": str, "seconds": duration, "steps_per_second": "{:.2f}".format,
    "style_covered": _percent, "content_kept": _percent,
    "memory": lambda memory: tr(
        "memory_more" if memory.get("more_than_planned") else "memory",
        planned=megabytes(memory["planned_mb"]), real=megabytes(memory["real_mb"])),
}


def summary(result: Mapping[str, Any]) -> list[str]:
    """The result of a run: warnings first, then a line for each known key, in a fixed order.
    Other keys are for programs."""
    first = [i18n.tr(key, params) for key, params in said_first(result)]
    rows = []
    for key, show in SHOWN.items():
        if result.get(key) is not None:
            # the record of a run may be damaged, or an older version's
            with contextlib.suppress(TypeError, ValueError, KeyError):
                rows.append((key, show(result[key])))
    if pictures := result.get("samples"):
        folder = Path(pictures[-1]).parent
        rows.append(("samples", tr("many", count=len(pictures), folder=folder)))
    return first + table([(tr(f"result_{key}"), text) for key, text in rows])


def table(rows: list[tuple[str, str]]) -> list[str]:
    """Labels in one column, texts in the next."""
    widest = max((width(label) for label, _ in rows), default=0)
    return [f"{label}{' ' * (widest - width(label))}  {text}" for label, text in rows]


def width(text: str) -> int:
    """Columns on the screen: a Chinese character takes two."""
    return Text(text).cell_len
