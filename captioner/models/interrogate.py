"""Joins several captioners' descriptions: a sentence, then the tags that add to it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from captioner.base import Description, Tag
from captioner.models.tagging import plain

_ARTICLES = {"a", "an", "the"}


def combine(descriptions: Sequence[Description]) -> Description:
    """One description out of several captioners', in their order.

    Different sentences follow one another. A tag is left out where the sentence or an earlier tag
    has its words side by side, whatever the articles and plurals: "cars" and "blue background"
    after "a red car on a blue background", but not "red background".
    """
    sentences = dict.fromkeys(d.sentence.strip() for d in descriptions if d.sentence.strip())
    sentence = (". ".join(text.rstrip(".") for text in sentences) + "." if len(sentences) > 1
                else "".join(sentences))
    first_tags: dict[str, Tag] = {}
    for description in descriptions:
        for tag in description.tags:
            first_tags.setdefault(plain(tag.name), tag)
    tags, known = [], [_stems(sentence)]
    for tag in first_tags.values():
        stems = _stems(tag.name)
        count = len(stems)
        if stems and not any(words[n:n + count] == stems for words in known
                             for n in range(len(words) - count + 1)):
            tags.append(tag)
            known.append(stems)
    return Description(sentence, tuple(tags))


def _stems(text: str) -> list[str]:
    """Words without articles and plural endings, of any script."""
    stems = []
    for word in re.findall(r"\w+", plain(text)):
        if word in _ARTICLES:
            continue
        for ending, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"),
                                 ("sses", "ss")):
            if word.endswith(ending) and len(word) > len(ending) + 1:
                word = word.removesuffix(ending) + singular
                break
        else:
            if len(word) > 3 and not word.endswith("ss"):
                word = word.removesuffix("s")
        stems.append(word)
    return stems
