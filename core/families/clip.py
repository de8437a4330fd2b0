"""How SD 1.x, 2.x and XL read texts with CLIP: longer ones in chunks of 75 tokens.

Each chunk has start and end marks of its own, and the states of the chunks are put one after the
other, as with kohya's max_token_length and in A1111. Chunks are cut every 75 tokens, as kohya does,
and not at commas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.families.registry import CHUNK

WHOLE = CHUNK + 2                           # with start and end


def tokenize(tokenizer: Any, prompts: Sequence[str], most: int) -> Tensor:
    """Returns tokens (B, n * 77), on the CPU. The longest prompt decides the number n of chunks,
    the others end with empty ones. Of each prompt at most `most` tokens are read."""
    texts = [ids[:most] for ids in tokenizer(
        list(prompts), add_special_tokens=False, verbose=False).input_ids]
    count = max(1, *(-(-len(ids) // CHUNK) for ids in texts))
    first, last, pad = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)

    def row(ids: list[int]) -> list[int]:
        chunks = [ids[n * CHUNK:(n + 1) * CHUNK] for n in range(count)]
        return [token for chunk in chunks
                for token in (first, *chunk, last, *[pad] * (CHUNK - len(chunk)))]
    return torch.tensor([row(ids) for ids in texts])


def read(encoder: Any, ids: Tensor, layer: int = 0) -> tuple[Tensor, Any]:
    """Tokens (B, n * 77) -> states (B, n * 77, C) and the encoder's output for the B * n chunks.

    `layer` 0 is the last one, with its norm; 1, 2 ... count from the end and have no norm.
    """
    out = encoder(ids.to(encoder.device).reshape(-1, WHOLE), output_hidden_states=layer > 0)
    states: Tensor = out.hidden_states[-layer] if layer else out.last_hidden_state
    return states.reshape(len(ids), -1, states.shape[2]), out


def like(shorter: Tensor, other: Tensor) -> Tensor:
    """Makes the states (1, L, C) of one text as long as the other's, by repeating the last chunk.
    For an empty text that is the same as adding empty chunks."""
    missing = (other.shape[1] - shorter.shape[1]) // WHOLE
    return torch.cat([shorter, *[shorter[:, -WHOLE:]] * missing], 1)
