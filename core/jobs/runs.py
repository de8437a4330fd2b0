"""A run as others see it: its folder, who runs it, and the JobView that its journal folds into.

The folder is the only truth: a refreshed page, a second window, the command line and a restarted
app all read the same picture from it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter

from core import i18n, paths
from core.config.flat_yaml import read_flat_yaml
from core.errors import UserError
from core.failures import one_line
from core.jobs import events, journal
from core.jobs.control import Request
from core.jobs.events import MOST_TIME, Checkpoint, Event, Faulted, Note, Sample, Step
from core.jobs.journal import CONFIG, EVENTS, LOG, Point, append_line, new_run_id, tail, thinned
from core.serialization import from_json, json_object
from core.system import logs

RUN = "run.json"                          # name, job, created, ...: written once, never changed
OWNER = "worker.json"                     # which process runs it
REQUESTS = "requests.jsonl"               # stop, pause, ...: anyone appends, that process reads

State = Literal["queued", "starting", "running", "paused", "stopping",
                "done", "unproven", "stopped", "failed", "interrupted"]
ENDED: frozenset[str] = frozenset({"done", "unproven", "stopped", "failed", "interrupted"})
POINTS = 400                              # of a chart; thinned when twice as many have come
NOTES = 200                               # the newest ones stay
# notes that tell a change of state
MOODS: dict[str, State] = {"jobs.paused": "paused", "jobs.going": "running",
                            "jobs.stopping": "stopping"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A run as it stands: an immutable snapshot."""

    id: str
    folder: Path
    job: str = "train"
    name: str = ""
    state: State = "queued"
    phase: str = ""
    phase_done: int = 0
    phase_total: int = 0                  # 0: unknown
    step: int = 0
    total: int = 0
    epoch: float = 0.0
    loss: float | None = None
    lr: float = 0.0
    steps_per_s: float = 0.0
    eta_s: float = 0.0
    memory_mb: float = 0.0
    free_mb: float | None = None
    temperature_c: float | None = None
    plan: dict[str, Any] = field(default_factory=dict)     # what was planned, before the start
    losses: tuple[Point, ...] = ()
    validations: tuple[Point, ...] = ()
    samples: tuple[Sample, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    captioned: int = 0
    notes: tuple[Note, ...] = ()
    fault: Faulted | None = None
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    output_dir: str = ""                  # absolute
    cwd: str = ""                         # where relative paths of the config start
    created: float = 0.0                  # Unix times, s; 0: not yet
    started: float = 0.0
    updated: float = 0.0                  # the last event's
    ended: float = 0.0
    pid: int = 0
    exit_code: int | None = None          # of a worker that died; -N: signal N
    resumed_from: str = ""                # id of the run that this one goes on from

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def beside(self) -> bool:
        """Whether this run draws pictures on the CPU, and so runs beside one that uses the GPU."""
        return self.job == "generate" and self.config.get("device") == "cpu"


def fold(view: JobView, event: Event) -> JobView:
    """The view after one more event."""
    if view.over:
        return view
    return replace(view, updated=event.at, **_changes(view, event))


def fold_all(view: JobView, news: Iterable[Event]) -> JobView:
    """The view after many events. Of Steps in a row, which fill a journal, only the last one makes
    a view; the others only add their points to the charts."""
    for are_steps, group in itertools.groupby(news, lambda event: isinstance(event, Step)):
        batch = list(group)
        if are_steps and not view.over:
            losses, validations = view.losses, view.validations
            for step in batch[:-1]:
                if isinstance(step, Step):
                    losses = _longer(losses, step.step, step.loss)
                    validations = _longer(validations, step.step, step.validation)
            view = replace(view, losses=losses, validations=validations)
            batch = batch[-1:]
        view = reduce(fold, batch, view)
    return view


def _changes(view: JobView, event: Event) -> dict[str, Any]:
    """The fields of the view that an event changes."""
    working = {"state": "running"} if view.state in ("queued", "starting") else {}
    match event:
        case events.JobStarted():
            return {"state": "starting" if view.state == "queued" else view.state,
                    "job": event.job, "pid": event.pid, "started": event.at,
                    "config": event.config, "output_dir": _output_dir(view.cwd, event.config)}
        case events.Phase():
            return working | {"phase": event.name, "phase_done": event.done,
                              "phase_total": event.total, "eta_s": event.eta_s or view.eta_s}
        case events.Planned():
            return working | {"plan": event.plan}
        case Step():
            numbers = {name: getattr(event, name) for name in Step.__slots__}
            del numbers["validation"]
            return working | numbers | {
                "losses": _longer(view.losses, event.step, event.loss),
                "validations": _longer(view.validations, event.step, event.validation)}
        case Sample():
            return working | {"samples": (*view.samples, event)}
        case Checkpoint():
            return working | {"checkpoints": (*view.checkpoints, event)}
        case events.Captioned():
            return working | {"captioned": view.captioned + 1}
        case Note():
            mood = {"state": MOODS[event.key]} if event.key in MOODS else {}
            return mood | {"notes": (*view.notes, event)[-NOTES:]}
        case Faulted():
            return {"fault": event}
        case events.JobEnded():
            return {"state": event.state if event.state in ENDED else "failed",
                    "result": event.result, "ended": event.at}
    return {}


def _longer(series: tuple[Point, ...], step: int, value: float | None) -> tuple[Point, ...]:
    """The series with one more point; a value that is no number is left out."""
    if value is None or not math.isfinite(value):
        return series
    if series and series[-1][0] >= step:            # the run went back to an earlier state
        series = tuple(point for point in series if point[0] < step)
    longer = (*series, (step, value))
    return longer if len(longer) <= 2 * POINTS else thinned(longer, POINTS)


def _output_dir(cwd: str, config: dict[str, Any]) -> str:
    folder = config.get("output_dir")
    return str(Path(cwd, folder)) if folder and isinstance(folder, str) else ""


# --- runs on disk ---

def create_run(job: str, config: str, name: str, *, resumed_from: str = "", cwd: str = "",
               queued: bool = True) -> Path:
    """Makes a run's folder and returns it. `queued` False: this process is about to run it itself
    (worker.run_job). `config` is YAML, `cwd` where its relative paths start. Raises UserError
    `jobs.no_record` where our folder takes nothing."""
    folder = paths.runs_dir() / new_run_id(name)
    try:
        folder.mkdir(parents=True)
        paths.write_atomic(folder / CONFIG, config)
        if not queued:
            claim(folder)
        facts = {"job": job, "name": name, "created": time.time(), "resumed_from": resumed_from,
                 "cwd": cwd or os.getcwd()}
        # last, as from now on others see the run
        paths.write_atomic(folder / RUN, json.dumps(facts, ensure_ascii=False))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError("jobs.no_record", folder=paths.data_dir(),
                        reason=one_line(error)) from error
    return folder


def list_runs() -> list[JobView]:
    """All runs, newest first. Those that have ended are read as `glance` reads them."""
    folders = [paths.runs_dir() / run_id for run_id in run_ids()]
    return newest_first(glance(folder) or observe(Seen(blank(folder))) for folder in folders)


def load_run(run_id: str) -> JobView:
    known = run_ids()
    if run_id not in known:
        raise unknown(run_id, known)
    return observe(Seen(blank(paths.runs_dir() / run_id)))


def ask(run_id: str, request: Request) -> None:
    """Sends a request to a run of any process, without a manager: for the command line."""
    send(load_run(run_id), request)


def send(view: JobView, request: Request) -> None:
    if view.over or view.state == "queued":
        raise UserError("jobs.not_running", id=view.id, state=view.state)
    append_line(view.folder / REQUESTS, json.dumps({"ask": request, "at": time.time()}))


def resume_of(folder: Path, resume: bool | str) -> bool | str:
    """The value of the key `resume` that goes on with this run and no other of its name.

    That is the number of its session. `resume` is the run's own value, which stays where it had no
    session yet, and so nothing to go on from; and where it is the folder of one checkpoint, and
    none was saved since.
    """
    happened = tail(folder, 0)[0]
    if isinstance(resume, str) and not resume.isdigit() and not any(
            isinstance(event, Checkpoint) for event in happened):
        return resume
    sessions = [event.params["session"] for event in happened
                if isinstance(event, Note) and "session" in event.params]
    return str(sessions[-1]) if sessions else resume


def log_tail(run_id: str, lines: int = 200) -> str:
    """The last lines of a run's log.txt, for "copy diagnostics"."""
    return logs.tail(lines, load_run(run_id).folder / LOG)


def run_ids(known: Container[str] = ()) -> list[str]:
    """The ids on disk, oldest first. Folders in `known` are taken for runs without a look."""
    root = paths.runs_dir()
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if name in known or any(
        (root / name / file).exists() for file in (RUN, EVENTS)))


def newest_first(views: Iterable[JobView]) -> list[JobView]:
    return sorted(views, key=lambda view: (view.created, view.id), reverse=True)


def unknown(run_id: str, known: Iterable[str]) -> UserError:
    """The fault that there is no such run, with those that it may have meant."""
    close = i18n.nearest(run_id, known)
    return UserError("jobs.unknown" if close else "jobs.unknown_plain", id=run_id,
                     nearest=", ".join(close))


@dataclass(slots=True)
class Seen:
    """What one reader knows of a run: its view up to `offset` of the journal."""

    folded: JobView                       # by its journal alone
    offset: int = 0
    child: subprocess.Popen[bytes] | None = None      # the worker, if this process started it


def blank(folder: Path) -> JobView:
    """The view of a run before its first event, from run.json and config.yaml."""
    return _blank(folder, next(iter(journal.ends(folder)), None))


def _blank(folder: Path, first: Event | None) -> JobView:
    kinds: dict[str, Any] = {"job": str, "name": str, "cwd": str, "resumed_from": str,
                             "created": (int, float)}
    facts: dict[str, Any] = {"job": "", "name": folder.name} | {
        key: value for key, value in json_object(folder / RUN).items()
        if isinstance(value, kinds.get(key, ()))}
    if not 0 <= facts.get("created", 0) <= MOST_TIME:
        facts["created"] = 0.0
    config: dict[str, Any] = {}
    # a run that has started tells its config in its first event, in a hundredth of YAML's time
    if not isinstance(first, events.JobStarted):
        with contextlib.suppress(OSError, ValueError, UserError):
            config = read_flat_yaml((folder / CONFIG).read_text("utf-8"), CONFIG)[0]
    return JobView(id=folder.name, folder=folder, config=config,
                   output_dir=_output_dir(facts.get("cwd", ""), config), **facts)


def glance(folder: Path) -> JobView | None:
    """The view of a run that has ended by the two ends of its journal, without its charts,
    pictures and notes: thousands are read in a second. None for a run that hasn't ended."""
    news = journal.ends(folder)
    if not (news and isinstance(news[-1], events.JobEnded)):
        return None
    view, changes = _blank(folder, news[0]), dict[str, Any]()
    for event in news:
        changes |= _changes(view, event)
    return replace(view, updated=news[-1].at, **changes)


def observe(seen: Seen) -> JobView:
    """Reads on in a run's journal and looks at its process. Returns the view as it now stands."""
    folder = seen.folded.folder
    # The process is looked at before the journal, so that a run that ends in between is not taken
    # for one that died.
    owner = owner_of(folder)
    alive = seen.child.poll() is None if seen.child else process_of(owner) is not None
    news, seen.offset = tail(folder, seen.offset)
    view = seen.folded = fold_all(seen.folded, news)
    if not view.job and owner is None:
        # neither what was to be done is known nor that it began
        return replace(view, state="interrupted", fault=Faulted(
            at=view.created, code="jobs.damaged", params={"path": str(folder / RUN)}))
    if view.over or (owner is None and (view.state == "queued" or owner_of(folder))):
        return view
    if alive and owner:
        return replace(view, state="starting", pid=owner.pid) if view.state == "queued" else view
    if owner and seen.child and owner.exit_code is None:
        # only its parent can ask for the exit code; others read it from the file
        owner = replace(owner, exit_code=seen.child.returncode)
        with contextlib.suppress(OSError):
            write_owner(folder, owner)
    return replace(view, state="interrupted", exit_code=owner.exit_code if owner else None,
                   ended=view.updated or view.created, fault=view.fault or _death(owner, view))


def _death(owner: Owner | None, view: JobView) -> Faulted:
    """Why a run broke off, as far as one can tell from outside."""
    code = owner.exit_code if owner else None
    how = ""
    if owner and owner.forced:
        key = "jobs.forced"
    elif code is None:
        key = "jobs.lost"
    elif code == -9:
        # mostly Linux' OOM killer, which has a sentence of its own
        key, how = "jobs.killed", "SIGKILL"
    elif code < 0:
        key, how = "jobs.died", f"signal {-code}"
        with contextlib.suppress(ValueError):
            how = signal.Signals(-code).name
    else:
        key, how = "jobs.died", f"exit code {code}"
    return Faulted(at=view.updated, code=key, params={"how": how, "log": str(view.folder / LOG)})


# --- which process runs it ---

@dataclass(frozen=True, slots=True)
class Owner:
    """The process that runs a job. Systems use a pid again: the creation time tells them apart."""

    pid: int
    create_time: float                # Unix time, s
    dedicated: bool = False           # a worker that lives for this run alone, and may be killed
    exit_code: int | None = None      # known to the parent; -N: signal N
    forced: bool = False              # it ignored a stop and was killed


def claim(folder: Path, pid: int | None = None, dedicated: bool = False) -> None:
    """Makes a process (None: this one) the owner of a run."""
    process = psutil.Process(pid)
    write_owner(folder, Owner(process.pid, process.create_time(), dedicated))


def write_owner(folder: Path, owner: Owner) -> None:
    paths.write_atomic(folder / OWNER, json.dumps(asdict(owner)))


@functools.cache
def _owner_type() -> TypeAdapter[Owner]:
    # as dear as reading a hundred records
    return TypeAdapter(Owner)


def owner_of(folder: Path) -> Owner | None:
    try:
        return _owner_type().validate_python(from_json((folder / OWNER).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def process_of(owner: Owner | None) -> psutil.Process | None:
    """The owner's process, or None where it has ended. A zombie has ended."""
    if owner is None or owner.exit_code is not None:
        return None
    try:
        process = psutil.Process(owner.pid)
        # seconds: the clock may have been corrected since
        same = abs(process.create_time() - owner.create_time) < 2
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, ValueError, OverflowError):
        # gone, or a damaged file's number that no process can have
        return None
