"""What the window asks to be drawn: a GenerateConfig with weights to compare. Without torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from core.config import GenerateConfig, read_flat_yaml
from core.faults import Fault


class DrawConfig(GenerateConfig):
    """`weights`: of the first LoRA, one picture each; empty: as `loras` say."""

    weights: list[float] = Field(default=[], max_length=20)


def load(path: Path) -> DrawConfig:
    """A run's config.yaml. Raises Fault."""
    data, lines = read_flat_yaml(path.read_text("utf-8"), str(path))
    try:
        return DrawConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise Fault("config.bad_value", file=path, line=lines.get(key, "?"), key=key,
                    value=data.get(key), problem=first["msg"]) from None
