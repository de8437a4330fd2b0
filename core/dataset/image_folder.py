"""A folder of pictures: what is in it, each picture's caption, and what is wrong. Only ever read.

Flat and nested folders, kohya's `N_name` folders, metadata.csv / .jsonl, .txt and .caption.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from core import i18n, serialization, threads
from core.dataset import captions
from core.dataset.images import Look, look_at, prepare
from core.dataset.masks import STEMS as MASK_STEMS
from core.errors import UserError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".avif", ".tif",
                      ".tiff", ".gif"))
# Pictures to their owner that we can't read: that is said, not silently ignored.
CANT_READ = frozenset((".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef",
                       ".arw"))
MOST_REPEATS = 999                          # 2024_summer is a year

_REPEATS = re.compile(r"([0-9]+)_(.+)")
_IGNORED = re.compile(r"\..*|_left_out|__macosx", re.IGNORECASE)
_MASKS = re.compile(r"masks?|.*[_-]masks?", re.IGNORECASE)
_SKIPPED = frozenset(f"dataset.{what}" for what in (
    "unreadable", "empty", "truncated", "not_a_picture", "corrupt", "too_large", "unsupported"))


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture that can train."""

    path: Path                              # absolute
    caption: str                            # one line; "" where there is none
    repeats: int                            # times per epoch
    size: tuple[int, int]                   # width, height as seen (EXIF orientation applied)
    has_alpha: bool                         # some pixel is not opaque
    # The sidecar or metadata file that holds the caption.
    caption_file: Path | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a file or folder; `code` is the key of its sentence."""

    path: Path                              # absolute
    code: str
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether the picture does not train because of this."""
        return self.code in _SKIPPED

    def __str__(self) -> str:
        return i18n.tr(self.code, self.params)


@dataclass(frozen=True, slots=True)
class Dataset:
    """What `scan` found in a folder."""

    pictures: tuple[Picture, ...]           # by relative path
    problems: tuple[Problem, ...]
    folder: Path

    @property
    def names(self) -> tuple[str, ...]:
        """The pictures' names for people and for our own lists, in their order."""
        return tuple(relative_name(picture.path, self.folder) for picture in self.pictures)

    @property
    def captioned(self) -> int:
        return sum(bool(picture.caption) for picture in self.pictures)

    @property
    def skipped(self) -> int:
        return sum(problem.skipped for problem in self.problems)


# --- the folder -------------------------------------------------------------------------------

LookAll = Callable[[Sequence[Path]], Generator[Look | UserError, None, None]]


def scan(folder: Path, metadata: Path | None = None,
         progress: Callable[[int, int], None] = lambda done, total: None, *,
         left_out: Collection[str] = (), look_all: LookAll | None = None) -> Dataset:
    """Decodes every picture under `folder` once in full, and returns them with all findings.

    Captions come from `metadata` if given, else from the metadata.csv / .jsonl found beside the
    pictures; then from .txt, then .caption, then the name of an `N_name` folder. `left_out` are
    pictures that the user doesn't want, by `relative_name`. `look_all` looks at the files, in
    order, in another way (see core/dataset/checks/image_stats.py); its generator is closed at the
    end. Raises UserError where nothing is found.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    tree = walk(folder)
    texts = _read_captions(tree, metadata)
    wanted = [path for path in tree.pictures if tree.name(path) not in left_out]
    if count := len(tree.pictures) - len(wanted):
        if not wanted:
            raise UserError("dataset.all_left_out", folder=folder, count=count)
        tree.report(folder, "dataset.left_out", count=count)
        tree.pictures = wanted
    if look_all is None:
        # Pillow's readers are loaded before several threads need them.
        prepare()
        look_all = functools.partial(threads.in_order, look_at, name="scan")
    pictures = []
    # Closed, as after Ctrl+C what has not begun need not begin.
    with contextlib.closing(look_all(tree.pictures)) as looks:
        for done, (path, look) in enumerate(zip(tree.pictures, looks, strict=True), 1):
            if isinstance(look, UserError):
                tree.report(path, look.code, **look.params)
            else:
                pictures.append(Picture(path, texts.get(path, ""), tree.repeats[path.parent], *look,
                                        tree.caption_files.get(path)))
            progress(done, len(tree.pictures))
    if not pictures:
        first = next(problem for problem in tree.problems if problem.skipped)
        raise UserError("dataset.all_skipped", folder=folder, count=len(tree.pictures),
                        first=str(first))
    if bare := sum(not picture.caption for picture in pictures):
        tree.report(folder, "dataset.captions_missing", count=bare, total=len(pictures))
    return Dataset(tuple(pictures), tuple(tree.problems), folder)


@dataclass(slots=True)
class Tree:
    """The files under a folder that matter, with what their places say."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    folders: int = 0
    repeats: dict[Path, int] = field(default_factory=dict)      # by folder
    tokens: dict[Path, str] = field(default_factory=dict)       # class token by folder
    caption_files: dict[Path, Path] = field(default_factory=dict)   # by picture
    problems: list[Problem] = field(default_factory=list)

    def report(self, path: Path, code: str, /, **params: Any) -> None:
        # Only what JSON can hold: problems also go into events and reports.
        plain = {key: value if isinstance(value, (int, float, str)) else str(value)
                 for key, value in params.items()}
        self.problems.append(Problem(path, code, plain | {"file": self.name(path)}))

    def name(self, path: Path) -> str:
        return relative_name(path, self.folder)


def relative_name(path: Path, folder: Path) -> str:
    """Returns a picture's name for people and for our own lists.

    It is relative to the folder, with slashes; what lies outside of the folder is named in full.
    """
    name, root = os.fspath(path), os.path.join(folder, "")
    # Strings: pathlib takes ten times longer.
    inside = name.startswith(root)
    return serialization.readable_name(name[len(root):].replace(os.sep, "/") if inside else name)


def walk(folder: Path) -> Tree:
    """Lists the files under a folder; none is opened. Raises UserError where no picture is."""
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
    # A link may lead back to a folder above.
    if real in seen:
        return
    seen.add(real)
    # Kohya's `N_name`: N repeats, and `name` as the caption where a picture has none.
    if match := _REPEATS.fullmatch(folder.name):
        number = int(match[1])
        if number > MOST_REPEATS:
            tree.report(folder, "dataset.not_repeats", number=match[1], most=MOST_REPEATS)
        else:
            repeats, token = number, serialization.readable_name(match[2]).strip()
        if number == 0:
            tree.report(folder, "dataset.zero_repeats")
    tree.repeats[folder], tree.tokens[folder] = repeats, token
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        tree.report(folder, "dataset.folder_unreadable", reason=error.strerror)
        return
    for entry in entries:
        if _IGNORED.fullmatch(entry.name):
            continue
        path = folder / entry.name
        if not entry.is_dir():
            # Reading a pipe would wait for ever, and /dev/zero behind a link never ends; a link to
            # nowhere is kept, as its picture is to be reported as missing.
            if not (entry.is_file() or (entry.is_symlink() and not path.exists())):
                continue
            suffix = path.suffix.lower()
            tree.files.append(path)
            if suffix in CANT_READ:
                tree.report(path, "dataset.unsupported", suffix=suffix)
            elif suffix in SUFFIXES and repeats and not path.stem.endswith(MASK_STEMS):
                tree.pictures.append(path)
        elif _MASKS.fullmatch(path.name) and not _REPEATS.fullmatch(path.name):
            tree.report(path, "dataset.masks_left_out")
        else:
            tree.folders += 1
            _enter(tree, path, repeats, token, seen)


# --- captions ---------------------------------------------------------------------------------

def _read_captions(tree: Tree, metadata: Path | None) -> dict[Path, str]:
    """Returns each picture's caption, "" where there is none, and fills `tree.caption_files`.

    Metadata counts before sidecars, the first sidecar that isn't empty before the others, and the
    name of an `N_name` folder where nothing else says anything.
    """
    texts: dict[Path, str] = {}
    # A file that the user names is the only one.
    tables = (captions.metadata_files(tree.files) if metadata is None
              else [Path(os.path.abspath(metadata.expanduser()))])
    index: Index | None = None
    for file in tables:
        index = index or Index(tree)
        texts = _captions_of(tree, index, file, explicit=metadata is not None) | texts
    unused = 0
    for path, sidecars in captions.caption_places(tree.pictures, tree.files).items():
        if path in texts:
            unused += bool(sidecars)
            continue
        texts[path] = tree.tokens[path.parent]
        # An empty sidecar stands for the caption where no other one is filled.
        if sidecars:
            tree.caption_files[path] = sidecars[0]
        for file in sidecars:
            try:
                caption = captions.read_caption(file)
            except UserError as fault:
                tree.report(file, fault.code, **fault.params)
                continue
            if caption:
                texts[path], tree.caption_files[path] = caption, file
                break
    if unused:
        tree.report(tree.folder, "dataset.sidecars_unused", count=unused)
    return texts


def _captions_of(tree: Tree, index: Index, file: Path, explicit: bool) -> dict[Path, str]:
    """Returns the captions of one metadata file, and reports every row that helps nobody.

    `explicit`: the user named this file; UserError is raised where it is of no use.
    """
    texts: dict[Path, str] = {}
    try:
        rows, faults = captions.read_metadata(file)
    except UserError as fault:
        if explicit:
            raise
        tree.report(file, fault.code, **fault.params)
        return {}
    for bad_line in faults:
        tree.report(file, bad_line.code, **bad_line.params)
    matched_any = False
    for row in rows:
        name = row.name.replace("\\", "/")
        pictures: list[Path] = []
        # What lies outside of the folder is refused.
        if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
            tree.report(file, "dataset.row_outside", line=row.line, name=row.name)
        elif not (pictures := index.find(name, file.parent)):
            tree.report(file, "dataset.row_without_picture", line=row.line, name=row.name)
        matched_any |= bool(pictures)
        if not texts.keys().isdisjoint(pictures):
            tree.report(file, "dataset.row_twice", line=row.line, name=row.name)
        for path in pictures if row.caption else ():
            texts.setdefault(path, row.caption)
            tree.caption_files.setdefault(path, file)
    if explicit and not matched_any:
        raise UserError("dataset.metadata_no_match", file=file, folder=tree.folder, count=len(rows),
                        name=rows[0].name if rows else "-")
    return texts


class Index:
    """Finds pictures by the names that rows of metadata use.

    Names may start from the metadata's folder or from the dataset's, with or without suffix, in
    any case and Unicode form.
    """

    def __init__(self, tree: Tree) -> None:
        self.folder = tree.folder
        self.exact = {tree.name(path): path for path in tree.pictures}
        self.loose: dict[str, list[Path]] = {}
        for name, path in self.exact.items():
            for key in {_fold(name), _fold(str(PurePosixPath(name).with_suffix("")))}:
                self.loose.setdefault(key, []).append(path)

    def find(self, name: str, beside: Path) -> list[Path]:
        """Returns the pictures of a name in a metadata file that lies in the folder `beside`."""
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
            if _fold(candidate) in self.loose:
                return self.loose[_fold(candidate)]
        return []


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


# --- held-out pictures ------------------------------------------------------------------------

def held_out(pictures: Sequence[Picture], share: float, seed: int) -> frozenset[int]:
    """Returns the indices of the pictures that are held out for validation.

    The choice depends on seed and file names alone, so that it stays when the folder moves. If
    there are two pictures or more, at least one is held out and one is not.
    """
    if share <= 0 or len(pictures) < 2:
        return frozenset()
    count = min(max(round(share * len(pictures)), 1), len(pictures) - 1)

    def draw_lot(index: int) -> bytes:
        path = pictures[index].path
        return sha256(os.fsencode(f"{seed}/{path.parent.name}/{path.name}")).digest()

    return frozenset(sorted(range(len(pictures)), key=draw_lot)[:count])
