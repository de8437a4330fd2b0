"""What the user decided about a folder's pictures: which to leave out, where to crop.

Kept in our data folder (datasets/<digest of the folder's path>.json), never beside the user's
files. Names are those of image_folder.relative_name, so that the window, the command line and the
training mean the same picture.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from core import paths
from core.dataset.buckets import Point
from core.errors import UserError
from core.serialization import from_json


@dataclass(frozen=True, slots=True)
class Choices:
    """Pictures that don't train, and points that crops are cut about, both by name."""

    left_out: frozenset[str] = frozenset()
    focus: Mapping[str, Point] = field(default_factory=dict)    # set by hand


def load(folder: Path) -> Choices:
    """Returns the choices for a folder, empty ones where nothing was chosen yet.

    Raises UserError where the file can't be understood: to train in silence on pictures that were
    left out would be worse.
    """
    path = _file(folder)
    try:
        data = from_json(path.read_text("utf-8"))
        return Choices(frozenset(map(str, data.get("left_out", ()))),
                       {str(name): _point(at) for name, at in data.get("focus", {}).items()})
    except FileNotFoundError:
        return Choices()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError("checks.choices_unreadable", file=path, reason=error) from None


def leave_out(folder: Path, names: Iterable[str]) -> Choices:
    """Takes these pictures out of the training; their files stay."""
    return _change(folder, lambda old: replace(old, left_out=old.left_out.union(names)))


def take_in(folder: Path, names: Iterable[str]) -> Choices:
    """Undoes leave_out for these pictures."""
    return _change(folder, lambda old: replace(old, left_out=old.left_out.difference(names)))


def set_focus(folder: Path, points: Mapping[str, Point | None]) -> Choices:
    """Sets points (0..1 from the top left) that crops bring as near to their middle as they can.

    None takes a point back.
    """
    return _change(folder, lambda old: replace(old, focus={
        name: _point(at) for name, at in {**old.focus, **points}.items() if at is not None}))


def _change(folder: Path, change: Callable[[Choices], Choices]) -> Choices:
    path = _file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The window and the command line may both be at work on the same folder.
    with FileLock(f"{path}.lock"):
        new = change(load(folder))
        data = {"folder": os.path.realpath(paths.expanded(folder)),
                "left_out": sorted(new.left_out), "focus": dict(sorted(new.focus.items()))}
        text = json.dumps(data, ensure_ascii=False, indent=1)
        paths.write_atomic(path, text.encode("utf-8", "replace"))
    return new


def _file(folder: Path) -> Path:
    real = os.path.normcase(os.path.realpath(paths.expanded(folder)))
    name = hashlib.sha256(os.fsencode(real)).hexdigest()[:20]
    return paths.data_dir() / "datasets" / f"{name}.json"


def _point(at: Any) -> Point:
    x, y = (float(value) for value in at)
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"a point outside of the picture: {x}, {y}")
    return x, y
