"""Which text file and which row of a table belongs to which picture: one loose key for all.

Names may differ in case and Unicode form, rows may have no suffix, start further up than the folder
or on another computer. What fits exactly comes before what fits loosely.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.json", "metadata.tsv")
# Caption files of single pictures, in the order in which they are read.
PLAIN = (".txt", ".caption", ".caption.txt", ".tags", ".cap")
SIDECARS = (*PLAIN, ".json")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".xls", ".ods",
          ".parquet", ".arrow")
_OF_NO_PICTURE = re.compile(r"(readme|licen[cs]e|notice)\b.*|requirements.*\.txt", re.IGNORECASE)
_ELSEWHERE = re.compile(r"[A-Za-z]:|/|~")


def fold(name: str) -> str:
    """Returns the key under which names that differ in case and Unicode form are the same."""
    return unicodedata.normalize("NFC", name).casefold()


def natural(name: str) -> tuple[list[Any], str]:
    """Returns the key that sorts 2 before 10, as file managers do."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], name


def metadata_files(files: Iterable[Path]) -> list[Path]:
    """Returns the metadata files among `files`, the nearest to its pictures first.

    A picture's caption is the first one that these files hold, else that of its sidecars.
    """
    tables = (path for path in files if path.name.lower() in METADATA)
    return sorted(tables, key=lambda path: (-len(path.parts), path.as_posix()))


def caption_places(pictures: Iterable[Path], files: Iterable[Path]) -> dict[Path, list[Path]]:
    """Returns each picture's sidecars among `files`, in the order in which they are read.

    The first one that isn't empty is the picture's caption.
    """
    exact: dict[tuple[str, str], Path] = {}
    loose: dict[tuple[str, str], Path] = {}
    for file in files:
        name = str(file)
        for suffix in SIDECARS:
            if name.lower().endswith(suffix):
                stem = name[:-len(suffix)]
                exact.setdefault((stem, suffix), file)
                loose.setdefault((fold(stem), suffix), file)
    # 01.png.txt, as some downloaders write it, and 01.txt
    names = {path: (str(path), os.path.splitext(path)[0]) for path in pictures}
    keys = {path: [(name, suffix) for suffix in SIDECARS
                   for name in names] for path, names in names.items()}
    claimed = {exact[key] for own in keys.values() for key in own if key in exact}
    found: dict[Path, list[Path]] = {}
    for path, own in keys.items():
        places = [exact.get(key) or loose.get((fold(key[0]), key[1])) for key in own]
        found[path] = list(dict.fromkeys(
            file for key, file in zip(own, places, strict=True)
            if file is not None and (key in exact or file not in claimed)))
    return found


def unused(files: Sequence[Path], places: Mapping[Path, Sequence[Path]],
           tables: Iterable[Path]) -> list[Path]:
    """Returns the text files and tables that belong to nothing in the folder."""
    used = {*tables, *(file for own in places.values() for file in own)}
    texts = [file for file in files if file.name.lower().endswith((*SIDECARS, *TABLES))
             and file not in used and not _OF_NO_PICTURE.fullmatch(file.name)]
    # The text of a picture that can't be read, or of a film, is no mistake; nor is a second one.
    others = [fold(str(file)) for file in files if not file.name.lower().endswith(SIDECARS)]
    known = {*others, *(os.path.splitext(name)[0] for name in others)}

    def belongs(file: Path) -> bool:
        name = fold(str(file))
        return any(name.endswith(suffix) and name[:-len(suffix)] in known for suffix in SIDECARS)

    return [file for file in texts if not belongs(file)]


class Index:
    """Finds pictures by the names that rows of metadata use.

    Names may start from the metadata's folder or from the dataset's, with or without suffix, in
    any case and Unicode form; full paths are those of the folder, or another computer's, of which
    the end counts.
    """

    def __init__(self, pictures: Mapping[str, Path], folder: Path) -> None:
        """`pictures`: by their names relative to `folder`, with slashes."""
        self.folder, self.exact = folder, pictures
        self.loose: dict[str, list[Path]] = {}
        for name, path in pictures.items():
            for key in {fold(name), fold(str(PurePosixPath(name).with_suffix("")))}:
                self.loose.setdefault(key, []).append(path)
        self.by_base: dict[str, list[Path]] = {}
        for path in pictures.values():
            for key in {fold(path.name), fold(path.stem)}:
                self.by_base.setdefault(key, []).append(path)

    def match(self, names: Sequence[str], beside: Path) -> list[list[Path]]:
        """Returns the pictures of each name in a metadata file that lies in the folder `beside`.

        A picture belongs to the name that says its place best: the end of a full path doesn't
        take it from a name that is all there.
        """
        found = [self.find(name, beside) for name in names]
        cut = [0] * len(names)
        for i, name in enumerate(names):
            if not found[i] and self.is_elsewhere(name):
                found[i], cut[i] = self._by_end(name)
        # Several full paths may end alike: the one of which least was cut off is meant.
        least: dict[Path, int] = {}
        for pictures, parts in zip(found, cut, strict=True):
            for path in pictures:
                least[path] = min(parts, least.get(path, parts))
        return [[path for path in pictures if least[path] == parts]
                for pictures, parts in zip(found, cut, strict=True)]

    def is_elsewhere(self, name: str) -> bool:
        """Whether a name leads out of the folder."""
        name = name.replace("\\", "/")
        return bool(_ELSEWHERE.match(name)) or ".." in name.split("/")

    def find(self, name: str, beside: Path) -> list[Path]:
        """Returns the pictures of a name that says its place in the folder."""
        name = name.replace("\\", "/")
        if self.is_elsewhere(name):
            try:
                full = os.path.normpath(os.path.join(beside, os.path.expanduser(name)))
                name = Path(full).relative_to(self.folder).as_posix()
            except ValueError:
                return []
            beside = self.folder
        parts = PurePosixPath(name).parts
        names = [PurePosixPath(*parts)]
        if beside != self.folder and beside.is_relative_to(self.folder):
            names.insert(0, PurePosixPath(beside.relative_to(self.folder).as_posix(), *parts))
        # The name may be written from further up, such as data/cats/01.png for the folder cats.
        for cut in range(1, len(parts)):
            if self.folder.parts[-cut:] == parts[:cut]:
                names.append(PurePosixPath(*parts[cut:]))
        for candidate in map(str, names):
            if candidate in self.exact:
                return [self.exact[candidate]]
            if fold(candidate) in self.loose:
                return self.loose[fold(candidate)]
        return []

    def _by_end(self, name: str) -> tuple[list[Path], int]:
        """The one picture whose path ends most like this one, and in how many parts they differ."""
        parts = [fold(part) for part in name.replace("\\", "/").split("/")]
        fits: dict[tuple[bool, int], list[Path]] = {}
        for path in self.by_base.get(parts[-1], ()):
            folders = [fold(part) for part in path.relative_to(self.folder).parts[-2::-1]]
            pairs = zip(folders, parts[-2::-1], strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            # A picture whose whole name is the end of the path comes before others.
            fits.setdefault((same == len(folders), same), []).append(path)
        best = fits[max(fits)] if fits else []
        # What lies here in another folder is another picture.
        if len(best) != 1 or (os.path.isabs(name) and os.path.exists(name)
                              and not os.path.samefile(name, best[0])):
            return [], 0
        return best, len(parts) - max(fits)[1]
