"""TOML and JSON as flat entries that know their line: (path of keys, value, line)."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import serialization
from core.config.flat_yaml import refuse_backslashes
from core.errors import UserError

DEEPEST = 64                               # levels; more is no config
LARGEST = 16 * 2**20                       # bytes
LIST = "concepts"                          # the key of a file that is a list of tables alone
_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')

Keys = tuple[str, ...]                     # ("concepts", "0", "path")
Lines = dict[Keys, int]


@dataclass(frozen=True, slots=True)
class Entry:
    keys: Keys
    value: Any
    line: int

    @property
    def name(self) -> str:
        return ".".join(self.keys)


def text_of(path: Path) -> str:
    """A config's text. Raises UserError where there is no file, or no text in it."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError("config.unreadable", file=path, reason=f"> {LARGEST} bytes")
        return serialization.decode_text(path.read_bytes())
    except FileNotFoundError:
        raise UserError("config.missing", file=path, folder=Path.cwd()) from None
    except (OSError, ValueError) as error:
        raise UserError("config.unreadable", file=path, reason=error) from None


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """-> the data and the line of each key. Raises UserError with the line where the text is no
    TOML or JSON."""
    text = text_of(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UserError("config_import.yaml", file=path)
    toml = path.suffix.lower() == ".toml"
    kind = "TOML" if toml else "JSON"
    refuse_backslashes(text, path)
    try:
        data = tomllib.loads(text) if toml else json.loads(text)
    except RecursionError:
        raise UserError("config_import.bad_text", file=path, line=1, kind=kind,
                        reason=f"> {DEEPEST} levels") from None
    except ValueError as error:
        # tomllib of Python 3.11 tells the line in its message alone
        line = getattr(error, "lineno", None) or (
            int(match[1]) if (match := re.search(r"line (\d+)", str(error))) else 1)
        refuse_backslashes(text, path, line, error)
        raise UserError("config_import.bad_text", file=path, line=line, kind=kind,
                        reason=getattr(error, "msg", error)) from None
    lines = _toml_lines(text) if toml else _json_lines(text)
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        return {LIST: data}, {(LIST, *keys): line for keys, line in lines.items()}
    if not isinstance(data, dict) or not data:
        raise UserError("config_import.not_settings", file=path)
    return data, lines


def entries(data: Any, lines: Lines, keys: Keys = ()) -> Iterator[Entry]:
    """All leaves of the data. Lists of tables are walked, other lists are values."""
    # a key without a line has that of the table around it
    line = lines.get(keys, lines.get(keys[:-1], 1))
    inner: list[tuple[str, Any]] = []
    if isinstance(data, dict):
        inner = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        inner = [(str(number), value) for number, value in enumerate(data)]
    if len(keys) >= DEEPEST or not inner:
        yield Entry(keys, data, line)
        return
    for key, value in inner:
        yield from entries(value, lines, (*keys, key))


def _toml_lines(text: str) -> Lines:
    """The lines of `key =` and of [headers]. Text inside of long strings may look like keys: it
    adds names that the data doesn't have, which nobody asks for."""
    lines: Lines = {}
    table: Keys = ()
    counts: Lines = {}                     # of lists of tables: number of the newest
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            names, table = _names(header[2]), ()
            for name in names[:-1]:
                # below a list of tables, a header belongs to the newest
                table = (*table, name)
                if table in counts:
                    table = (*table, str(counts[table]))
            table = (*table, names[-1])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, *_names(key[1])), number)
    return lines


def _names(text: str) -> Keys:
    return tuple(part.strip().strip("\"'") for part in re.findall(
        r"""[\w-]+|"[^"]*"|'[^']*'""", text))


def _json_lines(text: str) -> Lines:
    """The lines of keys in a text that is valid JSON."""
    lines: Lines = {}
    stack: list[list[Any]] = []            # [kind, name or number]
    last = ""
    line, reached = 1, 0
    for token in _TOKEN.finditer(text):
        line += text.count("\n", reached, token.start())
        reached, word = token.start(), token[0]
        if word in "{[":
            stack.append([word, 0 if word == "[" else ""])
        elif word in "}]":
            stack.pop()
        elif word == "," and stack and stack[-1][0] == "[":
            stack[-1][1] += 1
        elif word == ":":
            # the string before it was a name
            stack[-1][1] = json.loads(last)
            lines.setdefault(tuple(str(name) for _, name in stack), line)
        last = word
    return lines
