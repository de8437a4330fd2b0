"""What language models answer, made into a caption: pure text."""

from __future__ import annotations

import re

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPENED = re.compile(r"<(think|thinking|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE)
_CLOSED = re.compile(r"\A.*</(think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\Z", re.DOTALL)
_POLITE = re.compile(r"(?:sure|certainly|of course|okay|ok|absolutely|好的|当然)[\s,.!:，。！：]+",
                     re.IGNORECASE)
_INTRODUCTION = re.compile(     # "Here is a short caption for the image:" and its like
    r"(?:(?:here(?:'s| is| are)|this is|below is)\b[^:.\n]{0,80}|"
    r"(?:[\w-]+ ){0,3}(?:caption|description|prompt|tags|answer)s?(?: for[^:.\n]{0,40})?|"
    r"(?:以下|下面|这)是[^：:。\n]{0,30}|(?:图片|图像|画面)?(?:描述|说明|标题|标签|提示词))"
    r"\s*[:：]\s*", re.IGNORECASE)
_MARKUP = re.compile(r"\*\*(.+?)\*\*|__(.+?)__|^#{1,6}\s+", re.MULTILINE)
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+(?=\S)")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "『": "』", "«": "»", "`": "`"}
_END = re.compile(r"[.!?。！？][\"'”’」』)]*(?=\s|$|(?<=[。！？]))")
_REFUSAL = re.compile(
    r"(?:i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i (?:can(?:no|'|’)t|do not|don't) "
    r"|as an ai\b|unfortunately, i|抱歉|对不起|我无法|我不能|很抱歉)", re.IGNORECASE)


def clean(answer: str) -> str:
    """One line without thoughts, politeness, introduction, markup, bullets and quotes."""
    text = without_thoughts(answer).strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    text = _MARKUP.sub(lambda found: found[1] or found[2] or "", text)
    before = None
    while before != text:               # each may hide another
        before = text
        text = _POLITE.sub("", text, count=1) if _introduced(text) else text
        text = _INTRODUCTION.sub("", text, count=1) if _INTRODUCTION.match(text) else text
        text = unquoted(text.strip())
    return " ".join(_joined(text).split())


def without_thoughts(answer: str) -> str:
    """Thoughts end at their tag; some servers swallow the first tag, a cut answer has no last."""
    return _OPENED.sub("", _CLOSED.sub("", _THINKING.sub("", answer)))


def unquoted(text: str) -> str:
    """Without the quotes around the whole; those inside stay."""
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        if text[0] not in inner and text[-1] not in inner:
            return inner.strip()
    return text


def whole_sentences(text: str) -> str:
    """A text that a token limit cut off, back to its last full sentence if it has one."""
    ends = [found.end() for found in _END.finditer(text)]
    return text[:ends[-1]] if ends else text


def is_refusal(text: str) -> bool:
    """"I'm sorry, but I can't ...": an answer that must not become a caption."""
    return bool(_REFUSAL.match(text.strip()))


def _introduced(text: str) -> bool:
    """Politeness goes only where more follows it, so that a caption of one word stays."""
    found = _POLITE.match(text)
    return bool(found and found.end() < len(text))


def _joined(text: str) -> str:
    """A list of points becomes one line with commas."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(_BULLET.match(line) for line in lines):
        return ", ".join(_BULLET.sub("", line).strip().rstrip(",;") for line in lines)
    return text
