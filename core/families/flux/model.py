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
    ComponentFamily,
    TokenizerSpec,
    dit_sizes,
    layer_count,
    pack,
    unpack,
)
from core.families.flux.spec import SPEC
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.sd3.model import CLIP_L, T5XXL
from core.families.timestep_sampling import FLUX_LINE, STEPS, TimestepSampling, by_share_and_step

GUIDANCE = 1.0                              # told to dev while it learns
DEV = TimestepSampling(line=FLUX_LINE, told=by_share_and_step)
SCHNELL = TimestepSampling(told=by_share_and_step)


class Kept:
    """For pipelines of diffusers 0.42 that look for a layer's weight before they load a LoRA file:
    a base in int8 or nf4 has none. No file of ours needs the wider layers that it looks for."""

    @classmethod
    def _maybe_expand_lora_state_dict(cls, transformer: Any, lora_state_dict: Any) -> Any:
        return lora_state_dict


class Drawing(Kept, FluxPipeline):  # type: ignore[misc]
    pass


class Flux1(ComponentFamily):
    kind = SPEC.id
    spec = SPEC
    pieces = (
        ComponentSpec("transformer", FluxTransformer2DModel, "denoiser",
                      convert=checkpoint_keys.by_table(SPEC.naming[0])),
        ComponentSpec("vae", AutoencoderKL, "vae", ("vae.", "first_stage_model."),
                      checkpoint_keys.vae,
                      alone="vae_16"),
        ComponentSpec("text_encoder", CLIPTextModel, "text", (CLIP_L,), alone="clip_l"),
        ComponentSpec("text_encoder_2", T5EncoderModel, "text", (T5XXL,), alone="t5"))
    vocabularies: ClassVar = {"text_encoder": TokenizerSpec(),
                              "text_encoder_2": TokenizerSpec("t5", 512)}
    pipe = Drawing

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
        native, step = dit_sizes(layout)
        dev = layout.found.what == "flux_dev"
        return Parts(layout.source, layout.scheduler, "flow", native, step,
                     flow=DEV if dev else SCHNELL, architecture="" if dev else "flux-1-schnell")

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
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        guidance = (torch.full_like(t, GUIDANCE) if denoiser.config.guidance_embeds else None)
        found = denoiser(
            hidden_states=pack(noisy), timestep=t / STEPS, guidance=guidance,
            encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"],
            txt_ids=noisy.new_zeros(cond["text"].shape[1], 3),
            img_ids=positions(height, width, noisy), return_dict=False)[0]
        return unpack(found, height, width)

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        """Without the negative: dev's guidance is an input, schnell has none."""
        return {"prompt_embeds": cond["text"], "pooled_prompt_embeds": cond["pooled"]}


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 3): 0, row and column of each token."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    grid = torch.stack([like.new_zeros(height, width), rows[:, None].expand(height, width),
                        columns[None].expand(height, width)], -1)
    return grid.flatten(0, 1)
