"""What each picture file is like, measured once in threads and kept in cache/looks.sqlite.

A file is looked at again when its size or time of change differs. The table in memory is the
same packed record as on disk, a few hundred bytes a picture: 100,000 fit in 40 MB.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core import paths, threads
from core.dataset import images
from core.dataset.buckets import Point
from core.dataset.checks import measures, saliency
from core.dataset.curation import Choices
from core.dataset.image_folder import Dataset, relative_name
from core.dataset.images import Look
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
    ("subject", "<f4", (4,)),                   # see focus.salient_box; nan: none
])
Table = NDArray[Any]                            # of RECORD
T = TypeVar("T")


class Stopped(Exception):
    """The user stopped; what was measured is kept."""


def measure(path: Path) -> bytes | UserError:
    """A RECORD's bytes; decodes the whole file once, a large JPEG at reduced size."""
    try:
        decoded = images.decode(path, least=WORK_SIDE)
        return _measured(path, decoded).tobytes()
    except UserError as fault:
        return fault
    except Exception as error:              # a palette that is too short, for example
        return images.damage(path, error)


def _measured(path: Path, decoded: images.Decoded) -> Table:
    record = np.zeros((), RECORD)
    record["width"], record["height"] = decoded.size
    record["format"], record["digest"] = decoded.format.encode(), _digest(path)
    record["animated"], record["turned"] = decoded.animated, decoded.turned
    record["alpha"] = images.is_see_through(decoded.image)
    record["quality"] = measures.jpeg_quality(decoded.tables) if decoded.tables else 0
    image = images.plain(decoded.image)
    _measure_full(record, image, whole=image.size == decoded.size)
    _measure_small(record, image)
    return record


def _measure_full(record: Table, image: Image.Image, whole: bool) -> None:
    """What needs pixels: at the file's own scale if `whole`, else at 1/2, 1/4 or 1/8."""
    luma = image.convert("L")
    grey = np.asarray(luma)
    scale = int(record["width"]) / image.width
    record["contrast"] = measures.deviation(luma)
    record["blocking"] = measures.blocking(grey) if whole else 1.0
    record["borders"] = [round(side * scale) for side in measures.borders(grey)]
    factor = max(min(image.size) // WORK_SIDE, 1)
    if factor > 1:
        grey = np.asarray(image.reduce(factor).convert("L"))
    found = measures.detail(grey)
    # a picture that is sharp at the scale it was measured at may be so above, too
    record["detail"] = found if found == 1.0 else found / (scale * factor)


def _measure_small(record: Table, image: Image.Image) -> None:
    thumbnail = measures.small(image, saliency.SIDE)
    record["hash"] = measures.perceptual_hash(
        np.asarray(measures.small(thumbnail.convert("L"), measures.HASH_SIDE)))
    record["colours"] = np.asarray(measures.small(thumbnail, 8))
    record["subject"] = saliency.salient_box(np.asarray(thumbnail)) or (np.nan,) * 4


def subject_of(table: Table, index: int) -> saliency.Box | None:
    """Of the picture in a row of the table; None where nothing stands out."""
    left, top, right, bottom = table["subject"][index].tolist()
    return None if np.isnan(left) else (left, top, right, bottom)


def _digest(path: Path) -> bytes:
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


# --- many files -------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class _Found:
    path: Path
    record: bytes | UserError
    fresh: bool                             # measured now, not taken from the cache


class Looks:
    """Measures pictures, or takes what the cache has. `look_all` is what dataset.scan() calls;
    afterwards `table` has a record of each picture that could be read, in their order."""

    def __init__(self, control: Control | None = None) -> None:
        self.control = control
        self.measured = 0                   # files that the cache lacked
        self._records = bytearray()

    @property
    def table(self) -> Table:
        return np.frombuffer(bytes(self._records), RECORD)

    def look_all(self, files: Sequence[Path]) -> Iterator[Look | UserError]:
        """Raises Stopped where the user stops."""
        with Store() as store, contextlib.closing(
                threads.in_order(_measure_anew, files, "looks", store.known)) as results:
            for found in results:
                if self.control is not None and self.control.stopping:
                    raise Stopped
                yield self._taken(found, store)

    def _taken(self, found: _Found, store: Store) -> Look | UserError:
        if isinstance(found.record, UserError):
            return found.record
        if found.fresh:
            self.measured += 1
            store.put(found.path, found.record)
        self._records += found.record
        record = np.frombuffer(found.record, RECORD)[0]
        return (int(record["width"]), int(record["height"])), bool(record["alpha"])


def _measure_anew(path: Path) -> _Found:
    return _Found(path, measure(path), True)


class Store:
    """cache/looks.sqlite. A store that is damaged is made anew; where none can be kept (a full
    disk, a locked folder), every look is a first one."""

    def __init__(self) -> None:
        self.path = paths.cache_dir() / "looks.sqlite"
        self.db: sqlite3.Connection | None = None
        self.waiting = 0

    def __enter__(self) -> Self:
        images.prepare()
        for attempt in (1, 2):
            try:
                self.db = self._open()
                break
            except (OSError, sqlite3.Error) as error:
                self._close()
                if attempt == 1 and type(error) is sqlite3.DatabaseError:   # not one of ours
                    with contextlib.suppress(OSError):
                        self.path.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self._try(lambda db: db.commit())
        self._close()

    def known(self, path: Path) -> _Found | None:
        """The record of a file that hasn't changed since."""
        try:
            stat = path.stat()
        except OSError:
            return None
        rows = self._try(lambda db: db.execute(
            "SELECT record FROM looks WHERE path = ? AND changed = ? AND size = ?",
            (os.fsencode(path), stat.st_mtime_ns, stat.st_size)).fetchone())
        return _Found(path, rows[0], False) if rows and len(rows[0]) == RECORD.itemsize else None

    def put(self, path: Path, record: bytes) -> None:
        with contextlib.suppress(OSError):              # it has just gone
            stat = path.stat()
            self._try(lambda db: db.execute(
                "INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?)",
                (os.fsencode(path), stat.st_mtime_ns, stat.st_size, record)))
            self.waiting += 1
            if self.waiting % SAVED_EVERY == 0:
                self._try(lambda db: db.commit())

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.db = db = sqlite3.connect(self.path, timeout=10)
        if db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            db.execute("DROP TABLE IF EXISTS looks")
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("CREATE TABLE IF NOT EXISTS looks (path BLOB PRIMARY KEY, changed INTEGER, "
                   "size INTEGER, record BLOB) WITHOUT ROWID")
        db.commit()
        return db

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
    """Where each picture is cut about: the point set by hand; else, where `table` is given
    (RECORD rows of the same pictures), the subject found; else None, the centre."""
    points: list[Point | None] = []
    for index, picture in enumerate(data.pictures):
        point = chosen.focus.get(relative_name(picture.path, data.folder))
        if point is None and table is not None and (box := subject_of(table, index)):
            point = saliency.centre(box)
        points.append(point)
    return points
