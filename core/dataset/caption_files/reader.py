"""The one reader of a folder's captions, for training, the captioner and the window."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.dataset.caption_files.places import (
    PLAIN,
    Index,
    caption_places,
    metadata_files,
    unused,
)
from core.dataset.caption_files.tables import (
    Record,
    caption_of_object,
    json_caption,
    read_metadata,
    text_of_table,
)
from core.dataset.captions import one_line
from core.errors import UserError
from core.serialization import from_json
from core.text_encoding import Decoder, Reading

LARGEST = 2**26                             # bytes of a file that may be a caption or a table
# Keys of a picture's .json; a description may be anything that somebody wrote about a picture.
JSON_KEYS = ("caption", "captions", "prompt", "text", "tags")
# What word processors and browsers save as .txt; and answers of models, saved as they came.
_DOCUMENT = re.compile(r"\s*(\{\\rtf|<!doctype html|<html|<\?xml)", re.IGNORECASE)
_JSON = re.compile(r'\s*\{\s*"\w+"\s*:.*\}\s*\Z', re.DOTALL)


class CaptionFiles:
    """The sidecars and tables of a folder, decoded together."""

    def __init__(self, folder: Path, pictures: Mapping[str, Path], files: Sequence[Path],
                 metadata: Path | None = None) -> None:
        """`pictures`: by their names relative to `folder`; `metadata`: the only table, where the
        user names one."""
        self.tables = metadata_files(files) if metadata is None else [metadata]
        self.sidecars = caption_places(pictures.values(), files)
        self.unused = unused(files, self.sidecars, (*self.tables, *metadata_files(files)))
        self.index = Index(pictures, folder)
        self._contents: dict[Path, bytes | OSError] = {}
        for file in (*self.tables, *(file for own in self.sidecars.values() for file in own)):
            if file not in self._contents:
                self._contents[file] = _content(file)
        self._decoder = Decoder(data for data in self._contents.values() if isinstance(data, bytes))
        self._readings: dict[Path, Reading | ValueError] = {}

    @functools.cached_property
    def odd(self) -> dict[Path, Reading]:
        """The files that aren't in UTF-8 or whose encoding is in doubt."""
        odd = {}
        for file in self._contents:
            with contextlib.suppress(OSError, ValueError):
                reading = self.reading(file)
                if reading.doubt or not reading.encoding.startswith("utf-8"):
                    odd[file] = reading
        return odd

    def reading(self, file: Path) -> Reading:
        """Returns a file's text as all of the folder's files together have it read. Raises OSError,
        and ValueError where it is no text."""
        if file not in self._readings:
            try:
                self._readings[file] = self._decoder.read(self.content(file))
            except ValueError as error:
                self._readings[file] = error
        reading = self._readings[file]
        if isinstance(reading, ValueError):
            raise reading
        return reading

    def content(self, file: Path) -> bytes:
        """Returns a file's bytes. Raises OSError."""
        data = self._contents[file]
        if isinstance(data, OSError):
            raise data
        return data

    def caption(self, file: Path) -> str:
        """Returns the caption in a sidecar. Raises UserError where it can't be read."""
        try:
            return caption_in(file, self.reading(file).text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError("dataset.caption_unreadable", file=file.name, reason=reason) from None

    def lines(self, file: Path) -> tuple[str, ...]:
        """Returns the lines of a sidecar that can be read, each as a caption; a .json has one."""
        text = self.reading(file).text
        if not file.name.lower().endswith(PLAIN) or _JSON.match(text):
            return (caption_in(file, text),)
        return tuple(line for raw in text.splitlines() if (line := one_line(raw)))

    def text_of_table(self, file: Path) -> str:
        """Returns a table's text. Raises UserError where it can't be read."""
        return text_of_table(file, lambda: self.content(file), lambda _: self.reading(file))

    def rows(self, file: Path) -> tuple[list[tuple[Record, list[Path]]], list[UserError]]:
        """Returns a table's rows with the pictures that they name, and what is wrong with it.

        Raises UserError where the whole table is of no use.
        """
        records, faults = read_metadata(file, self.text_of_table(file))
        pictures = self.index.match([record.name for record in records], file.parent)
        return list(zip(records, pictures, strict=True)), faults


def _content(file: Path) -> bytes | OSError:
    try:
        if (size := file.stat().st_size) > LARGEST:
            return OSError(0, f"{size >> 20} MB")
        return file.read_bytes()
    except OSError as error:
        return error


def caption_in(file: Path, text: str) -> str:
    """Returns the caption in the text of a sidecar. Raises ValueError where it is damaged."""
    if match := _DOCUMENT.match(text):
        raise ValueError(f"it begins with {match[1]}: a document, no plain text")
    if file.suffix.lower() != ".json" and not _JSON.match(text):
        return one_line(text)
    data = from_json(text)
    if isinstance(data, dict) and file.suffix.lower() != ".json":
        # written as text: it is the caption itself where no key tells one
        return caption_of_object(data) or one_line(text)
    if isinstance(data, dict):
        return caption_of_object(data, JSON_KEYS)
    return json_caption(data) if isinstance(data, list | str) else ""
