"""JSON and YAML of unknown origin: a value, or ValueError and nothing else. Files nested a
thousand deep, aliases that multiply (YAML bombs) and files too large for what they are count as
broken, so that nobody has to think of RecursionError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from core import i18n
from core.errors import Fault

Kind = TypeVar("Kind", dict[str, Any], list[Any])
MOST_DEEP = 30                              # brackets
MOST_YAML = 2**18                           # characters; PyYAML reads some 100 kB a second


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number (YAML 1.2) and refuses aliases, and brackets whose
    depth costs its scanner time by the square."""

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
    """What is wrong, and the line (from 1) where it is known."""

    def __init__(self, reason: object, line: int = 1) -> None:
        super().__init__(f"line {line}: {reason}")
        self.reason, self.line = str(reason), line


def from_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; an empty one where it holds none, or can't be read."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return {}
    return json_of(text, dict)


def json_of(text: str, kind: type[Kind]) -> Kind:
    """The value of that kind that a text holds; an empty one where it holds none."""
    try:
        found = from_json(text)
    except ValueError:
        return kind()
    return found if isinstance(found, kind) else kind()


def from_yaml(text: str) -> Any:
    """Raises BadYaml."""
    node = compose(text)
    return None if node is None else construct(node)


def compose(text: str) -> yaml.Node | None:
    """The tree with its line numbers, not yet values. Raises BadYaml."""
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
    """Raises BadYaml for a date that is none, a key that is a list, a number without end."""
    try:
        return Loader("").construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or node.start_mark
        raise BadYaml(getattr(error, "problem", None) or error, mark.line + 1) from None
    except ValueError as error:
        raise BadYaml(error, node.start_mark.line + 1) from None
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise BadYaml("a value that its tag doesn't allow, or nested too deeply",
                      node.start_mark.line + 1) from None


_SAME = {"int_parsing": "int", "int_type": "int", "int_from_float": "int",
         "float_parsing": "float", "float_type": "float", "bool_parsing": "bool",
         "bool_type": "bool"}          # pydantic's kinds of error -> ours


def problem_of(error: Any) -> Any:
    """What pydantic found wrong, in our words; its own where we have none."""
    code = f"config.must_{_SAME.get(error['type'], error['type'])}"
    if code not in i18n.catalogue("en"):
        return error["msg"].removeprefix("Value error, ")
    return {"say": code, **{name: str(value).replace(" or ", ", ")
                            for name, value in error.get("ctx", {}).items()}}


def read_flat_yaml(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """-> values and line numbers by key. Aliases are refused, numbers such as 2e-4 are numbers."""
    try:
        node = compose(text)
    except BadYaml as error:
        raise Fault("config.bad_yaml", file=source, line=error.line, reason=error.reason
                    ) from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise Fault("config.not_a_mapping", file=source)
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in lines:
            raise Fault("config.twice", file=source, line=key_node.start_mark.line + 1, key=key,
                        first=lines[key])
        lines[key] = key_node.start_mark.line + 1
    try:
        data = construct(node)
    except BadYaml as error:
        raise Fault("config.bad_yaml", file=source, line=error.line, reason=error.reason
                    ) from None
    return {str(k): v for k, v in data.items() if v is not None}, lines


def told(value: Any) -> str:
    """A wrong value as a sentence can hold it; 0xfff... may be too long for a decimal."""
    try:
        text = " ".join(str(value).split())
    except ValueError:
        return "..."
    return text if len(text) <= 200 else f"{text[:200]}..."


def scalar(text: str) -> Any:
    """A --set value, read as YAML: 4, 2e-4, true, [a, b], plain text."""
    try:
        return from_yaml(text)
    except ValueError:
        return text


def refuse_unknown(data: Mapping[str, Any], known: Collection[str], lines: Mapping[str, int],
                   source: str) -> None:
    for key in data:
        if key not in known:
            close = i18n.nearest(key, known, 1)
            raise Fault("config.unknown_key" if close else "config.unknown_key_plain",
                        file=source, line=lines.get(key, "--set"), key=key,
                        nearest=close[0] if close else "")
