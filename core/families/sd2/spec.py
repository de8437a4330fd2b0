"""Stable Diffusion 2.x: what is known of it without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.families import unet
from core.families.layer_names import Naming, clip_part
from core.families.spec import FamilySpec, Found, Shapes
from core.families.targets import ALIASES, TEXT_TARGETS, UNET_PRESETS
from core.families.unet import UNET

NAMING: Naming = (UNET, clip_part("text_encoder", "lora_te", "clip_h"))


def recognize(shapes: Shapes) -> Found | None:
    return Found("sd2", "sd2") if unet.is_plain(shapes, 1024) else None


def is_its_unet(config: Mapping[str, Any]) -> bool:
    return unet.is_plain_config(config) and bool(config.get("use_linear_projection"))


SPEC = FamilySpec(
    id="sd2", title="Stable Diffusion 2.x", native_size=768, bucket_step=64,
    lora_presets=UNET_PRESETS, lora_aliases=ALIASES, base_version="sd_v2",
    architecture="stable-diffusion-v2-768-v", implementation="diffusers", text_targets=TEXT_TARGETS,
    chunked=True, model="StableDiffusion2", short_title="SD 2.x", file="whole",
    naming=NAMING, recognize=recognize, unet=is_its_unet, unet_what="sd2",
    lora_signs=(
        (r"attn2[._]to_[kv]\b.*(down|lora_A|weight$)", 1024),
        (r"lora_te_|text_encoder\..*[qkv]_proj.*(down|lora_A)", 1024)),
    metadata_names=("sd_v2", "stable-diffusion-v2"),
    trainer_names=("sd2", "sd2lora", *(f"stablediffusion{version}" for version in (
        "20", "20base", "21", "21base"))))
