"""Generated pictures that were deleted: moved beside the others, so that it can be undone."""

from __future__ import annotations

from pathlib import Path

from core import paths

TRASH = "_deleted"                          # a folder in that of the pictures


def discard(file: Path) -> Path:
    """Moves a picture into the trash folder under a free name. -> where. Raises OSError."""
    folder = file.parent / TRASH
    folder.mkdir(exist_ok=True)
    return paths.place(file, folder / file.name)


def restore(file: Path, original: Path) -> None:
    """Moves it back. Raises FileExistsError where another picture has taken the name meanwhile."""
    paths.move(file, original)
