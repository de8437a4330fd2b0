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
from core.families.flux.model import Kept, positions
from core.families.layer_names import CHROMA
from core.families.loading import Layout, Piece
from core.families.sd3.model import JOINT, JOINT_FF, T5XXL
from core.objectives.flow import STEPS, Sampling, by_share_and_step

LENGTH = 512                                # tokens
LEARNS = Sampling("parabola", bend=7.7, told=by_share_and_step)


class Masked(Kept, ChromaPipeline):  # type: ignore[misc]
    """diffusers 0.42 hands its mask on as numbers, which attention adds to its scores instead of
    hiding what they stand for (its issues 12116 and 13619)."""

    def _prepare_attention_mask(self, *args: Any, attention_mask: Tensor | None = None,
                                **rest: Any) -> Any:
        return super()._prepare_attention_mask(
            *args, **rest, attention_mask=None if attention_mask is None else attention_mask.bool())


class Chroma(Loaded):
    kind = "chroma"
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="chroma", title="Chroma", native_size=1024, bucket_step=64,
        lora_presets={"attention": JOINT, "attention+ff": (*JOINT, *JOINT_FF, "proj_mlp"),
                      "all-linear": (*JOINT, *JOINT_FF, "proj_mlp", "proj_out")},
        lora_aliases=ALIASES, kohya_prefix="lora_unet", base_version="chroma",
        architecture="chroma", implementation="https://github.com/lodestone-rock/flow", cfg=4.0)
    pieces = (
        Piece("transformer", ChromaTransformer2DModel, "denoiser",
              convert=checkpoint_keys.by_table(CHROMA[0])),
        Piece("vae", AutoencoderKL, "vae", ("vae.", "first_stage_model."), checkpoint_keys.vae,
              alone="vae_16"),
        Piece("text_encoder", T5EncoderModel, "text", (T5XXL,), alone="t5"))
    vocabularies: ClassVar = {"text_encoder": Vocabulary("t5", LENGTH)}
    pipe = Masked

    def adapt(self, layout: Layout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"] |= {
            "num_layers": layer_count(shapes, "transformer_blocks."),
            "num_single_layers": layer_count(shapes, "single_transformer_blocks.")}

    def empty(self, layout: Layout) -> Parts:
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
