"""JSON and YAML of unknown origin: a value, or ValueError and nothing else. Files nested a
thousand deep, aliases that multiply (YAML bombs) and files too large for what they are count as
broken, so that nobody has to think of RecursionError.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

Kind = TypeVar("Kind", dict[str, Any], list[Any])
MOST_DEEP = 30                              # nested brackets
# characters; PyYAML reads some 100 kB a second, so that a larger file would hang the window
MOST_YAML = 2**18

# UTF-32's mark begins as UTF-16's does, and is looked for first.
_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))
_HAN = re.compile(r"[\0-\x7f\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
# text in one script: Greek, Cyrillic, Armenian, Hebrew, Arabic, or Latin with plain letters
_ONE_SCRIPT = re.compile("|".join(
    rf"[\0-\x7f\xa0-\xbf{script}]*" for script in (
        r"\u0370-\u03ff", r"\u0400-\u045f\u0490\u0491", r"\u0531-\u058a", r"\u05be-\u05ea",
        r"\u0600-\u06ff")) + r"|(?=.*[A-Za-z])[\0-\x7f\xa0-\u024f\u0300-\u036f]*", re.DOTALL)


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
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise BadYaml("a value that its tag doesn't allow, or nested too deeply",
                      node.start_mark.line + 1) from None


# --- text ---

def decode_text(data: bytes) -> str:
    """Text from bytes: UTF-8 with or without BOM, UTF-16 or UTF-32 with BOM, else GB18030, else
    Windows-1252. Raises ValueError for binary data."""
    text = data.decode(encoding_of(data))
    if "\0" in text:
        raise ValueError("it holds binary data")
    return text


def encoding_of(data: bytes) -> str:
    """The encoding of a text, by its mark or by trial. Raises ValueError."""
    # cp1252, the last, takes nearly any bytes, so that the order decides
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return encoding
    for encoding in ("utf-8", "gb18030", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding != "utf-8" or not _is_chinese_misread(text, data):
            return encoding
    raise ValueError("it is neither UTF-8, UTF-16 nor GB18030")


def _is_chinese_misread(text: str, data: bytes) -> bool:
    """Whether `text`, decoded as UTF-8, is short Chinese text in GB18030 that is valid UTF-8 by
    chance: the bytes of "one cat" read as a Cyrillic, a Hebrew and a French letter. No language
    mixes scripts so."""
    if text.isascii() or max(text) > "\u07ff" or _ONE_SCRIPT.fullmatch(text):
        return False
    try:
        return bool(_HAN.fullmatch(data.decode("gb18030")))
    except UnicodeDecodeError:
        return False


def readable_name(name: str) -> str:
    """A file name as text, also where it isn't UTF-8: Chinese archives unpacked on Linux."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        pass
    try:
        return decode_text(os.fsencode(name))
    except ValueError:
        return name.encode("utf-8", "replace").decode()
