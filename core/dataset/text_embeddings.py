"""Embeddings of captions: one row each, kept without padding and joined for a batch."""

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
    """Joins rows of (1, ...) to (B, ...).

    Where texts are of different length, shorter ones get zeros at their end, and a mask (B, L)
    says what counts: no text is changed by its neighbours in a batch.
    """
    batch = {name: torch.cat(alike(*(row[name] for row in rows))).to(device, non_blocking=True)
             for name in rows[0]}
    lengths = [row["text"].shape[1] for row in rows if "text" in row]
    if len(set(lengths)) > 1 and "mask" not in batch:
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        batch["mask"] = mask.to(batch["text"].dtype).to(device, non_blocking=True)
    return batch


def grouped(sizes: Sequence[Hashable], encode: Callable[[list[int]], Cond]) -> list[Cond]:
    """Encodes texts of the same size at once, and returns rows (1, ...) in the order of `sizes`.

    `encode` takes the indices of some texts and returns (B, ...).
    """
    rows: dict[int, Cond] = {}
    for size in dict.fromkeys(sizes):
        indices = [i for i, other in enumerate(sizes) if other == size]
        batch = encode(indices)
        rows |= {i: {name: values[n:n + 1] for name, values in batch.items()}
                 for n, i in enumerate(indices)}
    return [rows[i] for i in range(len(sizes))]


def sizes_of(tokens: dict[str, Tensor]) -> Hashable:
    """Returns what must be the same in texts that are encoded at once: their lengths in tokens."""
    return tuple((name, ids.shape[1]) for name, ids in tokens.items())


def reading_of(config: TrainConfig | GenerateConfig, clip_skip: int = 1) -> Reading:
    """Returns how a config reads texts; `clip_skip` is for one that leaves it open."""
    return Reading(config.max_tokens, clip_skip if config.clip_skip is None else config.clip_skip)


def unused_of(family: Family, reading: Reading) -> list[str]:
    """Returns the config keys in use that this family's text encoders know nothing of."""
    usual, spec = Reading(), family.spec
    return [key for key, used in (("max_tokens", spec.chunked), ("clip_skip", spec.skips))
            if not used and getattr(reading, key) != getattr(usual, key)]


def trimmed(row: Cond) -> Cond:
    """Takes away a text's padding, where a mask (1, L) tells it, from all (1, L, C) and (1, L)."""
    if "mask" not in row:
        return row
    # An empty text keeps one token: attention over none would be NaN.
    length, used = row["mask"].shape[1], max(1, int(row["mask"].sum()))
    return {name: values[:, :used].clone() if values.ndim > 1 and values.shape[1] == length
            else values for name, values in row.items()}


def unread(family: Family, parts: Parts, text: str, limit: int | None = None) -> str:
    """Returns the end of a text that the base doesn't read, or "" where it reads all. `limit`: of
    tokens, where it isn't the base's.

    It begins with the word in which the limit lies.
    """
    limit = family.token_limit(parts) if limit is None else limit

    def is_too_long(end: int) -> bool:
        return family.count_tokens(parts, [text[:end]])[0] > limit
    if not is_too_long(len(text)):
        return ""
    # Tokens say nothing of where they stand in the text, so the word is found by halving.
    words = [match.span() for match in re.finditer(r"\S+", text)]
    first = bisect.bisect_left(words, True, key=lambda span: is_too_long(span[1]))
    return text[words[min(first, len(words) - 1)][0]:] if words else text
