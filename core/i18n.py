"""Sentences for people, by key and language: core/strings/<language>/<subject>.yaml."""

from __future__ import annotations

import difflib
import functools
import locale
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

STRINGS = Path(__file__).parent / "strings"
LANGUAGES = ("en", "zh-CN")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")    # ESC, bidi
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)     # C's takes a tenth of the time


@functools.cache
def catalogue(language: str) -> dict[str, str]:
    """All sentences of a language; key `subject.what`, placeholders in braces."""
    sentences: dict[str, str] = {}
    for path in sorted((STRINGS / language).glob("*.yaml")):
        entries = yaml.load(path.read_text("utf-8"), _Loader) or {}
        sentences |= {f"{path.stem}.{key}": text for key, text in entries.items()}
    return sentences


@functools.cache
def language() -> str:
    """DARKROOM_LANG, else the system's language where we have it, else English."""
    wanted = os.environ.get("DARKROOM_LANG") or locale.getlocale()[0] or ""
    return "zh-CN" if wanted.lower().startswith(("zh", "chinese")) else "en"


def tr(key: str, params: Mapping[str, Any] | None = None, lang: str | None = None) -> str:
    """The sentence for a key, its placeholders filled; the bare key where no sentence exists. A
    parameter `{"tr": key, ...}` is a part of a sentence, told in the same language."""
    text = catalogue(lang or language()).get(key) or catalogue("en").get(key)
    if text is None:
        return f"{key} {dict(params)}" if params else key
    return text.format_map(_Kept(params or {}, lang))


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known words that look like `word`, best first: for "did you mean"."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


class _Kept(dict[str, Any]):
    """A missing parameter stays visible as its placeholder: a fault must not fail. Text of others'
    files can't steer the terminal that shows it."""

    def __init__(self, params: Mapping[str, Any], lang: str | None) -> None:
        super().__init__(params)
        self.lang = lang

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, Mapping) and "say" in value:
            return tr(value["say"], value, self.lang)
        return _CONTROL.sub("�", str(value)) if isinstance(value, (str, Path)) else value

    def __missing__(self, key: str) -> str:
        return "{" + key + "}"
