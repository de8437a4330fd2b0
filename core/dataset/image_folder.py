"""A folder of pictures: what is in it, each picture's caption, and what is wrong. Only ever read.

Flat and nested folders, kohya's `N_name` folders, metadata.csv / .jsonl, .txt and .caption.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from core import i18n, serialization, threads
from core.dataset import captions
from core.dataset.images import Look, look_at, prepare
from core.errors import UserError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".avif", ".tif",
                      ".tiff", ".gif"))
CANT_READ = frozenset((".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef",
                       ".arw"))             # pictures to their owner: said, not silently ignored
MASKS = ("-masklabel", ".mask")            # behind the stem of a picture: its mask, see masks.py
MOST_REPEATS = 999                          # 2024_summer is a year

_REPEATS = re.compile(r"([0-9]+)_(.+)")
_IGNORED = re.compile(r"\..*|_left_out|__macosx", re.IGNORECASE)
_MASKS = re.compile(r"masks?|.*[_-]masks?", re.IGNORECASE)
_SKIPPED = frozenset(f"dataset.{what}" for what in (
    "unreadable", "empty", "truncated", "not_a_picture", "corrupt", "too_large", "unsupported"))


@dataclass(frozen=True, slots=True)
class Picture:
    path: Path                              # absolute
    caption: str                            # one line; "" where there is none
    repeats: int                            # times per epoch
    size: tuple[int, int]                   # width, height as seen (EXIF orientation applied)
    has_alpha: bool                         # some pixel is not opaque
    caption_file: Path | None = field(default=None, compare=False)  # sidecar or metadata


@dataclass(frozen=True, slots=True)
class Problem:
    path: Path                              # absolute
    code: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """The picture doesn't train; False: a finding that changes less than that."""
        return self.code in _SKIPPED

    def __str__(self) -> str:
        return i18n.tr(self.code, self.params)


@dataclass(frozen=True, slots=True)
class Dataset:
    pictures: tuple[Picture, ...]           # by relative path
    problems: tuple[Problem, ...]
    folder: Path

    @property
    def captioned(self) -> int:
        return sum(bool(picture.caption) for picture in self.pictures)

    @property
    def skipped(self) -> int:
        return sum(problem.skipped for problem in self.problems)


# --- the folder -------------------------------------------------------------------------------

LookAll = Callable[[Sequence[Path]], Iterator[Look | UserError]]


def scan(folder: Path, metadata: Path | None = None,
         progress: Callable[[int, int], None] | None = None, *,
         left_out: Collection[str] = (), look_all: LookAll | None = None) -> Dataset:
    """Every picture under `folder`, decoded once in full, and all findings.

    Captions: `metadata` if given, else the metadata.csv / .jsonl found beside the pictures; then
    .txt, then .caption, then the name of an `N_name` folder. `left_out`: pictures that the user
    doesn't want, by `relative_name`. `look_all` looks at the files, in order, in another way (see
    core/dataset/checks/image_stats.py). Raises UserError where nothing is found.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    tree = walk(folder)
    told = _read_captions(tree, metadata)
    _leave_out(tree, left_out)
    looks = _look_at_all(tree, look_all or _in_threads, progress)
    pictures = tuple(Picture(path, told.get(path, ""), tree.repeats[path.parent], *look,
                             tree.caption_files.get(path)) for path, look in looks.items())
    if not pictures:
        first = next(problem for problem in tree.problems if problem.skipped)
        raise UserError("dataset.all_skipped", folder=folder, count=len(tree.pictures),
                        first=str(first))
    bare = sum(not picture.caption for picture in pictures)
    if bare:
        tree.report(folder, "captions_missing", count=bare, total=len(pictures))
    return Dataset(pictures, tuple(tree.problems), folder)


@dataclass(slots=True)
class Tree:
    """The files under a folder that matter, and what was found on the way."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    folders: int = 0
    repeats: dict[Path, int] = field(default_factory=dict)      # by folder
    tokens: dict[Path, str] = field(default_factory=dict)       # class token by folder
    caption_files: dict[Path, Path] = field(default_factory=dict)   # by picture
    problems: list[Problem] = field(default_factory=list)

    def report(self, path: Path, what: str, **params: Any) -> None:
        shown = {"file": self.name(path)} | {k: _plain(v) for k, v in params.items()}
        self.problems.append(Problem(path, f"dataset.{what}", shown))

    def report_fault(self, path: Path, fault: UserError) -> None:
        self.report(path, fault.code.removeprefix("dataset."),
                    **fault.params | {"file": self.name(path)})

    def name(self, path: Path) -> str:
        return relative_name(path, self.folder)


def relative_name(path: Path, folder: Path) -> str:
    """A picture's name for people and for our own lists: relative to the folder, with slashes;
    the folder itself and strangers in full."""
    name, root = os.fspath(path), os.path.join(folder, "")
    inside = name.startswith(root)          # pathlib takes ten times longer
    return serialization.readable_name(name[len(root):].replace(os.sep, "/") if inside else name)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else str(value)


def walk(folder: Path) -> Tree:
    if not os.path.exists(folder):
        nearest = next(parent for parent in folder.parents if os.path.exists(parent))
        raise UserError("dataset.folder_missing", folder=folder, nearest=nearest)
    if not os.path.isdir(folder):
        raise UserError("dataset.not_a_folder", folder=folder)
    tree = Tree(folder)
    _enter(tree, folder, 1, "", set())
    tree.files.sort(key=tree.name)
    tree.pictures.sort(key=tree.name)
    if not tree.pictures:
        kinds = Counter(path.suffix.lower() or path.name for path in tree.files)
        raise UserError("dataset.no_pictures", folder=folder, folders=tree.folders,
                        files=len(tree.files),
                        kinds=", ".join(f"{n} × {kind}" for kind, n in kinds.most_common(4)) or "-")
    return tree


def _enter(tree: Tree, folder: Path, repeats: int, token: str, seen: set[str]) -> None:
    """Adds a folder and those below it; `repeats` and `token` come from the folder above."""
    real = os.path.realpath(folder)
    if real in seen:                        # a link that leads back
        return
    seen.add(real)
    repeats, token = _rule(tree, folder, repeats, token)
    tree.repeats[folder], tree.tokens[folder] = repeats, token
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        tree.report(folder, "folder_unreadable", reason=error.strerror)
        return
    for entry in entries:
        if _IGNORED.fullmatch(entry.name):
            continue
        path = folder / entry.name
        if not entry.is_dir():
            # reading a pipe would wait for ever; /dev/zero behind a link never ends
            if entry.is_file() or (entry.is_symlink() and not path.exists()):
                _add_file(tree, path, repeats)
        elif _MASKS.fullmatch(path.name) and not _REPEATS.fullmatch(path.name):
            tree.report(path, "masks_left_out")
        else:
            tree.folders += 1
            _enter(tree, path, repeats, token, seen)


def _rule(tree: Tree, folder: Path, repeats: int, token: str) -> tuple[int, str]:
    """Kohya's `N_name`: N repeats, and `name` as the caption where a picture has none."""
    match = _REPEATS.fullmatch(folder.name)
    if not match:
        return repeats, token
    if int(match[1]) > MOST_REPEATS:
        tree.report(folder, "not_repeats", number=match[1], most=MOST_REPEATS)
        return repeats, token
    if int(match[1]) == 0:
        tree.report(folder, "zero_repeats")
    return int(match[1]), serialization.readable_name(match[2]).strip()


def _add_file(tree: Tree, path: Path, repeats: int) -> None:
    suffix = path.suffix.lower()
    tree.files.append(path)
    if suffix in CANT_READ:
        tree.report(path, "unsupported", suffix=suffix)
    elif suffix in SUFFIXES and repeats and not path.stem.endswith(MASKS):
        tree.pictures.append(path)


def _leave_out(tree: Tree, left_out: Collection[str]) -> None:
    kept = [path for path in tree.pictures if tree.name(path) not in left_out]
    count = len(tree.pictures) - len(kept)
    if count and not kept:
        raise UserError("dataset.all_left_out", folder=tree.folder, count=count)
    if count:
        tree.report(tree.folder, "left_out", count=count)
    tree.pictures = kept


def _in_threads(files: Sequence[Path]) -> Iterator[Look | UserError]:
    prepare()
    return threads.in_order(look_at, files, "scan")


def _look_at_all(tree: Tree, look_all: LookAll,
                 progress: Callable[[int, int], None] | None) -> dict[Path, Look]:
    looks: dict[Path, Look] = {}
    total = len(tree.pictures)
    found = look_all(tree.pictures)
    try:
        for done, (path, look) in enumerate(zip(tree.pictures, found, strict=True), 1):
            if isinstance(look, UserError):
                tree.report_fault(path, look)
            else:
                looks[path] = look
            if progress:
                progress(done, total)
    finally:
        if isinstance(found, Generator):    # Ctrl+C: what hasn't begun needn't begin
            found.close()
    return looks


# --- captions ---------------------------------------------------------------------------------

def _read_captions(tree: Tree, metadata: Path | None) -> dict[Path, str]:
    """The caption of every picture that has one."""
    told = _from_metadata(tree, metadata)
    sidecars = {(_stem(path), path.suffix.lower()): path for path in tree.files
                if path.suffix.lower() in (".txt", ".caption")}
    unused = 0
    for path in tree.pictures:
        # 01.txt and, as some downloaders write it, 01.png.txt
        own = [sidecars[key] for suffix in (".txt", ".caption")
               for key in ((_stem(path), suffix), (os.path.normcase(path), suffix))
               if key in sidecars]
        if path in told:
            unused += bool(own)
            continue
        read = ((file, _sidecar(tree, file)) for file in own)
        file, caption = next((pair for pair in read if pair[1]), (own[0] if own else None, ""))
        told[path] = caption or tree.tokens[path.parent]
        if file is not None:
            tree.caption_files[path] = file
    if unused:
        tree.report(tree.folder, "sidecars_unused", count=unused)
    return told


def _stem(path: Path) -> str:
    return os.path.splitext(os.path.normcase(path))[0]


def _sidecar(tree: Tree, path: Path) -> str:
    try:
        return captions.read_caption(path)
    except UserError as fault:
        tree.report_fault(path, fault)
        return ""


def _from_metadata(tree: Tree, metadata: Path | None) -> dict[Path, str]:
    if metadata is not None:
        return _told_by(tree, Index(tree), Path(os.path.abspath(metadata.expanduser())),
                        explicit=True)
    told: dict[Path, str] = {}
    found = [path for path in tree.files
             if path.name.lower() in ("metadata.csv", "metadata.jsonl")]
    index = Index(tree) if found else None
    for path in sorted(found, key=lambda p: (-len(p.parts), tree.name(p))):
        assert index is not None
        told = _told_by(tree, index, path) | told       # the nearest to a picture wins
    return told


def _told_by(tree: Tree, index: Index, file: Path, explicit: bool = False) -> dict[Path, str]:
    """The captions of one metadata file; every row that helps nobody is reported."""
    told: dict[Path, str] = {}
    try:
        rows, faults = captions.read_metadata(file)
    except UserError as fault:
        if explicit:
            raise
        tree.report_fault(file, fault)
        return {}
    for bad_line in faults:
        tree.report_fault(file, bad_line)
    found_any = False
    for row in rows:
        found = _find(tree, index, file, row)
        found_any |= bool(found)
        if not told.keys().isdisjoint(found):
            tree.report(file, "row_twice", line=row.line, name=row.name)
        for path in found if row.caption else ():
            told.setdefault(path, row.caption)
            tree.caption_files.setdefault(path, file)
    if explicit and not found_any:
        raise UserError("dataset.metadata_no_match", file=file, folder=tree.folder, count=len(rows),
                        name=rows[0].name if rows else "-")
    return told


def _find(tree: Tree, index: Index, file: Path, row: captions.Row) -> list[Path]:
    """The pictures that a row names; what lies outside of the folder is refused."""
    name = row.name.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
        tree.report(file, "row_outside", line=row.line, name=row.name)
        return []
    found = index.find(name, file.parent)
    if not found:
        tree.report(file, "row_without_picture", line=row.line, name=row.name)
    return found


class Index:
    """Pictures by the names that rows use: from the metadata's folder or from the given one,
    with or without suffix, in any case and Unicode form."""

    def __init__(self, tree: Tree) -> None:
        self.folder = tree.folder
        self.exact = {tree.name(path): path for path in tree.pictures}
        self.loose: dict[str, list[Path]] = {}
        for name, path in self.exact.items():
            for key in {_fold(name), _fold(str(PurePosixPath(name).with_suffix("")))}:
                self.loose.setdefault(key, []).append(path)

    def find(self, name: str, beside: Path) -> list[Path]:
        parts = PurePosixPath(name).parts
        names = [PurePosixPath(*parts)]
        if beside != self.folder and beside.is_relative_to(self.folder):
            names.insert(0, PurePosixPath(beside.relative_to(self.folder).as_posix(), *parts))
        for cut in range(1, len(parts)):    # written from further up: data/cats/01.png
            if self.folder.parts[-cut:] == parts[:cut]:
                names.append(PurePosixPath(*parts[cut:]))
        for wanted in map(str, names):
            if wanted in self.exact:
                return [self.exact[wanted]]
            if _fold(wanted) in self.loose:
                return self.loose[_fold(wanted)]
        return []


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


# --- held-out pictures ------------------------------------------------------------------------

def split_validation(pictures: Sequence[Picture], share: float,
                     seed: int) -> tuple[list[int], list[int]]:
    """-> indices to train on, indices held out; the choice hangs on seed and file names alone,
    so that it stays when the folder moves. At least one picture on each side, if there are two.
    """
    if share <= 0 or len(pictures) < 2:
        return list(range(len(pictures))), []
    count = min(max(round(share * len(pictures)), 1), len(pictures) - 1)

    def lot(index: int) -> bytes:
        path = pictures[index].path
        return sha256(os.fsencode(f"{seed}/{path.parent.name}/{path.name}")).digest()

    held_out = set(sorted(range(len(pictures)), key=lot)[:count])
    return [i for i in range(len(pictures)) if i not in held_out], sorted(held_out)
