"""Stable Diffusion 2.x: the UNet of 1.x with linear projections, OpenCLIP ViT-H/14's text encoder
(its last but one layer). The 768 px models predict v (Salimans & Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

from typing import ClassVar

from transformers import CLIPTextModel

from core.families import checkpoint_keys
from core.families.common import TokenizerSpec
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.sd2.spec import SPEC
from core.families.sd15.model import StableDiffusion1
from core.safetensors_header import read_header

OPEN_CLIP = "cond_stage_model.model."


class StableDiffusion2(StableDiffusion1):
    kind = SPEC.id
    spec = SPEC
    components = (
        *StableDiffusion1.components[:2],   # UNet and VAE
        ComponentSpec("text_encoder", CLIPTextModel, "text", (OPEN_CLIP,),
                      checkpoint_keys.open_clip, file_kind="clip_h"))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec(pad="!")}

    def adapt(self, layout: CheckpointLayout) -> None:
        # 512-base, which predicts noise, has the shapes of 768-v, which most bases are made of. The
        # file's metadata may tell them apart, and the config key `prediction_type` always can.
        metadata = read_header(layout.source).metadata
        if (metadata.get("modelspec.prediction_type") == "epsilon"
                or metadata.get("modelspec.architecture") == "stable-diffusion-v2-512"):
            layout.scheduler["prediction_type"] = "epsilon"
            layout.configs["unet"]["sample_size"] = 64
