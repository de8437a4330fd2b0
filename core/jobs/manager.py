"""JobManager: a background thread that starts, stops and watches workers, one run at a time (and
pictures on the CPU beside it).

The folders under runs/ are the only truth. A manager can die at any time: its worker goes on, and
the next manager, or any reader, sees the same picture. This file must stay free of torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel

from core import paths
from core.config import dump_yaml, read_train_config
from core.errors import UserError
from core.jobs import history, runs, worker
from core.jobs.control import Request
from core.jobs.events import Event, Faulted, JobEnded
from core.jobs.journal import CONFIG, LOG, Journal
from core.jobs.runs import JobView, ask, fold, list_runs, load_run, log_tail

__all__ = ["JobManager", "JobView", "ask", "fold", "list_runs", "load_run", "log_tail"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Stop:
    """When a stop gets harder; times of time.monotonic()."""

    terminate_at: float
    kill_at: float
    terminated: bool = False


@dataclass(slots=True)
class _Run(runs.Seen):
    stop: _Stop | None = None
    settled: bool = False                 # nothing will change any more


class JobManager:
    """Starts, stops and watches runs. Every method may be called from any thread; readers get
    snapshots and never wait for the disk."""

    def __init__(self, *, command: Sequence[str] | None = None, dispatch: bool = True,
                 poll_s: float = 0.15, grace_s: float = 10.0, term_s: float = 5.0) -> None:
        """`command`: another than children.command("worker"). `dispatch` False: watch and stop,
        but start nothing. A stop waits `grace_s` before it terminates, `term_s` until it kills."""
        self.version = 0                  # differs whenever any view does
        self._command = command
        self._dispatch = dispatch
        self._poll_s, self._grace_s, self._term_s = poll_s, grace_s, term_s
        self._acting = threading.RLock()          # guards what follows; taken before _changed
        self._runs: dict[str, _Run] = {}
        self._spare: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()     # guards _views and version; never held for long
        self._views: dict[str, JobView] = {}
        self._wake = threading.Event()
        self._closed = False
        self._refresh()
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)
        self._thread.start()

    # --- reading ---

    def views(self) -> list[JobView]:
        """All runs, newest first."""
        with self._changed:
            return runs.newest_first(self._views.values())

    def view(self, run_id: str) -> JobView:
        with self._changed:
            if run_id not in self._views:
                raise runs.unknown(run_id, list(self._views))
            return self._views[run_id]

    def queue(self) -> list[JobView]:
        """The runs that wait, the next one first."""
        return history.in_order([view for view in self.views() if view.state == "queued"])

    def wait(self, run_id: str, timeout: float | None = None) -> JobView:
        """The view once the run is over, or after `timeout` seconds as it then stands."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.view(run_id).over, timeout)
            return self.view(run_id)

    # --- acting ---

    def start(self, config: BaseModel, name: str | None = None, job: str = "train") -> str:
        """Queues a run and returns its id."""
        return self._enqueue(job, dump_yaml(config), name or str(getattr(config, "name", job)))

    def resume(self, run_id: str) -> str:
        """Queues a new run that goes on from the last checkpoint of one that is over."""
        old = self.view(run_id)
        if not old.over:
            raise UserError("jobs.still_running", id=run_id, state=old.state)
        config = (old.folder / CONFIG).read_text("utf-8")
        if old.job == "train":
            own = read_train_config(old.folder / CONFIG)
            config = dump_yaml(own.with_changes(resume=runs.resume_of(old.folder, own.resume)))
        return self._enqueue(old.job, config, old.name, run_id, old.cwd)

    def stop(self, run_id: str) -> None:
        """Asks the run to save and end, harder and harder; returns at once. One that waits in the
        queue leaves it, one that is over stays as it is."""
        with self._acting:
            run = self._runs[self.view(run_id).id]
            view = self._look(run)
            if view.state == "queued":
                view = self._withdraw(run)
            if not view.over:
                runs.send(view, "stop")
                run.stop = run.stop or self._plan()
                self._look(run)

    def move_up(self, run_id: str) -> None:
        """Before the run that waits before it."""
        with self._acting, self._queue_lock():
            history.move_up(self.queue(), run_id)
            with self._changed:
                self._mark_change()

    def pause(self, run_id: str) -> None:
        self._ask(run_id, "pause")

    def go(self, run_id: str) -> None:
        """Ends a pause."""
        self._ask(run_id, "go")

    def sample(self, run_id: str) -> None:
        self._ask(run_id, "sample")

    def save(self, run_id: str) -> None:
        self._ask(run_id, "save")

    def warm(self, job: str = "train") -> None:
        """Starts a spare worker that imports torch now; the next run takes it."""
        with self._acting:
            if not self._closed and (self._spare is None or self._spare.poll() is not None):
                self._spare = worker.spawn_worker(self._command, preload=[job])

    def hold(self, held: bool = True) -> None:
        """Held, nothing that waits is started."""
        self._dispatch = not held

    def close(self) -> None:
        """Ends the thread and the spare worker. A run that goes on goes on without us, and what
        is queued stays queued."""
        with self._acting, self._changed:
            self._closed = True
            self._changed.notify_all()
        self._wake.set()
        self._thread.join()
        if self._spare:
            self._spare.kill()            # without a run; it may be importing for seconds yet
            worker.dismiss(self._spare)
        for run in self._runs.values():
            if run.child:
                worker.reap(run.child)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the thread ---

    def _loop(self) -> None:
        while not self._closed:
            pause = self._poll_s
            try:
                with self._acting:
                    self._tick()
            except Exception:             # a full disk, a folder deleted: it may pass
                _log.exception("the job thread goes on after an error")
                pause = 2.0
            self._wake.wait(pause)
            self._wake.clear()

    def _tick(self) -> None:
        self._refresh()
        for run in self._runs.values():
            if run.stop:
                self._escalate(run, run.stop)
        if self._dispatch:
            self._start_next()

    def _refresh(self) -> None:
        """Looks at every run that may have changed, other processes' runs too."""
        ids = runs.run_ids(self._runs)
        for run_id in ids:
            run = self._runs.get(run_id)
            if run is None:
                run = self._runs[run_id] = _Run(runs.blank(paths.runs_dir() / run_id))
            if not run.settled:
                self._look(run)
        for run_id in self._runs.keys() - set(ids):       # deleted by hand
            del self._runs[run_id]
            with self._changed:
                del self._views[run_id]
                self._mark_change()

    def _look(self, run: _Run) -> JobView:
        view = runs.observe(run)
        if view.over:
            self._settle(run)
        elif run.stop:
            view = replace(view, state="stopping")
        with self._changed:
            old = self._views.get(view.id)
            if old is None or replace(view, version=old.version) != old:
                self._views[view.id] = replace(view, version=self._mark_change())
        return view

    def _mark_change(self) -> int:
        self.version += 1
        self._changed.notify_all()
        return self.version

    def _settle(self, run: _Run) -> None:
        """A run that is over holds its GPU memory until its process has gone; one that hangs in
        its exit is helped out."""
        lingers = self._process(run) is not None
        if lingers and run.stop is None and self._dispatch:
            run.stop = self._plan()
        if not lingers:
            run.stop, run.child, run.settled = None, None, True

    def _process(self, run: _Run) -> psutil.Process | None:
        """The worker, as far as it still runs. A process that does other things too counts until
        its job is over."""
        if run.child and run.child.poll() is not None:
            return None
        owner = runs.owner_of(run.folded.folder)
        mine = owner is not None and (owner.dedicated or not run.folded.over)
        return runs.process_of(owner) if mine else None

    def _plan(self) -> _Stop:
        now = time.monotonic()
        return _Stop(now + self._grace_s, now + self._grace_s + self._term_s)

    def _escalate(self, run: _Run, stop: _Stop) -> None:
        process, now = self._process(run), time.monotonic()
        if process is None or process.pid == os.getpid():
            return
        if now >= stop.terminate_at and not stop.terminated:
            stop.terminated = True
            if owner := runs.owner_of(run.folded.folder):
                runs.write_owner(run.folded.folder, replace(owner, forced=True))
            with contextlib.suppress(psutil.Error):
                process.terminate()
        elif now >= stop.kill_at:
            worker.kill_tree(process)

    # --- the queue ---

    def _queue_lock(self) -> FileLock:
        return FileLock(paths.runs_dir() / ".queue.lock")

    def _start_next(self) -> None:
        if self._next() is None:
            return
        with contextlib.suppress(Timeout), self._queue_lock().acquire(blocking=False):
            self._refresh()               # another process may have been quicker
            if run := self._next():
                self._launch(run)

    def _next(self) -> _Run | None:
        """The first in the queue of those whose place is free: one holds the card, and one at a
        time draws beside it on the CPU."""
        waiting, taken = [], set()
        for run in self._runs.values():
            if self._views[run.folded.id].state == "queued":
                waiting.append(run)
            elif not run.settled:
                taken.add(run.folded.beside)
        first = history.in_order([self._views[run.folded.id] for run in waiting
                                  if run.folded.beside not in taken])
        return self._runs[first[0].id] if first else None

    def _launch(self, run: _Run) -> None:
        folder = run.folded.folder
        child = self._take_spare(folder)
        try:
            if child is None:
                child = worker.spawn_worker(self._command, folder / LOG)
                if not worker.hand_over(child, folder):
                    worker.dismiss(child)             # run.child's exit code tells why
            run.child = child
        except (OSError, psutil.Error) as error:
            if child:
                worker.dismiss(child)
            self._end_here(run, Faulted(code="jobs.no_worker", params={"reason": str(error)}),
                           JobEnded(state="failed"))
        self._look(run)

    def _take_spare(self, folder: Path) -> subprocess.Popen[bytes] | None:
        """The warm worker, if it took the run."""
        spare, self._spare = self._spare, None
        if spare and spare.poll() is None and worker.hand_over(spare, folder):
            return spare
        if spare:
            worker.dismiss(spare)
        return None

    def _withdraw(self, run: _Run) -> JobView:
        with self._queue_lock():
            if self._look(run).state == "queued":
                self._end_here(run, JobEnded(state="stopped"))
            return self._look(run)

    def _end_here(self, run: _Run, *events: Event) -> None:
        """Ends a run that never had a worker, so that this process is its only writer."""
        with Journal(run.folded.folder) as journal:
            for event in events:
                journal.append(event)

    def _enqueue(self, job: str, config: str, name: str, resumed_from: str = "",
                 cwd: str = "") -> str:
        folder = runs.create_run(job, config, name, resumed_from=resumed_from, cwd=cwd)
        with self._acting:
            self._refresh()
        self._wake.set()
        return folder.name

    def _ask(self, run_id: str, request: Request) -> None:
        runs.send(self.view(run_id), request)
