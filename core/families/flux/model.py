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
from core.families.base import Cond, FamilySpec, Parts
from core.families.common import (
    ALIASES,
    Loaded,
    Vocabulary,
    dit_sizes,
    layer_count,
    pack,
    unpack,
)
from core.families.layer_names import FLUX
from core.families.loading import Layout, Piece
from core.families.sd3.model import CLIP_L, JOINT, JOINT_FF, T5XXL
from core.objectives.flow import FLUX_LINE, STEPS, Sampling, by_share_and_step

GUIDANCE = 1.0                              # told to dev while it learns
DEV = Sampling(line=FLUX_LINE, told=by_share_and_step)
SCHNELL = Sampling(told=by_share_and_step)


class Kept:
    """For pipelines of diffusers 0.42 that look for a layer's weight before they load a LoRA file:
    a base in int8 or nf4 has none. No file of ours needs the wider layers that it looks for."""

    @classmethod
    def _maybe_expand_lora_state_dict(cls, transformer: Any, lora_state_dict: Any) -> Any:
        return lora_state_dict


class Drawing(Kept, FluxPipeline):  # type: ignore[misc]
    pass


class Flux1(Loaded):
    kind = "flux"
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="flux", title="Flux.1", native_size=1024, bucket_step=64,
        lora_presets={"attention": JOINT, "attention+ff": (*JOINT, *JOINT_FF, "proj_mlp"),
                      "all-linear": (*JOINT, *JOINT_FF, "proj_mlp", "proj_out")},
        lora_aliases=ALIASES, kohya_prefix="lora_unet", base_version="flux1",
        architecture="flux-1-dev", implementation="https://github.com/black-forest-labs/flux",
        encoders=("text_encoder", "text_encoder_2"), cfg=3.5)
    pieces = (
        Piece("transformer", FluxTransformer2DModel, "denoiser",
              convert=checkpoint_keys.by_table(FLUX[0])),
        Piece("vae", AutoencoderKL, "vae", ("vae.", "first_stage_model."), checkpoint_keys.vae,
              alone="vae_16"),
        Piece("text_encoder", CLIPTextModel, "text", (CLIP_L,), alone="clip_l"),
        Piece("text_encoder_2", T5EncoderModel, "text", (T5XXL,), alone="t5"))
    vocabularies: ClassVar = {"text_encoder": Vocabulary(),
                              "text_encoder_2": Vocabulary("t5", 512)}
    pipe = Drawing

    def adapt(self, layout: Layout) -> None:
        shapes = self.shapes(layout)
        guided = layout.found.what == "flux_dev"
        layout.configs["transformer"] |= {
            "num_layers": layer_count(shapes, "transformer_blocks."),
            "num_single_layers": layer_count(shapes, "single_transformer_blocks."),
            "guidance_embeds": guided}
        if not guided:
            layout.scheduler.update(use_dynamic_shifting=False, shift=1.0)

    def empty(self, layout: Layout) -> Parts:
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
