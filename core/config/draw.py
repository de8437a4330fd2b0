"""What is drawn: a GenerateConfig, with weights or checkpoints to compare where the window asks.
Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from core.config import GenerateConfig
from core.config.flat_yaml import first_problem, read_flat_yaml, validation_fault
from core.errors import UserError

SHEET = -1                                  # a Sample's `step` where it is no column


class DrawConfig(GenerateConfig):
    """Columns: one picture for each of `weights` of the first LoRA, or for each of `checkpoints`,
    files that stand for it; neither: as `loras` say. More than one is drawn as a sheet as well."""

    weights: list[float] = Field(default=[], max_length=20)
    checkpoints: list[str] = Field(default=[], max_length=40)
    labels: list[str] = Field(default=[], max_length=40)    # of the columns, in the sheet
    names: dict[str, str] = Field(default={})   # LoRAs that <lora:name> means: name -> file


def load(path: Path) -> DrawConfig:
    """A run's config.yaml. Raises UserError."""
    data, lines = read_flat_yaml(path.read_text("utf-8"), str(path))
    try:
        return DrawConfig.model_validate(data)
    except ValidationError as error:
        raise validation_fault(error, data, path, lines, "?") from None


def of_options(given: Mapping[str, Any]) -> DrawConfig:
    """What a command line asks for, with options of other meaning beside it. Raises UserError."""
    known = {key: value for key, value in given.items() if key in DrawConfig.model_fields}
    try:
        return DrawConfig.model_validate(known)
    except ValidationError as error:
        key, problem = first_problem(error)
        raise UserError("commands.bad_option", option=f"--{key.replace('_', '-')}",
                        value=known.get(key), problem=problem) from None
