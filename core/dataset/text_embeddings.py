"""Captions' embeddings as rows: without padding where they are kept, joined for a batch."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from core.config import GenerateConfig, TrainConfig
from core.families.base import Cond, Family, Parts, Reading
from core.families.text import alike


def batched(rows: Sequence[Cond], device: torch.device) -> Cond:
    """(1, ...) each -> (B, ...). Where texts are of different length, a mask (B, L) tells what of
    them counts, so that none is changed by its neighbours in a batch."""
    whole = {k: joined([r[k] for r in rows]).to(device, non_blocking=True) for k in rows[0]}
    lengths = [row["text"].shape[1] for row in rows if "text" in row]
    if len(set(lengths)) > 1 and "mask" not in whole:
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        whole["mask"] = mask.to(whole["text"].dtype).to(device, non_blocking=True)
    return whole


def grouped(sizes: Sequence[Hashable], encode: Callable[[list[int]], Cond]) -> list[Cond]:
    """Rows (1, ...) in their order, those of one size encoded at once: `encode` takes indices."""
    found: dict[int, Cond] = {}
    for size in dict.fromkeys(sizes):
        some = [i for i, one in enumerate(sizes) if one == size]
        whole = encode(some)
        found |= {i: {k: v[n:n + 1] for k, v in whole.items()} for n, i in enumerate(some)}
    return [found[i] for i in range(len(sizes))]


def sizes_of(tokens: dict[str, Tensor]) -> Hashable:
    """Of one text's tokens: what must be alike in texts that are encoded at once."""
    return tuple((name, ids.shape[1]) for name, ids in tokens.items())


def reading_of(config: TrainConfig | GenerateConfig, clip_skip: int = 1) -> Reading:
    """`clip_skip`: where the config leaves it open."""
    return Reading(config.max_tokens, clip_skip if config.clip_skip is None else config.clip_skip)


def unused_of(family: Family, reading: Reading) -> list[str]:
    """Config keys that would change something of another family's texts."""
    usual, spec = Reading(), family.spec
    return [key for key, used in (("max_tokens", spec.chunked), ("clip_skip", spec.skips))
            if not used and getattr(reading, key) != getattr(usual, key)]


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
