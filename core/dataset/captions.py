"""Captions: text of any encoding, metadata.csv and .jsonl, trigger words, tags."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from core.config import TrainConfig
from core.errors import UserError
from core.serialization import decode_text, from_json

# Columns or keys of metadata, in the order in which they are looked for.
NAME_KEYS = ("filename", "file_name", "file", "image", "image_path", "path")
CAPTION_KEYS = ("prompt", "caption", "text", "description", "tags")

METADATA = ("metadata.csv", "metadata.jsonl")
SIDECARS = (".txt", ".caption")             # caption files of single pictures, in this order

MOST_SHUFFLES = 8               # caption variants kept for each picture when tags are shuffled

_COMMA = re.compile("[,，]")
# Chinese and its neighbours put no spaces between words, so their letters bound no word.
_WORD = r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_LOOKS_LIKE_FILE = re.compile(r".*\.[A-Za-z]{3,5}\s*", re.DOTALL)


# --- text -------------------------------------------------------------------------------------

def one_line(text: str) -> str:
    """Returns a caption file's whole text as one line.

    Lines of tags are joined with commas, prose with spaces. Lines are tags if one has a comma or
    all have at most four words, and none ends as a sentence does.
    """
    # Files that were joined by hand may hold a byte order mark in the middle.
    text = text.replace("\ufeff", "")
    lines = [clean for line in text.splitlines() if (clean := " ".join(line.split()))]
    prose = any(line.endswith(tuple(".!?。！？")) for line in lines)
    tags = (any(_COMMA.search(line) for line in lines)
            or all(len(line.split()) <= 4 for line in lines))
    if prose or not tags:
        return " ".join(lines)
    return ", ".join(clean for line in lines if (clean := line.strip(",， ")))


def split_tags(caption: str) -> list[str]:
    return [tag for part in _COMMA.split(caption) if (tag := part.strip())]


def with_trigger(caption: str, trigger: str) -> str:
    """Puts the trigger first, unless the caption already has it as a whole word or phrase."""
    if not trigger.strip() or phrase(trigger).search(caption):
        return caption
    return ", ".join(filter(None, (trigger.strip(), caption.strip())))


def without_trigger(caption: str, trigger: str) -> str:
    """Takes the trigger out of a caption, and the empty parts that this leaves."""
    if not trigger.strip():
        return caption
    parts = (" ".join(part.split()) for part in phrase(trigger).sub("", caption).split(","))
    return ", ".join(filter(None, parts))


def phrase(text: str) -> re.Pattern[str]:
    """A pattern that finds a word or phrase as a whole, in any case, with any spaces inside."""
    words = r"\s+".join(map(re.escape, text.split()))
    return re.compile(f"(?<!{_WORD}){words}(?!{_WORD})", re.IGNORECASE)


def shuffle_tags(caption: str, keep_tokens: int, rng: Random) -> str:
    """Puts comma-separated tags in random order; the first `keep_tokens` stay in front."""
    tags = split_tags(caption)
    first, rest = tags[:keep_tokens], tags[keep_tokens:]
    rng.shuffle(rest)
    return ", ".join(first + rest)


def variants(caption: str, config: TrainConfig, index: int) -> tuple[str, ...]:
    """Returns the different texts that the picture at `index` trains with.

    That is its caption, or with `shuffle_tags` up to MOST_SHUFFLES orders of its tags.
    """
    texts = [caption]
    if config.shuffle_tags:
        rng = Random(f"{config.seed}-{index}")
        texts = [shuffle_tags(caption, config.keep_tokens, rng) for _ in range(MOST_SHUFFLES)]
    # The trigger word goes in front after the shuffling, so that it is never shuffled.
    return tuple(dict.fromkeys(with_trigger(text, config.trigger_word) for text in texts))


# --- where captions are read from -------------------------------------------------------------

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
    def stem(path: Path) -> str:
        return os.path.splitext(os.path.normcase(path))[0]

    sidecars = {(stem(path), path.suffix.lower()): path for path in files
                if path.suffix.lower() in SIDECARS}
    # 01.txt and, as some downloaders write it, 01.png.txt
    return {path: [sidecars[key] for suffix in SIDECARS
                   for key in ((stem(path), suffix), (os.path.normcase(path), suffix))
                   if key in sidecars] for path in pictures}


# --- metadata.csv and metadata.jsonl ----------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a metadata file."""

    line: int
    name: str                               # as the file has it
    caption: str


def read_caption(path: Path) -> str:
    """Reads the caption file of one picture. Raises UserError when it can't be read."""
    try:
        return one_line(decode_text(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError("dataset.caption_unreadable", file=path.name, reason=_why(error)) from None


def read_metadata(path: Path) -> tuple[list[Row], list[UserError]]:
    """Reads a .csv or .jsonl: returns its rows, and an error for each line that has no row.

    Raises UserError when the whole file is missing, unreadable or lacks the columns.
    """
    try:
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        raise UserError("dataset.metadata_missing", file=path) from None
    except (OSError, ValueError) as error:
        raise UserError("dataset.metadata_unreadable", file=path, reason=_why(error)) from None
    is_json = path.suffix.lower() in (".json", ".jsonl", ".ndjson")
    rows = list(_json_rows(text, path) if is_json else _csv_rows(text, path))
    return ([row for row in rows if isinstance(row, Row)],
            [row for row in rows if isinstance(row, UserError)])


def _json_rows(text: str, path: Path) -> Iterator[Row | UserError]:
    # splitlines() would also cut at U+2028, which JSON allows inside of a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json_row(number, from_json(line))
            except (ValueError, RecursionError) as error:
                yield UserError("dataset.row_bad", file=path.name, line=number, reason=_why(error))


def json_row(number: int, data: Any) -> Row:
    """Reads one line of a .jsonl. Raises ValueError where it names no picture."""
    if not isinstance(data, dict):
        raise ValueError("expected an object with file_name and text")
    values = {str(key).strip().lower(): value for key, value in data.items()}
    name = next((values[key] for key in NAME_KEYS if isinstance(values.get(key), str)), None)
    if name is None:
        raise ValueError("there is no file_name")
    captions = (json_caption(values.get(key)) for key in CAPTION_KEYS)
    return Row(number, name.strip(), next(filter(None, captions), ""))


def json_caption(value: Any) -> str:
    """Reads the value of one of CAPTION_KEYS, which is a text or a list of tags."""
    if isinstance(value, list):
        value = ", ".join(tag for tag in value if isinstance(tag, str))
    if value is not None and not isinstance(value, str):
        raise ValueError("the caption is not a text")
    return one_line(value or "")


def _csv_rows(text: str, path: Path) -> Iterator[Row | UserError]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text),
                        skipinitialspace=True)
    columns: Columns | None = None
    line = 1
    try:
        for fields in reader:
            # A quoted caption may span lines: a row is reported by its first one.
            first_line, line = line, reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if columns is None:
                columns, is_header = columns_of(fields, path)
                if is_header:
                    continue
            yield columns.row(first_line, fields)
    except csv.Error as error:
        yield UserError("dataset.row_bad", file=path.name, line=line, reason=error)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a .csv hold what: how many there are, and indices."""

    width: int
    name: int
    captions: tuple[int, ...]

    def row(self, line: int, fields: Sequence[str]) -> Row:
        fields = [*fields[:self.width], *[""] * (self.width - len(fields)), *fields[self.width:]]
        caption = next((text for i in self.captions if (text := fields[i].strip())), "")
        # A caption in the last column may hold commas that nobody quoted.
        if self.captions == (self.width - 1,):
            caption = ", ".join(part for field in fields[self.width - 1:]
                                if (part := field.strip()))
        return Row(line, fields[self.name].strip(), one_line(caption))


def columns_of(fields: Sequence[str], path: Path) -> tuple[Columns, bool]:
    """Returns the columns that a file's first record tells, and whether it is a header.

    Without a header, a file name comes first and the caption second. Raises UserError where a
    header has a file name and no caption.
    """
    names = [field.strip().lower() for field in fields]
    name = next((names.index(key) for key in NAME_KEYS if key in names), None)
    captions = tuple(names.index(key) for key in CAPTION_KEYS if key in names)
    if name is not None and captions:
        return Columns(len(fields), name, captions), True
    if name == 0:
        raise UserError("dataset.metadata_columns", file=path, columns=", ".join(fields))
    return Columns(2, 0, (1,)), False


def delimiter_of(text: str) -> str:
    """Returns the sign between the fields of a .csv text.

    It is a comma, unless only a tab or a semicolon (which some Excels write) splits the first line
    into a file name and more, or into known column names.
    """
    first = next((line for line in text.splitlines() if line.strip()), "")
    for mark in (",", "\t", ";"):
        fields = next(csv.reader([first], delimiter=mark, skipinitialspace=True), [])
        names = [field.strip().lower() for field in fields]
        if len(fields) > 1 and (_LOOKS_LIKE_FILE.fullmatch(fields[0])
                                or set(NAME_KEYS) & set(names)):
            return mark
    return ","


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
