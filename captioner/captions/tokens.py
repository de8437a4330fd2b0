"""How many tokens the base's text encoder makes of a caption. No torch until one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from core import paths

CLIP = paths.DEMO / "base" / "tokenizer"    # CLIP's own: SD 1.x, and the first of SDXL


def counter(base: str = "") -> Callable[[str], int]:
    """Counts a text's tokens, without the start and end marks, as the base's tokenizer does.

    `base` is a model folder or file, whose weights aren't read; empty: CLIP's tokenizer. Raises
    UserError where there is no such base.
    """
    count = _of_base(Path(base).expanduser()) if base else _clip()
    return functools.lru_cache(maxsize=65536)(count)


def _clip() -> Callable[[str], int]:
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(CLIP)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def _of_base(base: Path) -> Callable[[str], int]:
    from core import families
    from core.weights import precision
    family = families.get(families.detect(base))
    parts = family.skeleton(base, precision.choose("fp32", "cpu"), only=frozenset({"text"}))
    return lambda text: family.count_tokens(parts, [text])[0]
