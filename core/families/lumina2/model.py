"""Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758): a flow in one stream of text and picture
tokens; Gemma 2 reads the text behind a fixed instruction, which an empty text goes without.

As its reference code (github.com/Alpha-VLLM/Lumina-Image-2.0, transport.py) learns: noise levels
drawn logit-normally and shifted with the picture's size (mu from 0.5 at 256 tokens to 1.15 at
4096); pictures are drawn with a shift of 6. Time runs from noise (0) to the picture (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor
from transformers import Gemma2Model

from core.families import checkpoint_keys, text
from core.families.base import Cond, Parts
from core.families.common import FlowFamily, TokenizerSpec, denoiser_spec, vae_spec
from core.families.loading import CheckpointLayout, ComponentSpec, layer_count
from core.families.lumina2.spec import SPEC
from core.families.timestep_sampling import FLUX_LINE, STEPS, TimestepSampling

GEMMA = "text_encoders.gemma2_2b.transformer."
TEXT_ENCODER = ComponentSpec("text_encoder", Gemma2Model, "text", (GEMMA,), checkpoint_keys.gemma,
                             file_kind="gemma_2", outgrows_fp16=True)
LENGTH = 256                                # tokens, the instruction's among them
# The model's own words, part of every prompt that it has seen.
INSTRUCTION = ("You are an assistant designed to generate superior images with the superior degree "
               "of image-text alignment based on textual prompts or user prompts."
               " <Prompt Start> ")


def gemma_states(parts: Parts, tokens: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """Returns the output of one of Gemma's layers (B, L, C) and the mask of the tokens (B, L)."""
    encoder = parts.text["text_encoder"]
    mask = tokens["text_encoder.mask"].to(encoder.device)
    # Its activations outgrow fp16: no autocast.
    exact = nullcontext() if mask.is_meta else torch.autocast(mask.device.type, enabled=False)
    with exact:
        out = encoder(input_ids=tokens["text_encoder"].to(encoder.device),
                      attention_mask=None if mask.is_meta else mask, output_hidden_states=True)
    return out.hidden_states[layer], mask


class Lumina2(FlowFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(Lumina2Transformer2DModel, SPEC), vae_spec("vae_16", "vae."), TEXT_ENCODER)
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec("gemma2", LENGTH)}
    pipe = Lumina2Pipeline
    sampling = TimestepSampling(line=FLUX_LINE)

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"] |= {
            "num_layers": layer_count(shapes, "layers."),
            "num_refiner_layers": layer_count(shapes, "noise_refiner."),
            "cap_feat_dim": shapes["time_caption_embed.caption_embedder.0.weight"][0]}

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = parts.text["tokenizer"]
        # Gemma's own is left, but this model has learned so.
        tokenizer.padding_side = "right"
        return text.masked_tokens(tokenizer, [p and INSTRUCTION + p for p in prompts], LENGTH)

    def token_limit(self, parts: Parts) -> int:
        return LENGTH - 1 - text.count(parts.text["tokenizer"], [INSTRUCTION])[0]

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        states, mask = gemma_states(parts, tokens, -2)
        return {"text": states, "mask": mask}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mask = cond["mask"]
        predicted: Tensor = denoiser(
            hidden_states=noisy, timestep=1 - t / STEPS, encoder_hidden_states=cond["text"],
            encoder_attention_mask=MetaMask(mask) if mask.is_meta else mask.int(),
            return_dict=False)[0]
        return -predicted

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return text.masked_arguments(cond | {"mask": cond["mask"].int()},
                                     negative | {"mask": negative["mask"].int()})


class MetaMask:
    """Stands for a mask in a plan. The transformer asks for the lengths of the texts, which a mask
    on the meta device cannot tell: all are as long as can be."""

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.shape = mask, mask.shape

    def bool(self) -> Tensor:
        return self.mask.bool()

    def sum(self, dim: int) -> MetaMask:
        return self

    def tolist(self) -> list[int]:
        return [self.shape[1]] * self.shape[0]
