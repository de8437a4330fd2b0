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
from core.errors import UserError

DEEPEST = 64                               # levels; more is no config
LARGEST = 16 * 2**20                       # bytes
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


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """-> the data and the line of each key. Raises UserError with the line of what is no TOML or
    JSON."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError("config.unreadable", file=path, reason=f"> {LARGEST} bytes")
        text = serialization.decode_text(path.read_bytes())
    except FileNotFoundError:
        raise UserError("config.missing", file=path, folder=Path.cwd()) from None
    except (OSError, ValueError) as error:
        raise UserError("config.unreadable", file=path, reason=error) from None
    data = _parsed(path, text)
    if not isinstance(data, dict) or not data:
        raise UserError("config_import.not_settings", file=path)
    lines = _toml_lines(text) if path.suffix.lower() == ".toml" else _json_lines(text)
    return data, lines


def _parsed(path: Path, text: str) -> Any:
    toml = path.suffix.lower() == ".toml"
    try:
        return tomllib.loads(text) if toml else json.loads(text)
    except RecursionError:
        raise UserError("config_import.bad_text", file=path, line=1,
                        kind="TOML" if toml else "JSON",
                        reason=f"> {DEEPEST} levels") from None
    except ValueError as error:
        line = getattr(error, "lineno", None) or (
            int(found[1]) if (found := re.search(r"line (\d+)", str(error))) else 1)
        raise UserError("config_import.bad_text", file=path, line=line,
                        kind="TOML" if toml else "JSON",
                        reason=getattr(error, "msg", error)) from None


def entries(data: Any, lines: Lines, keys: Keys = ()) -> Iterator[Entry]:
    """All leaves; lists of tables are walked, plain lists are values."""
    line = lines.get(keys, lines.get(keys[:-1], 1))
    inner: list[tuple[str, Any]] = []
    if isinstance(data, dict):
        inner = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and data and all(isinstance(one, dict) for one in data):
        inner = [(str(number), value) for number, value in enumerate(data)]
    if len(keys) >= DEEPEST or not inner:
        yield Entry(keys, data, line)
        return
    for key, value in inner:
        yield from entries(value, lines, (*keys, key))


def _toml_lines(text: str) -> Lines:
    """Lines of `key =` and of [headers]; what stands inside of long strings adds names that the
    data hasn't."""
    lines: Lines = {}
    table: Keys = ()
    counts: Lines = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.fullmatch(line):
            names, table = _names(header[2]), ()
            for name in names[:-1]:        # the newest of an outer list of tables
                table = (*table, name)
                if table in counts:
                    table = (*table, str(counts[table]))
            table = (*table, names[-1])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            lines.setdefault(table, number)
        elif found := _KEY.match(line):
            lines.setdefault((*table, *_names(found[1])), number)
    return lines


def _names(text: str) -> Keys:
    return tuple(part.strip().strip("\"'") for part in re.findall(
        r"""[\w-]+|"[^"]*"|'[^']*'""", text))


def _json_lines(text: str) -> Lines:
    """The text is valid JSON: a name is a string before a colon."""
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
            stack[-1][1] = json.loads(last)
            lines.setdefault(tuple(str(name) for _, name in stack), line)
        last = word
    return lines
