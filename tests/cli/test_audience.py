"""Who watches a job may go at any moment: it ends as it would have, with its own exit code. Real
processes, real pipes, terminals and signals, and a job of the tests that needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from core.jobs import runs
from core.jobs.runs import JobView
from tests.calls import ROOT
from tests.conftest import handling

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, terminals, /dev/full")

PROGRAM = """
import sys
import launcher
from core.jobs import worker
worker.JOBS["train"] = worker.JOBS["train"]._replace(run="tests.fake_job:train")
sys.exit(launcher.run(sys.argv[1:]))
"""


def started(tmp_path: Path, what: str = "", steps: int = 60, **streams: Any
            ) -> subprocess.Popen[bytes]:
    config = tmp_path / "c.yaml"
    config.write_text(f"trigger_word: '{what}'\nepochs: {steps}\noutput_dir: {tmp_path / 'out'}\n")
    command = [sys.executable, "-c", PROGRAM, "train", "--config", str(config)]
    return subprocess.Popen(command, cwd=ROOT, **({"stdin": subprocess.DEVNULL} | streams))


def under_way() -> JobView:
    while not (found := runs.list_runs()) or not found[0].step:
        time.sleep(0.02)
    return found[0]


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    return process.wait(), runs.list_runs()[0].state


@contextlib.contextmanager
def full() -> Iterator[IO[bytes]]:
    with open("/dev/full", "wb") as file:
        yield file


# --- what is written goes nowhere ---

@pytest.mark.parametrize(("what", "code", "state"), [
    ("", 0, "done"), ("crash", 1, "failed"), ("exit", 1, "failed")])
def test_a_log_on_a_full_disk(tmp_path: Path, what: str, code: int, state: str) -> None:
    with full() as file:
        process = started(tmp_path, what, 3, stdout=file, stderr=file)
    assert ended(process) == (code, state)


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    process = started(tmp_path, steps=20, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    assert process.stdout.readline()            # `| head -1`
    process.stdout.close()
    assert ended(process) == (0, "done")


def test_no_streams_at_all(tmp_path: Path) -> None:
    """`>&- 2>&- <&-`, as services and cron jobs may start it."""
    def close() -> None:
        for number in (0, 1, 2):
            os.close(number)
    process = started(tmp_path, steps=3, stdin=None, preexec_fn=close)
    assert ended(process) == (0, "done")


def test_an_answer_is_whole_or_an_error(tmp_path: Path) -> None:
    """Commands that only answer say by their exit code that nobody could read the answer."""
    ended(started(tmp_path, steps=2, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    command = [sys.executable, "-c", PROGRAM, "runs", "list", "--json"]
    with full() as file:
        assert subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.PIPE).returncode
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["ok"]


def test_bad_input_has_its_code_too(tmp_path: Path) -> None:
    with full() as file:
        assert started(tmp_path, steps=0, stdout=file, stderr=file).wait() == 2


# --- who watches goes ---

@pytest.mark.parametrize("number", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends(tmp_path: Path, number: str) -> None:
    kind = getattr(signal, number)
    with handling(kind, signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL):
        process = started(tmp_path, steps=100_000, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
    under_way()
    process.send_signal(kind)
    assert ended(process) == (130, "stopped")
    assert [point.path for point in runs.list_runs()[0].checkpoints] == ["last.ckpt"]


def test_what_nohup_started_goes_on(tmp_path: Path) -> None:
    with handling(signal.SIGHUP, signal.SIG_IGN):
        process = started(tmp_path, steps=60, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    under_way()
    process.send_signal(signal.SIGHUP)
    assert ended(process) == (0, "done")


def test_a_terminal_that_closes(tmp_path: Path) -> None:
    """As ssh does when the line drops: the system sends SIGHUP, and each write fails from then on.
    """
    import fcntl
    import pty
    import termios
    master, slave = pty.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    with handling(signal.SIGHUP, signal.SIG_DFL):
        process = started(tmp_path, steps=100_000, stdin=slave, stdout=slave, stderr=slave,
                          start_new_session=True, preexec_fn=own_terminal)
    os.close(slave)

    def read(until: Callable[[], object]) -> None:
        while not until():
            with contextlib.suppress(OSError):
                os.read(master, 4096)
    over = threading.Event()
    reader = threading.Thread(target=read, args=(over.is_set,))
    reader.start()
    under_way()
    over.set()
    reader.join()
    os.close(master)
    assert ended(process) == (130, "stopped")
    assert [point.path for point in runs.list_runs()[0].checkpoints] == ["last.ckpt"]


# --- a data folder that takes nothing ---

@pytest.mark.parametrize("how", ["a file", "a file inside"])
def test_a_data_folder_that_takes_nothing_is_named(tmp_path: Path, own_home: Path, how: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    home = own_home if how == "a file inside" else tmp_path / "file"
    (home / "runs" if how == "a file inside" else home).write_text("x")
    monkeypatch.setenv("DARKROOM_HOME", str(home))
    process = started(tmp_path, steps=1, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, said = process.communicate()
    last = said.decode().strip().splitlines()[-1]
    assert process.returncode == 2
    assert str(home) in last
    assert "DARKROOM_HOME" in last
    assert "Traceback" not in said.decode()
