"""Chroma (Lodestone Rock 2025): Flux schnell without guidance and CLIP, a flow; T5 reads the text.

No paper; as its reference code (github.com/lodestone-rock/flow) learns: noise levels s drawn with
density 2 - 7.7 (s - 1/2)^2, not shifted, and of the text's padding one token is seen, the rest is
hidden from T5 and from the transformer. Pictures are drawn shifted as Flux's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel

from core.families import checkpoint_keys, text
from core.families.base import Cond, Parts
from core.families.chroma.spec import SPEC
from core.families.common import (
    ComponentFamily,
    TokenizerSpec,
    dit_sizes,
    layer_count,
    pack,
    unpack,
)
from core.families.flux.model import Kept, positions
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.sd3.model import T5XXL
from core.families.timestep_sampling import STEPS, TimestepSampling, by_share_and_step

LENGTH = 512                                # tokens
LEARNS = TimestepSampling("parabola", bend=7.7, told=by_share_and_step)


class Masked(Kept, ChromaPipeline):  # type: ignore[misc]
    """diffusers 0.42 hands its mask on as numbers, which attention adds to its scores instead of
    hiding what they stand for (its issues 12116 and 13619)."""

    def _prepare_attention_mask(self, *args: Any, attention_mask: Tensor | None = None,
                                **rest: Any) -> Any:
        return super()._prepare_attention_mask(
            *args, **rest, attention_mask=None if attention_mask is None else attention_mask.bool())


class Chroma(ComponentFamily):
    kind = SPEC.id
    spec = SPEC
    pieces = (
        ComponentSpec("transformer", ChromaTransformer2DModel, "denoiser",
                      convert=checkpoint_keys.by_table(SPEC.naming[0])),
        ComponentSpec("vae", AutoencoderKL, "vae", ("vae.", "first_stage_model."),
                      checkpoint_keys.vae,
                      alone="vae_16"),
        ComponentSpec("text_encoder", T5EncoderModel, "text", (T5XXL,), alone="t5"))
    vocabularies: ClassVar = {"text_encoder": TokenizerSpec("t5", LENGTH)}
    pipe = Masked

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"] |= {
            "num_layers": layer_count(shapes, "transformer_blocks."),
            "num_single_layers": layer_count(shapes, "single_transformer_blocks.")}

    def empty(self, layout: CheckpointLayout) -> Parts:
        native, step = dit_sizes(layout)
        return Parts(layout.source, layout.scheduler, "flow", native, step,
                     flow=LEARNS)

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = text.padded(parts.text["tokenizer"], prompts, LENGTH)
        return {"text_encoder": found.input_ids, "text_encoder.mask": found.attention_mask}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        encoder = parts.text["text_encoder"]
        mask = tokens["text_encoder.mask"].to(encoder.device)
        out = encoder(tokens["text_encoder"].to(encoder.device),
                      attention_mask=None if mask.is_meta else mask)
        places = torch.arange(mask.shape[1], device=mask.device)
        return {"text": out.last_hidden_state, "mask": places <= mask.sum(1, keepdim=True)}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        picture = torch.ones(len(noisy), height * width, dtype=torch.bool, device=noisy.device)
        mask = torch.cat([cond["mask"].bool(), picture], 1)
        with masked(denoiser, mask):
            found = denoiser(
                hidden_states=pack(noisy), timestep=t / STEPS, encoder_hidden_states=cond["text"],
                txt_ids=noisy.new_zeros(cond["text"].shape[1], 3),
                img_ids=positions(height, width, noisy), attention_mask=mask,
                return_dict=False)[0]
        return unpack(found, height, width)

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return text.masked_arguments(cond, negative)


@contextmanager
def masked(denoiser: Any, mask: Tensor) -> Iterator[None]:
    """Under activation checkpointing diffusers 0.42 forgets the single blocks' mask."""
    own = getattr(denoiser, "_gradient_checkpointing_func", None)
    if own is None:
        yield
        return

    def checkpoint(block: Any, *inputs: Any) -> Any:
        return own(block, *inputs, *(() if len(inputs) > 3 else (mask,)))
    denoiser._gradient_checkpointing_func = checkpoint
    try:
        yield
    finally:
        denoiser._gradient_checkpointing_func = own
