"""What families share of text: tokens, language models that read them, stand-ins in plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.faults import Fault


def padded(tokenizer: Any, prompts: Sequence[str], length: int = 0) -> Any:
    """input_ids and attention_mask (B, length), on the CPU; 0: the tokenizer's own limit."""
    return tokenizer(list(prompts), padding="max_length", truncation=True,
                     max_length=length or tokenizer.model_max_length, return_tensors="pt")


def count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt without start and end."""
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids
    return [len(one) for one in ids]


def chat(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> Sequence[str]:
    """Each prompt as what a user says, in the tokenizer's own chat template."""
    if isinstance(tokenizer, Blank):
        return prompts
    return [tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
        enable_thinking=thinking) for prompt in prompts]


def read(encoder: Any, tokens: dict[str, Tensor], **options: Any) -> tuple[Any, Tensor]:
    """What a language model makes of `text_encoder`'s tokens (B, L); their mask, where it works."""
    mask = tokens["text_encoder.mask"].to(encoder.device)
    seen: Any = mask.bool()
    if mask.is_meta:                    # a plan has no numbers to look at: a mask that is made
        seen = None if "position_ids" in options else {"full_attention": None}
    return encoder(input_ids=tokens["text_encoder"].to(encoder.device), attention_mask=seen,
                   use_cache=False, **options), mask


def alike(*rows: Tensor) -> list[Tensor]:
    """(B, L, ...) each, with zeros at the end of the shorter ones."""
    longest = max((row.shape[1] for row in rows if row.ndim > 1), default=0)
    return [row if row.ndim < 2 or row.shape[1] == longest else
            F.pad(row, (*[0, 0] * (row.ndim - 2), 0, longest - row.shape[1])) for row in rows]


def masked_arguments(cond: Mapping[str, Tensor], negative: Mapping[str, Tensor]
                     ) -> dict[str, Tensor]:
    """A pipeline's arguments for embeddings with masks, both texts of one length."""
    texts, masks = (alike(cond[name], negative[name]) for name in ("text", "mask"))
    return {"prompt_embeds": texts[0], "prompt_attention_mask": masks[0],
            "negative_prompt_embeds": texts[1], "negative_prompt_attention_mask": masks[1]}


class Blank:
    """Stands for a tokenizer that isn't there, in plans: all texts are as long as can be."""

    def __init__(self, length: int, refusal: Fault) -> None:
        self.model_max_length, self.refusal = length, refusal

    def __call__(self, prompts: Sequence[str], max_length: int = 0, **options: Any) -> Any:
        """Raises Fault where tokens are to be counted: it can't."""
        if not options.get("add_special_tokens", True):
            raise self.refusal
        ids: Tensor = torch.zeros(len(prompts), max_length or self.model_max_length,
                                  dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
