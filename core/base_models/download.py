"""One file from a server: continues where it broke off, checked by its hash, renamed when whole.

huggingface_hub 2 throws a partial file away with the process that began it and compares sizes
only; on a slow line a 5 GB file would never arrive. Its session (proxies, certificates) is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from core.errors import UserError
from core.jobs.control import Control

CHUNK = 1024 * 1024                     # bytes read at once
TIMEOUT_S = 10.0                        # without a byte; a stop is heard within it
TRIES = 5                               # in a row without progress
BACKOFF_S = 0.5                         # doubles with each of them
BUSY = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Wanted:
    name: str                           # path inside the repository, with "/"
    url: str
    size: int                           # bytes
    digest: str                         # hex: SHA-256 of the bytes, or the SHA-1 of the git blob


def network_errors() -> tuple[type[Exception], ...]:
    """Those of httpx or httpx2, whichever the installed huggingface_hub uses."""
    from huggingface_hub import errors
    return (getattr(errors, "HTTPError", OSError), OSError)


def download(wanted: Wanted, target: Path, headers: Mapping[str, str],
             told: Callable[[int], None], control: Control) -> bool:
    """True once `target` holds the checked file, False where a stop was asked for; what has come
    by then stays in `<target>.part` for the next call. `told` gets the bytes that are there.

    Raises UserError `hub.checksum`, `hub.broken_off`, `hub.disk_full` or one for the server's
    answer.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f"{target.name}.part")
    while True:
        with Part(path, wanted) as part:
            continued = part.size > 0
            if not _filled(part, headers, told, control):
                return False
            whole = part.matches()
        if whole:
            os.replace(path, target)
            return True
        path.unlink()
        if not continued:               # a damaged rest of an earlier try gets a second chance
            raise UserError("hub.checksum", file=wanted.name)


class Part:
    """The file so far and the hash of it."""

    def __init__(self, path: Path, wanted: Wanted) -> None:
        self.path, self.wanted, self.size = path, wanted, 0
        self._hash = self._new_hash()

    def __enter__(self) -> Self:
        self._file = open(self.path, "ab+")
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            self._hash.update(chunk)
            self.size += len(chunk)
        if self.size > self.wanted.size:
            self.restart()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None
                 ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, chunk: bytes) -> None:
        try:
            self._file.write(chunk)
            self._file.flush()          # what was told is in the file, should this process die
        except OSError as error:
            raise disk_fault(error, self.path.parent) from None
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._file.truncate(0)
        self.size, self._hash = 0, self._new_hash()

    def matches(self) -> bool:
        return self.size == self.wanted.size and self._hash.hexdigest() == self.wanted.digest

    def _new_hash(self) -> Any:
        if len(self.wanted.digest) == 64:
            return hashlib.sha256()
        header = f"blob {self.wanted.size}\0".encode()      # as git hashes a blob
        return hashlib.sha1(header, usedforsecurity=False)


def disk_fault(error: OSError, folder: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("hub.disk_full_now", folder=folder)
    return UserError("hub.unwritable", folder=folder, reason=error.strerror or str(error))


# --- the server's side ---

class _Broken(Exception):
    """Worth another try, after `wait_s` where the server named a time."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def _filled(part: Part, headers: Mapping[str, str], told: Callable[[int], None],
            control: Control) -> bool:
    failed = 0
    told(part.size)
    while part.size < part.wanted.size:
        before = part.size
        try:
            _append(part, headers, told, control)
        except _Broken as error:
            failed = failed + 1 if part.size <= before else 0
            if failed >= TRIES:
                raise UserError("hub.broken_off", file=part.wanted.name, reason=error) from None
            if not _waited(max(BACKOFF_S * 2 ** failed, error.wait_s), control):
                return False
        if control.stopping:
            return False
    return True


def _append(part: Part, headers: Mapping[str, str], told: Callable[[int], None],
            control: Control) -> None:
    """Reads until the end, a stop or a break; a break is raised as _Broken."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled
    asked = {**headers, "Accept-Encoding": "identity"}
    if part.size:
        asked["Range"] = f"bytes={part.size}-"
    try:
        with get_session().stream("GET", part.wanted.url, headers=asked, timeout=TIMEOUT_S,
                                  follow_redirects=True) as response:
            _judge(response, part)
            for chunk in response.iter_raw():     # as it comes in
                part.write(chunk)
                told(part.size)
                control.wait_while_paused()
                if control.stopping or part.size >= part.wanted.size:
                    return
    except OfflineModeIsEnabled:
        raise UserError("hub.offline") from None
    except network_errors() as error:
        raise _Broken(str(error) or type(error).__name__) from None


def _judge(response: Any, part: Part) -> None:
    status = response.status_code
    if status in BUSY:
        raise _Broken(f"HTTP {status}", _seconds(response.headers.get("Retry-After")))
    if status == 416:                   # it has less than we already hold
        part.restart()
        raise _Broken("HTTP 416")
    if status in (401, 403):
        raise UserError("hub.file_refused", file=part.wanted.name, status=status)
    if status not in (200, 206):
        raise UserError("hub.status", status=status, host=response.url.host)
    if status == 200 and part.size:     # the server knows no ranges
        part.restart()


def _seconds(text: str | None) -> float:
    """Of a Retry-After header; at most a minute."""
    return min(float(text), 60.0) if text and text.strip().isdigit() else 0.0


def _waited(seconds: float, control: Control) -> bool:
    """False where a stop came meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not control.stopping:
        time.sleep(0.05)
    return not control.stopping
