"""Findings about captions: missing, empty, the same, too long, encodings, trigger word, tags."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from core import prompt_markup
from core.dataset.captions import split_tags, with_trigger
from core.dataset.checks.findings import Finding, Level, Subject, worst_first
from core.dataset.crops import BaseFacts
from core.dataset.image_folder import Picture

FEWEST_FOR_TAGS = 4             # captioned pictures; of fewer, all may share a tag by chance
SHOWN = 8                       # tags named in a sentence
TAG_WORDS = 4                   # a longer one is a clause, not a tag
COUNTED_AT_ONCE = 1000          # captions; so that the tokenizer needs little memory
SHORTEST_FUSED = 3              # letters of a trigger; shorter ones lie in many words by chance

Named = Sequence[tuple[str, Picture]]       # image_folder.relative_name of each picture


def check_captions(names: Sequence[str], pictures: Sequence[Picture], facts: BaseFacts,
                   trigger: str = "", encodings: Mapping[Path, str] | None = None,
                   unreadable: Collection[Path] = ()) -> Iterator[Finding]:
    """Yields all findings about captions; `names` are those of the pictures, in their order.

    `encodings`: image_folder.Dataset.encodings; `unreadable`: caption files of which that was said.
    """
    trigger = trigger.strip()
    named = list(zip(names, pictures, strict=True))
    missing = [Subject(name) for name, picture in named
               if not picture.caption and picture.caption_file is None]
    empty = [Subject(name, {"sidecar": picture.caption_file.name}) for name, picture in named
             if not picture.caption and picture.caption_file is not None
             and picture.caption_file not in unreadable]
    yield from _finding("caption_missing", "warning", missing, total=len(named))
    yield from _finding("caption_empty", "warning", empty)
    yield from check_repeated(named)
    yield from check_length(named, facts, trigger)
    yield from check_encodings(named, encodings or {})
    yield from check_markup(named, trigger)
    if trigger:
        yield from check_trigger(named, trigger)
    yield from check_tags(named, trigger)


def _finding(code: str, level: Level, subjects: Sequence[Subject], **params: object
             ) -> Iterator[Finding]:
    if subjects:
        yield Finding(f"checks.{code}", level, tuple(subjects), params, ("edit",))


def check_repeated(named: Named) -> Iterator[Finding]:
    # Only what the user wrote: captions that come from a folder's name are the same by intent.
    written = [(name, picture.caption) for name, picture in named
               if picture.caption and picture.caption_file]
    counts = Counter(caption.casefold() for _, caption in written)
    repeated = [(counts[caption.casefold()], Subject(name, {"caption": caption}))
                for name, caption in written if counts[caption.casefold()] > 1]
    yield from _finding("caption_same", "warning", worst_first(repeated),
                        texts=sum(count > 1 for count in counts.values()))


def check_length(named: Named, facts: BaseFacts, trigger: str) -> Iterator[Finding]:
    """Finds captions that have more tokens than the base reads."""
    if facts.count_tokens is None:
        return
    # A token is at least one byte: most captions needn't be counted.
    long = [(name, text) for name, picture in named
            if len((text := with_trigger(picture.caption, trigger)).encode()) > facts.token_limit]
    subjects = []
    for start in range(0, len(long), COUNTED_AT_ONCE):
        some = long[start:start + COUNTED_AT_ONCE]
        counts = facts.count_tokens([text for _, text in some])
        subjects += [(tokens, Subject(name, {"tokens": tokens, "limit": facts.token_limit}))
                     for (name, _), tokens in zip(some, counts, strict=True)
                     if tokens > facts.token_limit]
    yield from _finding("caption_long", "warning", worst_first(subjects), limit=facts.token_limit)


# --- encodings --------------------------------------------------------------------------------

def check_encodings(named: Named, encodings: Mapping[Path, str]) -> Iterator[Finding]:
    odd = {file: Subject(name, {"sidecar": file.name, "encoding": encodings[file]})
           for name, picture in named if (file := picture.caption_file) in encodings
           and file is not None and encodings[file] != "UTF-8"}
    yield from _finding("caption_encoding", "note", list(odd.values()))
    garbled = [Subject(name, {"caption": picture.caption[:80]}) for name, picture in named
               if is_garbled(picture.caption)]
    yield from _finding("caption_garbled", "warning", garbled)


def is_garbled(text: str) -> bool:
    """Whether a text was once decoded wrongly.

    Then it has replacement characters, signs of HTML or JSON such as &amp; and \\u00e9, or UTF-8
    that was read as Windows-1252, such as "cafÃ©".
    """
    if re.search(r"\ufffd|锟斤拷|&(amp|quot|apos|lt|gt|nbsp|#\d{2,5});|\\u[0-9a-f]{4}", text):
        return True
    if text.isascii():
        return False
    try:
        return text.encode("cp1252").decode("utf-8") != text
    except (UnicodeEncodeError, UnicodeDecodeError):
        return False


# --- what other programs mean -----------------------------------------------------------------

def check_markup(named: Named, trigger: str) -> Iterator[Finding]:
    """Finds markup of other programs, which is learned as plain text."""
    # A tag a line is a list; of whole captions, each may be meant as one.
    several = [Subject(name, {"lines": len(picture.lines)}) for name, picture in named
               if picture.lines and all(len(split_tags(one)) > 1 or len(one.split()) > TAG_WORDS
                                        for one in picture.lines)]
    yield from _finding("caption_lines", "note", several)
    yield from _finding("caption_markup", "warning", [
        Subject(name, {"part": part}, f"checks.markup_{kind}")
        for name, picture in named
        for kind, part in prompt_markup.unread_in(picture.caption, trigger).items()])


# --- trigger word -----------------------------------------------------------------------------

def check_trigger(named: Named, trigger: str) -> Iterator[Finding]:
    placed = [(name, prompt_markup.placed(picture.caption, trigger)) for name, picture in named]
    without = [(name, caption) for name, caption in placed
               if with_trigger(caption, trigger) != caption]
    fused = {name: word for name, caption in without if (word := fused_with(caption, trigger))}
    yield from _finding("trigger_fused", "warning",
                        [Subject(name, {"word": word}) for name, word in fused.items()],
                        trigger=trigger)
    missing = [Subject(name) for name, _ in without if name not in fused]
    yield from _finding("trigger_missing", "note", missing, trigger=trigger, total=len(named))


def fused_with(caption: str, trigger: str) -> str:
    """Returns the word that swallowed the trigger ("m1aperson" for "m1a"), or ""."""
    if len(trigger.strip()) < SHORTEST_FUSED:
        return ""
    phrase = r"[\s_-]*".join(map(re.escape, trigger.split()))
    match = re.search(rf"[^\s,，]*{phrase}[^\s,，]*", caption, re.IGNORECASE)
    return match[0] if match and with_trigger(caption, trigger) != caption else ""


# --- tags -------------------------------------------------------------------------------------

def check_tags(named: Named, trigger: str) -> Iterator[Finding]:
    """Finds tags that all captions share, and, if captions are tags at all, those of one alone."""
    names_of: dict[str, list[str]] = {}
    captioned = 0
    for name, picture in named:
        tags = dict.fromkeys(tag.casefold() for tag in split_tags(
            prompt_markup.joined(picture.caption)))
        captioned += bool(tags)
        for tag in tags:
            names_of.setdefault(tag, []).append(name)
    if captioned < FEWEST_FOR_TAGS:
        return
    everywhere = sorted(tag for tag, names in names_of.items()
                        if len(names) == captioned and tag != trigger.casefold())
    if everywhere:
        yield Finding("checks.tag_everywhere", "note", (),
                      {"tags": _listed(everywhere), "count": len(everywhere)}, ("edit",))
    once = [(tag, names[0]) for tag, names in names_of.items()
            if len(names) == 1 and tag not in everywhere and len(tag.split()) <= TAG_WORDS]
    # Prose has commas, too: in tags, most parts are short, and some come more than once.
    short = sum(len(names) for tag, names in names_of.items() if len(tag.split()) <= TAG_WORDS)
    are_tags = (2 * short > sum(map(len, names_of.values()))
                and any(len(names) > 1 for names in names_of.values()))
    if once and are_tags:
        yield Finding("checks.tag_once", "note",
                      tuple(Subject(name, {"tag": tag}) for tag, name in once),
                      {"tags": _listed([tag for tag, _ in once]), "count": len(once)}, ("edit",))


def _listed(tags: Sequence[str]) -> str:
    return ", ".join(tags[:SHOWN]) + (" …" if len(tags) > SHOWN else "")
