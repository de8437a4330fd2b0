"""Generated pictures that were deleted: moved beside the others, so that it can be undone."""

from __future__ import annotations

import os
from pathlib import Path

TRASH = "_deleted"                          # a folder in that of the pictures


def discard(file: Path) -> Path:
    """-> where it is now; what lies there already stays. Raises OSError."""
    target = _free(file.parent / TRASH / file.name)
    target.parent.mkdir(exist_ok=True)
    os.rename(file, target)
    return target


def restore(file: Path, original: Path) -> None:
    """Raises FileExistsError where another picture has taken the name meanwhile."""
    if original.exists():
        raise FileExistsError(17, "exists", str(original))
    os.rename(file, original)


def _free(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
