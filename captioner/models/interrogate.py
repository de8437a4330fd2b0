"""CLIP + BLIP together, the interrogator way: a sentence, then the tags that add to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from captioner.base import Description, Tag
from captioner.models.tagging import plain

_FILLERS = {"a", "an", "the"}


def combine(descriptions: Sequence[Description]) -> Description:
    """Several captioners' words on one picture, in the order of their ids ("blip+clip" or
    "clip+blip": sentences first anyway).

    Sentences that differ follow one another. A tag is left out where the sentence or an earlier
    tag says it already, in these words and but for articles and plurals: "cars" and "blue
    background" after "a red car on a blue background", but not "red background".
    """
    sentences = dict.fromkeys(d.sentence.strip() for d in descriptions if d.sentence.strip())
    sentence = (". ".join(text.rstrip(".") for text in sentences) + "." if len(sentences) > 1
                else "".join(sentences))
    return Description(sentence, tuple(_new(sentence, _interleaved(descriptions))))


def _interleaved(descriptions: Iterable[Description]) -> list[Tag]:
    """Each captioner's tags in its own order; of a tag that several have, the first counts."""
    seen: dict[str, Tag] = {}
    for description in descriptions:
        for tag in description.tags:
            seen.setdefault(plain(tag.name), tag)
    return list(seen.values())


def _new(sentence: str, tags: Iterable[Tag]) -> list[Tag]:
    said, kept = [_stems(sentence)], []
    for tag in tags:
        own = _stems(tag.name)
        if own and not any(_within(own, words) for words in said):
            kept.append(tag)
            said.append(own)
    return kept


def _within(own: list[str], said: list[str]) -> bool:
    """The tag's words stand side by side, in this order."""
    return any(said[n:n + len(own)] == own for n in range(len(said) - len(own) + 1))


def _stems(text: str) -> list[str]:
    """Words without articles and plural endings; letters of any script count as words."""
    return [_stem(word) for word in re.findall(r"\w+", plain(text)) if word not in _FILLERS]


def _stem(word: str) -> str:
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"),
                            ("sses", "ss")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + instead
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word
