"""JSON and YAML of unknown origin: a value, or ValueError and nothing else. Files nested a
thousand deep, aliases that multiply (YAML bombs) and files too large for what they are count as
broken, so that nobody has to think of RecursionError.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from core.text_encoding import decode_text as decode_text
from core.text_encoding import read

Kind = TypeVar("Kind", dict[str, Any], list[Any])
MOST_DEEP = 30                              # nested brackets
# characters; PyYAML reads some 100 kB a second, so that a larger file would hang the window
MOST_YAML = 2**18


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number (YAML 1.2). It refuses aliases (YAML bombs) and deep
    brackets: PyYAML's scanner takes time by the square of their depth."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= MOST_DEEP:
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed here",
                                              event.start_mark)
        return super().compose_node(parent, index)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+0123456789."))


class BadYaml(ValueError):
    """A text is no YAML, or more than we read. `line` counts from 1."""

    def __init__(self, reason: object, line: int = 1) -> None:
        super().__init__(f"line {line}: {reason}")
        self.reason, self.line = str(reason), line


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none, or the file can't be read."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return {}
    return json_of(text, dict)


def json_of(text: str, kind: type[Kind]) -> Kind:
    """The dict or list in a JSON text; an empty one where there is none."""
    try:
        value = from_json(text)
    except ValueError:
        return kind()
    return value if isinstance(value, kind) else kind()


def from_yaml(text: str) -> Any:
    """The value of a YAML text. Raises BadYaml."""
    node = compose(text)
    return None if node is None else construct(node)


def to_yaml(data: Any) -> str:
    """Plain data as YAML, in its own order and readable in every language."""
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False)


def compose(text: str) -> yaml.Node | None:
    """The tree of a YAML text, with line numbers, before values are made. Raises BadYaml."""
    if len(text) > MOST_YAML:
        raise BadYaml(f"longer than {MOST_YAML} characters")
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=Loader)
        return node
    except yaml.reader.ReaderError as error:
        raise BadYaml(f"{error.reason}: U+{ord(text[error.position]):04X}",
                      text.count("\n", 0, error.position) + 1) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise BadYaml(getattr(error, "problem", None) or error,
                      mark.line + 1 if mark else 1) from None
    except RecursionError:
        raise BadYaml("nested too deeply") from None


def construct(node: yaml.Node) -> Any:
    """The value of a tree. Raises BadYaml for a wrong date, a list as a key, an endless number."""
    try:
        return Loader("").construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or node.start_mark
        raise BadYaml(getattr(error, "problem", None) or error, mark.line + 1) from None
    except ValueError as error:
        raise BadYaml(error, node.start_mark.line + 1) from None
    except (TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        raise BadYaml("a value that its tag doesn't allow, or nested too deeply",
                      node.start_mark.line + 1) from None


def readable_name(name: str) -> str:
    """A file name as text, also where it isn't UTF-8: Chinese archives unpacked on Linux."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        pass
    try:
        return read(os.fsencode(name)).text
    except ValueError:
        return name.encode("utf-8", "replace").decode()
