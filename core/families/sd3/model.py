"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): MMDiT, a flow, two CLIPs and
T5, without which it works too (section 5.3.3: its embeddings are zeros then).

Noise levels are learned logit-normally, shifted by 3 (section 5.3.2, at 1024 px).
"""

from __future__ import annotations

from math import isqrt
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from core.families import checkpoint_keys
from core.families.base import Cond, Parts
from core.families.checkpoint_keys import Tensors
from core.families.common import FlowFamily, TokenizerSpec, denoiser_spec, t5_spec, vae_spec
from core.families.loading import CheckpointLayout, ComponentSpec, layer_count
from core.families.sd3.spec import SPEC
from core.families.timestep_sampling import TimestepSampling

T5_LENGTH = 256                             # tokens
CLIP_L, CLIP_G = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g"))


def _finish_names(tensors: Tensors) -> Tensors:
    # Only the original spelling has this name, the file is diffusers' own otherwise.
    if "pos_embed" not in tensors:
        return tensors
    tensors["pos_embed.pos_embed"] = tensors.pop("pos_embed")
    # The text's stream ends at the last block, whose norm has shift and scale the other way round.
    last = max(layer_count(tensors, "transformer_blocks.") - 1, 0)
    for leaf in ("weight", "bias"):
        name = f"transformer_blocks.{last}.norm1_context.linear.{leaf}"
        if name in tensors:
            tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)
    return tensors


class StableDiffusion3(FlowFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(SD3Transformer2DModel, SPEC, _finish_names),
        vae_spec("vae_16", "first_stage_model."),
        ComponentSpec("text_encoder", CLIPTextModelWithProjection, "text", (CLIP_L,),
                      checkpoint_keys.projected_clip, file_kind="clip_l"),
        ComponentSpec("text_encoder_2", CLIPTextModelWithProjection, "text", (CLIP_G,),
                      checkpoint_keys.projected_clip, file_kind="clip_g"),
        t5_spec("text_encoder_3", optional=True))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec(),
                            "text_encoder_2": TokenizerSpec(pad="!"),
                            "text_encoder_3": TokenizerSpec("t5", T5_LENGTH)}
    pipe = StableDiffusion3Pipeline
    sampling = TimestepSampling(shift=3.0)

    def adapt(self, layout: CheckpointLayout) -> None:
        # Medium, 3.5 medium and 3.5 large differ in sizes that the shapes tell.
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

    def sizes(self, layout: CheckpointLayout) -> tuple[int, int]:
        native, step = super().sizes(layout)
        # The usual step is that of tokens of two latent pixels.
        return native, step // 2 * layout.configs["transformer"]["patch_size"]

    def empty(self, layout: CheckpointLayout) -> Parts:
        parts = super().empty(layout)
        parts.text_width = (layout.configs["transformer"]["joint_attention_dim"]
                            - layout.configs["text_encoder"]["hidden_size"])
        return parts

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        cond: Cond = {}
        for name, ids in tokens.items():
            encoder, number = parts.text[name], name.removeprefix("text_encoder")
            out = encoder(ids.to(encoder.device), output_hidden_states=number != "_3")
            if number == "_3":
                cond["text_3"] = out.last_hidden_state
            else:
                cond |= {f"text{number}": out.hidden_states[-2],
                         f"pooled{number}": out.text_embeds}
        # The two CLIPs side by side must be as wide as T5.
        if "text_2" in cond:
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
    t5 = cond["text_3"] if "text_3" in cond else clip.new_zeros(len(clip), T5_LENGTH, clip.shape[2])
    return torch.cat([clip, t5.to(clip.dtype)], 1)


def _pooled(cond: Cond) -> Tensor:
    return torch.cat([cond["pooled"], cond["pooled_2"]], -1)
