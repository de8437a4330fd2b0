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
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from torch import Tensor

from core.families import text
from core.families.base import Cond, Parts
from core.families.chroma.spec import SPEC
from core.families.common import FlowFamily, TokenizerSpec, denoiser_spec, t5_spec, vae_spec
from core.families.flux import packed
from core.families.flux.model import LorasAsTheyAre
from core.families.loading import CheckpointLayout, block_counts
from core.families.timestep_sampling import TimestepSampling, by_share_and_step

LENGTH = 512                                # tokens


class MaskedChromaPipeline(LorasAsTheyAre, ChromaPipeline):  # type: ignore[misc]
    """Hands the mask on as booleans. diffusers 0.42 hands it on as numbers, which attention adds to
    its scores, so that nothing is hidden (its issues 12116 and 13619)."""

    def _prepare_attention_mask(self, *args: Any, attention_mask: Tensor | None = None,
                                **rest: Any) -> Any:
        return super()._prepare_attention_mask(
            *args, **rest, attention_mask=None if attention_mask is None else attention_mask.bool())


class Chroma(FlowFamily):
    kind = SPEC.id
    spec = SPEC
    components = (denoiser_spec(ChromaTransformer2DModel, SPEC),
                  vae_spec("vae_16", "vae.", "first_stage_model."), t5_spec("text_encoder"))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec("t5", LENGTH)}
    pipe = MaskedChromaPipeline
    sampling = TimestepSampling("parabola", bend=7.7, model_times=by_share_and_step)

    def adapt(self, layout: CheckpointLayout) -> None:
        layout.configs["transformer"] |= block_counts(self.shapes(layout))

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        return text.masked_tokens(parts.text["tokenizer"], prompts, LENGTH)

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        encoder = parts.text["text_encoder"]
        mask = tokens["text_encoder.mask"].to(encoder.device)
        out = encoder(tokens["text_encoder"].to(encoder.device),
                      attention_mask=None if mask.is_meta else mask)
        places = torch.arange(mask.shape[1], device=mask.device)
        # One token of padding is seen, as the transformer has learned.
        return {"text": out.last_hidden_state, "mask": places <= mask.sum(1, keepdim=True)}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        places = packed.positions(noisy)
        picture = torch.ones(len(noisy), len(places), dtype=torch.bool, device=noisy.device)
        mask = torch.cat([cond["mask"].bool(), picture], 1)
        with masked(denoiser, mask):
            return packed.predict(
                denoiser, noisy, t, cond["text"], img_ids=places, attention_mask=mask,
                txt_ids=noisy.new_zeros(cond["text"].shape[1], 3))

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return text.masked_arguments(cond, negative)


@contextmanager
def masked(denoiser: Any, mask: Tensor) -> Iterator[None]:
    """Gives the single blocks their mask, which diffusers 0.42 forgets under activation
    checkpointing."""
    checkpoint = getattr(denoiser, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        yield
        return

    def with_mask(block: Any, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, *(() if len(inputs) > 3 else (mask,)))
    denoiser._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        denoiser._gradient_checkpointing_func = checkpoint
