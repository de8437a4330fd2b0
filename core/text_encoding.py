"""Text files of unknown encoding: which one they are in, as one decision for all files of a folder.

Valid UTF-8 is UTF-8. All else is weighed: each encoding costs a text what its letters would be
worth in the languages that it was made for (rare letters, letters between letters of another
alphabet and words that nobody writes cost more), and the cheapest one wins. Captions are short:
libraries that guess encodings want paragraphs and are wrong about single words.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from core.text_letters import ASCII, TITLES, Language, languages

# UTF-32's mark begins as UTF-16's does, and is looked for first.
_BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))
_HAN = re.compile(r"[\0-\x7f\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
_NO_TEXT = re.compile("[\0-\x08\x0e-\x1a\x80-\x9f\ue000-\uf8ff]")   # controls, private use
# a word in Latin, Greek, Cyrillic, Armenian, Hebrew or Arabic letters
_ONE_SCRIPT = re.compile("|".join(rf"[\0-\x7f\xa0-\xbf{script}]*" for script in (
    r"\xc0-\u024f\u0300-\u036f", r"\u0370-\u03ff", r"\u0400-\u045f\u0490\u0491",
    r"\u0531-\u058a", r"\u05be-\u05ea", r"\u0600-\u06ff")))
# A byte below @ ends a word in every encoding here; digits may be part of a sign of GB18030.
_WORDS = re.compile(rb"[^\x00-\x2f\x3a-\x3f]+")
CLEAR = 4.0                     # the next encoding costs so much more, or the reading is in doubt
MOST_FROM_OTHERS = 10.0         # what a folder's other files add to a file's own words
UNREADABLE = 30.0               # a word that an encoding can't read
STRANGE = 5.0                   # a reading whose signs cost more on average is in doubt
LONGEST_SAMPLE = 2**16          # bytes of a file that are weighed


@dataclass(frozen=True, slots=True)
class Reading:
    """A file's text, and how sure it is."""

    text: str
    encoding: str
    doubt: bool = False                     # another encoding would read it nearly as well

    @property
    def title(self) -> str:
        """The encoding as people know it."""
        return TITLES.get(self.encoding, "UTF-8")


class Decoder:
    """Reads a folder's text files, weighing the words of all of them."""

    def __init__(self, files: Iterable[bytes]) -> None:
        self._all: Counter[str] = Counter()
        for data in files:
            if _plain(data) is None:
                self._all.update(_costs(data))

    def read(self, data: bytes) -> Reading:
        """Reads one of the files. Raises ValueError where it is no text."""
        if (encoding := _plain(data)) is not None:
            plain = data.decode(encoding)
            if "\0" in plain:
                raise ValueError("it holds binary data")
            return Reading(plain, encoding, encoding == "utf-8" and _looks_misread(plain, data))
        own = _costs(data)
        others = {name: cost - own[name] for name, cost in self._all.items()}
        least = min(others.values(), default=0.0)
        total = {name: cost + min(others.get(name, 0.0) - least, MOST_FROM_OTHERS)
                 for name, cost in own.items()}
        readings: dict[str, str] = {}
        for name in sorted(total, key=lambda name: total[name]):
            if (text := _decoded(data, name)) is not None and text not in readings.values():
                readings[name] = text
        if not readings:
            raise ValueError("it is in none of the encodings known here, or no text")
        best, *rest = readings
        doubt = (best == "utf-8-broken" or (bool(rest) and total[rest[0]] - total[best] < CLEAR)
                 or own[best] > STRANGE * sum(not sign.isascii() for sign in readings[best]))
        return Reading(readings[best], best, doubt)


def read(data: bytes) -> Reading:
    """Reads a file that stands alone. Raises ValueError where it is no text."""
    return Decoder(()).read(data)


def decode_text(data: bytes) -> str:
    """Returns the text of a config or the like, which nobody is shown to ask whether it is right.

    Valid UTF-8 of which no word makes sense is Chinese here. Raises ValueError where it is no text,
    and where two encodings fit.
    """
    reading = read(data)
    if reading.doubt and reading.encoding == "utf-8":
        return data.decode("gb18030")
    if reading.doubt:
        raise ValueError(f"it may be {reading.title} or another encoding; save it as UTF-8")
    return reading.text


def _plain(data: bytes) -> str | None:
    """The encoding of a text that tells it: by its mark, as valid UTF-8, or by UTF-16's zeros."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return encoding
    # Letters of the Latin alphabet have a zero as every second byte.
    if b"\0" in data[:-1] and len(data) % 2 == 0:
        for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
            letters = "" if 0 in data[1 - start::2] else _decoded(data, encoding) or ""
            if "".join(letters.split()).isprintable() and letters:
                return encoding
    return None if _decoded(data, "utf-8") is None and b"\0" not in data else "utf-8"


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        if encoding != "utf-8-broken":
            text = data.decode(encoding)
            return None if encoding != "utf-8" and _NO_TEXT.search(text) else text
    except UnicodeDecodeError:
        return None
    # A caption in UTF-8 that was cut at some length, for example: most of its signs are whole.
    text = data.decode("utf-8", "replace")
    whole = sum(not sign.isascii() for sign in text) - text.count("\ufffd")
    return text if whole >= text.count("\ufffd") else None


def _looks_misread(text: str, data: bytes) -> bool:
    """Whether `text`, which is valid UTF-8, may be short Chinese text in GB18030: the bytes of
    "one cat" are a Cyrillic, a Hebrew and a French letter. No language mixes scripts in a word."""
    if text.isascii() or max(text) > "\u07ff":
        return False
    other = _decoded(data, "gb18030")
    if other is None or not _HAN.fullmatch(other):
        return False
    return (not all(map(_ONE_SCRIPT.fullmatch, text.split()))
            or not (re.search("[A-Za-z]", text) or text.strip() > "\u0370"))


# --- what a text costs in an encoding ---------------------------------------------------------

def _costs(data: bytes) -> dict[str, float]:
    """What a file costs in each encoding, plain ASCII of its length being 0."""
    totals = [language.rarity for language in languages()]
    for word in _WORDS.findall(data[:LONGEST_SAMPLE]):
        if not word.isascii():
            totals = [sum(pair) for pair in zip(totals, _word_costs(word), strict=True)]
    costs: dict[str, float] = {}
    for language, total in zip(languages(), totals, strict=True):
        costs[language.codec] = min(total, costs.get(language.codec, total))
    return costs


@functools.lru_cache(maxsize=2**14)
def _word_costs(word: bytes) -> list[float]:
    return [UNREADABLE if (text := _decoded(word, language.codec)) is None
            else _cost(text, language) - ASCII * len(word) for language in languages()]


def _cost(word: str, language: Language) -> float:
    """What a word costs whose letters are read so."""
    total, before = 0.0, " "
    for here in word:
        total += _letter_cost(here, language)
        if before.isalpha() and here.isalpha():
            plain = before.isascii(), here.isascii()
            if language.latin:
                total += 2.5 if plain == (False, False) else 0
            elif plain[0] != plain[1]:
                letter = before if plain[0] else here
                total += 8 if language.vowels else 3 if letter.islower() else 1
            total += 6 if before.islower() and here.isupper() else 0
        before = here
    if language.vowels:
        total += 6 * len(re.findall(r"(?<=[^\W\d_])[^\w\s’‘'·–—…-](?=[^\W\d_])", word))
        total += sum(4 for part in re.findall(r"[^\W\d_]{3,}", word.lower())
                     if not part.isascii() and not set(part) & set(language.vowels))
    return total


def _letter_cost(letter: str, language: Language) -> float:
    if letter.isascii():
        return ASCII
    if (cost := language.letters.get(letter)) is not None:
        return cost
    return language.plain if letter in language.common else language.other
