"""Weights of .safetensors files that are to be multiplied by a scale beside them, and weights in
numbers that are not read here. Needs no torch.

ComfyUI's scaled fp8 in its older form: `layer.scale_weight` beside `layer.weight` and the mark
`scaled_fp8`; in its newer form: `layer.weight_scale`, with the kind in `layer.comfy_quant` (JSON
in bytes) or in the metadata `_quantization_metadata`. The weight is the stored number times the
scale, which is one number or one for each row. Scales of inputs (`scale_input`, `input_scale`)
serve products in fp8, which nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.safetensors_header import Header, TensorInfo, opened
from core.serialization import json_of

SCALES = ("scale_weight", "weight_scale")
INPUTS = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
FP8, INT8 = ("F8_E4M3", "F8_E5M2"), ("I8",)
READ = {"float8_e4m3fn": FP8, "float8_e5m2": FP8, "float8_e4m3fn_rowwise": FP8,
        "int8_tensorwise": INT8}           # kinds by ComfyUI's words -> how they are stored
# What other programs write beside weights in numbers of their own.
FOREIGN = {
    "absmax": "nf4 / fp4 (bitsandbytes)", "SCB": "int8 (bitsandbytes)", "scb": "int8",
    "qweight": "int4 (SVDQuant / AWQ / GPTQ)", "weight_packed": "int4 (compressed-tensors)",
    "weight_scale_2": "nvfp4", "weight_scale_inv": "fp8 (block scales)",
    "pre_quant_scale": "AWQ", "weight_codebook": "w4a8",
}


@dataclass(frozen=True, slots=True)
class Scaling:
    scales: dict[str, str]                 # weight -> the tensor that it is multiplied by
    helpers: frozenset[str]                # tensors that are no weights of a model
    unread: dict[str, str]                 # weight -> the kind of its numbers, which isn't read


def scaling_of(path: Path, header: Header) -> Scaling:
    """Of a whole file, by full names. Reads marks of a few bytes each. Raises UserError as reading
    the header does."""
    tensors, scales, helpers = header.tensors, dict[str, str](), set[str]()
    unread: dict[str, str] = {}
    kinds = _kinds(path, header)
    for name, info in tensors.items():
        stem, _, leaf = name.rpartition(".")
        weight = stem if stem.endswith(".weight") else f"{stem}.weight"
        if leaf in FOREIGN:
            helpers.add(name)
            unread[weight] = FOREIGN[leaf]
        elif leaf in INPUTS:
            helpers.add(name)
        elif leaf in SCALES and weight in tensors:
            helpers.add(name)
            kind = kinds.get(stem, {})
            if other := _other(kind, tensors[weight], info):
                unread.setdefault(weight, other)
            else:
                scales[weight] = name
    for stem, kind in kinds.items():
        weight = f"{stem}.weight"
        if weight in tensors and weight not in scales and (
                tensors[weight].dtype not in READ.get(_format(kind), ()) or _rotated(kind)):
            unread.setdefault(weight, _said(kind))
    for name, info in tensors.items():
        if name.endswith(".weight") and name not in scales and info.dtype in INT8:
            unread.setdefault(name, "int8")
    return Scaling(scales, frozenset(helpers), unread)


def _kinds(path: Path, header: Header) -> dict[str, Mapping[str, Any]]:
    """Layer -> what its mark says, such as {"format": "float8_e4m3fn"}."""
    found: dict[str, Mapping[str, Any]] = {}
    told = json_of(header.metadata.get("_quantization_metadata", ""), dict)
    layers = told.get("layers")
    for layer, kind in layers.items() if isinstance(layers, dict) else ():
        if isinstance(kind, dict):
            found[layer] = kind
    marks = [name for name, info in header.tensors.items()
             if name.endswith(".comfy_quant") and info.nbytes < 10_000]
    if marks:
        with opened(path) as file:
            for name in marks:
                file.seek(header.data_start + header.tensors[name].begin)
                found[name.removesuffix(".comfy_quant")] = json_of(
                    file.read(header.tensors[name].nbytes).decode("utf-8", "replace"), dict)
    return found


def _other(kind: Mapping[str, Any], weight: TensorInfo, scale: TensorInfo) -> str:
    """The kind of a scaled weight's numbers where it is not number times scale; else empty."""
    if kind and (_rotated(kind) or weight.dtype not in READ.get(_format(kind), ())):
        return _said(kind)
    if scale.dtype not in ("F64", "F32", "F16", "BF16"):
        return "mxfp8 / nvfp4"
    if not kind and weight.dtype not in (*FP8, *INT8, "F16", "BF16", "F32"):
        return f"{weight.dtype} (scales)"
    rows = weight.shape[:1] and (weight.shape[:1], (*weight.shape[:1], 1))
    one = all(side == 1 for side in scale.shape)
    return "" if one or scale.shape in rows else f"{weight.dtype} (block scales)"


def _format(kind: Mapping[str, Any]) -> str:
    return str(kind.get("format", ""))


def _rotated(kind: Mapping[str, Any]) -> bool:
    """Whether the weight's columns were mixed before they were rounded."""
    params = kind.get("params")
    return bool(kind.get("convrot") or (isinstance(params, dict) and params.get("convrot")))


def _said(kind: Mapping[str, Any]) -> str:
    name = "".join(c for c in _format(kind) if c.isalnum() or c in "_-")[:40] or "?"
    return f"{name} (convrot)" if _rotated(kind) and "convrot" not in name else name
