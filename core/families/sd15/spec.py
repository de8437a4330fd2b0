"""Stable Diffusion 1.x: what is known of it without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.families import unet
from core.families.layer_names import Naming, clip_part
from core.families.spec import FamilySpec, Found, Shapes
from core.families.targets import ALIASES, TEXT_TARGETS, UNET_PRESETS
from core.families.unet import UNET

NAMING: Naming = (UNET, clip_part("text_encoder", "lora_te", "clip_l"))


def recognize(shapes: Shapes) -> Found | None:
    return Found("sd1", "sd15") if unet.is_plain(shapes, 768) else None


def is_its_unet(config: Mapping[str, Any]) -> bool:
    return unet.is_plain_config(config) and not config.get("use_linear_projection")


SPEC = FamilySpec(
    id="sd15", title="Stable Diffusion 1.x", native_size=512, bucket_step=64,
    lora_presets=UNET_PRESETS, lora_aliases=ALIASES, base_version="sd_v1",
    architecture="stable-diffusion-v1", implementation="diffusers", text_targets=TEXT_TARGETS,
    chunked=True, skips=True, model="StableDiffusion1", short_title="SD 1.x", file="whole",
    naming=NAMING, recognize=recognize, relatives={"StableDiffusionInpaintPipeline": "inpainting"},
    unet=is_its_unet, unet_what="sd1",
    lora_signs=(
        (r"attn2[._]to_[kv]\b.*(down|lora_A|weight$)", 768),
        (r"lora_te_.*[qkv]_proj.*down", 768)),
    metadata_names=("sd_v1", "stable-diffusion-v1"),
    trainer_names=("sdlora", "sd1", "sd15", "stablediffusion15"))
