"""Random weights in the single-file layout of Stable Diffusion 1.x (v1-5-pruned).

The names are those of the original LDM code; here they are made from the diffusers modules, the
other way round than the loader goes.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from core.families.sd15 import CONFIGS

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                 "to_out.0": "proj_out"}


def filled(model: type[nn.Module], config: object, seed: int) -> nn.Module:
    """A model of full size with cheap random weights."""
    with torch.device("meta"):
        made = (model.from_config(config) if hasattr(model, "from_config") and
                isinstance(config, dict) else model(config))
    made.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if name.endswith("position_ids"):           # in no file; empty memory would be any places
            tensor.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
        elif tensor.is_floating_point():
            scale = 0.02 if tensor.ndim > 1 else 0.01
            tensor.data.normal_(0, scale, generator=generator)
            if tensor.ndim == 1 and "norm" in name and name.endswith("weight"):
                tensor.data.add_(1)
    return made


def unet_name(name: str) -> str:
    for ours, theirs in UNET.items():
        if name.startswith(f"{ours}."):
            return _resnet(name.replace(ours, theirs, 1))
    kind, block, part, index, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        name).groups()                                   # type: ignore[union-attr]
    place = 3 * int(block) + int(index)
    if part == "downsamplers":
        return f"input_blocks.{3 * (int(block) + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if part == "upsamplers":
        return f"output_blocks.{place + 2}.{1 if block == '0' else 2}.{rest}"
    where = f"input_blocks.{place + 1}" if kind == "down" else f"output_blocks.{place}"
    return _resnet(f"{where}.{0 if part == 'resnets' else 1}.{rest}")


def _resnet(name: str) -> str:
    stem, _, end = name.rpartition(".")
    for ours, theirs in RESNET.items():
        if stem.endswith(f".{ours}") and ".transformer_blocks." not in stem:
            return f"{stem.removesuffix(ours)}{theirs}.{end}"
    return name


def vae_name(name: str, levels: int = 4) -> str:
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
        "mid_block.resnets.1", "mid.block_2").replace("conv_norm_out", "norm_out").replace(
        "conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
    name = name.replace(".resnets.", ".block.").replace(".downsamplers.0.", ".downsample.")
    name = name.replace(".upsamplers.0.", ".upsample.")
    if ".attentions.0." in name:
        head, _, tail = name.partition(".attentions.0.")
        for ours, theirs in VAE_ATTENTION.items():
            tail = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", tail)
        name = f"{head.replace('mid_block', 'mid')}.attn_1.{tail}"
    return name


def full_size(seed: int = 0) -> dict[str, nn.Module]:
    return {
        "unet": filled(UNet2DConditionModel, UNet2DConditionModel.load_config(CONFIGS / "unet"),
                       seed),
        "vae": filled(AutoencoderKL, AutoencoderKL.load_config(CONFIGS / "vae"), seed + 1),
        "text": filled(CLIPTextModel, CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder"),
                       seed + 2)}


def write(path: Path, models: dict[str, nn.Module], dtype: torch.dtype = torch.float16) -> None:
    """One file as people have it, with a stray EMA weight as in v1-5-pruned."""
    tensors: dict[str, Tensor] = {}
    for name, value in models["unet"].state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name)}"] = value
    for name, value in models["vae"].state_dict().items():
        ours = vae_name(name)
        conv = ".attn_1." in ours and value.ndim == 2       # 1x1 convolutions there
        tensors[f"first_stage_model.{ours}"] = value[:, :, None, None] if conv else value
    for name, value in models["text"].state_dict().items():
        name = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = value
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    save_file({k: v.to(dtype).contiguous() if v.is_floating_point() else v
               for k, v in tensors.items()}, path)
