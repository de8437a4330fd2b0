"""What each picture file is like, measured once in threads and kept in cache/looks.sqlite.

A file is measured again when its size or time of change differs. The table in memory has the same
packed records as the disk, a few hundred bytes for each picture: 100,000 fit in 40 MB.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Generator, Sequence
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from core import paths, threads
from core.dataset import images
from core.dataset.buckets import Point
from core.dataset.checks import measures, saliency
from core.dataset.curation import Choices
from core.dataset.image_folder import Dataset
from core.errors import UserError
from core.jobs.control import Control

VERSION = 1                     # of RECORD and of what is measured
WORK_SIDE = 1024                # px; larger pictures are measured at half, a quarter ... of it
SAVED_EVERY = 500               # pictures: what an interruption may cost

RECORD = np.dtype([
    ("width", "<i4"), ("height", "<i4"),        # px, as seen
    ("format", "S8"),                           # "JPEG", as the content says
    ("digest", "V16"),                          # of the file's bytes
    ("alpha", "?"), ("animated", "?"), ("turned", "?"),
    ("quality", "u1"),                          # of a JPEG, 1..100; 0: no JPEG
    ("blocking", "<f4"),                        # see measures.blocking
    ("detail", "<f4"),                          # see measures.detail; of the whole file
    ("contrast", "<f4"),                        # deviation of grey, 0..128
    ("hash", "<u8"),                            # see measures.perceptual_hash
    ("colours", "u1", (8, 8, 3)),               # the picture at 8 x 8 px, RGB
    ("borders", "<i4", (4,)),                   # px of the whole file: left, top, right, bottom
    ("subject", "<f4", (4,)),                   # see saliency.salient_box; nan: none
])
Table = NDArray[Any]                            # of RECORD
T = TypeVar("T")


class Stopped(Exception):
    """The user stopped before there was anything to save; what was measured is kept."""


def measure(path: Path) -> bytes | UserError:
    """Returns the bytes of a file's RECORD, or what keeps it from being decoded."""
    try:
        # The whole file once; a large JPEG comes at reduced size.
        return _record(path, images.decode(path, least=WORK_SIDE)).tobytes()
    except UserError as fault:
        return fault
    except Exception as error:
        # A palette that is too short, for example.
        return images.damage(path, error)


def _record(path: Path, decoded: images.Decoded) -> Table:
    record = np.zeros((), RECORD)
    record["width"], record["height"] = decoded.size
    with open(path, "rb") as file:
        record["digest"] = file_digest(file, lambda: blake2b(digest_size=16)).digest()
    record["format"] = decoded.format.encode()
    record["animated"], record["turned"] = decoded.animated, decoded.turned
    record["alpha"] = images.is_see_through(decoded.image)
    record["quality"] = measures.jpeg_quality(decoded.tables) if decoded.tables else 0
    # From here on by pixels: those of the file, or a JPEG's at 1/2, 1/4 or 1/8.
    image = images.plain(decoded.image)
    luma = image.convert("L")
    grey = np.asarray(luma)
    scale = decoded.size[0] / image.width
    record["contrast"] = measures.deviation(luma)
    # Blocks are 8 px wide at the file's own scale only.
    record["blocking"] = measures.blocking(grey) if image.size == decoded.size else 1.0
    record["borders"] = [round(side * scale) for side in measures.borders(grey)]
    factor = max(min(image.size) // WORK_SIDE, 1)
    if factor > 1:
        grey = np.asarray(image.reduce(factor).convert("L"))
    detail = measures.detail(grey)
    # A picture that is sharp at the scale it was measured at may be so above, too.
    record["detail"] = detail if detail == 1.0 else detail / (scale * factor)
    thumbnail = measures.small(image, saliency.SIDE)
    record["hash"] = measures.perceptual_hash(
        np.asarray(measures.small(thumbnail.convert("L"), measures.HASH_SIDE)))
    record["colours"] = np.asarray(measures.small(thumbnail, 8))
    record["subject"] = saliency.salient_box(np.asarray(thumbnail)) or (np.nan,) * 4
    return record


def subject_of(table: Table, index: int) -> saliency.Box | None:
    """Returns the subject of the picture in a row; None where nothing stands out."""
    left, top, right, bottom = table["subject"][index].tolist()
    return None if np.isnan(left) else (left, top, right, bottom)


# --- many files -------------------------------------------------------------------------------

# A file, its record, and whether it was measured now and not taken from the cache.
_Measured = tuple[Path, bytes | UserError, bool]


class Looks:
    """Measures pictures, or takes what the cache has.

    `look_all` is for image_folder.scan; afterwards `table` has the record of each picture that
    could be read, in their order.
    """

    def __init__(self, control: Control | None = None) -> None:
        self.control = control
        self.measured = 0                   # files that the cache lacked
        self._records = bytearray()

    @property
    def table(self) -> Table:
        return np.frombuffer(bytes(self._records), RECORD)

    def look_all(self, files: Sequence[Path]) -> Generator[images.Look | UserError, None, None]:
        """Yields what a scan needs to know of each file. Raises Stopped where the user stops."""
        with Store() as store, contextlib.closing(threads.in_order(
                lambda path: (path, measure(path), True), files, "looks", store.known)) as results:
            for path, record, fresh in results:
                if self.control is not None and self.control.stopping:
                    raise Stopped
                if isinstance(record, UserError):
                    yield record
                    continue
                if fresh:
                    self.measured += 1
                    store.put(path, record)
                self._records += record
                row = np.frombuffer(record, RECORD)[0]
                yield (int(row["width"]), int(row["height"])), bool(row["alpha"])


class Store:
    """The records in cache/looks.sqlite.

    A store that is damaged is made anew. Where none can be kept (a full disk, a locked folder),
    nothing is known and nothing is kept, but measuring goes on.
    """

    def __init__(self) -> None:
        self.path = paths.cache_dir() / "looks.sqlite"
        self.db: sqlite3.Connection | None = None
        self.added = 0

    def __enter__(self) -> Self:
        images.prepare()
        for attempt in (1, 2):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.db = db = sqlite3.connect(self.path, timeout=10)
                if db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                    db.execute("DROP TABLE IF EXISTS looks")
                    db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute("CREATE TABLE IF NOT EXISTS looks (path BLOB PRIMARY KEY, "
                           "changed INTEGER, size INTEGER, record BLOB) WITHOUT ROWID")
                db.commit()
                break
            except (OSError, sqlite3.Error) as error:
                self._close()
                # The file is no database of ours. Subclasses of this error say that it is locked.
                if attempt == 1 and type(error) is sqlite3.DatabaseError:
                    with contextlib.suppress(OSError):
                        self.path.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._try(lambda db: db.commit())
        self._close()

    def known(self, path: Path) -> _Measured | None:
        """Returns the record of a file that hasn't changed since; else None."""
        try:
            stat = path.stat()
        except OSError:
            return None
        row = self._try(lambda db: db.execute(
            "SELECT record FROM looks WHERE path = ? AND changed = ? AND size = ?",
            (os.fsencode(path), stat.st_mtime_ns, stat.st_size)).fetchone())
        return (path, row[0], False) if row and len(row[0]) == RECORD.itemsize else None

    def put(self, path: Path, record: bytes) -> None:
        # The file may just have gone.
        with contextlib.suppress(OSError):
            stat = path.stat()
            self._try(lambda db: db.execute(
                "INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?)",
                (os.fsencode(path), stat.st_mtime_ns, stat.st_size, record)))
            self.added += 1
            if self.added % SAVED_EVERY == 0:
                self._try(lambda db: db.commit())

    def _try(self, call: Callable[[sqlite3.Connection], T]) -> T | None:
        try:
            return call(self.db) if self.db is not None else None
        except sqlite3.Error:
            self._close()
            return None

    def _close(self) -> None:
        if self.db is not None:
            with contextlib.suppress(sqlite3.Error):
                self.db.close()
        self.db = None


def focus_points(data: Dataset, chosen: Choices, table: Table | None = None) -> list[Point | None]:
    """Returns the point about which each picture is cut.

    That is the one set by hand; else, where `table` (RECORD rows of the same pictures) is given,
    the centre of the subject; else None, the centre of the picture.
    """
    points: list[Point | None] = []
    for index, name in enumerate(data.names):
        point = chosen.focus.get(name)
        if point is None and table is not None and (box := subject_of(table, index)):
            point = saliency.centre(box)
        points.append(point)
    return points
