"""What the user decided about a folder's pictures: which to leave out, where to crop.

Kept in our data folder (datasets/<digest of the folder's path>.json), never beside the user's
files. Names are those of dataset.relative_name, so that the window, the command line and the
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
    left_out: frozenset[str] = frozenset()
    focus: Mapping[str, Point] = field(default_factory=dict)    # set by hand


def load(folder: Path) -> Choices:
    """Nothing chosen yet: empty. Raises UserError where the file can't be understood: silently
    training on pictures that were left out would be worse."""
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
    """These pictures don't train; their files stay."""
    added = frozenset(names)
    return _change(folder, lambda old: replace(old, left_out=old.left_out | added))


def take_in(folder: Path, names: Iterable[str]) -> Choices:
    back = frozenset(names)
    return _change(folder, lambda old: replace(old, left_out=old.left_out - back))


def set_focus(folder: Path, points: Mapping[str, Point | None]) -> Choices:
    """Crops keep these points (0..1 from the top left) as near to their middle as they can;
    None takes a point back."""
    def changed(old: Choices) -> Choices:
        new = {**old.focus, **points}
        return replace(old, focus={name: _point(at) for name, at in new.items()
                                   if at is not None})
    return _change(folder, changed)


def _change(folder: Path, change: Callable[[Choices], Choices]) -> Choices:
    path = _file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        new = change(load(folder))
        told: dict[str, Any] = {"folder": os.fspath(_plain(folder)),
                                "left_out": sorted(new.left_out),
                                "focus": {name: new.focus[name] for name in sorted(new.focus)}}
        text = json.dumps(told, ensure_ascii=False, indent=1)
        paths.write_atomic(path, text.encode("utf-8", "replace"))
    return new


def _file(folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.normcase(_plain(folder)))).hexdigest()[:20]
    return paths.data_dir() / "datasets" / f"{name}.json"


def _plain(folder: Path) -> Path:
    return Path(os.path.realpath(folder.expanduser()))


def _point(at: Any) -> Point:
    x, y = (float(value) for value in at)
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"a point outside of the picture: {x}, {y}")
    return x, y
