"""Changes of captions, as swaps of what a place holds: carried out only where it still holds what
was read, so that an edit from elsewhere is never overwritten.

Between that look and the rename lies a moment that no file system closes; it is milliseconds
long. Every file is replaced whole.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from captioner.captions.table import Table
from core import paths
from core.errors import UserError

Kind = Literal["sidecar", "row", "table"]

THREADS = 8                                 # a sidecar's write mostly waits for the disk


@dataclass(frozen=True, slots=True)
class Place:
    """A file of its own, a row of a table, or a table's beginning."""

    file: Path                              # absolute
    kind: Kind = "sidecar"
    row: str = ""                           # the picture as the row names it


@dataclass(frozen=True, slots=True)
class Swap:
    picture: str                            # relative, with slashes; "" for a table's beginning
    place: Place
    before: bytes | None                    # the file's bytes or the row's text; None: not there
    after: bytes | None

    @property
    def back(self) -> Swap:
        return Swap(self.picture, self.place, self.after, self.before)


def perform(swaps: Sequence[Swap]) -> list[Swap]:
    """Carries out what fits and returns what doesn't, because a place holds something else by
    now. A place that holds the new content already counts as done. Files are replaced whole.

    Raises UserError where a file can't be written; files written before it stay written.
    """
    files: dict[Path, list[Swap]] = {}
    for swap in swaps:
        files.setdefault(swap.place.file, []).append(swap)
    if len(files) < THREADS:
        return [swap for group in files.values() for swap in _change_file(group)]
    with ThreadPoolExecutor(THREADS, "captions") as pool:
        return [swap for left in pool.map(_change_file, files.values()) for swap in left]


def check_writable(folders: Iterable[Path]) -> None:
    """A file is made in each folder and taken away: permissions alone don't tell."""
    for folder in sorted(set(folders)):
        try:
            handle, name = tempfile.mkstemp(prefix=".darkroom.", suffix=".tmp", dir=folder)
            try:
                os.write(handle, b"x" * 64)
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            raise cannot_write(error, folder) from None


def cannot_write(error: OSError, file: Path) -> UserError:
    name = file if str(error.filename or "").endswith(".tmp") else error.filename or file
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError("captions.disk_full", file=name)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError("captions.read_only", file=name)
    return UserError("captions.not_written", file=name, reason=error.strerror or error)


def _change_file(swaps: Sequence[Swap]) -> list[Swap]:
    """All swaps of one file, in order; those that don't fit come back."""
    file = Path(os.path.realpath(swaps[0].place.file))      # a link stays a link
    if file.suffix.lower() != swaps[0].place.file.suffix.lower():
        raise UserError("captions.odd_link", file=swaps[0].place.file, target=file)
    left: list[Swap] = []
    try:
        old = data = _bytes(file)
        for of_rows, group in groupby(swaps, lambda swap: swap.place.kind == "row"):
            if of_rows:
                data, misfits = _change_rows(file, data, list(group))
                left += misfits
                continue
            for swap in group:
                if data == swap.before:
                    data = swap.after
                elif data != swap.after:
                    left.append(swap)
        if data != old:
            _replace(file, data)
    except OSError as error:
        raise cannot_write(error, file) from error
    return left


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _change_rows(file: Path, data: bytes | None,
                 swaps: Sequence[Swap]) -> tuple[bytes | None, list[Swap]]:
    if data is None:
        return None, [swap for swap in swaps if swap.after is not None]
    try:
        table = Table(file, data)
    except (ValueError, UserError):             # somebody made something else of it
        return data, list(swaps)
    before = table.to_bytes()
    left = [swap for swap in swaps if not _change_row(table, swap)]
    after = table.to_bytes()
    return data if before == after else after, left


def _change_row(table: Table, swap: Swap) -> bool:
    """False: the row is another one by now."""
    before, after = (None if text is None else text.decode("utf-8")
                     for text in (swap.before, swap.after))
    rows = table.rows(swap.place.row)
    record = next((record for record in rows if record.raw == before), None)
    if record is not None and after is None:
        table.remove(record)
    elif record is not None and after is not None:
        record.raw = after
    elif before is None and after is not None and not rows:
        table.add(after, swap.place.row)
    else:                                   # done before, or not to be done
        return any(record.raw == after for record in rows) or (after is None and not rows)
    return True


def _replace(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink(missing_ok=True)
        return
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        if not mode & stat.S_IWUSR:         # replaced it could be; its owner said no
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    except FileNotFoundError:
        mode = None
    paths.write_atomic(file, data)
    if mode is not None and os.name != "nt":
        os.chmod(file, mode)
