"""Small operations on a caption's text: tags, phrases, joining. Pure."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Literal

from core.dataset.captions import one_line, split_tags

Existing = Literal["keep", "add", "replace"]

_HAN = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"            # no spaces between words
WORD = rf"[^\W{_HAN}]"                      # a letter that a neighbour would belong to
PIECES = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")
BARE_BRACKET = re.compile(r"(?<!\\)[()\[\]]")
ESCAPED_BRACKET = re.compile(r"\\+([()\[\]])")


def tag_key(tag: str) -> str:
    """What makes two tags the same: case, underscores, escapes and spaces don't count."""
    plain = ESCAPED_BRACKET.sub(r"\1", tag).replace("_", " ")
    return " ".join(plain.split()).casefold()


@functools.lru_cache(maxsize=1024)
def phrase(text: str) -> re.Pattern[str]:
    """Finds whole words or phrases, in any case: `cat` is not in `category`. Either comma stands
    for both."""
    body = r"\s*[,，]\s*".join(r"\s+".join(map(re.escape, part.split()))
                              for part in re.split("[,，]", text))
    return re.compile(rf"(?<!{WORD}){body}(?!{WORD})", re.IGNORECASE)


def join(parts: Iterable[str], like: str = "") -> str:
    """Joined with commas; with Chinese ones where `like` has no others."""
    mark = "，" if "，" in like and "," not in like else ", "
    return mark.join(part for part in parts if part)


def tidy(text: str) -> str:
    """What an edit leaves behind put right: no empty tags, single spaces, one line."""
    line = one_line(text)
    return join(split_tags(line), like=line)


def merge(existing: str, new: str, mode: Existing) -> str:
    """The caption that a picture gets. `keep`: what is there stays as it is; `add`: tags that
    aren't there yet come after it; `replace`: the new one, but never nothing for something."""
    if not existing or not new:
        return existing or new
    if mode == "replace":
        return new
    if mode == "keep":
        return existing
    known = {tag_key(tag) for tag in split_tags(existing)}
    fresh = [tag for tag in split_tags(new) if tag_key(tag) not in known]
    return join([existing.rstrip(",， "), *fresh], like=existing) if fresh else existing


def matches(name: str, glob: str) -> bool:
    """`cat/*.png` by the whole relative name, `*.png` and `01.png` by the file's name too."""
    glob = glob.replace("\\", "/").removeprefix("./")
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition("/")[2], glob)


def by_tags(caption: str, change: Callable[[list[str]], list[str]]) -> str:
    """The caption with other tags; as it was, to the letter, where they are the same."""
    tags = split_tags(caption)
    changed = change(tags)
    return caption if changed == tags else join(changed, like=caption)


def cut(caption: str, pattern: re.Pattern[str]) -> str:
    """Without all that the pattern finds."""
    rest = caption
    while pattern.search(rest):             # what was apart may meet when something goes
        rest = tidy(pattern.sub("", rest))
    return rest


def fits_star(text: str, pattern: str) -> bool:
    """Only `*` is special: tags are full of brackets and question marks."""
    return text == pattern or ("*" in pattern and re.fullmatch(
        ".*".join(map(re.escape, pattern.split("*"))), text) is not None)


def is_face(tag: str) -> bool:
    """^_^, o_o, >_<: no two letters stand together."""
    return tag.isascii() and not re.search("[A-Za-z0-9]{2}", tag)


def longest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 1..most that fits, if the smaller ones do; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
