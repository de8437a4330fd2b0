"""Arithmetic on LoRA layers: merging, lower ranks by SVD. The full matrix is never made.

A layer's delta is scale * up @ down, (out, in * kernel). Singular values come from the small
matrix between the QR factors of up and down (Eckart and Young 1936: no other matrix of that rank
lies nearer in the Frobenius norm).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.errors import UserError
from core.lora_files.layers import (
    ALPHA,
    DOWN,
    UP,
    Layer,
    Lora,
    kind_of,
    rank_of,
    refuse_broken,
    scale_of,
    with_alpha,
    without_mid,
)

_NEGLIGIBLE = 1e-7                         # of the largest singular value: rounding of float32


@dataclass(frozen=True, slots=True)
class Cut:
    """Which singular values stay: a rank, or the fewest that keep a share of the energy (the sum
    of squares)."""

    rank: int = 0                          # 0: no limit
    energy: float = 1.0

    def keep(self, values: Tensor) -> int:
        """How many of the falling singular values; at least one."""
        energies = values.double().square().cumsum(0)
        count = int((values > values[:1] * _NEGLIGIBLE).sum())
        if self.energy < 1:
            count = min(count, 1 + int((energies < self.energy * energies[-1]).sum()))
        return max(1, min(count, self.rank or count))


@dataclass(frozen=True, slots=True)
class Resized:
    lora: Lora
    ranks: tuple[int, int]                 # lowest and highest now
    kept: float                            # share of the deltas' energy


def resize(lora: Lora, cut: Cut) -> Resized:
    """The nearest LoRA of lower rank, layer by layer; layers that are small enough stay as they
    are. DoRA keeps its magnitudes. Raises UserError for kinds of layers that have no such form."""
    refuse_broken(lora, {"lora", "dora"}, "resize")
    layers, kept, whole = {}, 0.0, 0.0
    for path, layer in lora.layers.items():
        layers[path], stays, all_ = _cut(without_mid(layer), cut)
        kept, whole = kept + stays, whole + all_
    ranks = [rank_of(layer) for layer in layers.values()]
    return Resized(replace(lora, layers=layers), (min(ranks), max(ranks)),
                   kept / whole if whole else 1.0)


def _cut(layer: Layer, cut: Cut) -> tuple[Layer, float, float]:
    """-> the layer, the energy that stays, the energy that was there."""
    left, values, right = factors(layer[UP].flatten(1), layer[DOWN].flatten(1))
    scale, count = scale_of(layer), cut.keep(values)
    energies = (values * scale).square()
    whole, kept = float(energies.sum()), float(energies[:count].sum())
    if count >= rank_of(layer) or (cut.rank >= rank_of(layer) and cut.energy >= 1):
        return layer, whole, whole
    pair = balanced(left, values * abs(scale), right, count, layer)
    if scale < 0:
        pair[UP] = -pair[UP]
    return with_alpha({**layer, **pair}, count), kept, whole


def factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of up @ down, (out, r) @ (r, n), in float64: (out, r), (r,), (r, n)."""
    left, small_left = torch.linalg.qr(up.double())
    right, small_right = torch.linalg.qr(down.double().T)
    u, values, v = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    return left @ u, values, v @ right.T


def balanced(left: Tensor, values: Tensor, right: Tensor, count: int, like: Layer
             ) -> dict[str, Tensor]:
    """The first `count` directions as up and down of equal size, in the shapes and numbers of
    `like`."""
    root = values[:count].sqrt()
    up = (left[:, :count] * root).to(like[UP].dtype)
    down = (root[:, None] * right[:count]).to(like[DOWN].dtype)
    return {UP: up.reshape(-1, count, *like[UP].shape[2:]).contiguous(),
            DOWN: down.reshape(count, *like[DOWN].shape[1:]).contiguous()}


# --- merging -----------------------------------------------------------------------------------

def merge(loras: Sequence[tuple[Lora, float]], dtype: torch.dtype = torch.float32) -> Lora:
    """The weighted sum of the deltas, exactly but for rounding to `dtype`: ranks are put side by
    side. Whole differences (of norms, biases) are added up.

    Raises UserError for kinds of layers whose sum is of another form (DoRA, LoHa, LoKr, OFT)."""
    merged = replace(loras[0][0], layers={}, bundled={}, unknown=(), metadata={})
    for lora, _ in loras:
        refuse_broken(lora, {"lora", "full"}, "merge")
        merged.bundled |= lora.bundled
        merged.unknown += lora.unknown
    for path in dict.fromkeys(path for lora, _ in loras for path in lora.layers):
        own = [(lora.layers[path], weight) for lora, weight in loras if path in lora.layers]
        merged.layers[path] = _sum(path, own, dtype)
    return merged


def _sum(path: str, layers: Sequence[tuple[Layer, float]], dtype: torch.dtype) -> Layer:
    kinds = {kind_of(layer) for layer, _ in layers}
    if len(kinds) > 1:
        raise UserError("lora_convert.mixed", kinds=", ".join(sorted(kinds)), to="merge")
    if kinds == {"full"}:
        return _added(path, layers, dtype)
    plain = [(without_mid(layer), weight) for layer, weight in layers]
    if len({(x[DOWN].shape[1:], x[UP].shape[0]) for x, _ in plain}) > 1:
        raise UserError("lora_convert.other_shapes", layer=path)
    ups = [layer[UP].float() * (weight * scale_of(layer)) for layer, weight in plain]
    pair = {DOWN: torch.cat([layer[DOWN].float() for layer, _ in plain]).to(dtype),
            UP: torch.cat(ups, 1).to(dtype)}
    return with_alpha(pair)


def _added(path: str, layers: Iterable[tuple[Layer, float]], dtype: torch.dtype) -> Layer:
    total: Layer = {}
    for layer, weight in layers:
        for end, value in layer.items():
            if end in total and total[end].shape != value.shape:
                raise UserError("lora_convert.other_shapes", layer=path)
            if end != ALPHA:
                total[end] = total.get(end, torch.zeros(())) + value.float() * weight
    return {end: value.to(dtype) for end, value in total.items()}


def delta(layer: Mapping[str, Tensor]) -> Tensor:
    """The full matrix of a LoRA layer, (out, in, ...), for one layer at a time and for tests."""
    plain = without_mid(dict(layer))
    product = plain[UP].double().flatten(1) @ plain[DOWN].double().flatten(1)
    return (scale_of(plain) * product).reshape(-1, *plain[DOWN].shape[1:])
