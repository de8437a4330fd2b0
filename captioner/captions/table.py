"""metadata.csv and .jsonl as records that keep their text: a changed caption changes its own
characters and nothing else in the file.

core.dataset.captions, which training uses, decides what a row means.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from core.dataset import captions
from core.dataset.captions import CAPTION_KEYS, NAME_KEYS, one_line, split_tags
from core.serialization import decode_text

HEADER = "filename,prompt"                  # of a new .csv
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")

_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(slots=True)
class Record:
    raw: str                                # the text without its line end
    end: str                                # "\n", "\r\n"; "" on a last line without one
    name: str = ""                          # as written; "": a header, blank or damaged
    caption: str = ""                       # as training reads it
    removed: bool = False


class Table:
    """The records of a file. It is written as UTF-8; a .csv gets a byte order mark if it had one or
    was no UTF-8 before, as Excel would take it for the system's encoding otherwise."""

    def __init__(self, path: Path, data: bytes) -> None:
        """Raises ValueError if the file is no text, UserError where the columns are missing."""
        text = decode_text(data)
        is_json = path.suffix.lower() in JSON_SUFFIXES
        self.syntax: _Csv | _Jsonl = _Jsonl() if is_json else _Csv(text, path)
        self.has_mark = not is_json and (data.startswith(_BOMS) or not _is_utf8(data))
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
            self.records[-1].end = self.line_end
        record = Record(raw, self.line_end, name)
        self.records.append(record)
        self._by_name.setdefault(name, []).append(record)

    def remove(self, record: Record) -> None:
        record.removed = True
        self._by_name[record.name].remove(record)

    def to_bytes(self) -> bytes:
        *others, last = ([record for record in self.records if not record.removed]
                         or [Record("", "")])
        text = "".join(record.raw + self.syntax.closing(record.raw) + record.end
                       for record in others) + last.raw + last.end
        return codecs.BOM_UTF8 + text.encode() if self.has_mark else encoded(text)


def encoded(text: str) -> bytes:
    """UTF-8, with a byte order mark in the rare case that decode_text() would take it for another
    encoding (a few accented letters alone read as Chinese in GB18030)."""
    data = text.encode("utf-8", "replace")
    return data if _is_utf8(data) else codecs.BOM_UTF8 + data


def _is_utf8(data: bytes) -> bool:
    try:
        return decode_text(data) == data.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _split_end(line: str) -> tuple[str, str]:
    body = line.rstrip("\r\n")
    return body, line[len(body):]


# --- csv --------------------------------------------------------------------------------------

class _Csv:
    def __init__(self, text: str, path: Path) -> None:
        self.path = path
        self.delimiter = captions.delimiter_of(text)
        self.columns = captions.Columns(2, 0, (1,))
        self.quote_all = False

    def records(self, text: str) -> Iterator[Record]:
        # csv.reader counts lines itself: a quoted caption may span several.
        lines = list(io.StringIO(text, newline=""))
        reader = csv.reader(iter(lines), delimiter=self.delimiter, skipinitialspace=True)
        first, has_columns = 0, False
        while first < len(lines):
            try:
                values = next(reader)
            except csv.Error as error:
                # Training reads no row after it either.
                raise ValueError(f"line {first + 1}: {error}") from None
            raw, end = _split_end("".join(lines[first:reader.line_num]))
            first = reader.line_num
            record = Record(raw, end)
            if any(value.strip() for value in values):
                is_header = False
                if not has_columns:
                    self.columns, is_header = captions.columns_of(values, self.path)
                    has_columns = True
                # New fields are quoted if the last row's are.
                self.quote_all = all(piece.strip().startswith('"') for piece in self._split(raw))
                if not is_header:
                    row = self.columns.row(0, values)
                    record.name, record.caption = row.name, row.caption
            yield record

    def _values(self, raw: str) -> list[str]:
        return next(csv.reader(io.StringIO(raw, newline=""), delimiter=self.delimiter,
                               skipinitialspace=True), [])

    def with_caption(self, raw: str, caption: str) -> str:
        values, pieces = self._values(raw), self._split(raw)
        # Odd quoting, or a quote that nobody closed: the row is written anew.
        if self._values(self.delimiter.join([*pieces, "x"])) != [*values, "x"]:
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
        return self.columns.row(0, self._values(raw)).caption

    def closing(self, raw: str) -> str:
        """The quote that the row lacks, so that another row can follow it."""
        if raw.count('"') % 2 and self._values(raw + self.delimiter + "x")[-1] != "x":
            return '"'
        return ""

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

class _Jsonl:
    name_key, caption_key = "file_name", "text"
    first_row = ""                          # new rows look like it

    def records(self, text: str) -> Iterator[Record]:
        # Not splitlines(), which would also split at characters such as U+2028 within JSON.
        for line in re.findall(r"[^\n]*\n|[^\n]+\Z", text):
            raw, end = _split_end(line)
            record = Record(raw, end)
            try:
                row = captions.json_row(0, json.loads(raw))
            except (ValueError, RecursionError):
                # core.dataset.captions reports it.
                yield record
                continue
            record.name, record.caption = row.name, row.caption
            if not self.first_row:
                self.first_row = raw
                keys = {key.strip().lower(): key for key in _json_spans(raw)}
                self.name_key = next(keys[key] for key in NAME_KEYS if key in keys)
                self.caption_key = next((keys[key] for key in CAPTION_KEYS if key in keys),
                                        self.caption_key)
            yield record

    def with_caption(self, raw: str, caption: str) -> str:
        data, spans = json.loads(raw), _json_spans(raw)
        keys = {key.strip().lower(): key for key in spans}
        caption_keys = [keys[key] for key in CAPTION_KEYS if key in keys]
        filled = [key for key in caption_keys if captions.json_caption(data[key])]
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
        return captions.json_row(0, json.loads(raw)).caption

    def closing(self, raw: str) -> str:
        return ""

    def new_row(self, name: str, caption: str) -> str:
        return _dumped({self.name_key: name, self.caption_key: caption}, self.first_row)


def _spaced(raw: str) -> bool:
    return '": ' in raw or not raw


def _dumped(value: Any, like: str) -> str:
    """JSON with spaces and escapes like those of the line `like`."""
    return json.dumps(value, ensure_ascii=like.isascii() and "\\u" in like,
                      separators=None if _spaced(like) else (",", ":"))


def _json_spans(raw: str) -> dict[str, tuple[int, int]]:
    """Start and end of each value of an object; of a key that is there twice, the last."""
    decoder, spans = json.JSONDecoder(), {}
    at = _skip(raw, raw.index("{") + 1)
    while raw[at] == '"':
        key, at = scanstring(raw, at + 1)
        at = _skip(raw, _skip(raw, at) + 1)             # the colon
        _, end = decoder.raw_decode(raw, at)
        spans[key] = (at, end)
        at = _skip(raw, end)
        if raw[at] == ",":
            at = _skip(raw, at + 1)
    return spans


def _skip(raw: str, at: int) -> int:
    """The position behind white space."""
    match = _SPACE.match(raw, at)
    return match.end() if match else at


def caption_in(data: bytes) -> str:
    """A sidecar's caption, as training reads it. Raises ValueError if it is no text."""
    return one_line(decode_text(data))
