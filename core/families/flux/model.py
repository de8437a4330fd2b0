"""Flux.1 dev and schnell (Black Forest Labs 2024): a flow; T5 for the text, CLIP-L for its gist.

No paper; the reference code and diffusers' agree on what is here: latents in tokens of 2 x 2, a
shift towards noise that grows with the picture (mu from 0.5 at 256 tokens to 1.15 at 4096), none
for schnell. dev was distilled with guidance as an input: LoRAs learn at guidance 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from core.families import checkpoint_keys
from core.families.base import Cond, Parts
from core.families.common import (
    FlowFamily,
    TokenizerSpec,
    denoiser_spec,
    layer_count,
    positions,
    predict_packed,
)
from core.families.flux.spec import SPEC
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.sd3.model import CLIP_L, T5XXL
from core.families.timestep_sampling import FLUX_LINE, TimestepSampling, by_share_and_step

GUIDANCE = 1.0                              # dev's input while it learns
DEV = TimestepSampling(line=FLUX_LINE, told=by_share_and_step)
SCHNELL = TimestepSampling(told=by_share_and_step)


class LorasAsTheyAre:
    """Loads LoRA files into a quantised base.

    diffusers 0.42 looks at the weight of each layer, to see whether a LoRA is for a layer of
    another width, and a base in int8 or nf4 has none. No file of ours needs that.
    """

    @classmethod
    def _maybe_expand_lora_state_dict(cls, transformer: Any, lora_state_dict: Any) -> Any:
        return lora_state_dict


class Flux1Pipeline(LorasAsTheyAre, FluxPipeline):  # type: ignore[misc]
    pass


class Flux1(FlowFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(FluxTransformer2DModel, SPEC),
        ComponentSpec("vae", AutoencoderKL, "vae", ("vae.", "first_stage_model."),
                      checkpoint_keys.vae, file_kind="vae_16"),
        ComponentSpec("text_encoder", CLIPTextModel, "text", (CLIP_L,), file_kind="clip_l"),
        ComponentSpec("text_encoder_2", T5EncoderModel, "text", (T5XXL,), file_kind="t5"))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec(),
                            "text_encoder_2": TokenizerSpec("t5", 512)}
    pipe = Flux1Pipeline
    sampling = DEV

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        guided = layout.found.what == "flux_dev"
        layout.configs["transformer"] |= {
            "num_layers": layer_count(shapes, "transformer_blocks."),
            "num_single_layers": layer_count(shapes, "single_transformer_blocks."),
            "guidance_embeds": guided}
        if not guided:
            layout.scheduler.update(use_dynamic_shifting=False, shift=1.0)

    def empty(self, layout: CheckpointLayout) -> Parts:
        parts = super().empty(layout)
        if layout.found.what != "flux_dev":
            parts.flow, parts.architecture = SCHNELL, "flux-1-schnell"
        return parts

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        cond: Cond = {}
        for name, ids in tokens.items():
            encoder = parts.text[name]
            out = encoder(ids.to(encoder.device))
            if name == "text_encoder":
                cond["pooled"] = out.pooler_output
            else:
                cond["text"] = out.last_hidden_state
        return cond

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        guidance = torch.full_like(t, GUIDANCE) if denoiser.config.guidance_embeds else None
        return predict_packed(
            denoiser, noisy, t, cond["text"], guidance=guidance,
            pooled_projections=cond["pooled"], img_ids=positions(noisy),
            txt_ids=noisy.new_zeros(cond["text"].shape[1], 3))

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        """The negative prompt is left out: dev's guidance is an input, schnell has none."""
        return {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"]}
