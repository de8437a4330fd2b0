"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): MMDiT, a flow, two CLIPs and
T5, without which it works too (section 5.3.3: its embeddings are zeros then).

Noise levels are learned logit-normally, shifted by 3 (section 5.3.2, at 1024 px).
"""

from __future__ import annotations

from math import isqrt
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from core.families import checkpoint_keys
from core.families.base import Cond, FamilySpec, Parts
from core.families.common import (
    ALIASES,
    ATTENTION,
    FEED_FORWARD,
    Loaded,
    Vocabulary,
    dit_sizes,
    layer_count,
)
from core.families.loading import Layout, Piece
from core.objectives.flow import Sampling

T5_LENGTH = 256                             # tokens
LEARNS = Sampling(shift=3.0)
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
JOINT_FF = (*FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2")
CLIP_L, CLIP_G, T5XXL = (f"text_encoders.{name}.transformer."
                         for name in ("clip_l", "clip_g", "t5xxl"))


class StableDiffusion3(Loaded):
    kind = "sd3"
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="sd3", title="Stable Diffusion 3 / 3.5", native_size=1024, bucket_step=64,
        lora_presets={"attention": JOINT, "attention+ff": JOINT + JOINT_FF,
                      "all-linear": (*JOINT, *JOINT_FF, "context_embedder")},
        lora_aliases=ALIASES, kohya_prefix="lora_unet", base_version="sd3",
        architecture="stable-diffusion-3-medium",
        implementation="https://github.com/Stability-AI/sd3-ref",
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3"), cfg=4.5,
        lora_format="diffusers")            # which ComfyUI and diffusers both read
    pieces = (
        Piece("transformer", SD3Transformer2DModel, "denoiser", convert=checkpoint_keys.sd3),
        Piece("vae", AutoencoderKL, "vae", ("first_stage_model.",), checkpoint_keys.vae,
              alone="vae_16"),
        Piece("text_encoder", CLIPTextModelWithProjection, "text", (CLIP_L,),
              checkpoint_keys.projected_clip, alone="clip_l"),
        Piece("text_encoder_2", CLIPTextModelWithProjection, "text", (CLIP_G,),
              checkpoint_keys.projected_clip, alone="clip_g"),
        Piece("text_encoder_3", T5EncoderModel, "text", (T5XXL,), alone="t5", optional=True))
    vocabularies: ClassVar = {
        "text_encoder": Vocabulary(), "text_encoder_2": Vocabulary(pad="!"),
        "text_encoder_3": Vocabulary("t5", T5_LENGTH)}
    pipe = StableDiffusion3Pipeline

    def adapt(self, layout: Layout) -> None:
        """Medium, 3.5 medium and 3.5 large differ in sizes that the shapes tell."""
        shapes = self.shapes(layout)
        width, block = shapes["pos_embed.proj.weight"][0], "transformer_blocks.{}."
        count = layer_count(shapes, "transformer_blocks.")
        layout.configs["transformer"] |= {
            "num_layers": count,
            "num_attention_heads": width // layout.configs["transformer"]["attention_head_dim"],
            "caption_projection_dim": shapes["context_embedder.weight"][0],
            "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][1]),
            "dual_attention_layers": [
                i for i in range(count) if f"{block.format(i)}attn2.to_q.weight" in shapes],
            "qk_norm": "rms_norm" if f"{block.format(0)}attn.norm_q.weight" in shapes else None}

    def empty(self, layout: Layout) -> Parts:
        config = layout.configs["transformer"]
        native, step = dit_sizes(layout, config["patch_size"])
        return Parts(layout.source, layout.scheduler, "flow", native, step,
                     flow=LEARNS,
                     text_width=config["joint_attention_dim"]
                     - layout.configs["text_encoder"]["hidden_size"])

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        cond: Cond = {}
        for name, ids in tokens.items():
            encoder, number = parts.text[name], name.removeprefix("text_encoder")
            if number == "_3":
                cond["text_3"] = encoder(ids.to(encoder.device)).last_hidden_state
                continue
            out = encoder(ids.to(encoder.device), output_hidden_states=True)
            cond[f"text{number}"] = out.hidden_states[-2]
            cond[f"pooled{number}"] = out.text_embeds
        if "text_2" in cond:                # the two CLIPs side by side are as wide as T5
            rest = parts.text_width - cond["text_2"].shape[2]
            cond["text_2"] = torch.nn.functional.pad(cond["text_2"], (0, rest))
        return cond

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        predicted: Tensor = denoiser(
            hidden_states=noisy, timestep=t, encoder_hidden_states=_text(cond),
            pooled_projections=_pooled(cond), return_dict=False)[0]
        return predicted

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return {"prompt_embeds": _text(cond), "negative_prompt_embeds": _text(negative),
                "pooled_prompt_embeds": _pooled(cond),
                "negative_pooled_prompt_embeds": _pooled(negative)}


def _text(cond: Cond) -> Tensor:
    clip = torch.cat([cond["text"], cond["text_2"]], -1)
    t5 = cond.get("text_3")
    if t5 is None:
        t5 = clip.new_zeros(clip.shape[0], T5_LENGTH, clip.shape[2])
    return torch.cat([clip, t5.to(clip.dtype)], 1)


def _pooled(cond: Cond) -> Tensor:
    return torch.cat([cond["pooled"], cond["pooled_2"]], -1)
