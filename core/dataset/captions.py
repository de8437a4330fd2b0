"""Captions as text: one line, trigger words, tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from core import prompt_markup
from core.config import TrainConfig

MOST_SHUFFLES = 8               # caption variants kept for each picture when tags are shuffled

_COMMA = re.compile("[,，]")
# Chinese and its neighbours put no spaces between words, so their letters bound no word.
_WORD = r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]"


# --- text -------------------------------------------------------------------------------------

def one_line(text: str) -> str:
    """Returns a caption file's whole text as one line.

    Lines of tags are joined with commas, prose with spaces. Lines are tags if one has a comma or
    all have at most four words, and none ends as a sentence does.
    """
    # Files that were joined by hand may hold a byte order mark in the middle.
    text = text.replace("\ufeff", "")
    lines = [clean for line in text.splitlines() if (clean := " ".join(line.split()))]
    prose = any(line.endswith(tuple(".!?。！？")) for line in lines)
    tags = (any(_COMMA.search(line) for line in lines)
            or all(len(line.split()) <= 4 for line in lines))
    if prose or not tags:
        return " ".join(lines)
    return ", ".join(clean for line in lines if (clean := line.strip(",， ")))


def split_tags(caption: str) -> list[str]:
    return [tag for part in _COMMA.split(caption) if (tag := part.strip())]


def with_trigger(caption: str, trigger: str) -> str:
    """Puts the trigger first, unless the caption already has it as a whole word or phrase, or a
    place for it."""
    caption = prompt_markup.placed(caption, trigger)
    if not trigger.strip() or phrase(trigger).search(caption):
        return caption
    return ", ".join(filter(None, (trigger.strip(), caption.strip())))


def without_trigger(caption: str, trigger: str) -> str:
    """Takes the trigger out of a caption, and the empty parts that this leaves."""
    if not trigger.strip():
        return caption
    parts = (" ".join(part.split()) for part in phrase(trigger).sub("", caption).split(","))
    return ", ".join(filter(None, parts))


def phrase(text: str) -> re.Pattern[str]:
    """A pattern that finds a word or phrase as a whole, in any case, with any spaces inside."""
    words = r"\s+".join(map(re.escape, text.split()))
    return re.compile(f"(?<!{_WORD}){words}(?!{_WORD})", re.IGNORECASE)


def shuffle_tags(caption: str, keep_tokens: int, rng: Random) -> str:
    """Puts comma-separated tags in random order; the first `keep_tokens` stay in front. Where a
    caption has kohya's ||| itself, what stands before the first and after a second one stays; tags
    with ;;; between them stay together."""
    tags = split_tags(caption)
    first, rest, last = tags[:keep_tokens], tags[keep_tokens:], list[str]()
    if prompt_markup.SEPARATOR in caption:
        first, rest, last = map(split_tags, [*caption.split(prompt_markup.SEPARATOR, 2), ""][:3])
    rng.shuffle(rest)
    return prompt_markup.joined(", ".join(first + rest + last))


def variants(caption: str, config: TrainConfig, index: int,
             lines: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the different texts that the picture at `index` trains with.

    That is its caption; with `enable_wildcard` each of its file's `lines` with each alternative,
    with `shuffle_tags` orders of its tags: up to MOST_SHUFFLES texts.
    """
    texts = [caption]
    if config.enable_wildcard:
        lines, first = lines or texts, config.seed + index * MOST_SHUFFLES
        texts = [prompt_markup.choose(lines[n % len(lines)], first + n)
                 for n in range(MOST_SHUFFLES)]
    if config.shuffle_tags:
        rng = Random(f"{config.seed}-{index}")
        texts = [shuffle_tags(texts[n % len(texts)], config.keep_tokens, rng)
                 for n in range(MOST_SHUFFLES)]
    texts = [prompt_markup.joined(text) for text in texts]
    # The trigger word goes in front after the shuffling, so that it is never shuffled.
    return tuple(dict.fromkeys(with_trigger(text, config.trigger_word) for text in texts))
