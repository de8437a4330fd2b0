"""Configs from anywhere: our YAML, a LoRA file's metadata, other trainers' TOML and JSON."""

from core.importers.load import (
    FOREIGN,
    load_train_config,
    located,
    named_in,
    read,
    report_lines,
    to_yaml,
)
from core.importers.reader import Imported

__all__ = [
    "FOREIGN",
    "Imported",
    "load_train_config",
    "located",
    "named_in",
    "read",
    "report_lines",
    "to_yaml",
]
