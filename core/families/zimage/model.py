"""Z-Image (Tongyi-MAI 2025): a flow in one stream of text and picture tokens; Qwen3 reads the text.

As its pipeline has it: time runs from noise (0) to the picture (1), the output is the way to the
picture, captions go through the tokenizer's chat template, the last but one layer is read.

Noise levels are learned shifted by 2: the middle of what trainers take (1 to 3) and that of
Qwen-Image at 1024 px. Its makers say what pictures are drawn with (6, Turbo 3), not what is learned
with; 6 would leave 4 % of the draws below 1/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Model

from core.families import checkpoint_keys, text
from core.families.base import Cond, Parts
from core.families.common import FlowFamily, TokenizerSpec, denoiser_spec, vae_spec
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.timestep_sampling import STEPS, TimestepSampling
from core.families.zimage.spec import SHIFT, SPEC, TURBO_SHIFT

LENGTH = 512                                # tokens
QWEN3 = ("text_encoders.qwen3_4b.transformer.",)        # in files with everything, by ComfyUI


class ZImage(FlowFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(ZImageTransformer2DModel, SPEC), vae_spec("vae_16", "vae."),
        ComponentSpec("text_encoder", Qwen3Model, "text", QWEN3, checkpoint_keys.decoder,
                      file_kind="qwen3", outgrows_fp16=True))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec("qwen3", LENGTH, chat=text.QWEN3_CHAT)}
    pipe = ZImagePipeline
    sampling = TimestepSampling(shift=2.0)
    no_guidance_value = 0.0

    def empty(self, layout: CheckpointLayout) -> Parts:
        parts = super().empty(layout)
        # Turbo draws with another shift, and one scheduler config is shipped for both.
        if not layout.source.is_dir():
            parts.shifts = (SHIFT, TURBO_SHIFT)
        return parts

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = parts.text["tokenizer"]
        return text.masked_tokens(tokenizer, text.chat(tokenizer, prompts, thinking=True), LENGTH)

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        out, mask = text.read(parts.text["text_encoder"], tokens, output_hidden_states=True)
        return {"text": out.hidden_states[-2], "mask": mask}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        predicted = denoiser(list(noisy.unsqueeze(2).unbind(0)), 1 - t / STEPS, _texts(cond),
                             return_dict=False)[0]
        return -torch.stack(list(predicted)).squeeze(2)

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Any]:
        return {"prompt_embeds": _texts(cond), "negative_prompt_embeds": _texts(negative)}


def _texts(cond: Cond) -> list[Tensor]:
    """The embeddings (L, C) of each sample without padding; in plans with it, as a mask on the meta
    device has no values."""
    if cond["mask"].is_meta:
        return list(cond["text"].unbind(0))
    return [text[mask.bool()] for text, mask in zip(cond["text"], cond["mask"], strict=True)]
