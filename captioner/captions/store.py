"""Where a folder's captions are kept, and how they change there: sidecars, metadata.csv, .jsonl.

A picture's caption is the one that training reads (core/dataset/image_folder.py). Training joins
the lines of a caption; one that doesn't change keeps them in its file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from captioner.captions.edits import Place, Swap
from captioner.captions.table import HEADER, Table
from captioner.config import WriteTo
from core import paths
from core.dataset import image_folder
from core.dataset.caption_files.places import SIDECARS
from core.dataset.caption_files.reader import caption_in
from core.dataset.caption_files.tables import JSON_SUFFIXES
from core.errors import UserError
from core.serialization import readable_name
from core.text_encoding import read


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture and its caption as training reads it, without the class token of a folder."""

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
        """Whether the caption is in another place than where captions are to be written."""
        return self.home is not None and self.home != self.place


class Store:
    """The captions of a folder, as they stood when it was opened."""

    def __init__(self, folder: Path, metadata: Path | None = None,
                 write_to: WriteTo = "auto") -> None:
        """Raises UserError where there are no pictures, a table can't be read, or training would
        read another place before `write_to`."""
        self.folder = Path(os.path.abspath(paths.expanded(folder)))
        reader = _Reader(self.folder, metadata, write_to)
        self.tables = reader.tables
        self.entries = reader.entries()
        self.problems = tuple(reader.tree.problems)

    @property
    def captions(self) -> dict[str, str]:
        return {name: entry.caption for name, entry in self.entries.items()}

    def name(self, file: Path) -> str:
        """A file's name for people."""
        return image_folder.relative_name(file, self.folder)

    def swaps(self, captions: Mapping[str, str]) -> list[Swap]:
        """The changes that give the named pictures these captions; none where a picture has its
        caption already. The beginning of a new table comes before its rows."""
        changes: list[Swap] = []
        for name, caption in captions.items():
            entry = self.entries[name]
            place, old = entry.place, entry.content
            # What the entry's own place holds: its caption may be read from another one.
            written = entry.caption if entry.home == place else ""
            if entry.locked or (old is not None and written == caption):
                continue
            if place.kind == "sidecar":
                end = b"\n" if (old or b"").endswith(b"\n") else b""
                changes.append(Swap(name, place, old, caption.encode("utf-8", "replace") + end))
                continue
            if place.file not in self.tables:
                is_json = place.file.suffix.lower() in JSON_SUFFIXES
                head = b"" if is_json else f"{HEADER}\n".encode()
                self.tables[place.file] = Table(place.file, head)
                changes.append(Swap("", Place(place.file, "table"), None, head))
            syntax = self.tables[place.file].syntax
            row = (syntax.new_row(place.row, caption) if old is None
                   else syntax.with_caption(old.decode("utf-8"), caption))
            changes.append(Swap(name, place, old, row.encode("utf-8", "replace")))
        return changes

    def accept(self, done: Iterable[Swap]) -> None:
        """Takes over what perform() or an undo has done, so that editing continues without
        reading the folder again."""
        for swap in done:
            entry = self.entries.get(swap.picture)
            # Undo may bring back a place that captions no longer go to.
            if entry is None or entry.place != swap.place:
                continue
            if swap.after is None:
                caption = ""
            elif swap.place.kind == "sidecar":
                caption = caption_in(swap.place.file, read(swap.after).text)
            else:
                syntax = self.tables[swap.place.file].syntax
                caption = syntax.caption_of(swap.after.decode("utf-8"))
            self.entries[swap.picture] = replace(entry, content=swap.after, caption=caption,
                                                 home=entry.place if caption else None)


# --- reading ----------------------------------------------------------------------------------

@dataclass(slots=True)
class _Stored:
    """What one place holds for a picture."""

    place: Place
    content: bytes
    caption: str
    locked: str = ""


class _Reader:
    def __init__(self, folder: Path, metadata: Path | None, write_to: WriteTo) -> None:
        self.folder, self.write_to = folder, write_to
        self.metadata = metadata and Path(os.path.abspath(paths.expanded(metadata)))
        if self.metadata and self.metadata.suffix.lower() not in (".csv", ".tsv", ".txt",
                                                                  *JSON_SUFFIXES):
            raise UserError("captions.table_suffix", file=self.metadata)
        self.tables: dict[Path, Table] = {}
        self._table_locks: dict[Path, str] = {}
        self.tree = image_folder.walk(folder)
        self.files = self.tree.caption_files_of(self.metadata)
        # What training would say of them; a table that the user names may be yet to come.
        if self.metadata is None or self.metadata.is_file():
            image_folder.read_captions(self.tree, self.files)
        owners = Counter(file for own in self.files.sidecars.values() for file in own)
        # New texts of pictures that have a file in common go into files of their own.
        self.shared = {file for file, count in owners.items() if count > 1}
        stems = Counter(path.with_suffix("") for path in self.tree.pictures)
        self.same_stem = {stem for stem, count in stems.items() if count > 1}

    def entries(self) -> dict[str, Entry]:
        # Rows of tables before sidecars, as training reads them.
        stored: dict[Path, list[_Stored]] = {path: [] for path in self.tree.pictures}
        for path, row in self._rows():
            stored[path].append(row)
        for path, files in self.files.sidecars.items():
            stored[path] += map(self._read_sidecar, files)
        # New sidecars are named like most of the folder's: 01.txt or 01.png.txt.
        forms = Counter(form for path, places in stored.items() for one in places
                        if one.place.kind == "sidecar" and (form := _form(path, one.place.file)))
        (after_name, suffix), _ = forms.most_common(1)[0] if forms else ((False, ".txt"), 0)
        entries = {}
        for path, places in stored.items():
            home = next((one for one in places if one.caption), None)
            whole = after_name or path.with_suffix("") in self.same_stem
            sidecar = path.with_name((path.name if whole else path.stem) + suffix)
            place = self._target(path, places, home, sidecar)
            there = next((one for one in places if one.place == place), None)
            locked = there.locked if there else ""
            if place.kind == "row" and place.file in self.tables:
                locked = locked or self._table_locks[place.file]
            name = self.tree.name(path)
            entries[name] = Entry(path, name, home.caption if home else "",
                                  home.place if home else None, place,
                                  there.content if there else None, locked)
        # Training reads the first place that holds a caption, never what is written behind it.
        shadowed = [entry for entry in entries.values() if entry.home is not None and entry.strays
                    and self._rank(entry.home) < self._rank(entry.place)]
        if shadowed and self.write_to != "auto":
            home_place = shadowed[0].home
            raise UserError("captions.shadowed", count=len(shadowed), target=self.write_to,
                            file=self.tree.name(home_place.file) if home_place else "")
        return entries

    def _rows(self) -> Iterator[tuple[Path, _Stored]]:
        """Each picture with the rows that name it, in the order in which training reads them."""
        for file in self.files.tables:
            try:
                data = self.files.content(file)
                text = self.files.text_of_table(file)
                table = self.tables[file] = Table(file, data, text)
            except FileNotFoundError:
                # The user named a table that doesn't exist yet.
                continue
            except (OSError, ValueError) as error:
                raise UserError("dataset.metadata_unreadable", file=file, reason=error) from None
            alone = read(data)
            # Why no row can be written: it would be written back in another reading, or ...
            in_doubt = alone.text != text or (alone.doubt and alone.encoding != "utf-8")
            self._table_locks[file] = ("in_doubt" if in_doubt else
                                       "whole_json" if table.syntax.whole else "")
            records = [record for record in table.records if record.name]
            matches = self.files.index.match([record.name for record in records], file.parent)
            for record, pictures in zip(records, matches, strict=True):
                # A row that names several pictures can't get the caption of one of them.
                locked = "shared_row" if len(pictures) > 1 else ""
                for path in pictures:
                    yield path, _Stored(Place(file, "row", record.name), record.raw.encode(),
                                        record.caption, locked)

    def _read_sidecar(self, file: Path) -> _Stored:
        place = Place(file)
        try:
            content = self.files.content(file)
        except OSError:
            return _Stored(place, b"", "", "not_readable")
        try:
            reading = self.files.reading(file)
            in_doubt = reading.doubt and reading.encoding != "utf-8"
            return _Stored(place, content, caption_in(file, reading.text),
                           "in_doubt" if in_doubt else "")
        except ValueError:
            return _Stored(place, content, "", "not_text")

    def _target(self, path: Path, places: Sequence[_Stored], home: _Stored | None,
                sidecar: Path) -> Place:
        """Where a new caption of the picture goes; `sidecar`: if there is no place for it yet."""
        if self.metadata is not None:
            return self._row_place(path, self.metadata, places)
        # A .json is only read, a shared file stays: what is written is read before them.
        places = [one for one in places if one.place.kind == "row" or (
            one.place.file.suffix.lower() != ".json" and one.place.file not in self.shared)]
        if self.write_to == "auto" and home in places and home is not None:
            return home.place
        if self.write_to in ("csv", "jsonl"):
            return self._row_place(path, self.folder / f"metadata.{self.write_to}", places)
        if self.write_to in ("txt", "caption"):
            suffix = f".{self.write_to}"
            own = path.name if path.with_suffix("") in self.same_stem else path.stem
            return next((one.place for one in places if one.place.kind == "sidecar"
                         and one.place.file.suffix.lower() == suffix),
                        Place(path.with_name(own + suffix)))
        # An empty row or file is meant for the caption.
        if places:
            return places[0].place
        for table in self.tables:
            if not self.tables[table].syntax.whole and path.is_relative_to(table.parent):
                return self._row_place(path, table, places)
        return Place(sidecar)

    def _row_place(self, path: Path, table: Path, places: Sequence[_Stored]) -> Place:
        """The picture's row in the table: the first one with a caption, or else a new one."""
        rows = [one for one in places if one.place.file == table]
        if rows:
            return next((row for row in rows if row.caption), rows[0]).place
        beside = path.is_relative_to(table.parent) and table.is_relative_to(self.folder)
        name = path.relative_to(table.parent if beside else self.folder).as_posix()
        return Place(table, "row", readable_name(name))

    def _rank(self, place: Place) -> tuple[int, int, str]:
        """Smaller for places that training reads earlier; also for places that are yet to come."""
        if place.kind == "row":
            return (0, -len(place.file.parts), self.tree.name(place.file))
        name = place.file.name.lower()
        return (1 + max(i for i, suffix in enumerate(SIDECARS) if name.endswith(suffix)), 0, "")


def _form(path: Path, file: Path) -> tuple[bool, str] | None:
    """How a picture's sidecar is named: after its whole name or its stem, and with what behind
    it; None where new ones are not to be named so."""
    for whole, name in ((True, path.name), (False, path.stem)):
        suffix = file.name[len(name):].lower()
        if suffix in SIDECARS and suffix != ".json":
            return whole, suffix
    return None
