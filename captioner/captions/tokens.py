"""Counts a caption's tokens with the base model's tokenizer. Torch is imported with the first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from captioner.captions.rules import MaxTokens, Rule
from core import paths
from core.dataset.crops import TokenCounter


def counter(base: str = "") -> Callable[[str], int]:
    """Returns a function that counts a text's tokens without the start and end marks.

    `base`: a model folder or file, whose weights aren't read; empty: CLIP's tokenizer. Raises
    UserError where there is no such base.
    """
    count: Callable[[list[str]], list[int]] = TokenCounter()
    if base:
        from core import families
        from core.weights import precision
        family = families.get(families.detect(paths.expanded(base)))
        parts = family.skeleton(paths.expanded(base), precision.choose("fp32", "cpu"),
                                only=frozenset({"text"}))
        count = functools.partial(family.count_tokens, parts)
    return functools.lru_cache(maxsize=65536)(lambda text: count([text])[0])


def tokens_of(rules: Iterable[Rule]) -> Callable[[str], int] | None:
    """Counts tokens as the rules' base model does; None where no rule needs it."""
    limits = [rule for rule in rules if isinstance(rule, MaxTokens)]
    return counter(limits[0].base) if limits else None
