"""What a tab gets: the state that all pages share, a language, and sentences in it.

A tab is one file in gui/tabs with a class, a `Tab`, which is made inside its gr.Tab; it stands in
`TABS` of gui/app.py. Nothing lives in the page: handlers act on `ctx.app_state`, and the page is
painted from a Snapshot: on load, after each handler, and once a second.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
from pydantic import ValidationError

from core import i18n, paths
from core.config import TrainConfig
from core.errors import UserError
from core.jobs.manager import JobManager
from core.jobs.runs import JobView
from core.memory import plan, plan_inputs
from core.system import gpu
from core.system.gpu import GpuInfo
from core.workspace import presets
from core.workspace.project import Project, Projects
from core.workspace.settings import Settings, SettingsFile
from gui.state.base_models import BaseModels, BasesState
from gui.state.desktop import Closing, Desktop
from gui.state.plan_client import Planning, PlanState

# Seconds between two looks at the card.
PULSE_S = 2.0
Shared = TypeVar("Shared")


@dataclass(frozen=True, slots=True)
class Gauge:
    """Memory of the card, or of the computer where there is none; MiB, whole ones."""

    name: str = ""
    kind: str = "cpu"                   # cuda | mps | cpu
    used_mb: int = 0
    total_mb: int = 0
    temperature_c: int | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that pages show, at one moment. Two snapshots of one `version` are the same."""

    version: tuple[Any, ...] = ()
    # The version as pages know it: one word, which no other start of the app has used.
    mark: str = ""
    runs: tuple[JobView, ...] = ()      # newest first
    project: Project = field(default_factory=Project)
    settings: Settings = field(default_factory=Settings)
    config: TrainConfig = field(default_factory=TrainConfig)
    problem: ValidationError | UserError | None = None      # why the config can't be used
    gauge: Gauge = field(default_factory=Gauge)
    machine: plan.Machine | None = None
    plan_state: PlanState = field(default_factory=PlanState)
    bases: BasesState = field(default_factory=BasesState)
    order: tuple[str, ...] = ()         # ids that wait, the next one first; (): as they came
    native: bool = False                # a window of our own, with the system's dialogs
    closing: Closing = ""
    now: float = 0.0                    # Unix time, s

    @property
    def active(self) -> JobView | None:
        """The run that holds the machine; pictures on the CPU only where nothing else does."""
        running = [view for view in self.runs if not view.over and view.state != "queued"]
        return min(running, key=lambda view: view.beside, default=None)

    @property
    def queued(self) -> tuple[JobView, ...]:
        """Runs that wait, the next one first."""
        waiting = [view for view in reversed(self.runs) if view.state == "queued"]
        return tuple(sorted(waiting, key=lambda view: self.order.index(view.id)
                            if view.id in self.order else len(self.order)))

    @property
    def shown(self) -> JobView | None:
        """The training that stands in the Parameters tab instead of the form."""
        active = self.active
        return self.run(self.project.run) or (active if active and active.job == "train" else None)

    def run(self, run_id: str) -> JobView | None:
        return next((view for view in self.runs if view.id == run_id), None)


class AppState:
    """What all pages of all languages share. Every method may be called from any thread."""

    def __init__(self, jobs: JobManager, planning: Planning | None = None) -> None:
        self.jobs = jobs
        self.settings = SettingsFile()
        self.projects = Projects(self.settings.now.project)
        # The first start: the demo's base is there for sure.
        if not self.projects.names():
            self.projects.edit(base_model="demo")
        self.planning = planning or Planning()
        self.gauge = Gauge()
        self.machine: plan.Machine | None = None
        self._card: GpuInfo | None = None
        # Counts how often the inputs of all pages had to be set anew.
        self.fills = 0
        self._touched = 0
        # Messages about damaged files that were read.
        self._dismissed: set[str] = set()
        self._shared: dict[Any, Any] = {}
        self._making = threading.Lock()
        self.bases = BaseModels(self.touch)
        # What waits would start by itself with the next start: only what runs is asked about.
        self.desktop = Desktop(self.touch, lambda: bool(self.running()))
        self._marks = (f"{time.time_ns():x}-{n}" for n in itertools.count())
        self._snapshot = Snapshot()
        self._closed = threading.Event()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def shared(self, kind: Callable[[Callable[[], None]], Shared]) -> Shared:
        """The one object of a class that all pages share, made when it is first asked for. Its
        constructor gets a function to call after each change, so that all pages are painted."""
        with self._making:
            if kind not in self._shared:
                self._shared[kind] = kind(self.touch)
            shared: Shared = self._shared[kind]
            return shared

    def snapshot(self) -> Snapshot:
        """The state at this moment; the same object while nothing has changed."""
        settings, project = self.settings.now, self.projects.now
        version = (self.jobs.version, self.settings.version, self.projects.version,
                   self.planning.version, self.gauge, self._touched)
        if self._snapshot.version == version:
            return self._snapshot
        config, problem = TrainConfig(), None
        try:
            config = project.config(settings.output_folder)
        except (ValidationError, UserError) as error:
            problem = error
        self._snapshot = Snapshot(
            version, next(self._marks), tuple(self.jobs.views()), project, settings, config,
            problem, self.gauge, self.machine, self.planning.now, self.bases.now,
            tuple(view.id for view in self.jobs.queue()), self.desktop.window is not None,
            self.desktop.state, time.time())
        return self._snapshot

    @property
    def broken(self) -> list[UserError]:
        """A message for each of our own files that was found damaged."""
        return [error for error in (self.settings.broken, self.projects.broken,
                                    *presets.unusable())
                if error and str(error) not in self._dismissed]

    def dismiss(self) -> None:
        """Puts the messages about damaged files away."""
        self.settings.broken = self.projects.broken = None
        self._dismissed |= set(map(str, presets.unusable()))
        self.touch()

    def running(self) -> list[str]:
        """The ids of all runs that have begun and aren't over."""
        return [view.id for view in self.jobs.views() if not view.over and view.state != "queued"]

    def stop_all(self, seconds: float = 120.0) -> None:
        """Stops what runs, with its work saved, and waits for it. What waits stays where it is."""
        self.jobs.hold()
        running = self.running()
        for run_id in running:
            self.jobs.stop(run_id)
        for run_id in running:
            self.jobs.wait(run_id, seconds)

    def touch(self) -> None:
        """Makes the next snapshot a new one: something without a version has changed."""
        self._touched += 1

    def filled(self) -> None:
        """Has the inputs of all pages set from the project."""
        self.fills += 1
        self.touch()

    def replan(self, language: str) -> None:
        """Asks for plan and suggestion of the project as it stands; returns at once."""
        with contextlib.suppress(ValidationError, UserError):
            project = self.projects.now
            config = project.config(self.settings.now.output_folder)
            self.planning.ask({"config": config.model_dump(mode="json", exclude_defaults=True),
                               "purpose": project.purpose, "language": language})

    def close(self) -> None:
        """A run that goes on is left alone: its worker is a process of its own."""
        self._closed.set()
        self.planning.close()
        self.jobs.close()

    def _pulse(self) -> None:
        with gpu.Reader() as reader:
            while True:
                # A driver that is being replaced raises all kinds of errors.
                with contextlib.suppress(Exception):
                    self.machine = self.machine or plan_inputs.machine_here()
                    if self._card is None and self.machine.kind == "cuda":
                        self._card = gpu.chosen(gpu.report())
                    self.gauge = self._read_memory(reader)
                if self._closed.wait(PULSE_S):
                    return

    def _read_memory(self, reader: gpu.Reader) -> Gauge:
        """Memory in use, rounded so that pages aren't painted for a few kilobytes."""
        assert self.machine is not None
        if self._card is None:
            memory = psutil.virtual_memory()
            return Gauge(self.machine.name, self.machine.kind,
                         int(round((memory.total - memory.available) / 2**20, -2)),
                         round(memory.total / 2**20))
        sample = reader.poll(self._card.uuid or self._card.index)
        total, degrees = sample.total_mb or self._card.total_mb, sample.temperature_c
        used = 0 if sample.free_mb is None else total - sample.free_mb
        return Gauge(self._card.name, "cuda", int(round(used, -1)), round(total),
                     None if degrees is None else round(degrees))


class Registers(Protocol):
    """The page under construction as tabs see it; its class is gui.state.page.Page."""

    def on(self, handler: Callable[..., Updates | None], *events: Any, inputs: Sequence[Any] = (),
           outputs: Sequence[Any] = (), fill: bool = False) -> None: ...

    def select(self, tab: str) -> Updates: ...

    def tell(self, text: str, title: str = "", kind: str = "info") -> None: ...


@dataclass(frozen=True, slots=True)
class Context:
    """The state of the app, a language, and the page that the tab stands on.

    Handlers are registered with `ctx.page.on`, never with Gradio's own listeners: the page then
    turns faults into messages and sends what changed at once.
    """

    app_state: AppState
    language: str
    page: Registers

    def tr(self, key: str, /, **params: Any) -> str:
        """A sentence: `key` of strings/<language>/gui.yaml, or with its subject (`checks.x`)."""
        return i18n.tr(key if "." in key else f"gui.{key}", params, self.language)

    def error_text(self, error: UserError) -> str:
        return i18n.tr(error.code, error.params, self.language)


def pictures_folder() -> Path:
    """Where generated pictures go; the one folder that pages may read by path."""
    return paths.data_dir() / "pictures"


# Component -> value or gr.update(...)
Updates = dict[Any, Any]


class Tab(Protocol):
    """What the page asks of a tab. Of `paint` only what differs from the last time is sent."""

    def label(self, snap: Snapshot) -> str:
        """The tab's name with its live status."""

    def paint(self, snap: Snapshot) -> Updates:
        """Everything but what the user types in: on load, and whenever the version changes.
        A panel's is its HTML."""

    def fill(self, snap: Snapshot) -> Updates:
        """Inputs, from the project: on load, and after a project was changed as a whole."""
