"""Flux.1 dev and schnell (Black Forest Labs 2024): a flow; T5 for the text, CLIP-L for its gist.

No paper; the reference code and diffusers' agree on what is here: latents in tokens of 2 x 2, a
shift towards noise that grows with the picture (mu from 0.5 at 256 tokens to 1.15 at 4096), none
for schnell. dev was distilled with guidance as an input: LoRAs learn at guidance 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel

from core.families.base import Cond, Parts
from core.families.common import FlowFamily, TokenizerSpec, denoiser_spec, t5_spec, vae_spec
from core.families.flux import packed
from core.families.flux.spec import SPEC
from core.families.loading import CheckpointLayout, ComponentSpec, block_counts
from core.families.sd3.model import CLIP_L
from core.families.timestep_sampling import FLUX_LINE, TimestepSampling, by_share_and_step

GUIDANCE = 1.0                              # dev's input while it learns
DEV = TimestepSampling(line=FLUX_LINE, model_times=by_share_and_step)
SCHNELL = TimestepSampling(model_times=by_share_and_step)


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
        vae_spec("vae_16", "vae.", "first_stage_model."),
        ComponentSpec("text_encoder", CLIPTextModel, "text", (CLIP_L,), file_kind="clip_l"),
        t5_spec("text_encoder_2"))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec(),
                            "text_encoder_2": TokenizerSpec("t5", 512)}
    pipe = Flux1Pipeline
    sampling = DEV

    def adapt(self, layout: CheckpointLayout) -> None:
        guided = layout.found.what == "flux_dev"
        layout.configs["transformer"] |= {
            **block_counts(self.shapes(layout)), "guidance_embeds": guided}
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
            out = parts.text[name](ids.to(parts.text[name].device))
            cond |= ({"pooled": out.pooler_output} if name == "text_encoder"
                     else {"text": out.last_hidden_state})
        return cond

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        guidance = torch.full_like(t, GUIDANCE) if denoiser.config.guidance_embeds else None
        return packed.predict(
            denoiser, noisy, t, cond["text"], guidance=guidance,
            pooled_projections=cond["pooled"], img_ids=packed.positions(noisy),
            txt_ids=noisy.new_zeros(cond["text"].shape[1], 3))

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        """The negative prompt is left out: dev's guidance is an input, schnell has none."""
        return {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"]}
