"""LoRA files: reading, writing, and telling what a file is.

Importing this takes no torch; `describe` and `read_config` read the header alone. What the layers
in a file are called, and how they are converted, is in core/lora_files/formats.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core import paths
from core.errors import UserError
from core.families.lora_signs import NOT_LORA, TWINS, detect_format, family_of
from core.lora_files import metadata as lora_metadata
from core.safetensors_header import read_header, read_scalars

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 3                                  # names in a fault before "..."


# --- files -------------------------------------------------------------------------------------

def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
               ) -> dict[str, str]:
    """Writes atomically, with the hashes of A1111 and modelspec. -> the metadata written."""
    content, stamped = packed(path, tensors, metadata)
    paths.write_atomic(path, content)
    return stamped


def packed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
           ) -> tuple[bytes, dict[str, str]]:
    """-> the bytes of a LoRA file, and its metadata with the hashes. Nothing is written.

    Raises UserError, which names `path`, where there is no tensor or one holds NaN or infinity."""
    import torch
    from safetensors.torch import save
    if not tensors:
        raise UserError("lora_file.empty", file=path)
    # safetensors refuses views and transposed tensors: each one becomes a block of its own
    ready = {key: tensors[key].detach().to("cpu").clone(memory_format=torch.contiguous_format)
             for key in sorted(tensors)}
    for key, tensor in ready.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError("lora_file.not_finite", file=path, key=key, dtype=str(tensor.dtype)[6:])
    stamped = dict(metadata) | lora_metadata.hashes(ready, metadata)
    return save(ready, stamped), stamped


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata. Raises UserError for anything that isn't a LoRA."""
    from safetensors.torch import load
    header = read_header(path)
    format_ = detect_format(header.tensors)
    if format_ in NOT_LORA:
        raise UserError("lora_file.not_a_lora", file=path, what=format_)
    try:
        # from bytes, not mapped: the file stays free to be replaced, on Windows too
        tensors = load(path.read_bytes())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError("lora_file.unreadable", file=path, reason=error) from None
    for key, tensor in tensors.items():
        # torch can't compute with 8-bit floats; fp16 holds each of their values exactly
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensors[key] = tensor.half()
        # NaN in a LoRA makes every picture black.
        if not bool(tensor.isfinite().all()):
            raise UserError("lora_file.holds_nan", file=path, key=key)
    return tensors, header.metadata


def read_config(path: Path) -> str:
    """The YAML of the run that made this file. Raises UserError where the file has none."""
    metadata = read_header(path).metadata
    if lora_metadata.CONFIG_KEY in metadata:
        return metadata[lora_metadata.CONFIG_KEY]
    if metadata:
        keys = ", ".join(sorted(metadata)[:SHOWN]) + (" ..." if len(metadata) > SHOWN else "")
        raise UserError("lora_file.no_config", file=path, count=len(metadata), keys=keys)
    raise UserError("lora_file.no_metadata", file=path)


# --- what is it? -------------------------------------------------------------------------------

# Beginnings of keys in all formats; what fits neither is "other".
PARTS = {
    "text encoder": re.compile(r"lora_te\d?[_.]|text_encoder|clip_[lg]\.|t5\."),
    "unet": re.compile(r"lora_(unet|transformer)[_.]|lycoris_|(base_model\.model\.|model\.)?"
                       r"(unet|transformer|diffusion_model|down_blocks|mid_block|up_blocks)\b")}
# The end of a key, behind its layer.
_LAYER = re.compile(
    r"\.(lora_(down|up|mid|A|B)(\.[^.]+)?\.weight|hada_\w+|lokr_\w+|oft_\w+|dora_scale"
    r"|lora_magnitude_vector.*|alpha|diff|diff_b|w_norm|b_norm|lora(_linear_layer)?\.\w+\.weight)$"
    r"|(?<=_)lora\.\w+\.weight$")
# The path before a layer's own name: blocks and their numbers.
_BLOCK = re.compile(r".*(?:blocks?|layers|attentions|resnets|samplers)[._](\d+[._])*")
# Tensors whose first side is the rank.
_RANK_SIDE = re.compile(r"(lora_down|lora_A(\.[^.]+)?|[._]lora(_linear_layer)?\.down)\.weight$"
                        r"|\.(hada_w1_b|lokr_w[12]_b)$")


@dataclass(frozen=True, slots=True)
class Info:
    """What a file is, from its header alone."""

    path: Path
    size: int                              # bytes
    format: str                            # one of FORMATS, or unknown
    family: str                            # one of FAMILY_SIGNS, or unknown
    dtype: str                             # of most of the bytes: F16, BF16, F32
    ranks: tuple[int, ...]                 # different ones, ascending
    alphas: tuple[float, ...]              # none: the format has none
    scales: tuple[float, ...]              # alpha / rank: what the weights are multiplied with
    modules: dict[str, int]                # layers by part: "unet", "text encoder", "other"
    targets: tuple[str, ...]               # attn1_to_q, ff_net_2 ...
    facts: lora_metadata.Facts             # what the metadata says

    @property
    def is_lora(self) -> bool:
        return self.format not in NOT_LORA


def describe(path: Path) -> Info:
    """Tells what a .safetensors file is. Raises UserError only where the file is malformed."""
    header = read_header(path)
    tensors = header.tensors
    format_ = detect_format(tensors)
    facts = lora_metadata.facts_of(header.metadata)
    layer_of_key = {} if format_ in NOT_LORA else {
        key: _LAYER.sub("", key).rstrip("_") for key in tensors if _LAYER.search(key)}
    layers = sorted(set(layer_of_key.values()))
    ranks = {layer: tensors[key].shape[0] for key, layer in layer_of_key.items()
             if _RANK_SIDE.search(key) and tensors[key].shape}

    # Alphas are tensors in kohya's files; diffusers and peft note them in the metadata.
    scalars = read_scalars(path, header, [f"{layer}.alpha" for layer in ranks
                                          if f"{layer}.alpha" in tensors])
    alphas = {key.removesuffix(".alpha"): value for key, value in scalars.items()}
    peft_configs = lora_metadata.noted(header.metadata)
    for layer in ranks:
        alpha = peft_configs.get(layer.split(".")[0], {}).get("lora_alpha")
        # JSON may hold an integer that no float can be made of
        if layer not in alphas and isinstance(alpha, int | float) and abs(alpha) < 2**63:
            alphas[layer] = float(alpha)

    # The metadata decide where two families' layers are called the same, or tell nothing.
    family = family_of(tensors)
    if facts.family and TWINS.get(facts.family, "") == family:
        family = facts.family

    bytes_of: Counter[str] = Counter()
    for info in tensors.values():
        bytes_of[info.dtype] += info.nbytes
    return Info(
        path=path, size=header.size, format=format_, family=family or "unknown",
        dtype=max(bytes_of, key=lambda dtype: bytes_of[dtype], default=""),
        ranks=tuple(sorted(set(ranks.values()))), alphas=tuple(sorted(set(alphas.values()))),
        scales=tuple(sorted({alphas.get(layer, rank) / rank
                             for layer, rank in ranks.items() if rank})),
        modules=dict(Counter(
            next((part for part, pattern in PARTS.items() if pattern.match(layer)), "other")
            for layer in layers)),
        # lora_unet_..._transformer_blocks_0_attn1_to_q -> attn1_to_q
        targets=tuple(sorted({_BLOCK.sub("", layer).replace(".", "_") for layer in layers})),
        facts=facts)
