"""CLIP's text encoders as SD 1.x, 2.x and XL read with them: longer texts in chunks of 75 tokens.

Each chunk has a start and an end of its own, its states stand one behind the other (as kohya's
max_token_length and A1111 have it). Chunks are cut every 75 tokens, at no comma, as kohya does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.families.registry import CHUNK

WHOLE = CHUNK + 2


def tokenize(tokenizer: Any, prompts: Sequence[str], most: int) -> Tensor:
    """(B, n * 77), on the CPU, of at most `most` tokens each; n chunks as the longest needs them,
    at the end of the others empty ones."""
    texts = [ids[:most] for ids in tokenizer(
        list(prompts), add_special_tokens=False, verbose=False).input_ids]
    count = max(1, *(-(-len(ids) // CHUNK) for ids in texts))
    first, last, pad = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    rows = []
    for ids in texts:
        parts = [ids[n * CHUNK:(n + 1) * CHUNK] for n in range(count)]
        rows.append([token for part in parts
                     for token in (first, *part, last, *[pad] * (CHUNK - len(part)))])
    return torch.tensor(rows)


def read(encoder: Any, ids: Tensor, layer: int = 0) -> tuple[Tensor, Any]:
    """Tokens (B, n * 77) -> states (B, n * 77, C) and the encoder's output for all chunks, whose
    first index is B * n. `layer`: 0 the last one with its norm; 2 the last but one, without."""
    out = encoder(ids.to(encoder.device).reshape(-1, WHOLE), output_hidden_states=layer > 0)
    states: Tensor = out.hidden_states[-layer] if layer else out.last_hidden_state
    return states.reshape(len(ids), -1, states.shape[2]), out


def like(shorter: Tensor, other: Tensor) -> Tensor:
    """States (1, L, C) as long as the other's: the last chunk again, which of an empty text is what
    an empty chunk gives."""
    missing = (other.shape[1] - shorter.shape[1]) // WHOLE
    return torch.cat([shorter, *[shorter[:, -WHOLE:]] * missing], 1)
