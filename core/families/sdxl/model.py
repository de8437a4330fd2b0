"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952) and what is made of it: Illustrious,
Pony, NoobAI. Two CLIP encoders; the UNet is told the picture's size and cut (section 2.2).

Bases that predict v with zero terminal SNR (arXiv 2305.08891) are known by the marks `v_pred` and
`ztsnr` in their files, or by their scheduler's config. The VAE that Stability published overflows
in fp16: it runs in fp32 wherever the run's numbers are fp16 (core/memory/plan.py, numbers_for).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from core.families import checkpoint_keys, clip
from core.families.base import Cond, CropInfo, Parts
from core.families.common import TokenizerSpec, UNetFamily, denoiser_spec, vae_spec
from core.families.loading import ComponentSpec
from core.families.sdxl.spec import SPEC

CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


class StableDiffusionXL(UNetFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(UNet2DConditionModel, SPEC), vae_spec("vae", "first_stage_model."),
        ComponentSpec("text_encoder", CLIPTextModel, "text", (CLIP_L,), file_kind="clip_l"),
        ComponentSpec("text_encoder_2", CLIPTextModelWithProjection, "text", (CLIP_G,),
                      checkpoint_keys.open_clip, file_kind="clip_g"))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec(),
                            "text_encoder_2": TokenizerSpec(pad="!")}
    pipe = StableDiffusionXLPipeline
    step_multiple = 2                       # 64 px, as its makers' buckets (appendix I)

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        cond: Cond = {}
        for name, ids in tokens.items():
            states, out = clip.read(parts.text[name], ids, 2)
            cond[name.replace("text_encoder", "text")] = states
            # The first chunk's, as kohya and A1111 take it.
            if name == "text_encoder_2":
                cond["pooled"] = out.text_embeds[::states.shape[1] // clip.WHOLE]
        return cond

    def size_conditioning(self, frame: CropInfo) -> Cond:
        (width, height), (left, top), (wide, high) = frame.original, frame.left_top, frame.target
        return {"time_ids": torch.tensor([[height, width, top, left, high, wide]]).float()}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        more = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        predicted: Tensor = denoiser(
            noisy, t, _text(cond), encoder_attention_mask=cond.get("mask"), added_cond_kwargs=more,
            return_dict=False)[0]
        return predicted

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        return {"add_watermarker": False}

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        text, other = _text(cond), _text(negative)
        return {"prompt_embeds": clip.like(text, other),
                "negative_prompt_embeds": clip.like(other, text),
                "pooled_prompt_embeds": cond["pooled"],
                "negative_pooled_prompt_embeds": negative["pooled"]}


def _text(cond: Cond) -> Tensor:
    return torch.cat([cond["text"], cond["text_2"]], -1)
