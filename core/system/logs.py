"""The app's own log, app.log: five files of 2 MB. Each run's log lies in the run's folder."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from core import __version__, paths

NAME = "app.log"
LARGEST, KEPT = 2_000_000, 4            # bytes; older files beside it, app.log.1 the newest
FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"

_log = logging.getLogger("darkroom")


class _File(RotatingFileHandler):
    """A log that can't be written, or renamed while another process has it open, harms nobody."""

    def doRollover(self) -> None:
        try:
            super().doRollover()
        except OSError:
            self.stream = self._open()

    def handleError(self, record: logging.LogRecord) -> None:
        return


class _Stream(io.TextIOBase):
    """A stream whose lines go to the log: libraries that draw bars, or ask for a terminal, find
    one."""

    encoding = "utf-8"                  # libraries ask for it

    def __init__(self) -> None:
        self._rest, self._lock = "", threading.RLock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            _log.info("%s", line)
        return len(text)


def file() -> Path:
    return paths.log_dir() / NAME


def begin() -> None:
    """From now on the log gets what libraries warn of, threads die of, and the interpreter too.
    A folder that can't be written: nothing is kept."""
    root = logging.getLogger()
    if any(isinstance(handler, _File) for handler in root.handlers):
        return
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        handler = _File(file(), maxBytes=LARGEST, backupCount=KEPT, encoding="utf-8",
                        errors="backslashreplace")
        handler.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(handler)
        _log.setLevel(logging.INFO)
        logging.captureWarnings(True)
        threading.excepthook = _thread_died
        if not faulthandler.is_enabled():
            faulthandler.enable(_crashes())
        _log.info("LoRA Darkroom %s, Python %s", __version__, sys.version.split()[0])


def to_file() -> None:
    """What is missing of stdout and stderr (a program without a console) becomes the log."""
    if sys.stdout is None or sys.stderr is None:
        for handle in range(3):         # closed ones would go to the next file that is opened
            try:
                os.fstat(handle)
            except OSError:
                opened = _crashes() if handle else os.open(os.devnull, os.O_RDONLY)
                if opened == handle:
                    os.set_inheritable(handle, True)
                else:
                    os.dup2(opened, handle)
                    os.close(opened)
        begin()
        stream: Any = _Stream()
        sys.stdout, sys.stderr = sys.stdout or stream, sys.stderr or stream


def _crashes() -> int:
    """A file that stays open, for what C code says when it dies."""
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        return os.open(file().with_suffix(".crash"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    return os.open(os.devnull, os.O_WRONLY)


def tail(lines: int) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(file().read_text("utf-8", "replace").splitlines()[-lines:])
    return ""


def _thread_died(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        _log.error("thread %s", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
        if sys.stderr is not None and not isinstance(sys.stderr, _Stream):
            threading.__excepthook__(args)
