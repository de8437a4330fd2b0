"""Small operations on a caption's text: tags, phrases, joining."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from captioner.config import Existing
from core.dataset.captions import one_line, split_tags

# Chinese, Japanese and Korean have no spaces between words: each sign is a word of its own.
_HAN = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORD = rf"[^\W{_HAN}]"                      # a letter of a longer word
PIECES = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")
BARE_BRACKET = re.compile(r"(?<!\\)[()\[\]]")
ESCAPED_BRACKET = re.compile(r"\\+([()\[\]])")


def tag_key(tag: str) -> str:
    """The same for tags that differ in case, underscores, escapes and spaces only."""
    return " ".join(ESCAPED_BRACKET.sub(r"\1", tag).replace("_", " ").split()).casefold()


@functools.lru_cache(maxsize=1024)
def phrase(text: str) -> re.Pattern[str]:
    """A pattern for whole words or phrases, in any case: `cat` is not in `category`. A Western or
    Chinese comma matches both."""
    body = r"\s*[,，]\s*".join(r"\s+".join(map(re.escape, part.split()))
                              for part in re.split("[,，]", text))
    return re.compile(rf"(?<!{WORD}){body}(?!{WORD})", re.IGNORECASE)


def join(parts: Iterable[str], like: str = "") -> str:
    """Joins with commas; with Chinese ones where `like` has no others."""
    mark = "，" if "，" in like and "," not in like else ", "
    return mark.join(part for part in parts if part)


def tidy(text: str) -> str:
    """Cleans up after an edit: no empty tags, single spaces, one line."""
    line = one_line(text)
    return join(split_tags(line), like=line)


def merge(existing: str, new: str, mode: Existing) -> str:
    """The caption that a picture gets. `keep`: the existing one stays; `add`: missing tags come
    after it; `replace`: the new one. An empty caption replaces none."""
    if not existing or not new:
        return existing or new
    if mode == "replace":
        return new
    if mode == "keep":
        return existing
    known = {tag_key(tag) for tag in split_tags(existing)}
    added = [tag for tag in split_tags(new) if tag_key(tag) not in known]
    return join([existing.rstrip(",， "), *added], like=existing) if added else existing


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches the relative name (`cat/*.png`) or the file's own (`*.png`)."""
    glob = glob.replace("\\", "/").removeprefix("./")
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition("/")[2], glob)


def by_tags(caption: str, change: Callable[[list[str]], list[str]]) -> str:
    """Changes the list of tags. Where it stays the same, so does the caption, to the letter."""
    tags = split_tags(caption)
    changed = change(tags)
    return caption if changed == tags else join(changed, like=caption)


def cut(caption: str, pattern: re.Pattern[str]) -> str:
    """Removes all matches of the pattern."""
    rest = caption
    # A removal may bring words together that match then.
    while pattern.search(rest):
        rest = tidy(pattern.sub("", rest))
    return rest


def fits_star(text: str, pattern: str) -> bool:
    """Like a glob, but only `*` is special: tags are full of brackets and question marks."""
    return text == pattern or ("*" in pattern and re.fullmatch(
        ".*".join(map(re.escape, pattern.split("*"))), text) is not None)


def is_face(tag: str) -> bool:
    """Whether a tag is a face such as ^_^, o_o, >_<: it has no two letters side by side."""
    return tag.isascii() and not re.search("[A-Za-z0-9]{2}", tag)


def longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 1..most for which fits(n) is true, by bisection; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
