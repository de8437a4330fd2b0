"""Vocabularies for ranking, and how scores become tags. No torch.

A vocabulary is a YAML file of categories (captioner/models/vocabulary/ has ours):

    style:
      templates: ["a picture in {} style", "{a} style painting"]   # {a}: with its article
      written: "{} style"          # the tag's text; absent: the entry itself
      most: 3                      # tags of this category at most
      threshold: 0.05              # least score of a tag
      relative: 0.2                # least share of the category's best score
      entries: [sepia, pastel]     # a list, or one text with commas and line ends

or a .txt with one entry a line. Scores are a softmax over the entries of one category: they say
which of its words fits best. Scores of different categories can't be compared.
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
TEMPLATES = ("a photo of {a}", "a picture of {a}", "{}")
_KEYS = {"templates", "written", "most", "threshold", "relative", "entries"}


@dataclass(frozen=True, slots=True)
class Category:
    name: str
    entries: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES
    written: str = "{}"
    most: int = 3
    threshold: float = 0.05
    relative: float = 0.2

    def prompts(self, entry: str) -> list[str]:
        """What the text encoder reads; the embeddings of all templates are averaged."""
        return list(dict.fromkeys(fill(template, entry) for template in self.templates))

    def tag(self, entry: str) -> str:
        return self.written.replace("{}", entry)


Vocabulary = tuple[Category, ...]


def fill(template: str, entry: str) -> str:
    """'{a} thing' with 'old' -> 'an old thing'; plurals and entries with an article get none."""
    article = "an " if entry[:1].lower() in "aeiou" else "a "
    if ((entry.endswith("s") and not entry.endswith(("ss", "us", "is")))
            or entry.startswith(("two ", "a ", "an ", "the "))):
        article = ""
    return template.replace("{a}", article + entry).replace("{}", entry)


def digest(vocabulary: Vocabulary) -> str:
    """A hash of what the embeddings depend on: entries and templates, not how tags are chosen."""
    embedded = [(c.name, c.entries, c.templates) for c in vocabulary]
    return hashlib.sha256(repr(embedded).encode()).hexdigest()[:20]


# --- choosing ---------------------------------------------------------------------------------

def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, entries) -> (N, entries), where each row sums to one."""
    # Without the largest logit exp() would overflow.
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    shares: NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
    return shares


def choose(category: Category, scores: Sequence[float] | NDArray[np.float64],
           threshold: float | None = None, excluded: Iterable[str] = ()) -> list[Tag]:
    """The category's tags for one picture, best first. `threshold` replaces the category's own
    `threshold` and `relative`."""
    values = np.asarray(scores, np.float64)
    least = (max(category.threshold, category.relative * float(values.max(initial=0.0)))
             if threshold is None else threshold)
    unwanted = {plain(name) for name in excluded}
    tags: list[Tag] = []
    # A stable order, so that equal scores give the same tags everywhere.
    for index in np.argsort(-values, kind="stable"):
        name = category.tag(category.entries[index])
        if values[index] < least or len(tags) == category.most:
            break
        if plain(name) not in unwanted:
            tags.append(Tag(name, round(float(values[index]), 5), category.name))
    return tags


def best(tags: Iterable[Tag], most: int) -> tuple[Tag, ...]:
    """The best tags of all categories; of a name in two categories, the better one."""
    ordered = sorted(tags, key=lambda tag: -tag.score)
    unique = {plain(tag.name): tag for tag in reversed(ordered)}
    return tuple(tag for tag in ordered if unique[plain(tag.name)] is tag)[:most]


def plain(name: str) -> str:
    """The same text for blue_sky, 'Blue sky' and blue-sky."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


# --- reading ----------------------------------------------------------------------------------

def built_in() -> Vocabulary:
    return tuple(category for path in sorted(BUILT_IN.glob("*.yaml"))
                 for category in load_vocabulary(path))


def load_vocabulary(path: Path) -> Vocabulary:
    """Raises UserError("clip.bad_vocabulary") with what is wrong, and where."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, getattr(error, "strerror", None) or str(error)) from None
    return parse_lines(text, path) if path.suffix.lower() == ".txt" else parse_yaml(text, path)


def parse_lines(text: str, path: Path) -> Vocabulary:
    lines = (line.partition("#")[0] for line in text.splitlines())
    entries = _unique(lines)
    if not entries:
        raise _bad(path, "no entries")
    return (Category("general", entries, most=500),)


def parse_yaml(text: str, path: Path) -> Vocabulary:
    try:
        data = serialization.from_yaml(text)
    except ValueError as error:
        raise _bad(path, str(error)) from None
    if not isinstance(data, dict) or not data:
        raise _bad(path, "expected categories with their entries")
    vocabulary = []
    for name, options in data.items():
        # A category may be just a list of its entries.
        if not isinstance(options, Mapping):
            options = {"entries": options}
        unknown = sorted(map(str, options.keys() - _KEYS))
        if unknown:
            raise _bad(path, f"{name}: unknown key {unknown[0]}; known: {', '.join(sorted(_KEYS))}")
        entries = options.get("entries")
        if isinstance(entries, str):
            entries = entries.replace("\n", ",").split(",")
        if not isinstance(entries, list) or not _unique(entries):
            raise _bad(path, f"{name}: no entries")
        values: dict[str, Any] = {"entries": _unique(entries)}
        for key in ("templates", "written"):
            if (value := options.get(key)) is None:
                continue
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) and ("{}" in text or "{a}" in text)
                                    for text in texts):
                raise _bad(path, f"{name}: {key} needs {{}} where the entry goes")
            values[key] = tuple(texts) if key == "templates" else texts[0].replace("{a}", "{}")
        for key, kind, top in (("most", int, 500), ("threshold", float, 1), ("relative", float, 1)):
            if (value := options.get(key)) is None:
                continue
            # YAML's true is an int in Python.
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or (
                    not 0 <= value <= top):
                raise _bad(path, f"{name}: {key} must be a number from 0 to {top}")
            values[key] = kind(value)
        vocabulary.append(Category(str(name), **values))
    return tuple(vocabulary)


def _unique(entries: Iterable[Any]) -> tuple[str, ...]:
    """The entries without blanks and repeats. YAML reads a bare 35 as a number: it is a word."""
    words = (" ".join(str(entry).split()) for entry in entries if entry is not None)
    return tuple(dict.fromkeys(word for word in words if word))


def _bad(path: Path, problem: str) -> UserError:
    return UserError("clip.bad_vocabulary", file=path, problem=problem)
