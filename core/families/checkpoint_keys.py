"""The names of weights in single files -> those of diffusers' and transformers' models.

Every table takes both spellings: the original code's, and the model's own, as finetunes saved by
diffusers have them in one file. A name that a table doesn't know stays as it is; whoever loads
tells what is lacking then. All get names without the prefix of their part.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from core.families import layer_names

Tensors = dict[str, Tensor]
Convert = Callable[[Tensors, dict[str, Any]], Tensors]  # the file's names -> the model's
# What diffusers called the layers of a VAE's attention until 2023.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                 ".proj_attn.": ".to_out.0."}


def own(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return tensors


def by_table(part: layer_names.Part) -> Convert:
    """A denoiser, by the names of LoRA files: the layers are called the same there. Norms have a
    `scale` in the original code, a `weight` in diffusers and in some single files."""
    def convert(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        found: Tensors = {}
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            ours, rename = layer_names.from_native(part, path)
            rows = rename.rows if rename else (1,)
            if rename and rename.swapped:       # shift and scale
                value = value.roll(len(value) // 2, 0)
            pieces = [value] if len(ours) == 1 or len(value) % sum(rows) else torch.split(
                value, [len(value) // sum(rows) * share for share in rows])
            leaf = "weight" if leaf == "scale" else leaf
            found |= {f"{one}.{leaf}" if one else leaf: piece
                      for one, piece in zip(ours, pieces, strict=False)}
        return found
    return convert


def vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """AutoencoderKL: Stable Diffusion's, Flux's."""
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return {re.sub("|".join(map(re.escape, OLD_ATTENTION)),
                       lambda match: OLD_ATTENTION[match[0]], name): value
                for name, value in tensors.items()}
    return _known(single_file_utils.convert_ldm_vae_checkpoint, tensors, config)


def batch_normed_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Flux.2's."""
    if not any(name.startswith("encoder.down_blocks.") for name in tensors):
        norm = {name: value for name, value in tensors.items() if name.startswith("bn.")}
        tensors = vae({name.replace("encoder.quant_conv", "quant_conv")
                       .replace("decoder.post_quant_conv", "post_quant_conv"): value
                       for name, value in tensors.items()}, config) | norm
    return {"bn.num_batches_tracked": torch.tensor(0)} | tensors


def film_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Of Qwen-Image and Krea 2: as Wan's code calls its weights, or diffusers."""
    return (_known(single_file_utils.convert_wan_vae_to_diffusers, tensors)
            if "encoder.conv1.weight" in tensors else tensors)


def deep_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """DC-AE, Sana's."""
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return tensors
    return _known(single_file_utils.convert_autoencoder_dc_checkpoint_to_diffusers, tensors)


def open_clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """OpenCLIP's text model, its fused matrices split."""
    if not any(name.startswith("transformer.resblocks.") for name in tensors):
        return tensors
    like = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    found: Tensors = single_file_utils.convert_open_clip_checkpoint(like, tensors, "")
    return found


def projected_clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """CLIP whose file may lack the projection, which is the identity then."""
    return {"text_projection.weight": torch.eye(config["hidden_size"])} | open_clip(
        tensors, config)


def gemma(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items()}


_DECODER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?"
                      r"((?:layers|embed_tokens|norm)\..+)")


def decoder(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The layers of a language model without what stands before their names, and without the parts
    that no text is read with: a vision tower, the head."""
    return {match[1]: value for name, value in tensors.items()
            if (match := _DECODER.fullmatch(name))}


def _known(table: Callable[..., Tensors], tensors: Tensors, *more: Any) -> Tensors:
    """diffusers' tables want certain weights to be there, and fail in any way without them."""
    try:
        return table(dict(tensors), *more)
    except (LookupError, ValueError, TypeError):
        return tensors
