"""Changes of captions, each as a swap of what a place held for what it shall hold.

A swap is only carried out where the place still holds what was read, so that an edit from
elsewhere is never overwritten. (Between that check and the rename lies a moment of milliseconds
that no file system closes.) Every file is replaced as a whole.
"""

from __future__ import annotations

import contextlib
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

THREADS = 8                                 # writing a sidecar mostly waits for the disk


@dataclass(frozen=True, slots=True)
class Place:
    """A sidecar, a row of a table, or the beginning of a table."""

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
    """Carries out the swaps that fit and returns the others, whose places hold something else by
    now. A place that holds the new content already counts as done.

    Raises UserError where a file can't be written; files written before it stay written.
    """
    files: dict[Path, list[Swap]] = {}
    for swap in swaps:
        files.setdefault(swap.place.file, []).append(swap)
    if len(files) < THREADS:
        return [swap for file_swaps in files.values() for swap in _change_file(file_swaps)]
    with ThreadPoolExecutor(THREADS, "captions") as pool:
        return [swap for left in pool.map(_change_file, files.values()) for swap in left]


def check_writable(folders: Iterable[Path]) -> None:
    """Makes a file in each folder and deletes it: permissions alone don't tell. Raises UserError.
    """
    for folder in sorted(set(folders)):
        try:
            with tempfile.NamedTemporaryFile(prefix=".darkroom.", suffix=".tmp", dir=folder,
                                             buffering=0) as file:
                file.write(b"x" * 64)
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
    """Carries out the swaps of one file, in order, and returns those that don't fit."""
    # The target of a link is replaced, so that the link stays a link.
    file = Path(os.path.realpath(swaps[0].place.file))
    if file.suffix.lower() != swaps[0].place.file.suffix.lower():
        raise UserError("captions.odd_link", file=swaps[0].place.file, target=file)
    left: list[Swap] = []
    old: bytes | None = None
    try:
        with contextlib.suppress(FileNotFoundError):
            old = file.read_bytes()
        data = old
        for of_rows, group in groupby(swaps, lambda swap: swap.place.kind == "row"):
            if of_rows:
                data, misfits = _change_rows(file, data, list(group))
                left += misfits
                continue
            for swap in group:
                if data == swap.before:
                    data = swap.after
                # A swap that was carried out before counts as done.
                elif data != swap.after:
                    left.append(swap)
        if data != old:
            _replace(file, data)
    except OSError as error:
        raise cannot_write(error, file) from error
    return left


def _change_rows(file: Path, data: bytes | None,
                 swaps: Sequence[Swap]) -> tuple[bytes | None, list[Swap]]:
    if data is None:
        return None, [swap for swap in swaps if swap.after is not None]
    try:
        table = Table(file, data)
    except (ValueError, UserError):
        # Somebody has made something else of the file.
        return data, list(swaps)
    original = table.to_bytes()
    left = []
    for swap in swaps:
        before, after = (None if text is None else text.decode("utf-8")
                         for text in (swap.before, swap.after))
        rows = table.rows(swap.place.row)
        record = next((record for record in rows if record.raw == before), None)
        done = any(record.raw == after for record in rows) or (after is None and not rows)
        if record is not None and after is None:
            table.remove(record)
        elif record is not None and after is not None:
            record.raw = after
        elif before is None and after is not None and not rows:
            table.add(after, swap.place.row)
        elif not done:
            left.append(swap)
    changed = table.to_bytes()
    return data if original == changed else changed, left


def _replace(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink(missing_ok=True)
        return
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        # The folder's permissions would allow the replacement; the owner of the file said no.
        if not mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    except FileNotFoundError:
        mode = None
    paths.write_atomic(file, data)
    if mode is not None and os.name != "nt":
        os.chmod(file, mode)
