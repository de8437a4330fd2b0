"""Captions' embeddings as rows: without padding where they are kept, joined for a batch."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from core.families.base import Cond, Family, Parts
from core.families.text import alike


def batched(rows: Sequence[Cond], device: torch.device) -> Cond:
    """(1, ...) each -> (B, ...)"""
    return {k: joined([r[k] for r in rows]).to(device, non_blocking=True) for k in rows[0]}


def trimmed(one: Cond) -> Cond:
    """A text without its padding, where a mask (1, L) tells it; (1, L, C) and (1, L) each."""
    if "mask" not in one:
        return one
    length, kept = one["mask"].shape[1], max(1, int(one["mask"].sum()))
    return {k: v[:, :kept].clone() if v.ndim > 1 and v.shape[1] == length else v
            for k, v in one.items()}


def joined(rows: Sequence[Tensor]) -> Tensor:
    """(1, ...) each -> (B, ...); shorter texts get zeros at their end, so also masks."""
    return torch.cat(alike(*rows))


def unread(family: Family, parts: Parts, text: str) -> str:
    """The end of a text that the base doesn't read, from the word on in which its limit lies; ""
    where it reads all."""
    limit = family.token_limit(parts)

    def reaches_beyond(end: int) -> bool:
        return family.count_tokens(parts, [text[:end]])[0] > limit
    if not reaches_beyond(len(text)):
        return ""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    first = bisect.bisect_left(words, True, key=lambda span: reaches_beyond(span[1]))
    return text[words[min(first, len(words) - 1)][0]:] if words else text
