"""How SD 1.x, 2.x and XL read texts with CLIP: longer ones in chunks of 75 tokens.

Each chunk has start and end marks of its own, and the states of the chunks are put one after the
other, as with kohya's max_token_length and in A1111. Chunks are cut every 75 tokens, as kohya does,
and not at commas.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.families.registry import CHUNK
from core.prompt_markup import CHUNK_END, Spans

WHOLE = CHUNK + 2                           # with start and end


def tokenize(tokenizer: Any, prompts: Sequence[str], most: int) -> Tensor:
    """Returns tokens (B, n * 77), on the CPU. The longest prompt decides the number n of chunks,
    the others end with empty ones. Of each prompt at most `most` tokens are read."""
    return tokenize_spans(tokenizer, [[(prompt, 1.0)] for prompt in prompts], most)[0]


def tokenize_spans(tokenizer: Any, prompts: Sequence[Spans], most: int) -> tuple[Tensor, Tensor]:
    """The same of prompts in spans of different weight, and the weight of each token (B, n * 77).
    After a span CHUNK_END another chunk begins."""
    ids = iter(tokenizer([text for spans in prompts for text, _ in spans],
                         add_special_tokens=False, verbose=False).input_ids)
    texts = [_chunks([(next(ids), span) for span in spans], most) for spans in prompts]
    count = max(1, *map(len, texts))
    first, last, pad = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    rows = [[[(first, 1.0), *chunk, (last, 1.0), *[(pad, 1.0)] * (CHUNK - len(chunk))]
             for chunk in (*chunks, *[()] * (count - len(chunks)))] for chunks in texts]
    pairs = torch.tensor([[*itertools.chain.from_iterable(row)] for row in rows],
                         dtype=torch.float64)
    return pairs[..., 0].long(), pairs[..., 1].float()


def _chunks(spans: Sequence[tuple[list[int], tuple[str, float]]], most: int
            ) -> list[list[tuple[int, float]]]:
    """Tokens with their weights, in chunks, of which `most` // CHUNK are read."""
    chunks: list[list[tuple[int, float]]] = [[]]
    for ids, span in spans:
        if span == CHUNK_END:
            chunks.append([])
        for token in ids:
            if len(chunks[-1]) == CHUNK:
                chunks.append([])
            chunks[-1].append((token, span[1]))
    return chunks[:most // CHUNK]


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
