"""The app's own log, for a program that has no console to write to."""

from __future__ import annotations

import contextlib
import os
import sys

from core import paths

NAME = "app.log"
LARGEST, KEPT = 2_000_000, 4            # bytes; older files beside it, app.log.1 the newest


def to_file() -> None:
    """What is missing of stdout and stderr becomes the log; libraries that draw bars or ask for a
    terminal find a stream. A folder that can't be written: nowhere."""
    try:
        folder = paths.log_dir()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        with contextlib.suppress(OSError):
            _rotate(path)
        stream = open(path, "a", buffering=1, encoding="utf-8",  # noqa: SIM115
                      errors="backslashreplace")
    except OSError:
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for handle in range(3):             # closed ones would go to the next file that is opened
        try:
            os.fstat(handle)
        except OSError:
            os.dup2(stream.fileno(), handle)
    sys.stdout, sys.stderr = sys.stdout or stream, sys.stderr or stream


def _rotate(path: os.PathLike[str]) -> None:
    if not os.path.exists(path) or os.path.getsize(path) < LARGEST:
        return
    for number in range(KEPT, 0, -1):
        older = f"{path}.{number - 1}" if number > 1 else path
        if os.path.exists(older):
            os.replace(older, f"{path}.{number}")
