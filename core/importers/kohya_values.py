"""How kohya writes values into one text: options of prompts, arguments, lists."""

from __future__ import annotations

import re
from typing import Any

_OPTIONS = re.compile(r"\s--([a-z]+)(?=\s|$)")        # kohya's prompts: `a cat --w 512 --n blurry`
# Of a prompt's options those that have a key here; of two, a size is made.
_SHOTS = {"s": "sample_inference_steps", "l": "sample_cfg"}


def shot(line: str) -> dict[str, Any]:
    """One line of kohya's prompts by our keys; options that have none keep their letters."""
    prompt, *rest = _OPTIONS.split(f" {line}")
    options = {key: value.strip() for key, value in zip(rest[::2], rest[1::2], strict=True)}
    shot: dict[str, Any] = {"prompt": prompt.strip()}
    if {"w", "h"} <= options.keys():
        shot["sample_size"] = f"{options.pop('w')},{options.pop('h')}"
    return shot | {_SHOTS.get(key, f"--{key}"): value for key, value in options.items()}


def pairs(value: Any) -> list[tuple[str, str]]:
    """["conv_dim=4", "algo=loha"], or kohya_ss' one line of them."""
    parts = value if isinstance(value, list) else re.findall(r"[^\s=]+=\S+", str(value))
    return [(key.strip(), text.strip()) for part in parts
            for key, equals, text in [str(part).partition("=")] if equals]


def literal(text: str) -> Any:
    """A Python literal as kohya reads it; other words stay text."""
    lowered = text.lower()
    if lowered in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[lowered]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def several(value: Any) -> list[Any]:
    """A list; or text with one item a line, or on one line between spaces, as on kohya's command
    line."""
    if isinstance(value, list):
        return value
    text = str(value)
    return [line.strip() for line in text.splitlines() if line.strip()] if (
        "\n" in text.strip()) else text.split()
