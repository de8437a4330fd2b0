"""Stable Diffusion 1.x (Rombach et al. 2022, arXiv 2112.10752): UNet, CLIP ViT-L/14, VAE f8.

The demo base is of this family as well: the same classes, only smaller.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from core.errors import UserError
from core.families import clip
from core.families.base import Cond, Parts
from core.families.common import TokenizerSpec, UNetFamily, denoiser_spec, vae_spec
from core.families.loading import ComponentSpec
from core.families.sd15.spec import SPEC

CLIP = "cond_stage_model.transformer."


class StableDiffusion1(UNetFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(UNet2DConditionModel, SPEC), vae_spec("vae", "first_stage_model."),
        ComponentSpec("text_encoder", CLIPTextModel, "text", (CLIP,), file_kind="clip_l"))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec()}
    pipe = StableDiffusionPipeline

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        encoder, skip = parts.text["text_encoder"], parts.reading.clip_skip
        if not self.spec.skips or skip == 1:
            return {"text": clip.read(encoder, tokens["text_encoder"])[0]}
        if skip > (layers := encoder.config.num_hidden_layers):
            raise UserError("families.clip_skip", given=skip, layers=layers)
        # The earlier layer goes through the norm of the last one, as in A1111.
        states = clip.read(encoder, tokens["text_encoder"], skip)[0]
        return {"text": encoder.final_layer_norm(states)}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        predicted: Tensor = denoiser(
            noisy, t, cond["text"], encoder_attention_mask=cond.get("mask"), return_dict=False)[0]
        return predicted

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None,
                "requires_safety_checker": False}

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        text, other = cond["text"], negative["text"]
        return {"prompt_embeds": clip.like(text, other),
                "negative_prompt_embeds": clip.like(other, text)}
