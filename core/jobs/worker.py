"""The worker: runs one job to its end and turns exceptions into faults; in its own process, which
owns torch and CUDA, or in the caller's.

Torch comes with the job's own module, loaded by name: this file stays light for jobs.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
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

POLL_S = 0.1
MOST_WAITING = 1000                   # events that a full disk didn't take


class Job(NamedTuple):
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
                with contextlib.suppress(OSError):    # a full disk: they wait, the job goes on
                    while waiting:
                        journal.append(waiting[0])
                        waiting.popleft()
                if listen:
                    listen(event)

        with _desk(folder, control, emit):
            end = _attempt(job, config, folder, control, emit)
        emit(end)
        return end


def _attempt(job: str, config: Any, folder: Path, control: Control,
             emit: Callable[[Event], None]) -> JobEnded:
    try:
        entry = _entry(job)
        config = config if config is not None else load_config(job, folder / CONFIG)
        emit(JobStarted(job=job, pid=os.getpid(), config=config.model_dump(mode="json")))
        run = _named(entry.run)                       # torch comes in here
        result = {"state": "stopped"} if control.stopping else run(config, emit, control) or {}
        told = result.get("state")
        return JobEnded(state=told if told in ("stopped", "unproven") else "done", result=result)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            emit(JobEnded(state="stopped"))
        raise
    except (Exception, SystemExit) as error:
        with contextlib.suppress(OSError):
            emit(faulted(error, config))
        return JobEnded(state="failed")


def load_config(job: str, path: Path) -> Any:
    return _named(_entry(job).load)(path)


def _entry(job: str) -> Job:
    if job not in JOBS:
        raise UserError("jobs.no_such_job", job=job, known=", ".join(JOBS))
    return JOBS[job]


def _named(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


@contextlib.contextmanager
def _desk(folder: Path, control: Control, emit: Callable[[Event], None]) -> Iterator[None]:
    """While open: requests go from the folder to the job, and the journal hears what they changed,
    whoever asked."""
    closed = threading.Event()

    def serve() -> None:
        offset, mood = 0, "going"
        while True:
            with contextlib.suppress(OSError):
                lines, offset = tail_lines(folder / REQUESTS, offset)
                for line in lines:
                    if request := _request(line):
                        control.ask(request)
                now = "stopping" if control.stopping else "paused" if control.paused else "going"
                if now != mood:
                    mood = now
                    emit(Note(key=f"jobs.{mood}"))
            if closed.wait(POLL_S):
                return

    thread = threading.Thread(target=serve, name="desk", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


def _request(line: str) -> Request | None:
    try:
        word = from_json(line)["ask"]
    except (ValueError, KeyError, TypeError):
        return None
    return word if word in get_args(Request) else None


# --- starting one ---

def spawn_worker(command: Sequence[str] | None = None, log: Path | None = None,
                 preload: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """A worker that waits for `hand_over`, having imported the jobs in `preload`. It outlives
    this process once it has a run, and ends with it before."""
    with open(log or os.devnull, "ab") as output:
        return subprocess.Popen(
            [*(command or processes.command("worker")), *preload], stdin=subprocess.PIPE,
            env=processes.environment(PYTHONUNBUFFERED="1"),
            stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,                       # the terminal's Ctrl-C is not for it
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0)
            | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))


def hand_over(child: subprocess.Popen[bytes], folder: Path) -> bool:
    """Gives a waiting worker its run; False: it is dead. The run is claimed first, so that it
    can't be started twice if this process dies in between."""
    assert child.stdin is not None
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
    """Leaves no zombie when a child that nobody watches any longer ends."""
    threading.Thread(target=child.wait, daemon=True).start()


def main(preload: Sequence[str] = ()) -> int:
    """The child: imports what it may need, waits for a run's folder on stdin, runs it."""
    for job in preload:
        _named(_entry(job).run)
    with open(0, "rb", closefd=False) as orders:          # sys.stdin is None in a windowed app
        line = orders.readline()
    if not line.endswith(b"\n"):
        return 0                                          # the app has gone and nothing was asked
    folder = Path(from_json(line))
    _write_log(folder / LOG)
    claim(folder, dedicated=True)
    control = Control()

    def on_terminate(*_: object) -> None:
        # not from the handler itself: the main thread may hold Control's lock right now
        threading.Thread(target=control.ask, args=("stop",), daemon=True).start()

    signal.signal(signal.SIGTERM, on_terminate)
    facts = from_json((folder / RUN).read_text("utf-8"))
    with contextlib.suppress(OSError):
        os.chdir(facts["cwd"])                            # relative paths mean what they meant
    end = run_job(facts["job"], None, folder, control, _log)
    return 1 if end.state in ("failed", "unproven") else 0


def _write_log(path: Path) -> None:
    """stdout and stderr, C libraries' and crash reports included, go to the run's log."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for handle in (1, 2):
        os.dup2(log, handle)
    os.close(log)
    sys.stdout, sys.stderr = (
        open(handle, "w", buffering=1, encoding="utf-8", errors="backslashreplace",  # noqa: SIM115
             closefd=False) for handle in (1, 2))
    faulthandler.enable(sys.stderr)


def _log(event: Event) -> None:
    if not isinstance(event, Step):
        values = {k: v for k, v in asdict(event).items() if k not in ("at", "details")}
        print(time.strftime("%H:%M:%S", time.localtime(event.at)), event.kind, values)
    if isinstance(event, Faulted):
        print(event.details)


def kill_tree(process: psutil.Process) -> None:
    tree = [process]
    with contextlib.suppress(psutil.Error):
        tree += process.children(recursive=True)
    for member in tree:
        with contextlib.suppress(psutil.Error):
            member.kill()


# --- what went wrong ---

def faulted(error: BaseException, config: Any = None) -> Faulted:
    details = "".join(traceback.format_exception(error))
    code, params, fixes = _recognise(error, config)
    return Faulted(code=code, params=params, fixes=[asdict(fix) for fix in fixes], details=details)


def _recognise(error: BaseException, config: Any) -> tuple[str, dict[str, Any], tuple[Fix, ...]]:
    if isinstance(error, UserError):
        return error.code, error.params, error.fixes
    reason = one_line(error)
    for cause in causes(error):
        if gpu_memory(cause):
            return "jobs.out_of_gpu_memory", {"reason": reason}, _lighter(config)
        if memory(cause):
            return "jobs.out_of_memory", {"reason": reason}, _lighter(config)
        if disk_full(cause):
            return "jobs.disk_full", {"file": _file(cause, config)}, ()
        if isinstance(cause, PermissionError):
            return "jobs.no_permission", {"file": _file(cause, config)}, ()
    return "jobs.crash", {"reason": reason}, ()


def _file(error: BaseException, config: Any) -> str:
    return str(getattr(error, "filename", None) or getattr(config, "output_dir", None) or "?")


def _lighter(config: Any) -> tuple[Fix, ...]:
    """Changes that need less memory and give the same LoRA."""
    fixes = []
    if (batch := getattr(config, "batch_size", 1)) > 1:
        parts = 2 if batch % 2 == 0 else batch
        changes = {"batch_size": batch // parts}
        if hasattr(config, "gradient_accumulation_steps"):
            changes["gradient_accumulation_steps"] = config.gradient_accumulation_steps * parts
        fixes.append(Fix("smaller_batch", changes))
    if not getattr(config, "gradient_checkpointing", True):
        fixes.append(Fix("checkpointing", {"gradient_checkpointing": True}))
    return tuple(fixes)

