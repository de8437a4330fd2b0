"""What a LoRA layer adds to its matrix."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from core.lora_files.layers import DOWN, UP, scale_of, without_mid


def delta(layer: Mapping[str, Tensor]) -> Tensor:
    """The full matrix of a LoRA layer, (out, in, ...)."""
    plain = without_mid(dict(layer))
    product = plain[UP].double().flatten(1) @ plain[DOWN].double().flatten(1)
    return (scale_of(plain) * product).reshape(-1, *plain[DOWN].shape[1:])
