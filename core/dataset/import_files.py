"""Files that were dropped on the window: pictures and captions are copied into a folder of ours.

The user's own files stay where they are, and nothing in our folder is overwritten.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import paths
from core.dataset import image_folder
from core.dataset.caption_files.places import SIDECARS
from core.errors import UserError

CAPTIONS = frozenset((*SIDECARS, ".csv", ".tsv", ".jsonl"))


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of the files that were dropped."""

    copied: int                             # pictures and captions
    same: int                               # were there already
    refused: tuple[str, ...]                # names of files that are neither


def folder_for(project: str) -> Path:
    """Returns the folder for the files that are dropped on a project's page."""
    return paths.data_dir() / "dropped" / project


def copy_all(files: Sequence[Path], folder: Path,
             progress: Callable[[int, int], None] = lambda done, total: None) -> Taken:
    """Copies pictures and captions into `folder`.

    A picture and its caption keep their common name; where another picture has that name, both get
    the next free one. Raises UserError where nothing can be written.
    """
    good = [file for file in files if file.suffix.lower() in image_folder.SUFFIXES | CAPTIONS]
    refused = tuple(file.name for file in files if file not in set(good))
    copied = done = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("tab_dataset.not_copied", file=files[0].name if files else "",
                        folder=folder, reason=error.strerror or error) from None
    stems: dict[str, list[Path]] = {}
    for file in good:
        stems.setdefault(clean(_split(file)[0]).casefold(), []).append(file)
    for files_of_stem in stems.values():
        for group in _groups(files_of_stem):
            copied += _copy_group(clean(_split(group[0])[0]), group, folder)
            done += len(group)
            progress(done, len(good))
    return Taken(copied, done - copied, refused)


def _split(file: Path) -> tuple[str, str]:
    """A file's name as that of its picture and what comes behind: 1.png.txt, 1.caption.txt."""
    stem = file.name
    for suffixes in (sorted(SIDECARS, key=len), sorted(image_folder.SUFFIXES)):
        ends = [suffix for suffix in suffixes if stem.lower().endswith(suffix)]
        stem = stem[:len(stem) - len(ends[-1])] if ends else stem
    stem = stem if len(stem) < len(file.name) else file.stem
    return stem, file.name[len(stem):]


def _groups(files: Sequence[Path]) -> list[list[Path]]:
    """Parts files of one stem into pictures with their captions: of two files of the same name,
    from different folders, the second one begins a group of its own."""
    groups: list[dict[str, Path]] = []
    for file in files:
        name = _split(file)[1].casefold()
        free = [group for group in groups if name not in group]
        # A browser's upload has a folder a file; then the order tells.
        own = [group for group in free if any(one.parent == file.parent for one in group.values())]
        if not free:
            groups.append({})
        (own or free or groups[-1:])[0][name] = file
    return [list(group.values()) for group in groups]


def _copy_group(stem: str, group: Sequence[Path], folder: Path) -> int:
    """Copies files of one stem under the first free name; returns how many were not there yet."""
    for free in paths.numbered(folder / stem):
        targets = {file: free.with_name(f"{free.name}{_split(file)[1]}")
                   for file in group}
        if any(target.exists() and not filecmp.cmp(file, target, shallow=False)
               for file, target in targets.items()):
            continue
        # Where another program takes a name at this very moment, all of them get the next one.
        with contextlib.suppress(FileExistsError):
            copied = 0
            for file, target in targets.items():
                if not target.exists():
                    _copy(file, target)
                    copied += 1
            return copied
    raise AssertionError("names have no end")


def _copy(file: Path, target: Path) -> None:
    try:
        with paths.atomic(target, paths.move) as fresh:
            shutil.copyfile(file, fresh)
        os.utime(target, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError("tab_dataset.not_copied", file=file.name, folder=target.parent,
                        reason=error.strerror or error) from None


def clean(stem: str) -> str:
    """Turns a file name's stem into one that every file system takes."""
    plain = paths.BAD_CHARACTERS.sub("_", stem).strip(". ")[:119]
    # File systems count bytes, 255 at most with suffix; Chinese takes three a letter.
    while len(plain.encode("utf-8", "replace")) > 190:
        plain = plain[:-1]
    plain = plain.rstrip(". ") or "picture"
    return plain if paths.is_file_name(plain) else f"_{plain}"
