"""Stable Diffusion 1.x (Rombach et al. 2022, arXiv 2112.10752): UNet, CLIP ViT-L/14, VAE f8.

The demo base is of this family as well: the same classes, only smaller.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from core import paths
from core.families import names
from core.families.base import Cond, FamilySpec, Parts
from core.families.common import (
    ALIASES,
    TEXT_TARGETS,
    UNET_PRESETS,
    UNetFamily,
    Vocabulary,
)
from core.families.loading import TOKENIZER, Piece
from core.naming import SD1

__all__ = ["CONFIGS", "TOKENIZER", "StableDiffusion1"]
CONFIGS = paths.FAMILY_CONFIGS / "sd15"
CLIP = "cond_stage_model.transformer."


class StableDiffusion1(UNetFamily):
    kind = "sd15"
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="sd15", title="Stable Diffusion 1.x",
        native_size=512, bucket_step=64, lora_presets=UNET_PRESETS, lora_aliases=ALIASES,
        kohya_prefix="lora_unet", base_version="sd_v1", architecture="stable-diffusion-v1",
        implementation="diffusers",
        text_targets=TEXT_TARGETS)
    pieces = (
        Piece("unet", UNet2DConditionModel, "denoiser", convert=names.by_table(SD1[0])),
        Piece("vae", AutoencoderKL, "vae", ("first_stage_model.",), names.vae, alone="vae"),
        Piece("text_encoder", CLIPTextModel, "text", (CLIP,), alone="clip_l"))
    vocabularies: ClassVar = {"text_encoder": Vocabulary()}
    pipe = StableDiffusionPipeline

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        encoder = parts.text["text_encoder"]
        return {"text": encoder(tokens["text_encoder"].to(encoder.device)).last_hidden_state}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        predicted: Tensor = denoiser(noisy, t, cond["text"], return_dict=False)[0]
        return predicted

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None,
                "requires_safety_checker": False}

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return {"prompt_embeds": cond["text"], "negative_prompt_embeds": negative["text"]}
