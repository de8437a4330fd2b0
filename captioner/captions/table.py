"""metadata.csv and .jsonl as records that keep their text: a changed caption changes its own
characters and nothing else in the file.

core.dataset.caption_files.tables, which training uses, reads them.
"""

from __future__ import annotations

import codecs
import io
import json
from pathlib import Path
from typing import Any

from core.dataset.caption_files import tables
from core.dataset.caption_files.tables import (
    CAPTION_KEYS,
    NAME_KEYS,
    Record,
    json_caption,
    json_row,
    json_spans,
)
from core.dataset.captions import split_tags
from core.text_encoding import read

HEADER = "filename,prompt"                  # of a new .csv

_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Table:
    """The records of a file. It is written as UTF-8; a .csv gets a byte order mark if it had one or
    was no UTF-8 before, as Excel would take it for the system's encoding otherwise."""

    def __init__(self, path: Path, data: bytes, text: str | None = None) -> None:
        """`text`: what the data says, where its folder decides that. Raises ValueError if the file
        is no text, UserError where the columns are missing."""
        text = read(data).text if text is None else text
        is_json = tables.is_json(text, path)
        self.syntax: Csv | Json = (Json if is_json else Csv)(text, path)
        self.has_mark = not is_json and (data.startswith(_BOMS) or not is_utf8(data))
        self.records = list(self.syntax.records(text))
        self._by_name: dict[str, list[Record]] = {}
        for record in self.records:
            if record.name:
                self._by_name.setdefault(record.name, []).append(record)
        self.line_end = "\r\n" if "\r\n" in text else "\n"

    def rows(self, name: str) -> list[Record]:
        return self._by_name.get(name, [])

    def add(self, raw: str, name: str) -> None:
        if self.records and not self.records[-1].end:
            self.records[-1].raw = self.syntax.closed(self.records[-1].raw)
            self.records[-1].end = self.line_end
        record = Record(raw, self.line_end, name=name)
        self.records.append(record)
        self._by_name.setdefault(name, []).append(record)

    def remove(self, record: Record) -> None:
        record.removed = True
        self._by_name[record.name].remove(record)

    def to_bytes(self) -> bytes:
        text = "".join(record.raw + record.end for record in self.records if not record.removed)
        return (codecs.BOM_UTF8 if self.has_mark else b"") + text.encode("utf-8", "replace")


def is_utf8(data: bytes) -> bool:
    """Whether data is text in UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# --- csv --------------------------------------------------------------------------------------

class Csv(tables.Csv):
    """Changes the rows of a .csv."""

    quote_all = False                       # new fields are quoted if the last row's are

    def saw(self, raw: str) -> None:
        self.quote_all = all(piece.strip().startswith('"') for piece in self._split(raw))

    def _values(self, raw: str) -> list[str]:
        return self.row(list(io.StringIO(raw, newline="")) or [""], 0)[0]

    def with_caption(self, raw: str, caption: str) -> str:
        values, pieces = self._values(raw), self._split(raw)
        # Odd quoting, or a quote that nobody closed: the row is written anew.
        if self.is_open([raw]) or (
                self._values(self.delimiter.join([*pieces, "x"])) != [*values, "x"]):
            pieces = [self._quoted(value, self.quote_all) for value in values]
        width, columns = self.columns.width, self.columns.captions
        pieces += [""] * (width - len(pieces))
        values += [""] * (width - len(values))
        # Fields behind a last caption column are parts of a caption with unquoted commas.
        if columns == (width - 1,):
            pieces, values = pieces[:width], values[:width]
        # Training reads the first column that has text; an empty caption empties all of them.
        filled = [i for i in columns if values[i].strip()] or [columns[0]]
        for i in filled if not caption else filled[:1]:
            pieces[i] = self._quoted(caption, pieces[i].strip().startswith('"') or (
                not pieces[i] and self.quote_all))
        return self.delimiter.join(pieces)

    def caption_of(self, raw: str) -> str:
        return self.columns.caption(self._values(raw))

    def closed(self, raw: str) -> str:
        """The row with the quote that it lacks, so that another row can follow it."""
        if not self.is_open([raw]):
            return raw
        return self.delimiter.join(self._quoted(value, False) for value in self._values(raw))

    def new_row(self, name: str, caption: str) -> str:
        pieces = ['""' if self.quote_all else ""] * self.columns.width
        pieces[self.columns.name] = self._quoted(name, self.quote_all)
        pieces[self.columns.captions[0]] = self._quoted(caption, self.quote_all)
        return self.delimiter.join(pieces)

    def _quoted(self, value: str, always: bool) -> str:
        needs = always or value != value.strip() or any(
            mark in value for mark in (self.delimiter, '"', "\r", "\n"))
        return '"' + value.replace('"', '""') + '"' if needs else value

    def _split(self, raw: str) -> list[str]:
        """The fields with their quotes and spaces."""
        pieces, start, at, inside = [], 0, 0, False
        while at < len(raw):
            begins = not raw[start:at].strip(" ")
            # A quote only counts at the beginning of a field, as for csv.reader.
            if raw[at] == '"' and (inside or begins):
                # "" inside of quotes closes and opens them again.
                inside = not inside
                if not inside and raw[at + 1:at + 2] == '"':
                    inside, at = True, at + 1
            elif raw[at] == self.delimiter and not inside:
                pieces.append(raw[start:at])
                start = at + 1
            at += 1
        return [*pieces, raw[start:]]


# --- jsonl ------------------------------------------------------------------------------------

class Json(tables.Json):
    """Changes JSON lines. JSON that is one whole is only read: see `whole`."""

    name_key, caption_key = "file_name", "text"
    first_row = ""                          # new rows look like it

    def saw(self, raw: str) -> None:
        if not self.first_row:
            self.first_row = raw
            keys = _keys(raw)
            self.name_key = next(keys[key] for key in NAME_KEYS if key in keys)
            self.caption_key = next((keys[key] for key in CAPTION_KEYS if key in keys),
                                    self.caption_key)

    def with_caption(self, raw: str, caption: str) -> str:
        data, spans, keys = json.loads(raw), json_spans(raw), _keys(raw)
        caption_keys = [keys[key] for key in CAPTION_KEYS if key in keys]
        filled = [key for key in caption_keys if json_caption(data[key])]
        if not caption_keys:
            # A row without a caption gets one as its last key.
            at = raw.rindex("}")
            pair = _dumped({self.caption_key: caption}, raw)[1:-1]
            return raw[:at].rstrip() + (", " if _spaced(raw) else ",") + pair + raw[at:]
        # An empty caption empties all keys. From the end, so that earlier spans stay right.
        for key in sorted(filled if filled and not caption else (filled or caption_keys)[:1],
                          key=lambda key: -spans[key][0]):
            value = split_tags(caption) if isinstance(data[key], list) else caption
            start, end = spans[key]
            raw = raw[:start] + _dumped(value, raw) + raw[end:]
        return raw

    def caption_of(self, raw: str) -> str:
        return json_row(json.loads(raw))[1]

    def closed(self, raw: str) -> str:
        return raw

    def new_row(self, name: str, caption: str) -> str:
        return _dumped({self.name_key: name, self.caption_key: caption}, self.first_row)


def _spaced(raw: str) -> bool:
    return '": ' in raw or not raw


def _dumped(value: Any, like: str) -> str:
    """JSON with spaces and escapes like those of the line `like`."""
    return json.dumps(value, ensure_ascii=like.isascii() and "\\u" in like,
                      separators=None if _spaced(like) else (",", ":"))


def _keys(raw: str) -> dict[str, str]:
    """An object's keys as they are written, by how they are looked for."""
    return {tables.plain_key(key): key for key in json_spans(raw)}
