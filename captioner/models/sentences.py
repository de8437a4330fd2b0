"""Turns the answers of language models into captions. Text only."""

from __future__ import annotations

import re

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
# Thoughts without an end: the token limit cut the answer.
_OPENED = re.compile(r"<(think|thinking|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE)
# Thoughts without a beginning: the chat template of some servers swallows it.
_CLOSED = re.compile(r"\A.*</(think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)
# The whole answer as a Markdown code block.
_FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\Z", re.DOTALL)
_POLITE = re.compile(r"(?:sure|certainly|of course|okay|ok|absolutely|好的|当然)[\s,.!:，。！：]+",
                     re.IGNORECASE)
# "Here is a short caption for the image:" and its like. They are short and end in a colon.
_INTRODUCTION = re.compile(
    r"(?:(?:here(?:'s| is| are)|this is|below is)\b[^:.\n]{0,80}|"
    r"(?:[\w-]+ ){0,3}(?:caption|description|prompt|tags|answer)s?(?: for[^:.\n]{0,40})?|"
    r"(?:以下|下面|这)是[^：:。\n]{0,30}|(?:图片|图像|画面)?(?:描述|说明|标题|标签|提示词))"
    r"\s*[:：]\s*", re.IGNORECASE)
_MARKUP = re.compile(r"\*\*(.+?)\*\*|__(.+?)__|^#{1,6}\s+", re.MULTILINE)
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+(?=\S)")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "『": "』", "«": "»", "`": "`"}
# Chinese sentences may follow one another without a space.
_END = re.compile(r"[.!?。！？][\"'”’」』)]*(?=\s|$|(?<=[。！？]))")
# Only at the start of an answer: "sorry" may be written on a picture.
_REFUSAL = re.compile(
    r"(?:i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i (?:can(?:no|'|’)t|do not|don't) "
    r"|as an ai\b|unfortunately, i|抱歉|对不起|我无法|我不能|很抱歉)", re.IGNORECASE)


def clean(answer: str) -> str:
    """The answer as one line, without thoughts, politeness, introduction, markup, bullets, quotes.
    """
    text = _OPENED.sub("", _CLOSED.sub("", _THINKING.sub("", answer))).strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    text = _MARKUP.sub(lambda match: match[1] or match[2] or "", text)
    # Again and again, as each may hide another.
    before = None
    while before != text:
        before = text
        # Politeness goes only where more follows it, so that a caption of one word stays.
        polite = _POLITE.match(text)
        text = text[polite.end():] if polite and polite.end() < len(text) else text
        introduction = _INTRODUCTION.match(text)
        text = text[introduction.end():] if introduction else text
        text = unquoted(text.strip())
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(_BULLET.match(line) for line in lines):
        text = ", ".join(_BULLET.sub("", line).strip().rstrip(",;") for line in lines)
    return " ".join(text.split())


def unquoted(text: str) -> str:
    """Removes quotes around the whole text; those inside stay."""
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        if text[0] not in inner and text[-1] not in inner:
            return inner.strip()
    return text


def whole_sentences(text: str) -> str:
    """Cuts a text that hit the token limit back to its last full sentence, if it has one."""
    ends = [match.end() for match in _END.finditer(text)]
    return text[:ends[-1]] if ends else text


def is_refusal(text: str) -> bool:
    """"I'm sorry, but I can't ...": an answer that must not become a caption."""
    return bool(_REFUSAL.match(text.strip()))
