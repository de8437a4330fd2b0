"""What a LoRA layer adds to its matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from core.lora_files.layers import DOWN, UP, scale_of, without_mid


def delta(layer: Mapping[str, Tensor]) -> Tensor:
    """The full matrix of a LoRA layer, (out, in, ...)."""
    plain = without_mid(dict(layer))
    product = plain[UP].double().flatten(1) @ plain[DOWN].double().flatten(1)
    return (scale_of(plain) * product).reshape(-1, *plain[DOWN].shape[1:])


def weight(layer: Mapping[str, Tensor]) -> Tensor:
    """The same of LoHa, LoKr and whole differences without kernels, by LyCORIS' own rule."""
    def whole(name: str) -> Tensor:
        return (layer[name] if name in layer else layer[f"{name}_a"] @ layer[f"{name}_b"]).double()
    layer = {end: value.double() for end, value in layer.items()}
    if "hada_w1_a" in layer:
        rank = len(layer["hada_w1_b"])
        return whole("hada_w1") * whole("hada_w2") * layer.get("alpha", rank) / rank
    if any(end.startswith("lokr") for end in layer):
        rank = next((len(layer[end]) for end in ("lokr_w1_b", "lokr_w2_b") if end in layer), 1)
        alpha = layer.get("alpha", rank) if rank > 1 else rank
        return torch.kron(whole("lokr_w1"), whole("lokr_w2")) * alpha / rank
    return layer["diff"] if "diff" in layer else delta(layer)
