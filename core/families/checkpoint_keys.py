"""Renames the weights of single files to the names of diffusers' and transformers' models.

Every converter takes both spellings: the original code's, and the model's own, which finetunes
saved by diffusers have in one file. A name that a converter doesn't know stays as it is; the loader
says then what is lacking. All names come without the prefix of their component.
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


def unchanged(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """For components whose files have the model's own names."""
    return tensors


def by_table(part: layer_names.Part) -> Convert:
    """The converter of a denoiser, from the table that LoRA files are named by, too."""
    def convert(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        converted: Tensors = {}
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            layers, rename = layer_names.from_native(part, path)
            rows = rename.rows if rename else (1,)
            # Shift and scale, one half of the rows each, stand the other way round.
            if rename and rename.swapped:
                value = value.roll(len(value) // 2, 0)
            values = [value] if len(layers) == 1 or len(value) % sum(rows) else torch.split(
                value, [len(value) // sum(rows) * share for share in rows])
            # Norms have a `scale` in the original code, a `weight` in diffusers and in some files.
            leaf = "weight" if leaf == "scale" else leaf
            converted |= {f"{layer}.{leaf}" if layer else leaf: value
                          for layer, value in zip(layers, values, strict=False)}
        return converted
    return convert


def vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """AutoencoderKL: Stable Diffusion's, Flux's."""
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return {re.sub("|".join(map(re.escape, OLD_ATTENTION)),
                       lambda match: OLD_ATTENTION[match[0]], name): value
                for name, value in tensors.items()}
    return _known(single_file_utils.convert_ldm_vae_checkpoint, tensors, config)


def batch_normed_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Flux.2's VAE, which normalises its latents by a batch norm."""
    if not any(name.startswith("encoder.down_blocks.") for name in tensors):
        norm = {name: value for name, value in tensors.items() if name.startswith("bn.")}
        tensors = vae({name.replace("encoder.quant_conv", "quant_conv")
                       .replace("decoder.post_quant_conv", "post_quant_conv"): value
                       for name, value in tensors.items()}, config) | norm
    return {"bn.num_batches_tracked": torch.tensor(0)} | tensors


def film_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The VAE of Qwen-Image and Krea 2, in the names of Wan's code or of diffusers."""
    return (_known(single_file_utils.convert_wan_vae_to_diffusers, tensors)
            if "encoder.conv1.weight" in tensors else tensors)


def deep_vae(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """DC-AE, Sana's VAE."""
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return tensors
    return _known(single_file_utils.convert_autoencoder_dc_checkpoint_to_diffusers, tensors)


def open_clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """OpenCLIP's text model, its fused matrices split."""
    if not any(name.startswith("transformer.resblocks.") for name in tensors):
        return tensors
    # All that diffusers asks of the model is its width.
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    converted: Tensors = single_file_utils.convert_open_clip_checkpoint(model, tensors, "")
    return converted


def projected_clip(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """CLIP with a projection. A file may lack it: it is the identity then."""
    return {"text_projection.weight": torch.eye(config["hidden_size"])} | open_clip(
        tensors, config)


def gemma(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items()}


_DECODER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?"
                      r"((?:layers|embed_tokens|norm)\..+)")


def decoder(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The layers of a language model, whatever stands before their names. Vision tower and head,
    which read no text, are left out."""
    return {match[1]: value for name, value in tensors.items()
            if (match := _DECODER.fullmatch(name))}


def _known(convert: Callable[..., Tensors], tensors: Tensors, *more: Any) -> Tensors:
    """Calls one of diffusers' converters. Where weights are missing, these fail in any way: the
    names stay as they are then."""
    try:
        return convert(dict(tensors), *more)
    except (LookupError, ValueError, TypeError):
        return tensors
