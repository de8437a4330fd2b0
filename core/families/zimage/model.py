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
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Model

from core.families import checkpoint_keys, distilled, text
from core.families.base import Cond, FamilySpec, Parts
from core.families.common import (
    ATTENTION,
    ATTENTION_ALIASES,
    Loaded,
    Vocabulary,
    dit_sizes,
)
from core.families.layer_names import ZIMAGE
from core.families.loading import Layout, Piece
from core.objectives.flow import STEPS, Sampling

FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
LENGTH = 512                                # tokens
LEARNS = Sampling(shift=2.0)
QWEN3 = ("text_encoders.qwen3_4b.transformer.",)        # in files with everything, by ComfyUI


class ZImage(Loaded):
    kind = "zimage"
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="zimage", title="Z-Image", native_size=1024, bucket_step=64,
        lora_presets={"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                      "all-linear": (*ATTENTION, *FEED_FORWARD, "adaLN_modulation.0")},
        lora_aliases=ATTENTION_ALIASES,
        kohya_prefix="lora_unet", base_version="zimage", architecture="z-image",
        implementation="https://github.com/Tongyi-MAI/Z-Image", cfg=5.0, lora_format="diffusers")
    pieces = (
        Piece("transformer", ZImageTransformer2DModel, "denoiser",
              convert=checkpoint_keys.by_table(ZIMAGE[0])),
        Piece("vae", AutoencoderKL, "vae", ("vae.",), checkpoint_keys.vae, alone="vae_16"),
        Piece("text_encoder", Qwen3Model, "text", QWEN3, checkpoint_keys.decoder, alone="qwen3",
              wide=True))
    vocabularies: ClassVar = {
        "text_encoder": Vocabulary("qwen3", LENGTH, chat=text.QWEN3_CHAT)}
    pipe = ZImagePipeline

    def empty(self, layout: Layout) -> Parts:
        """Turbo draws with another shift; the scheduler's config is shipped for both."""
        native, step = dit_sizes(layout)
        shipped = not layout.source.is_dir()
        return Parts(layout.source, layout.scheduler, "flow", native, step, unguided=0.0,
                     flow=LEARNS, shifts=(distilled.ZIMAGE, distilled.ZIMAGE_TURBO)
                     if shipped else None)

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = parts.text["tokenizer"]
        found = text.padded(tokenizer, text.chat(tokenizer, prompts, thinking=True), LENGTH)
        return {"text_encoder": found.input_ids, "text_encoder.mask": found.attention_mask}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        out, mask = text.read(parts.text["text_encoder"], tokens, output_hidden_states=True)
        return {"text": out.hidden_states[-2], "mask": mask}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        found = denoiser(list(noisy.unsqueeze(2).unbind(0)), 1 - t / STEPS, _texts(cond),
                         return_dict=False)[0]
        return -torch.stack(list(found)).squeeze(2)

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Any]:
        return {"prompt_embeds": _texts(cond), "negative_prompt_embeds": _texts(negative)}


def _texts(cond: Cond) -> list[Tensor]:
    """Each sample's (L, C) without padding; in plans nothing is known of that."""
    if cond["mask"].is_meta:
        return list(cond["text"].unbind(0))
    return [one[kept.bool()] for one, kept in zip(cond["text"], cond["mask"], strict=True)]
