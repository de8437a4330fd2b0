"""A folder of pictures: what is in it, each picture's caption, and what is wrong. Only ever read.

Flat and nested folders, kohya's `N_name` folders; captions by core.dataset.caption_files.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from core import i18n, paths, serialization, threads
from core.dataset.caption_files.places import natural
from core.dataset.caption_files.reader import CaptionFiles
from core.dataset.images import Look, look_at, prepare
from core.dataset.masks import STEMS as MASK_STEMS
from core.errors import UserError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".avif", ".tif",
                      ".tiff", ".gif"))
# Pictures to their owner that we can't read: that is said, not silently ignored.
CANT_READ = frozenset((".heic", ".heif", ".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef",
                       ".arw"))
MOST_REPEATS = 999                          # 2024_summer is a year
MOST_NAMED, MOST_SHOWN = 5, 80              # files and letters in one remark

_REPEATS = re.compile(r"([0-9]+)_(.+)")
_IGNORED = re.compile(r"\..*|_left_out|__macosx", re.IGNORECASE)
# What network drives and recycle bins hold, thumbnails among it.
_OF_SYSTEMS = re.compile(r"@eadir|#recycle|#snapshot|@recycle|@recently-snapshot|\$recycle\.bin|"
                         r"recycler|system volume information|lost\+found", re.IGNORECASE)
# Beside kohya's `N_name` folders, or beside the img that holds them.
_KOHYA = re.compile(r"regs?|regulari[sz]ation(_images)?|class_images|logs?|models?|"
                    r"samples?|outputs?", re.IGNORECASE)
_IMG = ("img", "image", "images", "train")
_WEIGHTS = (".safetensors", ".ckpt", ".pt")
_MASKS = re.compile(r"masks?|.*[_-]masks?", re.IGNORECASE)
_SKIPPED = frozenset(f"dataset.{what}" for what in (
    "unreadable", "empty", "truncated", "not_a_picture", "corrupt", "too_large", "unsupported",
    "is_other_format"))


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
    # The lines of that sidecar, where it has several.
    lines: tuple[str, ...] = field(default=(), compare=False)


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

    pictures: tuple[Picture, ...]           # by relative path, 2 before 10
    problems: tuple[Problem, ...]
    folder: Path
    # Caption files that aren't in UTF-8, or may not be, and the name of their encoding.
    encodings: dict[Path, str] = field(default_factory=dict, compare=False)

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
    pictures; then from the pictures' own text files, then the name of an `N_name` folder.
    `left_out` are pictures that the user doesn't want, by `relative_name`. `look_all` looks at the
    files, in order, in another way (see core/dataset/checks/image_stats.py); its generator is
    closed at the end. Raises UserError where nothing is found.
    """
    folder = Path(os.path.abspath(paths.expanded(folder)))
    tree = walk(folder)
    files = tree.caption_files_of(metadata and Path(os.path.abspath(paths.expanded(metadata))))
    texts = read_captions(tree, files, explicit=metadata is not None)
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
                                        tree.caption_files.get(path), tree.lines.get(path, ())))
            progress(done, len(tree.pictures))
    if not pictures:
        first = next(problem for problem in tree.problems if problem.skipped)
        raise UserError("dataset.all_skipped", folder=folder, count=len(tree.pictures),
                        first=str(first))
    if bare := sum(not picture.caption for picture in pictures):
        tree.report(folder, "dataset.captions_missing", count=bare, total=len(pictures))
    return Dataset(tuple(pictures), tuple(tree.problems), folder, tree.encodings)


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
    systems: list[Path] = field(default_factory=list)           # of drives and recycle bins
    problems: list[Problem] = field(default_factory=list)
    lines: dict[Path, tuple[str, ...]] = field(default_factory=dict)    # see Picture
    encodings: dict[Path, str] = field(default_factory=dict)        # see Dataset

    def caption_files_of(self, metadata: Path | None) -> CaptionFiles:
        """Reads the text files. `metadata`: the only table, where the user names one."""
        return CaptionFiles(self.folder, {self.name(path): path for path in self.pictures},
                            self.files, metadata)

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
    if tree.systems:
        tree.report(tree.systems[0], "dataset.system_left_out", count=len(tree.systems))
    for files in (tree.files, tree.pictures):
        files.sort(key=lambda path: natural(tree.name(path)))
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
    names = {entry.name.lower() for entry in entries}
    if paths.MARK in names and folder != tree.folder:
        tree.report(folder, "dataset.own_folder")
        return
    holds_weights = any(name.endswith(_WEIGHTS) for name in names)
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
        elif _OF_SYSTEMS.fullmatch(entry.name):
            tree.systems.append(path)
        elif _KOHYA.fullmatch(entry.name) and (
                _has_repeats(folder) or any(map(_has_repeats, map(folder.joinpath, _IMG)))):
            tree.report(path, "dataset.kohya_left_out")
        elif entry.name.lower() in ("sample", "samples") and holds_weights:
            tree.report(path, "dataset.samples_left_out")
        elif os.path.realpath(path) in (os.path.realpath(paths.data_dir()),
                                        os.path.realpath(paths.cache_dir())):
            tree.report(path, "dataset.own_folder")
        else:
            tree.folders += 1
            _enter(tree, path, repeats, token, seen)


def _has_repeats(folder: Path) -> bool:
    """Whether it holds kohya's `N_name` folders."""
    with contextlib.suppress(OSError), os.scandir(folder) as listing:
        return any(_REPEATS.fullmatch(entry.name) and entry.is_dir() for entry in listing)
    return False


# --- captions ---------------------------------------------------------------------------------

def read_captions(tree: Tree, files: CaptionFiles, explicit: bool = False) -> dict[Path, str]:
    """Returns each picture's caption, "" where there is none, and fills `tree.caption_files`.

    Metadata counts before sidecars, the first sidecar that isn't empty before the others, and the
    name of an `N_name` folder where nothing else says anything. `explicit`: the user named the
    table; UserError is raised where it is of no use.
    """
    texts: dict[Path, str] = {}
    for file in files.tables:
        texts = _captions_of(tree, files, file, explicit) | texts
    unused = 0
    second: list[Path] = []                     # captions beside the one that is read
    unreadable: dict[Path, UserError] = {}
    for path, sidecars in files.sidecars.items():
        if path in texts:
            unused += bool(sidecars)
            continue
        texts[path] = tree.tokens[path.parent]
        # An empty sidecar stands for the caption where no other one is filled.
        if sidecars:
            tree.caption_files[path] = sidecars[0]
        known = ""
        for file in sidecars:
            try:
                caption = files.caption(file)
            except UserError as fault:
                unreadable[file] = fault
                continue
            if caption and not known:
                known = texts[path] = caption
                tree.caption_files[path] = file
                if len(lines := files.lines(file)) > 1:
                    tree.lines[path] = lines
            elif caption and caption != known:
                second.append(file)
    for file, why in unreadable.items():
        tree.report(file, why.code, **why.params)
    if unused:
        tree.report(tree.folder, "dataset.sidecars_unused", count=unused)
    if second:
        tree.report(tree.folder, "dataset.captions_second", count=len(second),
                    names=_listed(tree, second))
    _report_shared(tree, files)
    if files.unused:
        tree.report(tree.folder, "dataset.texts_unused", count=len(files.unused),
                    names=_listed(tree, files.unused))
    tree.encodings = {file: reading.title for file, reading in files.odd.items()}
    if doubtful := {file: reading for file, reading in files.odd.items() if reading.doubt}:
        file, reading = next(iter(doubtful.items()))
        tree.report(file, "dataset.encoding_doubt", count=len(doubtful), encoding=reading.title,
                    text=" ".join(reading.text.split())[:MOST_SHOWN])
    return texts


def _report_shared(tree: Tree, files: CaptionFiles) -> None:
    """Names sidecars that several pictures have in common: a.txt of a.png and a.jpg."""
    owners: dict[Path, list[Path]] = {}
    for path, file in tree.caption_files.items():
        if file not in files.tables:
            owners.setdefault(file, []).append(path)
    shared = {file: own for file, own in owners.items() if len(own) > 1}
    if shared:
        file, own = next(iter(shared.items()))
        tree.report(file, "dataset.caption_shared", count=len(shared), names=_listed(tree, own))


def _listed(tree: Tree, files: Sequence[Path]) -> str:
    return ", ".join(map(tree.name, files[:MOST_NAMED])) + " …" * (len(files) > MOST_NAMED)


def _captions_of(tree: Tree, files: CaptionFiles, file: Path, explicit: bool) -> dict[Path, str]:
    """Returns the captions of one metadata file, and reports the rows that help nobody: one remark
    a kind, with the first such row.

    `explicit`: the user named this file; UserError is raised where it is of no use.
    """
    texts: dict[Path, str] = {}
    try:
        rows, faults = files.rows(file)
    except UserError as fault:
        if explicit:
            raise
        tree.report(file, fault.code, **fault.params)
        return {}
    said: dict[str, list[dict[str, Any]]] = {}
    for bad_line in faults:
        said.setdefault(bad_line.code, []).append(bad_line.params)
    for row, pictures in rows:
        about = {"line": row.line, "name": row.name}
        if not pictures:
            outside = files.index.is_elsewhere(row.name)
            said.setdefault("dataset.row_outside" if outside else "dataset.row_without_picture",
                            []).append(about)
        elif not texts.keys().isdisjoint(pictures):
            said.setdefault("dataset.row_twice", []).append(about)
        for path in pictures if row.caption else ():
            texts.setdefault(path, row.caption)
            tree.caption_files.setdefault(path, file)
    for code, cases in said.items():
        tree.report(file, code, **cases[0] | {"count": len(cases)})
    if explicit and not any(pictures for _, pictures in rows):
        raise UserError("dataset.metadata_no_match", file=file, folder=tree.folder,
                        count=len(rows), name=rows[0][0].name if rows else "-")
    return texts


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
