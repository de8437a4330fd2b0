"""Configs of other trainers as ours: lora-scripts, kohya, kohya_ss, OneTrainer.

What can't be carried over is listed: file, line, key, why. Both sides are checked against
TrainConfig itself, so that a key which it learns later is carried over from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import i18n
from core.config import TrainConfig, dump_yaml
from core.importers import kohya, lines, onetrainer
from core.importers.reader import Imported, Reader


def read(path: Path) -> Imported:
    """Raises Fault where the file is no TOML or JSON, or no config of a trainer that is known."""
    data, at = lines.read(path)
    if is_ours(data):
        return Reader(path, "LoRA Darkroom").take(data, at)
    if "datasets" in data:
        return kohya.Dataset(path, "kohya dataset").take(data, at)
    if "training_method" in data or "base_model_name" in data:
        return onetrainer.OneTrainer(path, "OneTrainer").take(data, at)
    gui = path.suffix.lower() == ".json"
    return kohya.Kohya(path, "kohya_ss" if gui else "kohya").take(data, at)


def is_ours(data: Mapping[str, Any]) -> bool:
    return set(data) <= set(TrainConfig.model_fields)


def to_yaml(imported: Imported) -> str:
    """Our YAML, with what is missing in it as comments."""
    comments = [f"# {line}" for line in told(imported)]
    config = TrainConfig.model_validate(imported.values)
    return "\n".join([*comments, dump_yaml(config)])


def told(imported: Imported, lang: str | None = None) -> list[str]:
    """Line by line: what was taken over, what the other trainer would have taken, what is left."""
    head = i18n.say("config_import.carried", {
        "file": imported.file.name, "kind": imported.kind, "count": len(imported.values),
        "left": len(imported.left)}, lang)
    assumed = [i18n.say("config_import.assumed", {"key": key, "value": value}, lang)
               for key, value in imported.assumed.items()]
    return [head, *assumed, *(one.said(lang) for one in imported.left)]
