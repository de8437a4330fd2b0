"""JobManager: a background thread that starts, stops and watches workers. One run at a time has
the GPU; pictures may be drawn on the CPU beside it.

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
from core.jobs.runs import JobView

_log = logging.getLogger(__name__)
# Past runs whose charts and pictures are read before the first page; older ones follow by and by,
# so that thousands of them don't hold up a start.
NEWEST = 50
_GONE_S = 60.0                            # so long after its end a worker's process has gone
_SLICE_S = 0.03                           # of each poll, for reading older runs


@dataclass(slots=True)
class _Run(runs.Seen):
    stopping_since: float = 0.0           # time.monotonic(); 0: it was not asked to stop
    terminated: bool = False
    settled: bool = False                 # nothing will change any more
    glanced: bool = False                 # it ended long ago, and its charts are not read yet


class JobManager(contextlib.AbstractContextManager["JobManager"]):
    """Starts, stops and watches runs.

    Every method may be called from any thread. Readers get snapshots and never wait for the disk.
    """

    def __init__(self, *, command: Sequence[str] | None = None, dispatch: bool = True,
                 poll_s: float = 0.15, grace_s: float = 10.0, term_s: float = 5.0) -> None:
        """`command`: how a worker is started, by default processes.command("worker"). `dispatch`
        False: watch and stop runs, but start none. A stop waits `grace_s` seconds before it
        terminates the worker, and `term_s` more before it kills it."""
        self.version = 0                  # differs whenever any view does
        self._command = command
        self._dispatch = dispatch
        self._poll_s, self._grace_s, self._term_s = poll_s, grace_s, term_s
        # Guards _runs and _spare; held while files are read and workers are started. Where both
        # locks are needed, this one is taken first.
        self._acting = threading.RLock()
        self._runs: dict[str, _Run] = {}
        self._spare: subprocess.Popen[bytes] | None = None
        # Guards _views and version; never held for long, as readers wait for it.
        self._changed = threading.Condition()
        self._views: dict[str, JobView] = {}
        self._glanced: list[str] = []     # ids of old runs yet to be read, the next one last
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
        run = self._runs.get(run_id)
        if run and run.glanced:
            with self._acting:
                self._look(run)
        with self._changed:
            if run_id not in self._views:
                raise runs.unknown(run_id, list(self._views))
            return self._views[run_id]

    def queue(self) -> list[JobView]:
        """The queued runs, the next one first."""
        return history.in_order([view for view in self.views() if view.state == "queued"])

    def wait(self, run_id: str, timeout: float | None = None) -> JobView:
        """Waits until the run is over, at most `timeout` seconds. Returns its view."""
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
            before = read_train_config(old.folder / CONFIG)
            resume = runs.resume_of(old.folder, before.resume)
            config = dump_yaml(before.with_changes(resume=resume))
        return self._enqueue(old.job, config, old.name, run_id, old.cwd)

    def stop(self, run_id: str) -> None:
        """Asks the run to save and end, and returns at once; one that doesn't is terminated, then
        killed. A queued run leaves the queue."""
        with self._acting:
            run = self._runs[self.view(run_id).id]
            view = self._look(run)
            if view.state == "queued":
                # under the lock, as another manager may be starting it
                with self._queue_lock():
                    if self._look(run).state == "queued":
                        self._end_here(run, JobEnded(state="stopped"))
                    view = self._look(run)
            if not view.over:
                runs.send(view, "stop")
                run.stopping_since = run.stopping_since or time.monotonic()
                self._look(run)

    def move_up(self, run_id: str) -> None:
        """Moves a waiting run one place forward in the queue."""
        with self._acting, self._queue_lock():
            history.move_up(self.queue(), run_id)
            with self._changed:
                self._mark_change()

    def ask(self, run_id: str, request: Request) -> None:
        """Sends a request to the run. To stop it, `stop` does more."""
        runs.send(self.view(run_id), request)

    def warm(self, job: str = "train") -> None:
        """Starts a spare worker that imports torch now; the next run takes it."""
        with self._acting:
            if not self._closed and (self._spare is None or self._spare.poll() is not None):
                self._spare = worker.spawn_worker(self._command, preload=[job])

    def hold(self, held: bool = True) -> None:
        """While held, no waiting run is started."""
        self._dispatch = not held

    def close(self) -> None:
        """Ends the thread and the spare worker. A running worker goes on without us, and queued
        runs stay queued."""
        with self._acting, self._changed:
            self._closed = True
            self._changed.notify_all()
        self._wake.set()
        self._thread.join()
        if self._spare:
            # it has no run, and may be importing torch for seconds yet
            self._spare.kill()
            worker.dismiss(self._spare)
        for run in self._runs.values():
            if run.child:
                worker.reap(run.child)

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the thread ---

    def _loop(self) -> None:
        while not self._closed:
            pause = self._poll_s
            try:
                with self._acting:
                    self._refresh()
                    for run in self._runs.values():
                        if run.stopping_since:
                            self._escalate(run)
                    if self._dispatch:
                        self._start_next()
                    self._read_older()
            except Exception:
                # a full disk, a folder deleted by hand: it may pass
                _log.exception("the job thread goes on after an error")
                pause = 2.0
            self._wake.wait(pause)
            self._wake.clear()

    def _refresh(self) -> None:
        """Looks at every run that may have changed, other processes' runs too."""
        ids = runs.run_ids(self._runs)
        before = time.time() - _GONE_S
        for place, run_id in enumerate(ids, start=1 - len(ids)):
            if run_id not in self._runs:
                folder = paths.runs_dir() / run_id
                view = runs.glance(folder) if place <= -NEWEST else None
                if view and 0 < view.ended < before:
                    self._runs[run_id] = _Run(view, settled=True, glanced=True)
                    self._glanced.append(run_id)
                    with self._changed:
                        self._views[run_id] = view
                        self._mark_change()
                else:
                    self._runs[run_id] = _Run(runs.blank(folder))
            if not self._runs[run_id].settled:
                self._look(self._runs[run_id])
        # folders that a user deleted
        for run_id in self._runs.keys() - set(ids):
            del self._runs[run_id]
            with self._changed:
                del self._views[run_id]
                self._mark_change()

    def _read_older(self) -> None:
        """Reads runs that were only glanced at, as many as a slice of time allows."""
        until = time.monotonic() + _SLICE_S
        while self._glanced and time.monotonic() < until:
            run = self._runs.get(self._glanced.pop())
            if run and run.glanced:
                self._look(run)

    def _look(self, run: _Run) -> JobView:
        """Reads on in a run and publishes its view."""
        if run.glanced:
            run.folded, run.glanced, run.settled = runs.blank(run.folded.folder), False, False
        view = runs.observe(run)
        if view.over:
            # A run that is over holds its GPU memory until its process has gone; one that hangs in
            # its exit is helped out.
            if self._process(run) is None:
                run.stopping_since, run.child, run.settled = 0.0, None, True
            elif not run.stopping_since and self._dispatch:
                run.stopping_since = time.monotonic()
        elif run.stopping_since:
            view = replace(view, state="stopping")
        with self._changed:
            if view != self._views.get(view.id):
                self._views[view.id] = view
                self._mark_change()
        return view

    def _mark_change(self) -> None:
        self.version += 1
        self._changed.notify_all()

    def _process(self, run: _Run) -> psutil.Process | None:
        """The process that runs a job; None where it has ended. A process that does other things
        too, as the command line's, counts only until its job is over."""
        if run.child and run.child.poll() is not None:
            return None
        owner = runs.owner_of(run.folded.folder)
        busy = owner is not None and (owner.dedicated or not run.folded.over)
        return runs.process_of(owner) if busy else None

    def _escalate(self, run: _Run) -> None:
        """Terminates, later kills, the worker of a run that was asked to stop and goes on."""
        process, waited = self._process(run), time.monotonic() - run.stopping_since
        if process is None or process.pid == os.getpid():
            return
        if waited >= self._grace_s and not run.terminated:
            run.terminated = True
            if owner := runs.owner_of(run.folded.folder):
                runs.write_owner(run.folded.folder, replace(owner, forced=True))
            with contextlib.suppress(psutil.Error):
                process.terminate()
        elif waited >= self._grace_s + self._term_s:
            worker.kill_tree(process)

    # --- the queue ---

    def _queue_lock(self) -> FileLock:
        return FileLock(paths.runs_dir() / ".queue.lock")

    def _start_next(self) -> None:
        if self._next() is None:
            return
        with contextlib.suppress(Timeout), self._queue_lock().acquire(blocking=False):
            # another process may have been quicker
            self._refresh()
            if run := self._next():
                self._launch(run)

    def _next(self) -> _Run | None:
        """The run to start now: the first in the queue whose place is free. There are two places,
        the GPU and, for pictures drawn beside it, the CPU."""
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
        # the warm worker, if there is one and it takes the run
        child, self._spare = self._spare, None
        if child and not (child.poll() is None and worker.hand_over(child, folder)):
            worker.dismiss(child)
            child = None
        try:
            if child is None:
                child = worker.spawn_worker(self._command, folder / LOG)
                if not worker.hand_over(child, folder):
                    # the exit code of run.child tells readers why
                    worker.dismiss(child)
            run.child = child
        except (OSError, psutil.Error) as error:
            if child:
                worker.dismiss(child)
            self._end_here(run, Faulted(code="jobs.no_worker", params={"reason": str(error)}),
                           JobEnded(state="failed"))
        self._look(run)

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
