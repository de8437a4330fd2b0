"""The layers of a LoRA, whatever file they come from: kinds, ranks, alpha, fused matrices.

Tensors have LyCORIS' names: lora_down.weight, hada_w1_a ... Torch is imported where it is used:
the window imports this module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from core.families.layer_names import Naming, Part, Rename, from_native, to_native

if TYPE_CHECKING:
    from torch import Tensor

DOWN, UP, MID, ALPHA, DORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha",
                              "dora_scale")
LARGEST = 2**30                            # numbers in one matrix
_CONV = re.compile(r"(^|\.)conv(\d|_in|_out)?$")
Layer = dict[str, "Tensor"]                # lora_down.weight, lora_up.weight, alpha, hada_w1_a ...


@dataclass(slots=True)
class Lora:
    layers: dict[str, Layer]               # by module path: `unet.mid_block.attentions.0.proj_in`
    naming: Naming
    metadata: dict[str, str] = field(default_factory=dict)
    bundled: dict[str, Tensor] = field(default_factory=dict)   # embeddings, as the file has them
    unknown: tuple[str, ...] = ()          # keys that name no layer: reported, not kept

    def layers_of(self, part: str) -> dict[str, Layer]:
        """The layers of one part of the pipeline, by their paths inside of it."""
        return {path.partition(".")[2]: layer for path, layer in self.layers.items()
                if path.partition(".")[0] == part}


# --- one layer ---------------------------------------------------------------------------------

def kind_of(layer: Mapping[str, Any]) -> str:
    """lora | dora | loha | lokr | oft | full (whole differences of weights, biases, norms)."""
    for beginning, kind in (("hada_", "loha"), ("lokr_", "lokr"), ("oft_", "oft")):
        if any(end.startswith(beginning) for end in layer):
            return kind
    if DOWN in layer and UP in layer:
        return "dora" if DORA in layer else "lora"
    return "full" if {"diff", "diff_b", "w_norm", "b_norm"} & layer.keys() else "broken"


def rank_of(layer: Mapping[str, Tensor]) -> int:
    """Rows of the inner matrix; 0 where the layer has none."""
    for end in (DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if end in layer and layer[end].ndim:
            return int(layer[end].shape[0])
    return 0


def fits(layer: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a layer can belong together: files come from anywhere."""
    # alpha has one number, lengths have a side, and of a product only one kind can be meant
    kinds = {end[:5] for end in layer if end.startswith(("lora_", "hada_", "lokr_"))}
    if len(kinds) > 1 or (ALPHA in layer and layer[ALPHA].numel() != 1) or (
            DORA in layer and not layer[DORA].ndim):
        return False
    if not (DOWN in layer and UP in layer):
        return True
    down, up, rank = layer[DOWN], layer[UP], rank_of(layer)
    if min(down.ndim, up.ndim) < 2 or not min(down.numel(), up.numel()) or (
            up.flatten(1).shape[1] != rank):
        return False
    return MID not in layer or (layer[MID].ndim == 4 and layer[MID].shape[:2] == (rank, rank)
                                and down[0, 0].numel() == 1)


def alpha_of(layer: Mapping[str, Tensor]) -> float:
    """The alpha of a layer. None, or 0, means the rank, as in kohya's trainer."""
    return (float(layer[ALPHA]) if ALPHA in layer else 0.0) or float(rank_of(layer))


def scale_of(layer: Mapping[str, Tensor]) -> float:
    """alpha / rank: what the product is multiplied with."""
    rank = rank_of(layer)
    return alpha_of(layer) / rank if rank else 1.0


def with_alpha(layer: Layer, alpha: float | None = None) -> Layer:
    """The layer with this alpha; None: its own, or its rank where it has none."""
    if alpha is None and (ALPHA in layer or not rank_of(layer)):
        return layer
    import torch
    return {**layer, ALPHA: torch.tensor(float(rank_of(layer) if alpha is None else alpha))}


def folded(layer: Layer) -> Layer:
    """The same product without alpha: it is multiplied into the second matrix, in float32, and
    rounded to that matrix's type."""
    scale, end = scale_of(layer), UP if UP in layer else "hada_w1_a"
    rest = {key: value for key, value in layer.items() if key != ALPHA}
    if scale == 1 or end not in layer:
        return rest
    return {**rest, end: (layer[end].float() * scale).to(layer[end].dtype)}


def without_mid(layer: Layer) -> Layer:
    """A Tucker-decomposed convolution as a plain one: down and mid are multiplied."""
    if MID not in layer or DOWN not in layer:
        return layer
    import torch
    down = torch.einsum("rjkl,ji->rikl", layer[MID].float(), layer[DOWN].float().flatten(1))
    rest = {key: value for key, value in layer.items() if key != MID}
    return {**rest, DOWN: down.to(layer[DOWN].dtype)}


def as_product(path: str, layer: Layer) -> Layer:
    """LoHa and LoKr as a plain product of exactly the same weight, in float32: the columns of a
    Hadamard or Kronecker product are products of its factors' columns. Others stay as they are.
    Raises UserError where the factors don't fit each other."""
    kind = kind_of(layer)
    if kind not in ("loha", "lokr"):
        return layer
    ends = {end: value.float() for end, value in layer.items()}
    name = "hada" if kind == "loha" else kind
    try:
        factors = [_factor(ends, f"{name}_w{n}", f"{name}_t{n}", path) for n in (1, 2)]
        up, down = (_hadamard if kind == "loha" else _kronecker)(*factors)
    except (RuntimeError, ValueError, KeyError, IndexError):
        raise UserError("lora_convert.misfit", layer=path) from None
    lengths = {DORA: ends[DORA]} if DORA in ends else {}
    return with_alpha({DOWN: down, UP: up.reshape(*up.shape, *[1] * (down.ndim - 2)), **lengths},
                      scale_of(layer) * len(down))


Factor = tuple["Tensor", "Tensor"]         # (out, r) and (r, in) or (r, in, height, width)


def _hadamard(first: Factor, second: Factor) -> Factor:
    import torch
    if first[0].numel() * second[0].shape[1] > LARGEST:
        raise ValueError
    up = torch.einsum("oi,oj->oij", first[0], second[0]).flatten(1)
    return up, torch.einsum("i...,j...->ij...", first[1], second[1]).flatten(0, 1)


def _kronecker(first: Factor, second: Factor) -> Factor:
    import torch
    (up_1, down_1), (up_2, down_2) = first, second
    # files come from anywhere: a small one may stand for more than memory
    if up_1.numel() * up_2.numel() > LARGEST or down_1.numel() * down_2.numel() > LARGEST:
        raise ValueError
    down = torch.einsum("ai,bj...->abij...", down_1.flatten(1), down_2)
    return torch.kron(up_1, up_2), down.flatten(2, 3).flatten(0, 1)


def _factor(ends: Layer, name: str, core: str, path: str) -> Factor:
    import torch
    if name in ends:
        whole = ends[name]
        sides = whole.flatten(1).shape
        narrow = torch.eye(min(sides))
        return (narrow, whole) if sides[0] <= sides[1] else (
            whole.flatten(1), narrow.reshape(-1, *whole.shape[1:]))
    up, down = ends[f"{name}_a"], ends[f"{name}_b"]
    if core in ends:
        # Tucker: a core of ranks between the two
        return up.T.contiguous(), torch.einsum("ijkl,jr->irkl", ends[core], down)
    # files don't tell the size of a kernel whose rows lie flat: of UNets, these have 3 x 3
    if _CONV.search(path) and down.shape[1] % 9 == 0:
        down = down.reshape(len(down), -1, 3, 3)
    return up, down


def refuse_broken(lora: Lora, kinds: Iterable[str], to: str) -> None:
    """Raises UserError where a layer is incomplete, or is of none of the `kinds` that `to` has a
    place for."""
    paths = defaultdict(list)
    for path, layer in lora.layers.items():
        paths[kind_of(layer)].append(path)
    if "broken" in paths:
        raise UserError("lora_file.lone_half", keys=", ".join(paths["broken"][:3]),
                        count=len(paths["broken"]))
    for kind in sorted(paths.keys() - set(kinds)):
        code = to if to in ("merge", "resize") else "room"
        raise UserError(f"lora_convert.no_{code}", kind=kind, to=to, count=len(paths[kind]),
                        example=paths[kind][0])


# --- matrices that the original code fuses ------------------------------------------------------

def split(part: Part, inner: str, layer: Layer) -> list[tuple[str, Layer]]:
    """A layer of the original code -> those of diffusers. A fused one whose rows can't be
    separated stays whole, under its own name."""
    names, rename = from_native(part, inner)
    # one layer there, one here: only its name differs
    if rename is None or (len(names) == 1 and not rename.swapped):
        return [(names[0], layer)]
    ends = _rowed(layer, sum(rename.rows) * (2 if rename.swapped else 1))
    if not ends:
        return [(inner, layer)]
    if rename.swapped:
        return [(names[0], _swapped(layer, ends))]
    import torch
    pieces = {end: torch.split(layer[end], [len(layer[end]) // sum(rename.rows) * share
                                            for share in rename.rows]) for end in ends}
    return [(name, {**layer, **{end: pieces[end][i] for end in ends}})
            for i, name in enumerate(names)]


# The tensors of each kind whose rows are the rows of the whole matrix.
_ROWED = {"lora": (UP,), "dora": (UP,), "loha": ("hada_w1_a", "hada_w2_a"),
          "lokr": ("lokr_w1", "lokr_w1_a"), "full": ("diff",)}


def _rowed(layer: Layer, parts: int) -> list[str]:
    """The tensors whose rows are the matrix's rows, in order; none: the matrix can't be cut into
    so many equal parts."""
    # Rows of a Kronecker product are those of its first factor, rows of a Hadamard product those
    # of both. DoRA's lengths of columns belong to all rows at once: (1, in) can't be cut.
    ends = [end for end in (*_ROWED.get(kind_of(layer), ()), DORA, "diff_b") if end in layer]
    if "hada_t1" in layer or any(not layer[end].ndim or len(layer[end]) % parts for end in ends):
        return []
    return ends


def _swapped(layer: Layer, ends: Iterable[str]) -> Layer:
    return {**layer, **{end: layer[end].roll(len(layer[end]) // 2, 0) for end in ends}}


def native(part: Part, layers: dict[str, Layer]) -> tuple[dict[str, Layer], dict[str, Layer]]:
    """-> layers by the original code's names, fused where it fuses them; and, by diffusers' names,
    layers that can't be rows of one matrix: factors of LoHa, LoKr and OFT, lengths of columns."""
    named: dict[str, Layer] = {}
    apart: dict[str, Layer] = {}
    groups: dict[str, tuple[Rename, dict[int, str]]] = {}
    for inner, layer in layers.items():
        place = to_native(part, inner)
        if place.fused and place.of is not None:
            groups.setdefault(place.name, (place.of, {}))[1][place.number] = inner
        else:
            named[part.rooted(place.name)] = layer
    for name, (rename, inners) in groups.items():
        members = {number: layers[inner] for number, inner in inners.items()}
        if rename.swapped and (ends := _rowed(members[0], 2)):
            named[name] = _swapped(members[0], ends)
        elif not rename.swapped and _can_be_joined(rename, members):
            named[name] = _joined(rename, members, name)
        else:
            apart |= {inner: layers[inner] for inner in inners.values()}
    return named, apart


def _can_be_joined(rename: Rename, members: Mapping[int, Layer]) -> bool:
    """Whether they are plain products; DoRA's lengths must be of rows, and all rows have one."""
    with_lengths = [DORA in layer for layer in members.values()]
    return all(kind_of(layer) in ("lora", "dora") and MID not in layer
               and (DORA not in layer or len(layer[DORA]) == len(layer[UP]))
               for layer in members.values()) and (
        not any(with_lengths) or (all(with_lengths) and len(with_lengths) == len(rename.ours)))


def _joined(rename: Rename, members: Mapping[int, Layer], name: str) -> Layer:
    """Layers that are rows of one matrix -> one layer with exactly the same product. Raises
    UserError where their sizes don't fit each other."""
    import torch
    numbers = sorted(members)
    ordered = [members[i] for i in numbers]
    units = {(layer[UP].shape[0] / rename.rows[i], layer[UP].ndim, layer[DOWN].shape[1:])
             for i, layer in members.items()}
    if len(units) > 1 or any(layer[UP].ndim > 2 for layer in ordered):
        raise UserError("lora_convert.not_fusible", layer=name)
    magnitudes = [layer[DORA] for layer in ordered if DORA in layer]
    dora = {DORA: torch.cat(magnitudes)} if magnitudes else {}
    first = ordered[0]
    scales = {scale_of(layer) for layer in ordered}
    # they share one down matrix where they were trained fused: the ups go below each other
    if len(ordered) == len(rename.ours) and len(scales) == 1 and all(
            torch.equal(layer[DOWN], first[DOWN]) for layer in ordered):
        return {**first, UP: torch.cat([layer[UP] for layer in ordered]), **dora}
    # else the downs go below each other, and the ups into blocks of zeros
    plain = ordered if len(scales) == 1 else [folded(layer) for layer in ordered]
    unit = plain[0][UP].shape[0] // rename.rows[numbers[0]]
    ranks = [rank_of(layer) for layer in plain]
    up = first[UP].new_zeros(unit * sum(rename.rows), sum(ranks))
    column = 0
    for i, layer, rank in zip(numbers, plain, ranks, strict=True):
        row = unit * sum(rename.rows[:i])
        up[row:row + layer[UP].shape[0], column:column + rank] = layer[UP]
        column += rank
    joined = {DOWN: torch.cat([layer[DOWN] for layer in plain]), UP: up, **dora}
    return with_alpha(joined, sum(ranks) * (scales.pop() if len(scales) == 1 else 1.0))
