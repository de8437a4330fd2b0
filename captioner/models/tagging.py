"""Vocabularies for ranking, and how scores become tags. Pure text and numbers, no torch.

A vocabulary is a YAML file of categories (captioner/models/vocabulary/ has ours):

    style:
      templates: ["a picture in {} style", "{a} style painting"]   # {a}: with its article
      written: "{} style"          # how the tag reads; absent: the entry itself
      most: 3                      # tags of this category at most
      threshold: 0.05              # least score of a tag
      relative: 0.2                # least share of the category's best score
      entries: [sepia, pastel]     # a list, or one text with commas and line ends

or a .txt with one entry a line. Scores are a softmax over the category's own entries, so that a
score answers "which of these words, if any": categories are neither summed nor compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captioner.base import Tag
from core import serialization
from core.errors import UserError

BUILT_IN = Path(__file__).parent / "vocabulary"
PLAIN = ("a photo of {a}", "a picture of {a}", "{}")
_KEYS = {"templates", "written", "most", "threshold", "relative", "entries"}


@dataclass(frozen=True, slots=True)
class Category:
    name: str
    entries: tuple[str, ...]
    templates: tuple[str, ...] = PLAIN
    written: str = "{}"
    most: int = 3
    threshold: float = 0.05
    relative: float = 0.2

    def prompts(self, entry: str) -> list[str]:
        """What the text encoder reads; the embeddings of all templates are averaged."""
        return list(dict.fromkeys(fill(template, entry) for template in self.templates))

    def tag(self, entry: str) -> str:
        return self.written.replace("{}", entry)


TokenizerSpec = tuple[Category, ...]


def fill(template: str, entry: str) -> str:
    """'{a} thing' with 'old' -> 'an old thing'; what looks like more than one gets no article."""
    return template.replace("{a}", _with_article(entry)).replace("{}", entry)


def _with_article(entry: str) -> str:
    several = ((entry.endswith("s") and not entry.endswith(("ss", "us", "is")))
               or entry.startswith(("two ", "a ", "an ", "the ")))
    return entry if several else f"{'an' if entry[:1].lower() in 'aeiou' else 'a'} {entry}"


def digest(vocabulary: TokenizerSpec) -> str:
    """Names what is embedded: entries and templates, not how tags are chosen."""
    asked = [(c.name, c.entries, c.templates) for c in vocabulary]
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:20]


# --- choosing ---------------------------------------------------------------------------------

def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, entries) -> each row sums to one."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    total: NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
    return total


def choose(category: Category, scores: Sequence[float] | NDArray[np.float64],
           threshold: float | None = None, excluded: Iterable[str] = ()) -> list[Tag]:
    """The category's tags for one picture, best first. `threshold` replaces both of the
    category's own measures."""
    values = np.asarray(scores, np.float64)
    least = (max(category.threshold, category.relative * float(values.max(initial=0.0)))
             if threshold is None else threshold)
    unwanted = {plain(name) for name in excluded}
    found: list[Tag] = []
    for index in np.argsort(-values, kind="stable"):
        name = category.tag(category.entries[index])
        if values[index] < least or len(found) == category.most:
            break
        if plain(name) not in unwanted:
            found.append(Tag(name, round(float(values[index]), 5), category.name))
    return found


def best(tags: Iterable[Tag], most: int) -> tuple[Tag, ...]:
    """All categories' tags, best first; a name that stands in two keeps its better place."""
    ordered = sorted(tags, key=lambda tag: -tag.score)
    unique = {plain(tag.name): tag for tag in reversed(ordered)}
    return tuple(tag for tag in ordered if unique[plain(tag.name)] is tag)[:most]


def plain(name: str) -> str:
    """The same word for blue_sky, 'Blue sky' and blue-sky."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


# --- reading ----------------------------------------------------------------------------------

def built_in() -> TokenizerSpec:
    return tuple(category for path in sorted(BUILT_IN.glob("*.yaml"))
                 for category in load_vocabulary(path))


def load_vocabulary(path: Path) -> TokenizerSpec:
    """Raises UserError("clip.bad_vocabulary") with what is wrong, and where."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, getattr(error, "strerror", None) or str(error)) from None
    return parse_lines(text, path) if path.suffix.lower() == ".txt" else parse_yaml(text, path)


def parse_lines(text: str, path: Path) -> TokenizerSpec:
    lines = (line.partition("#")[0] for line in text.splitlines())
    entries = _unique(lines)
    if not entries:
        raise _bad(path, "no entries")
    return (Category("general", entries, most=500),)


def parse_yaml(text: str, path: Path) -> TokenizerSpec:
    try:
        data = serialization.from_yaml(text)
    except ValueError as error:
        raise _bad(path, str(error)) from None
    if not isinstance(data, dict) or not data:
        raise _bad(path, "expected categories with their entries")
    return tuple(_category(str(name), given, path) for name, given in data.items())


def _category(name: str, given: Any, path: Path) -> Category:
    if not isinstance(given, Mapping):
        given = {"entries": given}
    unknown = sorted(map(str, given.keys() - _KEYS))
    if unknown:
        raise _bad(path, f"{name}: unknown key {unknown[0]}; known: {', '.join(sorted(_KEYS))}")
    entries = given.get("entries")
    if isinstance(entries, str):
        entries = entries.replace("\n", ",").split(",")
    if not isinstance(entries, list) or not _unique(entries):
        raise _bad(path, f"{name}: no entries")
    options: dict[str, Any] = {"entries": _unique(entries)}
    options |= _texts(name, given, path) | _numbers(name, given, path)
    return Category(name, **options)


def _texts(name: str, given: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("templates", "written"):
        if (value := given.get(key)) is None:
            continue
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(t, str) and ("{}" in t or "{a}" in t) for t in texts):
            raise _bad(path, f"{name}: {key} needs {{}} where the entry goes")
        found[key] = tuple(texts) if key == "templates" else texts[0].replace("{a}", "{}")
    return found


def _numbers(name: str, given: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, kind, top in (("most", int, 500), ("threshold", float, 1), ("relative", float, 1)):
        if (value := given.get(key)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 <= value <= top:
            raise _bad(path, f"{name}: {key} must be a number from 0 to {top}")
        found[key] = kind(value)
    return found


def _unique(entries: Iterable[Any]) -> tuple[str, ...]:
    """Without blanks and repeats; a bare 35 is the word it looks like."""
    words = (" ".join(str(entry).split()) for entry in entries if entry is not None)
    return tuple(dict.fromkeys(word for word in words if word))


def _bad(path: Path, problem: str) -> UserError:
    return UserError("clip.bad_vocabulary", file=path, problem=problem)
