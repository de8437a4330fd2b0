"""Arithmetic on LoRA layers: merging, and lower ranks by SVD, without making the full matrix.

A layer's delta is scale * up @ down, (out, in * kernel). Singular values come from the small
matrix between the QR factors of up and down (Eckart and Young 1936: no other matrix of that rank
lies nearer in the Frobenius norm).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    as_product,
    kind_of,
    rank_of,
    refuse_broken,
    scale_of,
    with_alpha,
    without_mid,
)

WIDEST = 256                               # ranks of an exact sum of LoKr
# Of the largest singular value: what is below is rounding of float32.
_NEGLIGIBLE = 1e-7


@dataclass(frozen=True, slots=True)
class Cut:
    """Which singular values stay: a rank, or the fewest that keep a share of the energy (the sum
    of squares)."""

    rank: int = 0                          # 0: no limit
    energy: float = 1.0

    def keep(self, values: Tensor) -> int:
        """How many of the falling singular values stay; at least one."""
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
    """The nearest LoRA of lower rank, layer by layer; layers that are small enough, and whole
    differences, stay as they are. DoRA keeps its magnitudes, LoHa and LoKr become plain LoRA.
    Raises UserError for kinds of layers that have no such form."""
    refuse_broken(lora, {"lora", "dora", "loha", "lokr", "full"}, "resize")
    return _resized(lora, lora.layers.items(), cut)


def _resized(lora: Lora, parts: Iterable[tuple[str, Layer]], cut: Cut) -> Resized:
    layers, kept_energy, whole_energy = {}, 0.0, 0.0
    for path, layer in parts:
        if kind_of(layer) == "full":
            layers[path] = layer
            continue
        layer = without_mid(as_product(path, layer))
        left, values, right = factors(layer[UP].flatten(1), layer[DOWN].flatten(1))
        rank, scale, count = rank_of(layer), scale_of(layer), cut.keep(values)
        energies = (values * scale).square()
        if count >= rank or (cut.rank >= rank and cut.energy >= 1):
            count = rank
        else:
            pair = balanced(left, values * abs(scale), right, count, layer)
            if scale < 0:
                pair[UP] = -pair[UP]
            layer = with_alpha({**layer, **pair}, count)
        layers[path] = layer
        kept_energy += float(energies[:count].sum())
        whole_energy += float(energies.sum())
    ranks = [rank_of(layer) for layer in layers.values() if rank_of(layer)] or [0]
    return Resized(replace(lora, layers=layers), (min(ranks), max(ranks)),
                   kept_energy / whole_energy if whole_energy else 1.0)


def factors(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of up @ down, (out, r) @ (r, n), in float64: (out, r), (r,), (r, n)."""
    # (out, r) @ (r, n) has rank r: an SVD of r x r between two orthonormal factors is enough
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

    Raises UserError for kinds of layers whose sum is of another form (DoRA, OFT), and for LoKr
    whose exact sum would fill a disk."""
    merged = _shell(loras)
    for path, layer in _sums(loras, dtype):
        if rank_of(layer) > WIDEST and any(kind_of(lora.layers[path]) == "lokr"
                                           for lora, _ in loras if path in lora.layers):
            raise UserError("lora_convert.wide", layer=path, rank=rank_of(layer))
        merged.layers[path] = layer
    return merged


def merge_to(loras: Sequence[tuple[Lora, float]], cut: Cut) -> Resized:
    """The nearest LoRA of lower rank to the sum; no more than one whole layer is in memory."""
    return _resized(_shell(loras), _sums(loras, torch.float32), cut)


def _shell(loras: Sequence[tuple[Lora, float]]) -> Lora:
    shell = replace(loras[0][0], layers={}, bundled={}, unknown=(), metadata={})
    for lora, _ in loras:
        refuse_broken(lora, {"lora", "loha", "lokr", "full"}, "merge")
        shell.bundled |= lora.bundled
        shell.unknown += lora.unknown
    return shell


def _sums(loras: Sequence[tuple[Lora, float]], dtype: torch.dtype) -> Iterator[tuple[str, Layer]]:
    for path in dict.fromkeys(path for lora, _ in loras for path in lora.layers):
        layers = [(without_mid(as_product(path, lora.layers[path])), weight)
                  for lora, weight in loras if path in lora.layers]
        kinds = {kind_of(layer) for layer, _ in layers}
        if "full" in kinds:
            # a product beside a whole difference becomes one, too
            yield path, _sum(path, [(_whole(layer) if kind_of(layer) == "lora" else layer, weight)
                                    for layer, weight in layers], dtype)
            continue
        # [up1 up2] @ [down1; down2] = up1 @ down1 + up2 @ down2, with the weights in the ups
        if len({(layer[DOWN].shape[1:], layer[UP].shape[0]) for layer, _ in layers}) > 1:
            raise UserError("lora_convert.other_shapes", layer=path)
        ups = [layer[UP].float() * (weight * scale_of(layer)) for layer, weight in layers]
        yield path, with_alpha({
            DOWN: torch.cat([layer[DOWN].float() for layer, _ in layers]).to(dtype),
            UP: torch.cat(ups, 1).to(dtype)})


def _whole(layer: Layer) -> Layer:
    whole = layer[UP].float().flatten(1) @ layer[DOWN].float().flatten(1) * scale_of(layer)
    return {"diff": whole.reshape(len(whole), *layer[DOWN].shape[1:])}


def _sum(path: str, layers: Iterable[tuple[Layer, float]], dtype: torch.dtype) -> Layer:
    total: Layer = {}
    for layer, weight in layers:
        for end, value in layer.items():
            if end in total and total[end].shape != value.shape:
                raise UserError("lora_convert.other_shapes", layer=path)
            # a whole difference has no rank, so no alpha
            if end != ALPHA:
                total[end] = total.get(end, torch.zeros(())) + value.float() * weight
    return {end: value.to(dtype) for end, value in total.items()}
