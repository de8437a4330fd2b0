"""Downloads one file: goes on where it broke off, checks the hash, renames the file when whole.

huggingface_hub 2 drops a partial file with the process that began it and compares sizes only; on a
slow line a 5 GB file would never arrive. Its session (proxies, certificates) is used.
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
BUSY = {408, 425, 429, 500, 502, 503, 504}      # HTTP: try again later
LONGEST_WAIT_S = 60.0                   # that a server may ask for


@dataclass(frozen=True, slots=True)
class File:
    """A file of a repository."""

    name: str                           # path inside the repository, with "/"
    size: int                           # bytes
    digest: str                         # hex: SHA-256, or git's SHA-1 of small text files


def network_errors() -> tuple[type[Exception], ...]:
    """The errors of the HTTP library, httpx or another, that the installed huggingface_hub uses."""
    from huggingface_hub import errors
    return (getattr(errors, "HTTPError", OSError), OSError)


def download(file: File, url: str, target: Path, headers: Mapping[str, str],
             progress: Callable[[int], None], control: Control) -> bool:
    """Returns True once `target` holds the checked file, False where a stop was asked for; what
    has come by then stays in `<target>.part` for the next call. `progress` gets the bytes so far.

    Raises UserError `hub.checksum`, `hub.broken_off`, `hub.disk_full_now` or one for the server's
    answer.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f"{target.name}.part")
    while True:
        with Part(path, file) as part:
            continued = part.size > 0
            if not _fill(part, url, headers, progress, control):
                return False
            whole = part.matches()
        if whole:
            os.replace(path, target)
            return True
        path.unlink()
        # The rest of an earlier try may be what is damaged: once more, from the start.
        if not continued:
            raise UserError("hub.checksum", file=file.name)


class Part:
    """The file so far and its hash."""

    def __init__(self, path: Path, remote: File) -> None:
        self.path, self.remote, self.size = path, remote, 0
        self._hash = self._new_hash()

    def __enter__(self) -> Self:
        self._file = open(self.path, "ab+")
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            self._hash.update(chunk)
            self.size += len(chunk)
        if self.size > self.remote.size:
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
            # whatever `progress` was given is in the file, should this process die
            self._file.flush()
        except OSError as error:
            raise disk_fault(error, self.path.parent) from None
        self._hash.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._file.truncate(0)
        self.size, self._hash = 0, self._new_hash()

    def matches(self) -> bool:
        return self.size == self.remote.size and self._hash.hexdigest() == self.remote.digest

    def _new_hash(self) -> Any:
        if len(self.remote.digest) == 64:
            return hashlib.sha256()
        # as git hashes a blob: its length goes before its bytes
        header = f"blob {self.remote.size}\0".encode()
        return hashlib.sha1(header, usedforsecurity=False)


def disk_fault(error: OSError, folder: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("hub.disk_full_now", folder=folder)
    return UserError("hub.unwritable", folder=folder, reason=error.strerror or str(error))


# --- the server's side ---

class _Interrupted(Exception):
    """The transfer broke off and is worth another try, after `wait_s` where the server said so."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def _fill(part: Part, url: str, headers: Mapping[str, str], progress: Callable[[int], None],
          control: Control) -> bool:
    """Fetches what is missing, in as many tries as it takes. Returns False after a stop."""
    failed = 0
    progress(part.size)
    while part.size < part.remote.size:
        before = part.size
        try:
            _append(part, url, headers, progress, control)
        except _Interrupted as error:
            failed = failed + 1 if part.size <= before else 0
            if failed >= TRIES:
                raise UserError("hub.broken_off", file=part.remote.name, reason=error) from None
            until = time.monotonic() + max(BACKOFF_S * 2 ** failed, error.wait_s)
            while time.monotonic() < until and not control.stopping:
                time.sleep(0.05)
        if control.stopping:
            return False
    return True


def _append(part: Part, url: str, headers: Mapping[str, str], progress: Callable[[int], None],
            control: Control) -> None:
    """Reads until the end or a stop. Raises _Interrupted where the transfer broke off."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled
    # identity: a compressed body would have other lengths than the ranges we ask for
    request_headers = {**headers, "Accept-Encoding": "identity"}
    if part.size:
        request_headers["Range"] = f"bytes={part.size}-"
    try:
        with get_session().stream("GET", url, headers=request_headers, timeout=TIMEOUT_S,
                                  follow_redirects=True) as response:
            _check_status(response, part)
            for chunk in response.iter_raw():
                part.write(chunk)
                progress(part.size)
                control.wait_while_paused()
                if control.stopping or part.size >= part.remote.size:
                    return
    except OfflineModeIsEnabled:
        raise UserError("hub.offline") from None
    except network_errors() as error:
        raise _Interrupted(str(error) or type(error).__name__) from None


def _check_status(response: Any, part: Part) -> None:
    status = response.status_code
    if status in BUSY:
        wait = response.headers.get("Retry-After", "").strip()
        raise _Interrupted(f"HTTP {status}",
                           min(float(wait), LONGEST_WAIT_S) if wait.isdigit() else 0.0)
    # range not satisfiable: the server has less than we already hold
    if status == 416:
        part.restart()
        raise _Interrupted("HTTP 416")
    if status in (401, 403):
        raise UserError("hub.file_refused", file=part.remote.name, status=status)
    if status not in (200, 206):
        raise UserError("hub.status", status=status, host=response.url.host)
    # the server knows no ranges and sends the whole file
    if status == 200 and part.size:
        part.restart()
