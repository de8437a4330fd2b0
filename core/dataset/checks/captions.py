"""Findings about captions: missing, empty, the same, too long, encodings, trigger word, tags."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from core import serialization, threads
from core.dataset.captions import split_tags, with_trigger
from core.dataset.checks.findings import Finding, Subject, worst_first
from core.dataset.crops import BaseFacts
from core.dataset.image_folder import Picture

FEWEST_FOR_TAGS = 4             # captioned pictures; with fewer, a tag on all of them is chance
SHOWN = 8                       # tags named in a sentence
TAG_WORDS = 4                   # a longer one is a clause, not a tag
COUNTED_AT_ONCE = 1000
SHORTEST_FUSED = 3              # letters of a trigger; shorter ones lie in many words by chance


def check_captions(names: Sequence[str], pictures: Sequence[Picture], facts: BaseFacts,
                   trigger: str = "") -> Iterator[Finding]:
    """`names` are the pictures' own, in their order."""
    named = list(zip(names, pictures, strict=True))
    yield from _missing(named)
    yield from _same(named)
    yield from _too_long(named, facts, trigger)
    yield from _encodings(named)
    if trigger.strip():
        yield from _trigger(named, trigger.strip())
    yield from _tags(named, trigger.strip())


Named = Sequence[tuple[str, Picture]]


def _finding(code: str, level: str, subjects: Sequence[Subject], **params: object) -> Finding:
    return Finding(f"checks.{code}", "warning" if level == "warning" else "note",
                   tuple(subjects), params, ("edit",))


def _missing(named: Named) -> Iterator[Finding]:
    bare = [(name, one.caption_file) for name, one in named if not one.caption]
    missing = [Subject(name) for name, file in bare if file is None]
    empty = [Subject(name, {"sidecar": file.name}) for name, file in bare if file is not None]
    if missing:
        yield _finding("caption_missing", "warning", missing, total=len(named))
    if empty:
        yield _finding("caption_empty", "warning", empty)


def _same(named: Named) -> Iterator[Finding]:
    """Captions that the user wrote; those that a folder's name gives are the same by intent."""
    written = [(name, one.caption) for name, one in named if one.caption and one.caption_file]
    counts = Counter(caption.casefold() for _, caption in written)
    twins = [(name, caption) for name, caption in written if counts[caption.casefold()] > 1]
    if twins:
        subjects = worst_first([(counts[caption.casefold()], Subject(name, {"caption": caption}))
                                for name, caption in twins])
        texts = sum(count > 1 for count in counts.values())
        yield _finding("caption_same", "warning", subjects, texts=texts)


def _too_long(named: Named, facts: BaseFacts, trigger: str) -> Iterator[Finding]:
    if facts.count_tokens is None:
        return
    # a token is at least one byte: most captions needn't be counted
    long = [(name, text) for name, one in named
            if len((text := with_trigger(one.caption, trigger)).encode()) > facts.token_limit]
    found = []
    for start in range(0, len(long), COUNTED_AT_ONCE):
        some = long[start:start + COUNTED_AT_ONCE]
        counts = facts.count_tokens([text for _, text in some])
        found += [(tokens, Subject(name, {"tokens": tokens, "limit": facts.token_limit}))
                  for (name, _), tokens in zip(some, counts, strict=True)
                  if tokens > facts.token_limit]
    if found:
        yield _finding("caption_long", "warning", worst_first(found), limit=facts.token_limit)


# --- encodings --------------------------------------------------------------------------------

def _encodings(named: Named) -> Iterator[Finding]:
    files = {one.caption_file: name for name, one in named if one.caption_file is not None}
    odd = [Subject(files[path], {"sidecar": path.name, "encoding": encoding})
           for path, encoding in zip(files, threads.in_order(_odd_encoding, files, "captions"),
                                     strict=True) if encoding]
    if odd:
        yield _finding("caption_encoding", "note", odd)
    garbled = [Subject(name, {"caption": one.caption[:80]}) for name, one in named
               if is_garbled(one.caption)]
    if garbled:
        yield _finding("caption_garbled", "warning", garbled)


def _odd_encoding(path: Path) -> str:
    """The encoding of a file that other programs won't read as UTF-8; "": they will."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    for bom, name in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
                      (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if data.startswith(bom):
            return name
    try:
        read_here = serialization.decode_text(data)
    except ValueError:
        return ""                           # dataset.caption_unreadable says so
    try:
        return "" if data.decode("utf-8-sig") == read_here else "GB18030"
    except UnicodeDecodeError:
        return "GB18030" if _is(data, "gb18030") else "Windows-1252"


def _is(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def is_garbled(text: str) -> bool:
    """A text that was once decoded wrongly: replacement characters, or UTF-8 read as
    Windows-1252 (such as "cafÃ©")."""
    if "\ufffd" in text:
        return True
    if text.isascii():
        return False
    try:
        return text.encode("cp1252").decode("utf-8") != text
    except (UnicodeEncodeError, UnicodeDecodeError):
        return False


# --- trigger word -----------------------------------------------------------------------------

def _trigger(named: Named, trigger: str) -> Iterator[Finding]:
    lacking = [(name, one.caption) for name, one in named
               if with_trigger(one.caption, trigger) != one.caption]
    fused = {name: word for name, caption in lacking if (word := fused_with(caption, trigger))}
    if fused:
        yield _finding("trigger_fused", "warning",
                       [Subject(name, {"word": word}) for name, word in fused.items()],
                       trigger=trigger)
    missing = [Subject(name) for name, _ in lacking if name not in fused]
    if missing:
        yield _finding("trigger_missing", "note", missing, trigger=trigger, total=len(named))


def fused_with(caption: str, trigger: str) -> str:
    """The word of a caption that swallowed the trigger ("m1aperson" for "m1a"), or ""."""
    parts = list(map(re.escape, trigger.split()))
    if len(trigger.strip()) < SHORTEST_FUSED:
        return ""
    phrase = r"[\s_-]*".join(parts)
    found = re.search(rf"[^\s,，]*{phrase}[^\s,，]*", caption, re.IGNORECASE)
    return found[0] if found and with_trigger(caption, trigger) != caption else ""


# --- tags -------------------------------------------------------------------------------------

def _tags(named: Named, trigger: str) -> Iterator[Finding]:
    """Only for captions that are tags: most of their parts are short."""
    where: dict[str, list[str]] = {}
    captioned = 0
    for name, one in named:
        tags = dict.fromkeys(tag.casefold() for tag in split_tags(one.caption))
        captioned += bool(tags)
        for tag in tags:
            where.setdefault(tag, []).append(name)
    if captioned < FEWEST_FOR_TAGS:
        return
    own = trigger.casefold()
    everywhere = sorted(tag for tag, names in where.items()
                        if len(names) == captioned and tag != own)
    if everywhere:
        yield Finding("checks.tag_everywhere", "note", (),
                      {"tags": _some(everywhere), "count": len(everywhere)}, ("edit",))
    once = [(tag, names[0]) for tag, names in where.items()
            if len(names) == 1 and tag not in everywhere and len(tag.split()) <= TAG_WORDS]
    if once and _are_tags(where):
        yield Finding("checks.tag_once", "note",
                      tuple(Subject(name, {"tag": tag}) for tag, name in once),
                      {"tags": _some([tag for tag, _ in once]), "count": len(once)}, ("edit",))


def _are_tags(where: dict[str, list[str]]) -> bool:
    short = sum(len(names) for tag, names in where.items() if len(tag.split()) <= TAG_WORDS)
    return 2 * short > sum(map(len, where.values())) and any(len(n) > 1 for n in where.values())


def _some(tags: Sequence[str]) -> str:
    return ", ".join(tags[:SHOWN]) + (" …" if len(tags) > SHOWN else "")
