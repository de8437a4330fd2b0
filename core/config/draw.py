"""What is drawn: a GenerateConfig, and weights or checkpoints to compare. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from core.config import GenerateConfig
from core.config.flat_yaml import first_problem, read_flat_yaml, validated
from core.errors import UserError

SHEET = -1                                  # a Sample's `step` where it is no column


class DrawConfig(GenerateConfig):
    """A GenerateConfig with columns to compare.

    A column is a picture with one of `weights` for the first LoRA, or with one of `checkpoints`,
    files that take its place. Without either there is one column, as `loras` say. Several columns
    are drawn as a sheet as well.
    """

    weights: list[float] = Field(default=[], max_length=20)
    checkpoints: list[str] = Field(default=[], max_length=40)
    # of the columns, in the sheet
    labels: list[str] = Field(default=[], max_length=40)
    # name -> file, for <lora:name> in prompts
    names: dict[str, str] = Field(default={})


def load(path: Path) -> DrawConfig:
    """A run's config.yaml. Raises UserError."""
    data, lines = read_flat_yaml(path.read_text("utf-8"), str(path))
    return validated(DrawConfig, data, lines, path, no_line="?")


def of_options(options: Mapping[str, Any]) -> DrawConfig:
    """The config that a command line asks for. Options that are no key of it (--json) are
    skipped. Raises UserError."""
    known = {key: value for key, value in options.items() if key in DrawConfig.model_fields}
    try:
        return DrawConfig.model_validate(known)
    except ValidationError as error:
        key, problem = first_problem(error)
        raise UserError("commands.bad_option", option=f"--{key.replace('_', '-')}",
                        value=known.get(key), problem=problem) from None
