"""Counts a caption's tokens with the base model's tokenizer. Torch is imported with the first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from core import paths

CLIP = paths.DEMO / "base" / "tokenizer"    # CLIP's own: SD 1.x, and the first of SDXL


def counter(base: str = "") -> Callable[[str], int]:
    """Returns a function that counts a text's tokens without the start and end marks.

    `base`: a model folder or file, whose weights aren't read; empty: CLIP's tokenizer. Raises
    UserError where there is no such base.
    """
    if not base:
        from transformers import CLIPTokenizer
        tokenizer = CLIPTokenizer.from_pretrained(CLIP)
        return functools.lru_cache(maxsize=65536)(
            lambda text: len(tokenizer(text, add_special_tokens=False).input_ids))
    from core import families
    from core.weights import precision
    family = families.get(families.detect(Path(base).expanduser()))
    parts = family.skeleton(Path(base).expanduser(), precision.choose("fp32", "cpu"),
                            only=frozenset({"text"}))
    return functools.lru_cache(maxsize=65536)(
        lambda text: family.count_tokens(parts, [text])[0])
