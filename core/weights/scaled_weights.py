"""Weights of .safetensors files that are multiplied by a scale beside them, and weights in formats
that are not read here. Needs no torch.

ComfyUI's scaled fp8 in its older form: `layer.scale_weight` beside `layer.weight` and the mark
`scaled_fp8`; in its newer form: `layer.weight_scale`, with the format in `layer.comfy_quant` (JSON
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
# ComfyUI's names of formats -> the dtypes in which they are stored.
READ = {"float8_e4m3fn": FP8, "float8_e5m2": FP8, "float8_e4m3fn_rowwise": FP8,
        "int8_tensorwise": INT8}
# What other programs write beside weights in formats of their own.
FOREIGN = {
    "absmax": "nf4 / fp4 (bitsandbytes)", "SCB": "int8 (bitsandbytes)", "scb": "int8",
    "qweight": "int4 (SVDQuant / AWQ / GPTQ)", "weight_packed": "int4 (compressed-tensors)",
    "weight_scale_2": "nvfp4", "weight_scale_inv": "fp8 (block scales)",
    "pre_quant_scale": "AWQ", "weight_codebook": "w4a8"}
Mark = Mapping[str, Any]                   # such as {"format": "float8_e4m3fn"}


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scaled and the unreadable weights of a file, by full names."""

    scales: dict[str, str]                 # weight -> the tensor that it is multiplied by
    helpers: frozenset[str]                # tensors that are no weights of a model
    unread: dict[str, str]                 # weight -> its format, which isn't read


def scaling_of(path: Path, header: Header) -> Scaling:
    """Reads the marks of a file, of a few bytes each. Raises UserError as `read_header` does."""
    tensors, scales, helpers = header.tensors, dict[str, str](), set[str]()
    unread: dict[str, str] = {}
    marks = _marks(path, header)
    for name, info in tensors.items():
        stem, _, leaf = name.rpartition(".")
        weight = stem if stem.endswith(".weight") else f"{stem}.weight"
        if leaf in FOREIGN or leaf in INPUTS or (leaf in SCALES and weight in tensors):
            helpers.add(name)
        if leaf in FOREIGN:
            unread[weight] = FOREIGN[leaf]
        elif leaf in SCALES and weight in tensors:
            if unread_format := _unread_format(marks.get(stem, {}), tensors[weight], info):
                unread.setdefault(weight, unread_format)
            else:
                scales[weight] = name
    # Marked weights without a scale.
    for layer, mark in marks.items():
        weight = f"{layer}.weight"
        if weight in tensors and weight not in scales and _is_unread(mark, tensors[weight]):
            unread.setdefault(weight, _description(mark))
    # int8 means nothing without a scale.
    for name, info in tensors.items():
        if name.endswith(".weight") and name not in scales and info.dtype in INT8:
            unread.setdefault(name, "int8")
    return Scaling(scales, frozenset(helpers), unread)


def _marks(path: Path, header: Header) -> dict[str, Mark]:
    """Layer -> its mark, from the metadata and from tensors."""
    layers = json_of(header.metadata.get("_quantization_metadata", ""), dict).get("layers")
    marks: dict[str, Mark] = {
        layer: mark for layer, mark in (layers.items() if isinstance(layers, dict) else ())
        if isinstance(mark, dict)}
    # A larger one is no mark, and isn't worth reading.
    written = {name.removesuffix(".comfy_quant"): info for name, info in header.tensors.items()
               if name.endswith(".comfy_quant") and info.nbytes < 10_000}
    if written:
        with opened(path) as file:
            for layer, info in written.items():
                file.seek(header.data_start + info.begin)
                marks[layer] = json_of(file.read(info.nbytes).decode("utf-8", "replace"), dict)
    return marks


def _unread_format(mark: Mark, weight: TensorInfo, scale: TensorInfo) -> str:
    """The format of a scaled weight that isn't number times scale; else empty."""
    if mark and _is_unread(mark, weight):
        return _description(mark)
    if scale.dtype not in ("F64", "F32", "F16", "BF16"):
        return "mxfp8 / nvfp4"
    if not mark and weight.dtype not in (*FP8, *INT8, "F16", "BF16", "F32"):
        return f"{weight.dtype} (scales)"
    is_one = all(side == 1 for side in scale.shape)
    is_by_row = bool(weight.shape) and scale.shape in (weight.shape[:1], (weight.shape[0], 1))
    return "" if is_one or is_by_row else f"{weight.dtype} (block scales)"


def _is_unread(mark: Mark, weight: TensorInfo) -> bool:
    return _is_rotated(mark) or weight.dtype not in READ.get(str(mark.get("format", "")), ())


def _is_rotated(mark: Mark) -> bool:
    """Whether the weight's columns were mixed (convrot) before they were rounded."""
    params = mark.get("params")
    return bool(mark.get("convrot") or (isinstance(params, dict) and params.get("convrot")))


def _description(mark: Mark) -> str:
    """The format of a mark for the user: whatever the file has there, it is short and harmless."""
    name = "".join(c for c in str(mark.get("format", "")) if c.isalnum() or c in "_-")[:40] or "?"
    return f"{name} (convrot)" if _is_rotated(mark) and "convrot" not in name else name
