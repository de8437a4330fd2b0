"""A config as flat YAML: read with line numbers, checked, written. Whatever is wrong becomes a
UserError that names the file, the line and the key.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from core import i18n, paths
from core.config.other_names import BY_ITSELF, EPOCHS, ours
from core.config.schema import TrainConfig
from core.errors import UserError
from core.serialization import (
    BadYaml,
    compose,
    construct,
    decode_text,
    from_yaml,
    to_yaml,
)

Config = TypeVar("Config", bound=BaseModel)


def read_train_config(path: Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """A config in our own YAML, as users write it and runs keep it.

    Raises UserError with the file, the line and the nearest key where something is wrong.
    """
    try:
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        raise UserError("config.missing", file=path, folder=Path.cwd()) from None
    except (OSError, ValueError) as error:
        raise UserError("config.unreadable", file=path, reason=error) from None
    return parse_train_config(text, str(path), overrides)


def parse_train_config(text: str, source: str, overrides: Mapping[str, str] | None = None,
                       below: Mapping[str, Any] | None = None) -> TrainConfig:
    """A config from text. `overrides` (from --set) win over the text, the text over `below`."""
    data, lines = read_flat_yaml(text, source)
    data = {**(below or {}), **data}
    for key, value in (overrides or {}).items():
        data[key] = scalar(value)
        lines.pop(key, None)
    refuse_unknown(data, TrainConfig.model_fields, lines, source)
    return validated(TrainConfig, data, lines, source)


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML: only what differs from the defaults, so that it stays readable."""
    return to_yaml(config.model_dump(exclude_defaults=True))


def resolve(path: str, beside: Path | None) -> Path:
    """The absolute path that a user means. A relative one starts in the config's folder `beside`
    if something is there, else in the working folder."""
    given = paths.expanded(path)
    if given.is_absolute() or beside is None:
        return given.absolute()
    near = beside / given
    return (near if os.path.exists(near) else given).absolute()


def read_flat_yaml(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The values and the line numbers by key. Keys without a value are left out, as if they were
    not there. Raises UserError."""
    lines: dict[str, int] = {}
    refuse_backslashes(text, source)
    try:
        node = compose(text)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError("config.not_a_mapping", file=source)
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            # YAML forbids it, but PyYAML would take the last one in silence
            if key in lines:
                raise UserError("config.twice", file=source, line=line, key=key, first=lines[key])
            lines[key] = line
        data = construct(node)
    except BadYaml as error:
        refuse_backslashes(text, source, error.line, error.reason)
        raise UserError("config.bad_yaml", file=source, line=error.line, reason=error.reason
                        ) from None
    return {str(k): v for k, v in data.items() if v is not None}, lines


# "C:\new", ".\new", "..\new" outside of comments: nobody means C:, then a line break
_LONE_BACKSLASH = re.compile(
    r'^(?![ \t]*#)[^\n]*"(?:[A-Za-z]:\\|\.{1,2}\\(?!n))(?![\\"]|u[0-9A-Fa-f]{4})', re.MULTILINE)


def refuse_backslashes(text: str, source: object, line: int = 0, reason: object = "") -> None:
    """Raises UserError for a Windows path that stands in double quotes with single backslashes:
    TOML, JSON and YAML take these for special characters. `line` and `reason`: where and why the
    text could not be read, if it could not."""
    found = _LONE_BACKSLASH.search(text)
    if found or re.search("escape|hex", str(reason), re.IGNORECASE):
        raise UserError("config.backslashes", file=source,
                        line=text.count("\n", 0, found.start()) + 1 if found else line)


def shortened(value: Any) -> str:
    """A wrong value on one line, at most 200 characters of it."""
    try:
        text = " ".join(str(value).split())
    except ValueError:
        # Python refuses to write an integer of more than 4300 digits, such as a long 0xfff...
        return "..."
    return text if len(text) <= 200 else f"{text[:200]}..."


def scalar(text: str) -> Any:
    """The value of --set KEY=VALUE, read as YAML: 4, 2e-4, true, [a, b], plain text."""
    try:
        return from_yaml(text)
    except ValueError:
        return text


def refuse_unknown(data: Mapping[str, Any], known: Collection[str], lines: Mapping[str, int],
                   source: str) -> None:
    """Raises UserError, with the nearest known key, for the first key that is not known."""
    for key in data:
        if key not in known:
            # another trainer's name for it, else one that is spelled alike
            named = ours(key) if ours(key) in known else ""
            close = named or next(iter(i18n.nearest(key, known, 1)), "")
            kind = ("_epochs" if named and key in EPOCHS else
                    "_by_itself" if not named and key in BY_ITSELF else "" if close else "_plain")
            raise UserError(f"config.unknown_key{kind}", file=source,
                            line=lines.get(key, "--set"), key=key, nearest=close)


# --- what pydantic found wrong ---

def validated(model: type[Config], data: Mapping[str, Any], lines: Mapping[str, int],
              source: object, no_line: str = "--set") -> Config:
    """The config that the data makes. Raises UserError with the line of the first wrong value;
    `no_line` stands in the sentence for a value that came from no line of the file."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        key, problem = first_problem(error)
        raise UserError("config.bad_value", file=source, line=lines.get(key, no_line), key=key,
                        value=shortened(data.get(key)), problem=problem) from None


def first_problem(error: ValidationError) -> tuple[str, Any]:
    """The key of the first wrong value, and its problem for a sentence."""
    details = error.errors()[0]
    return str(details["loc"][0]) if details["loc"] else "", problem_of(details)


def first_message(error: ValidationError) -> str:
    """The same in pydantic's own English: 'needs.vram_gb: Input should be a valid number'."""
    details = error.errors()[0]
    return f"{'.'.join(map(str, details['loc']))}: {_message(details)}"


def usable(model: type[Config], data: Mapping[Any, Any]) -> tuple[Config, str]:
    """What of the data can be used, and what is wrong with the rest ("": nothing): one wrong value
    must not cost the user all the others."""
    try:
        return model.model_validate(data), ""
    except ValidationError as error:
        wrong = {details["loc"][0] for details in error.errors() if details["loc"]}
        kept = {key: value for key, value in data.items()
                if isinstance(key, str) and key not in wrong}
        with contextlib.suppress(ValidationError):
            return model.model_validate(kept), first_message(error)
        # Values that don't go together.
        return model(), first_message(error)


# pydantic's kinds of error that have the same sentence here
_KINDS = {"int_parsing": "int", "int_type": "int", "int_from_float": "int",
          "float_parsing": "float", "float_type": "float", "bool_parsing": "bool",
          "bool_type": "bool"}


def problem_of(details: Any) -> Any:
    """One of `ValidationError.errors()` in our words, in pydantic's where we have none."""
    code = f"config.must_{_KINDS.get(details['type'], details['type'])}"
    if code not in i18n.catalogue("en"):
        return _message(details)
    return {"say": code, **{name: str(value).replace(" or ", ", ")
                            for name, value in details.get("ctx", {}).items()}}


def _message(details: Any) -> str:
    return str(details["msg"]).removeprefix("Value error, ")
