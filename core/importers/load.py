"""Configs of other trainers as ours: lora-scripts, kohya, kohya_ss, OneTrainer.

What can't be carried over is listed: file, line, key, why. Both sides are checked against
TrainConfig itself, so that a key which it learns later is carried over from then on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import i18n, plugins
from core.config import (
    INPUTS,
    TrainConfig,
    dump_yaml,
    parse_train_config,
    read_train_config,
    resolve,
)
from core.errors import UserError
from core.importers import kohya, lines, onetrainer
from core.importers.reader import Imported, Reader
from core.lora_files.files import read_config
from core.lora_files.library import parse_lora

FOREIGN = (".toml", ".json")                # suffixes of other trainers' configs
EXTENSIONS = ("picture_processors", "callbacks", "optimizer", "adapter", "family")


def load_train_config(path: Path, overrides: Mapping[str, str] | None = None) -> TrainConfig:
    """Reads a YAML config, the config inside a LoRA file's metadata, or another trainer's TOML
    or JSON (`read` tells what of that is lost), and checks it.

    Raises UserError with the file, the line and the nearest key where something is wrong.
    """
    if path.suffix.lower() == ".safetensors":
        config = parse_train_config(read_config(path), str(path), overrides)
        # LoRA files travel: none may run code here
        for key, name in named_in(config):
            if key not in (overrides or {}):
                raise UserError("extensions.in_a_lora", file=path, key=key, name=name)
        return config
    if path.suffix.lower() in FOREIGN:
        return parse_train_config("", str(path), overrides, read(path).values)
    return read_train_config(path, overrides)


def read(path: Path) -> Imported:
    """Reads a TOML or JSON config of ours or of another trainer. Raises UserError where the file is
    neither."""
    data, line_of = lines.read(path)
    if set(data) <= set(TrainConfig.model_fields):
        return Reader(path, "LoRA Darkroom").take(data, line_of)
    if "datasets" in data:
        return kohya.Dataset(path, "kohya dataset").take(data, line_of)
    if data.keys() == {lines.LIST}:
        return onetrainer.Concepts(path, "OneTrainer").take(data, line_of)
    if "training_method" in data or "base_model_name" in data:
        return onetrainer.OneTrainer(path, "OneTrainer").take(data, line_of)
    gui = path.suffix.lower() == ".json"
    return kohya.Kohya(path, "kohya_ss" if gui else "kohya").take(data, line_of)


def to_yaml(imported: Imported) -> str:
    """Our YAML; settings that could not be taken over are listed in comments at its top."""
    comments = [f"# {line}" for line in report_lines(imported)]
    config = TrainConfig.model_validate(imported.values)
    return "\n".join([*comments, dump_yaml(config)])


def report_lines(imported: Imported, lang: str | None = None) -> list[str]:
    """Sentences for the user: what was taken over, the other trainer's defaults, what is left."""
    head = i18n.tr("config_import.carried", {
        "file": imported.file.name, "kind": imported.kind, "count": len(imported.values),
        "left": len(imported.left)}, lang)
    assumed = [i18n.tr("config_import.assumed", {"key": key, "value": value}, lang)
               for key, value in imported.assumed.items()]
    return [head, *assumed, *(left.sentence(lang) for left in imported.left)]


# --- extensions that a config names ---

def named_in(config: TrainConfig) -> list[tuple[str, str]]:
    """(key, name) of every extension of a config, `package.module.Class` of an optimizer too."""
    extensions = []
    for key in EXTENSIONS:
        value = getattr(config, key)
        names = [value] if isinstance(value, str) else value
        extensions += [(key, name) for name in names if plugins.is_named(name) or "." in name]
    return extensions


def located(config: TrainConfig, folder: Path) -> TrainConfig:
    """The config with all that lies in `folder`, the YAML's own, by its full path, so that it means
    the same from everywhere: pictures, models, LoRAs, a checkpoint, the user's own code."""
    changes: dict[str, Any] = {}
    for keys, absolute in ((EXTENSIONS, _code), (INPUTS, _path), (("base_loras",), _lora)):
        for key in keys:
            value = getattr(config, key)
            new = ([absolute(name, folder) for name in value] if isinstance(value, list)
                   else absolute(value, folder) if isinstance(value, str) else value)
            if new != value:
                changes[key] = new
    return config.with_changes(**changes) if changes else config


def _code(name: str, folder: Path) -> str:
    module, colon, item = name.rpartition(":")
    if not colon or "\0" in module:
        return name
    path = folder / (module if module.endswith(".py") else f"{module.replace('.', '/')}.py")
    return f"{path.absolute()}:{item}" if path.is_file() else name


def _path(name: str, folder: Path) -> str:
    # `demo` is no file, nor is the number of a session
    if not name or name == "demo" or name.isdigit() or "\0" in name:
        return name
    near = resolve(name, folder)
    return str(near) if os.path.exists(near) and near != resolve(name, None) else name


def _lora(text: str, folder: Path) -> str:
    name, _ = parse_lora(text, 1.0)
    path = resolve(name, folder)
    # the weight stays as it was written, right or wrong
    return f"{path}{text[len(name):]}" if os.path.exists(path) else text
