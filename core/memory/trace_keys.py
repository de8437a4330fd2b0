"""The config keys of adapter, optimizer and text encoder that decide how much a step holds."""

from __future__ import annotations

from typing import Any

from core import plugins
from core.config import TrainConfig

_ADAPTER_KEYS = ("adapter", "conv_rank", "block_ranks", "rank_dropout", "module_dropout",
                 "lokr_factor")


def adapter_settings(config: TrainConfig) -> dict[str, Any]:
    """The adapter's settings in a trace's key, besides its rank; empty for plain LoRA."""
    changed = {key: getattr(config, key) for key in _ADAPTER_KEYS
               if getattr(config, key) != TrainConfig.model_fields[key].default}
    # Dropout holds the same at any share: all shares have one trace.
    for key in ("rank_dropout", "module_dropout"):
        changed |= {key: 0.1} if key in changed else {}
    # A user's own adapter is told apart by its source: an edit may change what it trains.
    named = plugins.is_named(config.adapter)
    return ({"adapter": changed} if changed else {}) | (
        {"variant_source": plugins.mark(config.adapter)} if named else {})


def rule_settings(config: TrainConfig) -> dict[str, Any]:
    """The optimizer's settings in a trace's key; empty for torch's AdamW."""
    if config.optimizer in ("adamw", "adamw8bit"):
        return {}
    named = plugins.is_named(config.optimizer)
    return {"rule": {"optimizer": config.optimizer, "optimizer_args": config.optimizer_args},
            **({"rule_source": plugins.mark(config.optimizer)} if named else {})}


def text_settings(config: TrainConfig) -> dict[str, float]:
    """The settings of text encoders in training; the rate counts only as on or off."""
    rank = config.text_encoder_rank or config.lora_rank
    learns = config.text_encoder_lr > 0
    return {"text_encoder_lr": 1e-4 if learns else 0.0, "text_encoder_rank": rank if learns else 0,
            "pivotal_tokens": config.pivotal_tokens}
