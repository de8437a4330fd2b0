r"""What other programs write into captions and prompts: one list of it for all that read either.

In captions kohya's separators and ai-toolkit's placeholder for the trigger word have a meaning here
(core/dataset/captions.py). While drawing, so have A1111's emphasis and BREAK, where CLIP reads the
prompt, and alternatives. All else is letters to a text encoder: `found` names it for a sentence.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection
from random import Random

Spans = list[tuple[str, float]]             # texts, each with its weight

SEPARATOR = "|||"                           # kohya's keep_tokens_separator: what stays | what moves
CHUNK_END = ("", 0.0)                       # a span: the rest is read from the next 75 tokens on
MOST_SHOWN = 80                             # letters of a part in a sentence
MOST_WEIGHT = 10.0                          # of an emphasis or a LoRA; more is a slip

_STRONGER = 1.1                             # a pair of brackets, as in A1111
_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_TRIGGER = re.compile(r"\[trigger\]", re.IGNORECASE)
_NUMBER = r"[-+]?(?:\d+[.,]?\d*|[.,]\d+)(?:e[-+]?\d+)?|[-+]?nan|[-+]?inf(?:inity)?"
# An emphasis that is surely meant; single round brackets are in many a tag, too.
_SURE = re.compile(rf"\([^()]*:\s*(?:{_NUMBER}|(?<=\w:))\s*\)|\(\([^()]*\)\)|\[[^\[\]]*\w[^\[\]]*\]"
                   r"|\\[()\[\]]|\b(?-i:BREAK)\b", re.IGNORECASE)
_SCHEDULE = r"\[[^\[\]]*:\s*\d*\.?\d+\s*\]|\[[^\[\]|]+\|[^\[\]]+\]"
_PIECE = re.compile(rf"{_SCHEDULE}|\\([()\[\]\\])|([(\[])|:\s*({_NUMBER}|(?<=\w:))\s*\)"
                    r"|([)\]])|\b(BREAK)\b|[^\\()\[\]:B]+|.", re.IGNORECASE | re.DOTALL)
_WIDE = re.compile(r"[(（]([^()（）]*)[:：]\s*([-+\d.０-９．]+)\s*[)）]")

# What it is -> how it looks. The earlier ones take their letters from the later ones.
KINDS = {
    # all of a picture's settings, or options as Midjourney and kohya's samples have them
    "settings": re.compile(r"\A\s*\{\s*\"\w+\"\s*:.*|\bNegative prompt:|\bSteps: \d+, \w+.*|"
                           r"(?<![^\s,])(?:--|—)(?:[cdghlnpqsvw]|ar|neg|no|niji|seed|steps|sref|style"
                           r"|stylize)\s+[\w:.-]+", re.DOTALL),
    "trigger": _TRIGGER,
    "separator": re.compile(r"\|\|\||;;;"),
    "lora": re.compile(r"[<＜《〈(（\[]?\s*\b(?:lora|lyco|hypernet)\s*[:：=]"
                       r"[^,，<>()\n]*[>＞》〉)）\]]?|<[a-z]+:[^<>]+>", re.IGNORECASE),
    "embedding": re.compile(r"[(（]?\bembedding\s*[:：]\s*[^\s,，]+", re.IGNORECASE),
    "choice": _CHOICE,
    "wildcard": re.compile(r"__[\w/*~-]*[^\W_][\w/*~-]*?__"),
    "schedule": re.compile(_SCHEDULE),
    "appended": re.compile(r"[(（][^()（）]*\w[:：]\d*[.,]?\d+(?![^()（）]*[)）])|"
                           r"\)(?:[\d.]+\b|\++|-+)|\b(?![cC]\+\+)\w+(?:\+\+|--)(?=[\s,，]|$)"),
    "weight": re.compile(rf"[(（][^()（）]*[:：]\s*(?:{_NUMBER})\s*[)）]", re.IGNORECASE),
    "brackets": re.compile(r"\(\([^()]*\)\)|\[[^\[\]]*\w[^\[\]]*\]"),
    "escape": re.compile(r"\\[()\[\]{}]"),
    "chunk": re.compile(r"\bBREAK\b"),
    "prompts": re.compile(r"(?<=\S\s)AND(?=\s\S)"),
    "comment": re.compile(r"^\s*#\s.*$", re.MULTILINE),
}
# What a drawing does by itself; and what it does where CLIP reads the prompt.
DRAWN = frozenset({"separator", "choice", "comment"})
BY_CLIP = frozenset({"weight", "brackets", "escape", "chunk"})


class BadWeight(ValueError):
    """Holds an emphasis or a tag whose weight is no number that can be meant."""


def found(text: str, but: Collection[str] = ()) -> dict[str, str]:
    """What a text has of others' markup: kind -> the first of it; without the kinds `but`."""
    parts: dict[str, str] = {}
    for kind, pattern in KINDS.items():
        if match := pattern.search(text):
            parts[kind] = " ".join(match[0].split())[:MOST_SHOWN]
            text = pattern.sub(" , ", text)
    return {kind: part for kind, part in parts.items() if kind not in but}


def is_meant_as_number(text: str) -> bool:
    return bool(re.fullmatch(_NUMBER, text.strip(), re.IGNORECASE))


def number(text: str) -> float:
    """A weight. Raises BadWeight for one that is no number, or too large to be meant."""
    try:
        weight = float(unicodedata.normalize("NFKC", text))
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MOST_WEIGHT:
        raise BadWeight(text)
    return weight


# --- captions ---

def unread_in(caption: str, trigger: str) -> dict[str, str]:
    """What a caption has that is learned as it stands: see `found`."""
    return found(caption, {"separator", "comment", *(["trigger"] if trigger.strip() else ())})


def joined(caption: str) -> str:
    """A caption whose separators are commas."""
    if not KINDS["separator"].search(caption):
        return caption
    parts = (part.strip(" ,，") for part in KINDS["separator"].split(caption))
    return ", ".join(filter(None, parts))


def placed(text: str, trigger: str) -> str:
    """A text with the trigger word in its place, where it has one."""
    return _TRIGGER.sub(lambda match: trigger.strip(), text) if trigger.strip() else text


# --- prompts ---

def cleaned(prompt: str) -> str:
    """A prompt without comments and separators; （a：1.2） of a Chinese keyboard is (a:1.2)."""
    prompt = joined(KINDS["comment"].sub("", prompt)).strip()
    return _WIDE.sub(lambda match: f"({match[1]}:{unicodedata.normalize('NFKC', match[2])})",
                     prompt)


def choose(prompt: str, seed: int) -> str:
    """One of each {a|b}, always the same for a seed; {2$$a|b|c} takes two."""
    rng = Random(seed)

    def one(match: re.Match[str]) -> str:
        count, mark, listed = match[1].rpartition("$$")
        options = [option.rpartition("::")[2].strip() for option in listed.split("|")]
        many = int(count) if mark and count.isdecimal() else 1
        return ", ".join(rng.sample(options, min(many, len(options))))
    while _CHOICE.search(prompt):           # from the innermost on: each round takes brackets away
        prompt = _CHOICE.sub(one, prompt)
    return prompt


def spans(prompt: str) -> Spans:
    """A prompt's texts with their weights, by A1111's rules: (a:1.2), ((a)), [a], \\( and BREAK.

    A prompt without any of these is one text: its single brackets are letters, as in the tags that
    LoRAs are trained on. Raises BadWeight."""
    if not _SURE.search(prompt):
        return [(prompt, 1.0)]
    parts: Spans = []
    opened: list[tuple[str, int]] = []      # brackets, and how many parts stood before each

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        at = opened.pop()[1]
        parts[at:] = [(text, weight * factor) for text, weight in parts[at:]]
        return True
    for match in _PIECE.finditer(prompt):
        escaped, opening, weight, closing, end = match.groups()
        if opening:
            opened.append((opening, len(parts)))
        elif end == "BREAK":
            parts.append(CHUNK_END)
        elif weight is not None and opened and opened[-1][0] == "(" and len(parts) > opened[-1][1]:
            try:
                close("(", number(weight))
            except BadWeight:
                start = prompt.rfind("(", 0, match.start())
                raise BadWeight(prompt[start:match.end()]) from None
        elif not closing or not close(*{")": ("(", _STRONGER), "]": ("[", 1 / _STRONGER)}[closing]):
            parts.append((escaped or match[0], 1.0))
    for bracket, at in reversed(opened):
        # never closed: a letter
        parts.insert(at, (bracket, 1.0))
    return _merged(parts)


def _merged(parts: Spans) -> Spans:
    """Neighbours of one weight as one span; nothing is left of those without text."""
    merged: Spans = []
    for text, weight in parts:
        if merged and (text, weight) != CHUNK_END != merged[-1] and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text or (text, weight) == CHUNK_END:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def sections(prompt: str) -> list[str]:
    """The texts between BREAK and BREAK, without the signs of their weights."""
    texts = [""]
    for span in spans(prompt):
        texts = [*texts, ""] if span == CHUNK_END else [*texts[:-1], texts[-1] + span[0]]
    return texts
