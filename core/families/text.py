"""What families share of text: CLIP's tokens, stand-ins for tokenizers in plans."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
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
