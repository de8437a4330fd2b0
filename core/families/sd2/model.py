"""Stable Diffusion 2.x: the UNet of 1.x with linear projections, OpenCLIP ViT-H/14's text encoder
(its last but one layer). The 768 px models predict v (Salimans & Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

from typing import ClassVar

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from core.families import checkpoint_keys
from core.families.base import FamilySpec
from core.families.common import ALIASES, TEXT_TARGETS, UNET_PRESETS, Vocabulary
from core.families.layer_names import SD2
from core.families.loading import Layout, Piece
from core.families.sd15.model import StableDiffusion1
from core.safetensors_header import read_header

OPEN_CLIP = "cond_stage_model.model."


class StableDiffusion2(StableDiffusion1):
    kind = "sd2"
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="sd2", title="Stable Diffusion 2.x", native_size=768, bucket_step=64,
        lora_presets=UNET_PRESETS, lora_aliases=ALIASES, kohya_prefix="lora_unet",
        base_version="sd_v2", architecture="stable-diffusion-v2-768-v",
        implementation="diffusers",
        text_targets=TEXT_TARGETS, chunked=True)
    pieces = (
        Piece("unet", UNet2DConditionModel, "denoiser", convert=checkpoint_keys.by_table(SD2[0])),
        Piece("vae", AutoencoderKL, "vae", ("first_stage_model.",), checkpoint_keys.vae,
              alone="vae"),
        Piece("text_encoder", CLIPTextModel, "text", (OPEN_CLIP,), checkpoint_keys.open_clip,
              alone="clip_h"))
    vocabularies: ClassVar = {"text_encoder": Vocabulary(pad="!")}

    def adapt(self, layout: Layout) -> None:
        """Nothing in a file's shapes tells 512-base, which predicts noise, from 768-v, which most
        bases are made of; its metadata may, and the key `prediction_type` always can."""
        said = read_header(layout.source).metadata
        if (said.get("modelspec.prediction_type") == "epsilon"
                or said.get("modelspec.architecture") == "stable-diffusion-v2-512"):
            layout.scheduler["prediction_type"] = "epsilon"
            layout.configs["unet"]["sample_size"] = 64
