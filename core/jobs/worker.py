"""The worker runs one job to its end and turns exceptions into faults, in its own process, which
owns torch and CUDA, or in the caller's.

Torch comes with the job's own module, which is loaded by name: manager.py imports this file and
must stay free of torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil

from core.errors import Fix, UserError
from core.failures import causes, disk_full, gpu_memory, memory, one_line
from core.jobs.control import Control, Request
from core.jobs.events import Event, Faulted, JobEnded, JobStarted, Note, Step
from core.jobs.journal import CONFIG, LOG, Journal, tail_lines
from core.jobs.runs import REQUESTS, RUN, claim, owner_of
from core.serialization import from_json
from core.system import processes

POLL_S = 0.1                          # between looks for requests
MOST_WAITING = 1000                   # events that a full disk didn't take, the newest ones


class Job(NamedTuple):
    """A kind of job, by names, as importing it would load torch."""

    load: str                         # "module:function": path of config.yaml -> config
    run: str                          # "module:function": config, emit, control -> result


JOBS = {"train": Job("core.config:read_train_config", "core.training.run:train"),
        "caption": Job("captioner.job:load", "captioner.job:caption"),
        "generate": Job("core.config.draw:load", "core.inference.draw:draw")}


def run_job(job: str, config: Any, folder: Path, control: Control,
            listen: Callable[[Event], None] | None = None) -> JobEnded:
    """Runs a job in this process, its events going to the folder's journal and to `listen`.

    `config` None: the folder's config.yaml. Never raises for what the job does, Ctrl-C excepted.
    """
    if (owner := owner_of(folder)) is None or owner.pid != os.getpid():
        claim(folder)
    with Journal(folder) as journal:
        lock, waiting = threading.Lock(), deque[Event](maxlen=MOST_WAITING)

        def emit(event: Event) -> None:
            with lock:
                waiting.append(event)
                # On a full disk events wait, and the job goes on.
                with contextlib.suppress(OSError):
                    while waiting:
                        journal.append(waiting[0])
                        waiting.popleft()
                if listen:
                    listen(event)

        with _requests_served(folder, control, emit):
            end = _attempt(job, config, folder, control, emit)
        emit(end)
        return end


def _attempt(job: str, config: Any, folder: Path, control: Control,
             emit: Callable[[Event], None]) -> JobEnded:
    try:
        entry = _entry(job)
        config = config if config is not None else load_config(job, folder / CONFIG)
        emit(JobStarted(job=job, pid=os.getpid(), config=config.model_dump(mode="json")))
        # torch is imported here, which takes seconds: a stop may have come meanwhile
        run = pkgutil.resolve_name(entry.run)
        result = {"state": "stopped"} if control.stopping else run(config, emit, control) or {}
        state = result.get("state")
        return JobEnded(state=state if state in ("stopped", "unproven") else "done", result=result)
    except KeyboardInterrupt:
        # the second Ctrl+C: nothing is saved, but readers learn that the run is over
        with contextlib.suppress(OSError):
            emit(JobEnded(state="stopped"))
        raise
    except (Exception, SystemExit) as error:
        with contextlib.suppress(OSError):
            emit(faulted(error, config))
        return JobEnded(state="failed")


def load_config(job: str, path: Path) -> Any:
    """The config of a run, read as its kind of job reads it."""
    return pkgutil.resolve_name(_entry(job).load)(path)


def _entry(job: str) -> Job:
    if job not in JOBS:
        raise UserError("jobs.no_such_job", job=job, known=", ".join(JOBS))
    return JOBS[job]


@contextlib.contextmanager
def _requests_served(folder: Path, control: Control, emit: Callable[[Event], None]
                     ) -> Iterator[None]:
    """While open, a thread passes requests from the run's folder to the job. A change of state is
    written to the journal, whoever asked for it (a request, Ctrl+C)."""
    closed = threading.Event()

    def serve() -> None:
        offset, mood = 0, "going"
        while True:
            with contextlib.suppress(OSError):
                lines, offset = tail_lines(folder / REQUESTS, offset)
                for line in lines:
                    # a line of a newer version, or a torn one, asks for nothing
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        request = from_json(line)["ask"]
                        if request in get_args(Request):
                            control.ask(request)
                now = "stopping" if control.stopping else "paused" if control.paused else "going"
                if now != mood:
                    mood = now
                    emit(Note(key=f"jobs.{mood}"))
            if closed.wait(POLL_S):
                return

    thread = threading.Thread(target=serve, name="requests", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


# --- starting one ---

def spawn_worker(command: Sequence[str] | None = None, log: Path | None = None,
                 preload: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Starts a worker that imports the jobs in `preload` and then waits for `hand_over`. It ends
    with this process as long as it has no run, and outlives it once it has one."""
    with open(log or os.devnull, "ab") as output:
        return subprocess.Popen(
            [*(command or processes.command("worker")), *preload], stdin=subprocess.PIPE,
            env=processes.environment(PYTHONUNBUFFERED="1"),
            stdout=output, stderr=subprocess.STDOUT,
            # the terminal's Ctrl-C is not for it
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0)
            | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))


def hand_over(child: subprocess.Popen[bytes], folder: Path) -> bool:
    """Gives a waiting worker its run. Returns False where the worker is dead."""
    assert child.stdin is not None
    # first, so that the run can't be started twice if this process dies in between
    claim(folder, child.pid, dedicated=True)
    try:
        child.stdin.write(json.dumps(str(folder)).encode() + b"\n")
        child.stdin.close()
    except OSError:
        return False
    return child.poll() is None


def dismiss(child: subprocess.Popen[bytes]) -> None:
    """Ends a worker that has no run."""
    if child.stdin:
        with contextlib.suppress(OSError):
            child.stdin.close()
    reap(child)


def reap(child: subprocess.Popen[bytes]) -> None:
    """Waits for a child in the background, so that its end leaves no zombie."""
    threading.Thread(target=child.wait, daemon=True).start()


def main(preload: Sequence[str] = ()) -> int:
    """The child: imports what it may need, waits for a run's folder on stdin, runs it."""
    for job in preload:
        pkgutil.resolve_name(_entry(job).run)
    # by its number, as sys.stdin is None in a windowed app
    with open(0, "rb", closefd=False) as orders:
        line = orders.readline()
    # the app has gone before it gave us a run
    if not line.endswith(b"\n"):
        return 0
    folder = Path(from_json(line))
    # stdout and stderr, C libraries' and crash reports included, go to the run's log.
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for handle in (1, 2):
        os.dup2(log, handle)
    os.close(log)
    sys.stdout, sys.stderr = (
        open(handle, "w", buffering=1, encoding="utf-8", errors="backslashreplace",  # noqa: SIM115
             closefd=False) for handle in (1, 2))
    faulthandler.enable(sys.stderr)
    claim(folder, dedicated=True)
    control = Control()

    def on_terminate(*_: object) -> None:
        # not from the handler itself: the main thread may hold Control's lock right now
        threading.Thread(target=control.ask, args=("stop",), daemon=True).start()

    for name in ("SIGTERM", "SIGHUP"):                      # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_terminate)
    facts = from_json((folder / RUN).read_text("utf-8"))
    # relative paths mean what they meant where the run was started
    with contextlib.suppress(OSError):
        os.chdir(facts["cwd"])
    end = run_job(facts["job"], None, folder, control, _log)
    return 1 if end.state in ("failed", "unproven") else 0


def _log(event: Event) -> None:
    """Prints an event, steps excepted: they are many, and in the journal."""
    if not isinstance(event, Step):
        values = {k: v for k, v in asdict(event).items() if k not in ("at", "details")}
        print(time.strftime("%H:%M:%S", time.localtime(event.at)), event.kind, values)
    if isinstance(event, Faulted):
        print(event.details)


def kill_tree(process: psutil.Process) -> None:
    """Kills a process and its descendants, such as data loaders."""
    tree = [process]
    with contextlib.suppress(psutil.Error):
        tree += process.children(recursive=True)
    for member in tree:
        with contextlib.suppress(psutil.Error):
            member.kill()


# --- what went wrong ---

def faulted(error: BaseException, config: Any = None) -> Faulted:
    """The event for an exception that ended a job."""
    if isinstance(error, UserError):
        code, params, fixes = error.code, error.params, error.fixes
    else:
        code, params, fixes = "jobs.crash", {"reason": one_line(error)}, ()
        # The first cause that is known decides: libraries wrap the errors of others.
        for cause in causes(error):
            if gpu_memory(cause) or memory(cause):
                code = "jobs.out_of_gpu_memory" if gpu_memory(cause) else "jobs.out_of_memory"
                fixes = _lighter(config)
                break
            if disk_full(cause) or isinstance(cause, PermissionError):
                code = "jobs.disk_full" if disk_full(cause) else "jobs.no_permission"
                params = {"file": str(getattr(cause, "filename", None)
                                      or getattr(config, "output_dir", None) or "?")}
                break
    return Faulted(code=code, params=params, fixes=list(fixes),
                   details="".join(traceback.format_exception(error)))


def _lighter(config: Any) -> tuple[Fix, ...]:
    """Changes of the config that need less memory and give the same LoRA."""
    fixes = []
    if (batch := getattr(config, "batch_size", 1)) > 1:
        # half the batch, twice as often: the update sees as many pictures as before
        parts = 2 if batch % 2 == 0 else batch
        changes = {"batch_size": batch // parts}
        if hasattr(config, "gradient_accumulation_steps"):
            changes["gradient_accumulation_steps"] = config.gradient_accumulation_steps * parts
        fixes.append(Fix("smaller_batch", changes))
    if not getattr(config, "gradient_checkpointing", True):
        fixes.append(Fix("checkpointing", {"gradient_checkpointing": True}))
    return tuple(fixes)

