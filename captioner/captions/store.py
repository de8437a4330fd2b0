"""Where a folder's captions are kept, and how they change there: sidecars, metadata.csv, .jsonl.

Places are looked at in the order in which training does (core/dataset/image_folder.py). Lines
of a caption that spans several are read as one by training; only a changed caption is written, as
one line.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from captioner.captions.edits import Place, Swap
from captioner.captions.table import HEADER, JSON_SUFFIXES, Table, caption_in, encoded
from core.dataset import image_folder
from core.errors import UserError
from core.serialization import readable_name

WriteTo = Literal["auto", "txt", "caption", "csv", "jsonl"]

METADATA = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture and its caption as training reads it (a folder's class token aside)."""

    path: Path                              # absolute
    name: str                               # relative to the folder, with slashes
    caption: str
    home: Place | None                      # where training reads it; None: nowhere yet
    place: Place                            # where a new caption goes
    content: bytes | None                   # of `place`, as it was read
    locked: str = ""                        # why it can't be written: a key of captions.yaml

    @property
    def several_lines(self) -> bool:
        lines = (self.content or b"").splitlines() if self.place.kind == "sidecar" else []
        return sum(bool(line.strip()) for line in lines) > 1

    @property
    def strays(self) -> bool:
        """Its caption stands elsewhere than where captions are to be written."""
        return self.home is not None and self.home != self.place


class Store:
    """The captions of a folder, as they stood when it was opened."""

    def __init__(self, folder: Path, metadata: Path | None = None,
                 write_to: WriteTo = "auto") -> None:
        """Raises UserError where there are no pictures, a table can't be read, or training would
        read something else before what is written to `write_to`."""
        self.folder = Path(os.path.abspath(folder.expanduser()))
        reader = _Reader(self.folder, metadata, write_to)
        self.tables = reader.tables
        self.entries = reader.entries()
        self.problems = tuple(reader.tree.problems)

    @property
    def captions(self) -> dict[str, str]:
        return {name: entry.caption for name, entry in self.entries.items()}

    def swaps(self, wanted: Mapping[str, str]) -> list[Swap]:
        """What has to change so that the named pictures get these captions; nothing for those
        that training reads so already. A table that isn't there yet comes first."""
        changes: list[Swap] = []
        for name, caption in wanted.items():
            entry = self.entries[name]
            if entry.locked or self._says(entry) == caption:
                continue
            file = entry.place.file
            if entry.place.kind == "row" and file not in self.tables:
                self.tables[file] = Table(file, _head(file))
                changes.append(Swap("", Place(file, "table"), None, _head(file)))
            changes.append(Swap(name, entry.place, entry.content, self._content(entry, caption)))
        return changes

    def accept(self, done: Iterable[Swap]) -> None:
        """Takes over what perform() or an undo has done, so that editing can go on without
        another look at the folder."""
        for swap in done:
            entry = self.entries.get(swap.picture)
            if entry is None or entry.place != swap.place:
                continue
            caption = self._reads(swap)
            home = entry.place if caption else None
            self.entries[swap.picture] = replace(entry, content=swap.after, caption=caption,
                                                 home=home)

    def _reads(self, swap: Swap) -> str:
        if swap.after is None:
            return ""
        if swap.place.kind == "sidecar":
            return caption_in(swap.after)
        return self.tables[swap.place.file].syntax.caption_of(swap.after.decode("utf-8"))

    def _says(self, entry: Entry) -> str | None:
        """The caption at the entry's own place, as training reads it there."""
        if entry.content is None:
            return None
        return entry.caption if entry.home == entry.place else ""

    def _content(self, entry: Entry, caption: str) -> bytes:
        if entry.place.kind == "sidecar":
            end = b"\n" if (entry.content or b"").endswith(b"\n") else b""
            return encoded(caption) + end
        table = self.tables[entry.place.file]
        raw = table.syntax.new_row(entry.place.row, caption) if entry.content is None else (
            table.syntax.with_caption(entry.content.decode("utf-8"), caption))
        return raw.encode("utf-8", "replace")


def _head(file: Path) -> bytes:
    return b"" if file.suffix.lower() in JSON_SUFFIXES else f"{HEADER}\n".encode()


# --- reading ----------------------------------------------------------------------------------

@dataclass(slots=True)
class _Found:
    place: Place
    content: bytes
    caption: str
    locked: str = ""


@dataclass(slots=True)
class _Reader:
    folder: Path
    metadata: Path | None
    write_to: WriteTo
    tree: image_folder.Tree = field(init=False)
    tables: dict[Path, Table] = field(default_factory=dict)
    sidecars: dict[tuple[Path, str], Path] = field(init=False)
    table_files: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = image_folder.walk(self.folder)
        self.sidecars = {(file.with_suffix(""), file.suffix.lower()): file
                         for file in self.tree.files}
        if self.metadata is not None:
            self.metadata = Path(os.path.abspath(self.metadata.expanduser()))
            if self.metadata.suffix.lower() not in (".csv", *JSON_SUFFIXES):
                raise UserError("captions.table_suffix", file=self.metadata)
        self.table_files = self._order()

    def _order(self) -> list[Path]:
        """Tables in the order in which training looks at them: the nearest first."""
        if self.metadata is not None:
            return [self.metadata]
        files = [path for path in self.tree.files if path.name.lower() in METADATA]
        return sorted(files, key=lambda path: (-len(path.parts), self.tree.name(path)))

    def entries(self) -> dict[str, Entry]:
        found: dict[Path, list[_Found]] = {path: [] for path in self.tree.pictures}
        for path, one in self._rows():
            found[path].append(one)
        for path in self.tree.pictures:
            found[path] += self._sidecars(path)
        style = self._style(found)
        entries = [self._entry(path, places, style) for path, places in found.items()]
        self._refuse_shadowed(entries, found)
        return {entry.name: entry for entry in entries}

    def _rows(self) -> Iterator[tuple[Path, _Found]]:
        """Rows in the order in which training looks at them."""
        index = image_folder.Index(self.tree)
        for file in self.table_files:
            try:
                table = self.tables[file] = Table(file, file.read_bytes())
            except FileNotFoundError:       # given, and yet to be made
                continue
            except (OSError, ValueError) as error:
                raise UserError("dataset.metadata_unreadable", file=file, reason=error) from None
            for record in table.records:
                if not record.name:
                    continue
                pictures = index.find(record.name.replace("\\", "/"), file.parent)
                for path in pictures:
                    yield path, _Found(Place(file, "row", record.name), record.raw.encode(),
                                       record.caption,
                                       "shared_row" if len(pictures) > 1 else "")

    def _sidecars(self, path: Path) -> Iterator[_Found]:
        """01.txt, 01.png.txt, 01.caption, 01.png.caption: in training's order."""
        for suffix in (".txt", ".caption"):
            for key in ((path.with_suffix(""), suffix), (path, suffix)):
                if file := self.sidecars.get(key):
                    yield self._read(file)

    def _read(self, file: Path) -> _Found:
        try:
            content = file.read_bytes()
        except OSError as error:
            self.tree.report(file, "caption_unreadable", reason=error.strerror)
            return _Found(Place(file), b"", "", "not_readable")
        try:
            return _Found(Place(file), content, caption_in(content))
        except ValueError:
            return _Found(Place(file), content, "", "not_text")

    def _style(self, found: Mapping[Path, list[_Found]]) -> str:
        """The suffix that most of the folder's sidecars have; what there is none of: .txt."""
        names = Counter(one.place.file.name.removeprefix(path.stem)
                        if not one.place.file.name.startswith(path.name)
                        else "+" + one.place.file.suffix
                        for path, places in found.items() for one in places
                        if one.place.kind == "sidecar")
        return names.most_common(1)[0][0].lower() if names else ".txt"

    def _entry(self, path: Path, places: Sequence[_Found], style: str) -> Entry:
        home = next((one for one in places if one.caption), None)
        place = self._target(path, places, home, style)
        there = next((one for one in places if one.place == place), None)
        return Entry(path, self.tree.name(path), home.caption if home else "",
                     home.place if home else None, place, there.content if there else None,
                     there.locked if there else "")

    def _target(self, path: Path, places: Sequence[_Found], home: _Found | None,
                style: str) -> Place:
        file, kinds = self._wanted_table(path), {"csv": ".csv", "jsonl": ".jsonl"}
        if self.write_to == "auto" and self.metadata is None and home is not None:
            return home.place
        if file is not None and (self.write_to in kinds or self.metadata is not None):
            return self._row(path, file, places)
        if self.write_to in ("txt", "caption"):
            own = [one.place for one in places if one.place.kind == "sidecar"
                   and one.place.file.suffix.lower() == f".{self.write_to}"]
            return own[0] if own else Place(path.with_suffix(f".{self.write_to}"))
        if places:                          # an empty row or file waits for it
            return places[0].place
        if file is not None:
            return self._row(path, file, places)
        if style.startswith("+"):
            return Place(path.with_name(path.name + style[1:]))
        return Place(path.with_suffix(style))

    def _wanted_table(self, path: Path) -> Path | None:
        """The table that a caption without a place goes to; None: a sidecar."""
        if self.metadata is not None:
            return self.metadata
        if self.write_to in ("csv", "jsonl"):
            return self.folder / f"metadata.{self.write_to}"
        near = [file for file in self.table_files if path.is_relative_to(file.parent)]
        return near[0] if near and self.write_to == "auto" else None

    def _row(self, path: Path, file: Path, places: Sequence[_Found]) -> Place:
        rows = [one for one in places if one.place.file == file]
        if rows:
            return next((one for one in rows if one.caption), rows[0]).place
        beside = file.parent if path.is_relative_to(file.parent) and (
            file.is_relative_to(self.folder)) else self.folder
        return Place(file, "row", readable_name(path.relative_to(beside).as_posix()))

    def _refuse_shadowed(self, entries: Iterable[Entry],
                         found: Mapping[Path, list[_Found]]) -> None:
        """Training reads the first place that holds a caption: what is written behind it would
        never be read."""
        hidden = [entry for entry in entries if entry.home is not None and entry.strays
                  and self._rank(entry.home) < self._rank(entry.place)]
        if hidden and self.write_to != "auto":
            home = hidden[0].home
            raise UserError("captions.shadowed", count=len(hidden), target=self.write_to,
                            file=self.tree.name(home.file) if home else "")

    def _rank(self, place: Place) -> tuple[int, int, str]:
        if place.kind == "row":
            return (0, -len(place.file.parts), self.tree.name(place.file))
        return (1 if place.file.suffix.lower() == ".txt" else 2, 0, "")
