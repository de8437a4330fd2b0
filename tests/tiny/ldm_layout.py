"""Random weights in single files, full-size ones too.

The names are those of the original code; here they are made from the diffusers modules, the
other way round than the loader goes.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from core import families, paths
from core.families.krea2.spec import NAMING as KREA2
from core.families.layer_names import Part, to_native
from core.families.registry import SPECS
from core.memory import plan_inputs
from core.weights.precision import Precision

CONFIGS = paths.family_configs("sd15")

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2"}
OPEN_CLIP = {"encoder.layers": "transformer.resblocks", "self_attn.out_proj": "attn.out_proj",
             "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
             "mlp.fc2": "mlp.c_proj", "embeddings.token_embedding": "token_embedding",
             "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm": "ln_final"}
# What Flux, Chroma and Krea 2 call `scale`.
SCALES = ("query_norm", "key_norm", "qnorm", "knorm", "prenorm", "postnorm", "txtmlp.0",
          "last.norm", *(f"distilled_guidance_layer.norms.{i}" for i in range(5)))
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


def original(part: Part, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A denoiser's weights in the original code's names, its matrices fused."""
    found: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        place = to_native(part, path)
        if leaf == "scale_shift_table" and part is KREA2[0]:
            blocks = path.startswith("transformer_blocks.")
            found[f"{path.removeprefix('transformer_')}.mod.lin" if blocks else
                  "last.modulation.lin"] = value.flatten() if blocks else value
            continue
        leaf = "scale" if place.name.endswith(SCALES) else leaf
        if place.of is not None and place.of.swapped:
            found[f"{place.name}.{leaf}"] = value.roll(value.shape[0] // 2, 0)
        elif place.fused:
            rows[f"{place.name}.{leaf}"][place.number] = value
        elif place.name:
            found[f"{place.name}.{leaf}"] = value
        else:                               # Sana's last layer has a weight of the whole model's
            found[f"final_layer.{leaf}" if leaf == "scale_shift_table" else leaf] = value
    return found | {name: torch.cat([own[i] for i in sorted(own)]) for name, own in rows.items()}


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        found[name] = value
    for name in [n for n in found if ".self_attn.q_proj." in n]:
        leaf = name.rpartition(".")[2]
        parts = [found.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        stem = name.split(".self_attn.")[0]
        found[f"{stem}.attn.in_proj_{leaf}"] = torch.cat(parts)
    if "text_projection.weight" in found:
        found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    return found


def vae(state: dict[str, Tensor], levels: int = 4) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        name = vae_name(name, levels)
        conv = ".attn_1." in name and value.ndim == 2       # 1x1 convolutions there
        found[name] = value[:, :, None, None] if conv else value
    return found


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.clone().contiguous() for name, value in state.items()}


def clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the outer module that transformers 5 dropped."""
    return {name if name.startswith("text_") else f"text_model.{name}": value
            for name, value in state.items()}


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
    tensors |= behind("first_stage_model.", vae(models["vae"].state_dict()))
    tensors |= behind("cond_stage_model.transformer.", clip(models["text"].state_dict()))
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    save_file({k: v.to(dtype).contiguous() if v.is_floating_point() else v
               for k, v in tensors.items()}, path)


def write_full_size(family: str, path: Path) -> Path:
    """Stable Diffusion 1.5 or XL as one fp16 file, written piece by piece: 2 and 7 GB."""
    meta = Precision(torch.device("meta"), torch.float16, torch.float16, torch.float16)
    parts = families.get(family).skeleton(plan_inputs.base_of(family).source, meta)
    unet, text = parts.denoiser.state_dict(), parts.text["text_encoder"].state_dict()
    tensors = behind("first_stage_model.", vae(parts.vae.state_dict()))
    if family == "sd15":
        tensors |= {f"model.diffusion_model.{unet_name(k)}": v for k, v in unet.items()}
        tensors |= behind("cond_stage_model.transformer.", clip(text))
    else:
        other = parts.text["text_encoder_2"].state_dict()
        tensors |= behind("model.diffusion_model.", original(SPECS[family].naming[0], unet))
        tensors |= behind("conditioner.embedders.0.transformer.", clip(text))
        tensors |= behind("conditioner.embedders.1.model.", open_clip(other))
    stream(path, {name: tuple(value.shape) for name, value in tensors.items()})
    return path


def stream(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of fp16 noise; scales of norms are near one."""
    noise = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(told)) + told)
        for name, shape in shapes.items():
            left, near = torch.Size(shape).numel(), len(shape) == 1 and name.endswith("weight")
            while left > 0:
                part = noise[:left] + 1 if near else noise[:left]
                file.write(part.numpy().tobytes())
                left -= len(part)
