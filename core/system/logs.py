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
LARGEST = 2_000_000                     # bytes of one file
KEPT = 4                                # older files beside it, app.log.1 the newest
FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"

_log = logging.getLogger("darkroom")


class _File(RotatingFileHandler):
    """Logging never disturbs the program: a log that can't be written is lost, one that can't be
    renamed (Windows, another process has it open) grows on."""

    def doRollover(self) -> None:
        try:
            super().doRollover()
        except OSError:
            self.stream = self._open()

    def handleError(self, record: logging.LogRecord) -> None:
        return


class _Stream(io.TextIOBase):
    """A stream whose lines go to the log, for libraries that draw bars or ask for a terminal."""

    # libraries ask for it
    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest, self._lock = "", threading.RLock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            # a progress bar ends its lines with \r
            *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            _log.info("%s", line)
        return len(text)


def file() -> Path:
    return paths.log_dir() / NAME


def begin() -> None:
    """Starts the log: warnings of libraries, exceptions that end threads, crashes of C code.

    Where its folder can't be written nothing is logged.
    """
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
    """In a program without a console, makes the log of its missing stdout and stderr."""
    if sys.stdout is None or sys.stderr is None:
        # The next file that is opened would get a closed handle's number, and with it all that C
        # code prints.
        for handle in range(3):
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
    """A file that stays open, for what C code prints when it crashes. Returns its handle."""
    with contextlib.suppress(OSError):
        file().parent.mkdir(parents=True, exist_ok=True)
        return os.open(file().with_suffix(".crash"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    return os.open(os.devnull, os.O_WRONLY)


def tail(lines: int, path: Path | None = None) -> str:
    """The last lines of a log (None: the app's own); "" where there is none."""
    with contextlib.suppress(OSError), open(path or file(), "rb") as log:
        # 400 bytes a line are enough for most; the log of a run may have hundreds of MB
        start = max(0, log.seek(0, os.SEEK_END) - 400 * lines)
        log.seek(start)
        found = log.read().decode("utf-8", "replace").splitlines()
        # the first is cut: half of a user's name is not known as one and would go into a report
        return "\n".join(found[1 if start else 0:][-lines:])
    return ""


def _thread_died(args: threading.ExceptHookArgs) -> None:
    """threading.excepthook: to the log, and to a stderr that is not the log itself."""
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        _log.error("thread %s", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
        if sys.stderr is not None and not isinstance(sys.stderr, _Stream):
            threading.__excepthook__(args)
