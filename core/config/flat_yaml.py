"""A config as flat YAML: read with line numbers, checked, written. Whatever is wrong is one
UserError.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from core import i18n
from core.config.schema import TrainConfig
from core.errors import UserError
from core.serialization import BadYaml, compose, construct, decode_text, from_yaml


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
    """`below`: values that the text and the overrides win over."""
    data, lines = read_flat_yaml(text, source)
    data = {**(below or {}), **data}
    for key, value in (overrides or {}).items():
        data[key] = scalar(value)
        lines.pop(key, None)
    refuse_unknown(data, TrainConfig.model_fields, lines, source)
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise validation_fault(error, data, source, lines, "--set") from None


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML: only what differs from the defaults, so that it stays readable."""
    return yaml.safe_dump(config.model_dump(exclude_defaults=True), allow_unicode=True,
                          sort_keys=False)


def resolve(path: str, beside: Path | None) -> Path:
    """A user's path: absolute as it is; relative from the config's folder if something is
    there, else from the working folder."""
    plain = Path(path).expanduser()
    if plain.is_absolute() or beside is None:
        return plain.absolute()
    near = beside / plain
    return (near if near.exists() else plain).absolute()


def read_flat_yaml(text: str, source: str) -> tuple[dict[str, Any], dict[str, int]]:
    """-> values and line numbers by key. Aliases are refused, numbers such as 2e-4 are numbers."""
    try:
        node = compose(text)
    except BadYaml as error:
        raise UserError("config.bad_yaml", file=source, line=error.line, reason=error.reason
                        ) from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError("config.not_a_mapping", file=source)
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in lines:
            raise UserError("config.twice", file=source, line=key_node.start_mark.line + 1, key=key,
                            first=lines[key])
        lines[key] = key_node.start_mark.line + 1
    try:
        data = construct(node)
    except BadYaml as error:
        raise UserError("config.bad_yaml", file=source, line=error.line, reason=error.reason
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
            raise UserError("config.unknown_key" if close else "config.unknown_key_plain",
                            file=source, line=lines.get(key, "--set"), key=key,
                            nearest=close[0] if close else "")


def validation_fault(error: ValidationError, data: Mapping[str, Any], source: object,
                     lines: Mapping[str, int], elsewhere: str) -> UserError:
    """The first thing that pydantic found wrong; `elsewhere` stands for the line of a value that
    stands on none."""
    key, problem = first_problem(error)
    return UserError("config.bad_value", file=source, line=lines.get(key, elsewhere), key=key,
                     value=told(data.get(key)), problem=problem)


_SAME = {"int_parsing": "int", "int_type": "int", "int_from_float": "int",
         "float_parsing": "float", "float_type": "float", "bool_parsing": "bool",
         "bool_type": "bool"}          # pydantic's kinds of error -> ours


def first_problem(error: ValidationError) -> tuple[str, Any]:
    """The key that pydantic complains of first, and its problem."""
    first = error.errors()[0]
    return str(first["loc"][0]) if first["loc"] else "", problem_of(first)


def problem_of(error: Any) -> Any:
    """What pydantic found wrong, in our words; its own where we have none."""
    code = f"config.must_{_SAME.get(error['type'], error['type'])}"
    if code not in i18n.catalogue("en"):
        return error["msg"].removeprefix("Value error, ")
    return {"say": code, **{name: str(value).replace(" or ", ", ")
                            for name, value in error.get("ctx", {}).items()}}
