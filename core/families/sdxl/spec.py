"""Stable Diffusion XL: what is known of it without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.families import unet
from core.families.layer_names import Naming, Part, clip_part
from core.families.spec import FamilySpec, Found, Shapes, starts
from core.families.targets import ALIASES, TEXT_TARGETS, UNET_PRESETS
from core.families.unet import unet_renames

NAMING: Naming = (
    Part("unet", "lora_unet", native="diffusion_model", renames=unet_renames(3, 2, (1, 2)),
         kohya_native=True),
    clip_part("text_encoder", "lora_te1", "clip_l"),
    clip_part("text_encoder_2", "lora_te2", "clip_g"))


def recognize(shapes: Shapes) -> Found | None:
    added = unet.added_width(shapes)
    if unet.channels(shapes) != 4 or not added:
        return None
    if added == 5632 or starts("encoder_hid_proj.")(shapes):
        return Found("kolors")
    return Found("sdxl_refiner") if unet.text_width(shapes) == 1280 else Found("sdxl", "sdxl")


def is_its_unet(config: Mapping[str, Any]) -> bool:
    return (config.get("addition_embed_type") == "text_time"
            and config.get("projection_class_embeddings_input_dim") != 2560)    # the refiner's


SPEC = FamilySpec(
    id="sdxl", title="Stable Diffusion XL", native_size=1024, bucket_step=64,
    lora_presets=UNET_PRESETS, lora_aliases=ALIASES, base_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    implementation="https://github.com/Stability-AI/generative-models",
    encoders=("text_encoder", "text_encoder_2"), text_targets=TEXT_TARGETS, chunked=True,
    model="StableDiffusionXL", short_title="SDXL", file="whole", naming=NAMING, recognize=recognize,
    pipelines={"StableDiffusionXLPipeline": "sdxl"},
    relatives={"StableDiffusionXLInpaintPipeline": "inpainting",
               "StableDiffusionXLImg2ImgPipeline": "sdxl_refiner"},
    unet=is_its_unet, unet_what="sdxl",
    lora_signs=(
        (r"lora_te2_|text_encoder_2\.|conditioner\.embedders", None),
        (r"attn2[._]to_[kv]\b.*(down|lora_A|weight$)", 2048),
        (r"_blocks?[._].*[._]transformer_blocks[._][2-9][._]", None)),
    metadata_names=("sdxl", "stable-diffusion-xl"),
    trainer_names=("sdxl", "sdxllora", "stablediffusionxl10base"))
