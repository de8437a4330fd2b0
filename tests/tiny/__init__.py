"""Tiny random-weight bases of the real classes, and small picture folders."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core import paths

TOKENIZER = paths.DEMO / "base" / "tokenizer"
MIDDLE = "mid_block_attentions_0_transformer_blocks_0_attn1"     # of tiny_unet; square layers
COLOURS = ("red", "green", "blue", "orange", "purple", "teal")


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), attention_head_dim=4,
        norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def tiny_base(folder: Path, prediction: str = "epsilon") -> Path:
    """A Stable Diffusion 1.x folder whose pictures are 32 px a side (VAE f4)."""
    torch.manual_seed(7)
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=8,
        sample_size=32)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=32, bos_token_id=49406, eos_token_id=49407))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              prediction_type=prediction)
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=tiny_unet(), text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def pictures(folder: Path, count: int = 6, size: tuple[int, int] = (48, 48),
             captions: bool = True) -> Path:
    """Discs and bars in flat colours, a `.txt` caption beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(count)
    for i in range(count):
        image = Image.new("RGB", size, "white")
        pen, colour = ImageDraw.Draw(image), COLOURS[i % len(COLOURS)]
        x, y = rng.randint(4, size[0] // 2), rng.randint(4, size[1] // 2)
        pen.ellipse((x, y, x + size[0] // 3, y + size[1] // 3), colour)
        image.save(folder / f"{i:03d}.png")
        if captions:
            (folder / f"{i:03d}.txt").write_text(f"{colour} disc, flat, number {i}", "utf-8")
    return folder


def tiny_lora(path: Path, names: tuple[str, ...] = (f"{MIDDLE}_to_q", f"{MIDDLE}_to_out_0"),
              width: int = 64, rank: int = 2, metadata: dict[str, str] | None = None) -> Path:
    """A kohya file for tiny_base's UNet that changes its pictures; names of square layers."""
    from safetensors.torch import save_file
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in names:
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(
            rank, width, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(
            width, rank, generator=generator)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata or {"ss_base_model_version": "sd_v1"})
    return path
