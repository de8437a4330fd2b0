"""Sentences for people, by key and language: core/strings/<language>/<subject>.yaml."""

from __future__ import annotations

import difflib
import functools
import locale
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

STRINGS = Path(__file__).parent / "strings"
LANGUAGES = ("en", "zh-CN")
# Control characters: ESC starts terminal commands, bidi overrides reverse what is read.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# The C loader takes a tenth of the time; some builds of PyYAML lack it.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def catalogue(language: str) -> dict[str, str]:
    """All sentences of a language, by their key `subject.what`; placeholders are in braces."""
    sentences: dict[str, str] = {}
    for path in sorted((STRINGS / language).glob("*.yaml")):
        entries = yaml.load(path.read_text("utf-8"), _Loader) or {}
        sentences |= {f"{path.stem}.{key}": text for key, text in entries.items()}
    return sentences


@functools.cache
def language() -> str:
    """The language of the user: DARKROOM_LANG, else the system's if we have it, else English."""
    setting = os.environ.get("DARKROOM_LANG") or locale.getlocale()[0] or ""
    # Windows names its locale "Chinese (Simplified)_China"
    return "zh-CN" if setting.lower().startswith(("zh", "chinese")) else "en"


def tr(key: str, params: Mapping[str, Any] | None = None, lang: str | None = None) -> str:
    """The sentence for a key, its placeholders filled; the bare key where no sentence exists.

    A parameter `{"say": key, ...}` is a sentence of its own, translated into the same language.
    """
    text = catalogue(lang or language()).get(key) or catalogue("en").get(key)
    if text is None:
        return f"{key} {dict(params)}" if params else key
    return text.format_map(_Params(params or {}, lang))


def translator(subject: str) -> Callable[..., str]:
    """`tr` for the sentences of one file: translator("plan")("saved", path=x) says plan.saved."""
    def tr_of_subject(key: str, **params: Any) -> str:
        return tr(f"{subject}.{key}", params)
    return tr_of_subject


def printable(text: str) -> str:
    """The text without control characters, which would command the terminal that shows it."""
    return CONTROL.sub("�", text)


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words that look most like `word`, best first: for "did you mean"."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


class _Params(dict[str, Any]):
    """The parameters of one sentence. A missing one stays visible as its {placeholder}: telling of
    a fault must not fail. Control characters of other people's files don't reach the terminal."""

    def __init__(self, params: Mapping[str, Any], lang: str | None) -> None:
        super().__init__(params)
        self.lang = lang

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, Mapping) and "say" in value:
            return tr(value["say"], value, self.lang)
        return printable(str(value)) if isinstance(value, (str, Path)) else value

    def __missing__(self, key: str) -> str:
        return "{" + key + "}"
