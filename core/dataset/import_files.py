"""Files that were dropped: pictures and captions are copied into a folder of ours. Their own
stay where they are, and nothing that is there is overwritten."""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import paths
from core.dataset import image_folder
from core.errors import UserError

CAPTIONS = frozenset((".txt", ".caption", ".csv", ".jsonl"))
TABLES = frozenset((".csv", ".jsonl"))
_BAD = re.compile(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]')


@dataclass(frozen=True, slots=True)
class Taken:
    copied: int                             # pictures and captions
    same: int                               # were there already
    refused: tuple[str, ...]                # names of files that are neither


def folder_for(project: str) -> Path:
    """Where the files dropped on a project's page go."""
    return paths.data_dir() / "dropped" / project


def copy_all(files: Sequence[Path], folder: Path,
             progress: Callable[[int, int], None] = lambda done, total: None) -> Taken:
    """Copies what can train. A picture and its caption keep their common name; where another
    picture has that name, both get the next free one. Raises UserError where nothing can be
    written."""
    good = [file for file in files if file.suffix.lower() in image_folder.SUFFIXES | CAPTIONS]
    refused = tuple(file.name for file in files if file not in set(good))
    copied = same = done = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("tab_dataset.not_copied", file=files[0].name if files else "",
                        folder=folder,
                        reason=error.strerror or error) from None
    for stem, group in _by_stem(good).items():
        new = _copy_group(stem, group, folder)
        copied, same, done = copied + new, same + len(group) - new, done + len(group)
        progress(done, len(good))
    return Taken(copied, same, refused)


def _copy_group(stem: str, group: Sequence[Path], folder: Path) -> int:
    """-> files copied; the others were there already. Where another program takes a name at this
    very moment, all of them get the next one."""
    for free in paths.numbered(folder / stem):
        names = {file: free.with_name(f"{free.name}{file.name[len(file.stem):]}")
                 for file in group}
        if any(_differs(file, target) for file, target in names.items()):
            continue
        with contextlib.suppress(FileExistsError):
            return sum(_copy(file, target) for file, target in names.items()
                       if not target.exists())
    raise AssertionError("names have no end")


def _by_stem(files: Iterable[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(clean(file.stem), []).append(file)
    return groups


def clean(stem: str) -> str:
    """A file name's stem that every file system keeps."""
    plain = _BAD.sub("_", stem).strip(". ")[:119]
    while len(plain.encode("utf-8", "replace")) > 190:          # Chinese takes three bytes a letter
        plain = plain[:-1]
    plain = plain.rstrip(". ") or "picture"
    return plain if paths.is_file_name(plain) else f"_{plain}"


def _differs(file: Path, there: Path) -> bool:
    return there.exists() and not filecmp.cmp(file, there, shallow=False)


def _copy(file: Path, target: Path) -> int:
    try:
        with paths.atomic(target, paths.move) as fresh:
            shutil.copyfile(file, fresh)
        os.utime(target, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        return 1
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError("tab_dataset.not_copied", file=file.name, folder=target.parent,
                        reason=error.strerror or error) from None
