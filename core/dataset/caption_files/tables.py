"""Tables of captions: .csv, JSON lines, JSON lists and kohya's meta_cap.json, as their records.

What a table is, its content says: the suffix decides only where the content doesn't. A record keeps
its text, so that captioner.captions.table can change one caption and nothing else in the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from core.dataset.captions import one_line
from core.errors import UserError
from core.serialization import from_json
from core.text_encoding import Reading, read

# Columns or keys, in the order in which they are looked for.
NAME_KEYS = ("filename", "file_name", "file", "image", "image_path", "path", "image_file",
             "image_name", "file_path", "filepath", "img", "img_path", "name", "文件名", "图片",
             "图像", "檔名", "圖片")
CAPTION_KEYS = ("prompt", "caption", "text", "description", "captions", "tags",
                "提示词", "标注", "描述", "文本", "标签", "提示詞", "標籤")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")

_PICTURE = re.compile(r".*\.(?:png|jpe?g|jpe|jfif|webp|bmp|avif|tiff?|gif)\s*", re.I | re.S)
_LOOKS_LIKE_FILE = re.compile(r".*\.[A-Za-z]{3,5}\s*", re.DOTALL)
_SEP = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)     # Excel's first line
_SPACE = re.compile(r"[ \t\r\n]*")
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")           # .xlsx and .ods, .xls


@dataclass(slots=True)
class Record:
    """One picture of a table, or a line that is none."""

    raw: str                                # the text without its line end
    end: str                                # "\n", "\r\n"; "" on a last line without one
    line: int = 0
    name: str = ""                          # as written; "": a header, blank or damaged
    caption: str = ""                       # as training reads it
    removed: bool = False


def read_metadata(path: Path, text: str | None = None) -> tuple[list[Record], list[UserError]]:
    """Reads a table: returns its rows, and an error for each line that has no row or is odd.

    `text`: the file's, where it was read already. Raises UserError when the whole file is missing,
    unreadable or lacks the columns.
    """
    if text is None:
        text = text_of_table(path, path.read_bytes)
    table = (Json if is_json(text, path) else Csv)(text, path)
    return [record for record in table.records(text) if record.name], table.faults


def text_of_table(path: Path, content: Callable[[], bytes],
                  reader: Callable[[bytes], Reading] = read) -> str:
    """Returns the text of a table. Raises UserError where it is missing or no text."""
    data = b""
    try:
        data = content()
        return reader(data).text
    except FileNotFoundError:
        raise UserError("dataset.metadata_missing", file=path) from None
    except (OSError, ValueError) as error:
        if data.startswith(_WORKBOOKS):
            raise UserError("dataset.metadata_workbook", file=path) from None
        raise UserError("dataset.metadata_unreadable", file=path,
                        reason=getattr(error, "strerror", None) or error) from None


def is_json(text: str, path: Path) -> bool:
    """Whether a table is JSON of some kind and no .csv."""
    start = text.lstrip("\ufeff \t\r\n")
    if path.suffix.lower() in JSON_SUFFIXES:
        # A .csv with a wrong suffix begins with a name or a header.
        return start[:1] in ("", "{", "[", '"') or "," not in start.partition("\n")[0]
    return bool(re.match(r'\{\s*"|\[\s*\{', start))


def split_end(line: str) -> tuple[str, str]:
    """Splits a line into its text and its end."""
    body = line.rstrip("\r\n")
    return body, line[len(body):]


# --- csv --------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a .csv hold what: how many there are, and indices."""

    width: int
    name: int
    captions: tuple[int, ...]

    def padded(self, fields: Sequence[str]) -> list[str]:
        """As many fields as the table has columns, or more."""
        return [*fields, *[""] * (self.width - len(fields))]

    def caption(self, fields: Sequence[str]) -> str:
        """A row's caption, as training reads it."""
        fields = self.padded(fields)
        caption = next((text for i in self.captions if (text := fields[i].strip())), "")
        # A caption in the last column may hold commas that nobody quoted.
        if self.captions == (self.width - 1,):
            caption = ", ".join(part for field in fields[self.width - 1:]
                                if (part := field.strip()))
        return one_line(caption)

    def holds_other_names(self, fields: Sequence[str]) -> bool:
        """Whether a row has names of pictures where its caption should be."""
        behind = range(self.width, len(fields))
        return any(_PICTURE.fullmatch(fields[i]) for i in (*self.captions, *behind)
                   if i < len(fields))


class Csv:
    """Reads a .csv with any delimiter, header and quotes."""

    whole = False

    def __init__(self, text: str, path: Path) -> None:
        self.path, self.delimiter = path, delimiter_of(text)
        self.columns = Columns(2, 0, (1,))
        self.faults: list[UserError] = []

    def records(self, text: str) -> Iterator[Record]:
        """Yields all of the text, and notes what is wrong with it in `faults`."""
        lines = list(io.StringIO(text, newline=""))
        at, has_columns = 0, False
        if lines and _SEP.fullmatch(lines[0]):
            yield Record(*split_end(lines[0]))
            at = 1
        while at < len(lines):
            fields, next_at, reason = self.row(lines, at)
            record = Record(*split_end("".join(lines[at:next_at])), at + 1)
            if reason:
                self.fault("dataset.row_open", record.line)
            if any(field.strip() for field in fields):
                is_header = False
                if not has_columns:
                    self.columns, is_header = columns_of(fields, self.path)
                    has_columns = True
                if not is_header:
                    record.name = self.columns.padded(fields)[self.columns.name].strip()
                    record.caption = self.columns.caption(fields)
                    if self.columns.holds_other_names(fields):
                        self.fault("dataset.row_names_several", record.line)
                self.saw(record.raw)
            yield record
            at = next_at

    def saw(self, raw: str) -> None:
        """Told of each row that isn't blank."""

    def fault(self, code: str, line: int) -> None:
        """Notes that something is wrong with a row."""
        self.faults.append(UserError(code, file=self.path.name, line=line,
                                     count=1))

    def row(self, lines: Sequence[str], at: int) -> tuple[list[str], int, str]:
        """Returns the fields of the row that begins at a line, the line after it, and why its
        quotes make no sense: one that is never closed would swallow the rows behind it. Such a row
        is read up to the end of its line, without its quotes."""
        reader = csv.reader((lines[i] for i in range(at, len(lines))), delimiter=self.delimiter,
                            skipinitialspace=True)
        try:
            fields = next(reader, [])
        except csv.Error as error:
            reason = str(error)
        else:
            end = at + reader.line_num
            reason = "open" if end == len(lines) and self.is_open(lines[at:end]) else next(
                ("row inside" for line in lines[at + 1:end] if self._is_row(line)), "")
            if not reason:
                return fields, end, ""
        bare = lines[at].split(self.delimiter)
        return [field.strip().strip('"') for field in bare], at + 1, reason

    def is_open(self, lines: Sequence[str]) -> bool:
        """Whether a quote begins in these lines that none of them closes."""
        try:
            list(csv.reader(lines, delimiter=self.delimiter, skipinitialspace=True, strict=True))
        except csv.Error as error:
            return "end of data" in str(error)
        return False

    def _is_row(self, line: str) -> bool:
        """Whether a line within quotes is a row of its own: it names a picture and more."""
        fields = [part.strip(' "\r\n') for part in line.split(self.delimiter)]
        at = self.columns.name
        return len(fields) > max(at, 1) and bool(_PICTURE.fullmatch(fields[at]))


def columns_of(fields: Sequence[str], path: Path) -> tuple[Columns, bool]:
    """Returns the columns that a file's first record tells, and whether it is a header.

    Without a header, a file name comes first and the caption second. Raises UserError where a
    header has a file name and no caption.
    """
    names = [plain_key(field) for field in fields]
    name = next((names.index(key) for key in NAME_KEYS if key in names), None)
    captions = tuple(names.index(key) for key in CAPTION_KEYS if key in names)
    if name is not None and captions:
        return Columns(len(fields), name, captions), True
    if name == 0:
        raise UserError("dataset.metadata_columns", file=path, columns=", ".join(fields))
    return Columns(2, 0, (1,)), False


def delimiter_of(text: str) -> str:
    """Returns the sign between the fields of a .csv text.

    It is a comma, unless Excel's first line names another one, or only a tab, a semicolon (which
    some Excels write) or a bar splits the first line into a file name and more, or into known
    column names.
    """
    if match := _SEP.match(text):
        return match[1]
    first = next((line for line in text.splitlines() if line.strip()), "")
    for mark in (",", "\t", ";", "|"):
        fields = next(csv.reader([first], delimiter=mark, skipinitialspace=True), [])
        if len(fields) > 1 and (_LOOKS_LIKE_FILE.fullmatch(fields[0])
                                or set(NAME_KEYS) & set(map(plain_key, fields))):
            return mark
    return ","


def plain_key(name: object) -> str:
    """File name, FileName and file_name as one."""
    return "_".join(str(name).strip("\ufeff \t\r\n").lower().replace("-", " ").split())


# --- JSON -------------------------------------------------------------------------------------

class Json:
    """Reads JSON lines, and JSON as a whole: a list of objects, or one with a key a picture."""

    def __init__(self, text: str, path: Path) -> None:
        self.path = path
        self.faults: list[UserError] = []
        self.data: Any = None
        with contextlib.suppress(ValueError):           # lines, or damaged: each line says so
            self.data = from_json(text.lstrip("\ufeff"))
        # One object with a name is one line.
        if not isinstance(self.data, dict | list) or _named(self.data):
            self.data = None
        # It has no lines of its own that a caption could be changed in.
        self.whole = self.data is not None

    def saw(self, raw: str) -> None:
        """Told of each line that is a row."""

    def records(self, text: str) -> Iterator[Record]:
        """Yields all of the text, and notes what is wrong with it in `faults`."""
        if self.whole:
            yield from self._whole(text)
            return
        # Not splitlines(), which would also split at characters such as U+2028 within JSON.
        for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+\Z", text), 1):
            record = Record(*split_end(line), number)
            if record.raw.strip("\ufeff \t"):
                self._fill(record, record.raw)
            yield record

    def _fill(self, record: Record, raw: str) -> None:
        try:
            record.name, record.caption = json_row(from_json(raw.lstrip("\ufeff")))
            self.saw(raw)
        except (ValueError, RecursionError) as error:
            self.faults.append(UserError("dataset.row_bad", file=self.path.name,
                                         line=record.line, reason=error, count=1))

    def _whole(self, text: str) -> Iterator[Record]:
        data = self.data
        if isinstance(data, dict):
            # {"images": [...]}, as some programs export it
            lists = [value for value in data.values() if isinstance(value, list) and value
                     and isinstance(value[0], dict)]
            data = lists[0] if len(lists) == 1 and len(data) < 5 else data
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        at, line, escaped = 0, 1, "\\u" in text
        for key, value in pairs:
            # The place of each row, for people: that of its name, which is written before it.
            name = key if isinstance(key, str) else _named(value)
            found = text.find(json.dumps(name, ensure_ascii=escaped), at) if name else -1
            if found > at:
                line, at = line + text.count("\n", at, found), found
            record = Record("", "", line)
            try:
                record.name, record.caption = (json_row(value) if isinstance(key, int)
                                               else (key, _caption_of_entry(value)))
            except ValueError as error:
                self.faults.append(UserError("dataset.row_bad", file=self.path.name,
                                             line=record.line, reason=error, count=1))
            yield record


def json_row(data: Any) -> tuple[str, str]:
    """Returns name and caption of one object. Raises ValueError where it names no picture."""
    if not isinstance(data, dict):
        raise ValueError("expected an object with file_name and text")
    name = _named(data)
    if name is None:
        raise ValueError("there is no file_name")
    return name.strip(), caption_of_object(data)


def _named(data: Any) -> str | None:
    if not isinstance(data, dict):
        return None
    values = {plain_key(key): value for key, value in data.items()}
    return next((values[key] for key in NAME_KEYS if isinstance(values.get(key), str)), None)


def caption_of_object(data: dict[str, Any], keys: Sequence[str] = CAPTION_KEYS) -> str:
    """Returns the first caption that an object has under one of the keys, "" where it has none.

    Raises ValueError where all that it has is a number or the like.
    """
    values = {plain_key(key): value for key, value in data.items()}
    caption = next(filter(None, (json_caption(values.get(key)) for key in keys)), "")
    if not caption and any(not isinstance(values.get(key), str | list | None) for key in keys):
        raise ValueError("the caption is not a text")
    return caption


def _caption_of_entry(value: Any) -> str:
    """The caption of a picture in kohya's meta_cap.json: caption and tags, as kohya joins them."""
    if not isinstance(value, dict):
        return json_caption(value)
    parts = [json_caption(value.get(key)) for key in ("caption", "tags")]
    return ", ".join(filter(None, parts)) or caption_of_object(value)


def json_caption(value: Any) -> str:
    """Reads the value of one of CAPTION_KEYS: a text or a list of tags; anything else is none."""
    if isinstance(value, list):
        value = ", ".join(tag for tag in value if isinstance(tag, str))
    return one_line(value) if isinstance(value, str) else ""


def json_spans(raw: str) -> dict[str, tuple[int, int]]:
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
