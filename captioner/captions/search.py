"""What a folder's captions say: counts, what goes together, and a small language to find them.

    cat and not dog          whole words or phrases, in any case; underscores are spaces
    "red hair" or (tag:1girl tokens > 75)
    empty   has:trigger   text:catego   tag:*background   file:cat/*.png   tags >= 12

`and` may be left out before a bracket, `not`, or a term with a colon; words that follow one
another are one phrase. `tag:` means a whole tag, `text:` any part; `*` stands for anything.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from captioner.captions.text import fits_star, matches, phrase, tag_key
from core.dataset.captions import split_tags
from core.errors import UserError

# --- statistics -------------------------------------------------------------------------------

_WORDS = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SMALL = frozenset(_WORDS.findall(          # say nothing about a picture
    "a an the of on in at with and or to is are was were by for from its it his her their there "
    "that this as into over under up down has have very some one two while next"))


def count(captions: Iterable[str]) -> list[tuple[str, int]]:
    """(tag, number of captions that have it), most frequent first; the usual spelling is shown.
    Case and underscores don't make a difference."""
    pictures: Counter[str] = Counter()
    spellings: dict[str, Counter[str]] = {}
    for caption in captions:
        tags = split_tags(caption)
        pictures.update({tag_key(tag) for tag in tags})
        for tag in tags:
            spellings.setdefault(tag_key(tag), Counter())[tag] += 1
    return [(spellings[key].most_common(1)[0][0], n) for key, n in
            sorted(pictures.items(), key=lambda pair: (-pair[1], pair[0]))]


def count_words(captions: Iterable[str]) -> list[tuple[str, int]]:
    """The same for the words of sentences; small words such as `the` left out."""
    found: Counter[str] = Counter()
    for caption in captions:
        said = {word.casefold() for word in _WORDS.findall(caption.replace("_", " "))}
        found.update(word for word in said - _SMALL if not word.isdigit())
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


def together(captions: Iterable[str], tag: str) -> list[tuple[str, int, float]]:
    """(other tag, captions that have both, share of the tag's captions), most frequent first."""
    key = tag_key(tag)
    having = [caption for caption in captions
              if key in {tag_key(one) for one in split_tags(caption)}]
    return [(other, n, n / len(having)) for other, n in count(having) if tag_key(other) != key]


def pairs(captions: Iterable[str], most: int = 100) -> list[tuple[str, str, int]]:
    """The tags that stand together most often; of the 200 most frequent tags."""
    listed = list(captions)
    known = {tag_key(tag): tag for tag, _ in count(listed)[:200]}
    found: Counter[tuple[str, str]] = Counter()
    for caption in listed:
        keys = sorted({tag_key(tag) for tag in split_tags(caption)} & known.keys())
        found.update((a, b) for i, a in enumerate(keys) for b in keys[i + 1:])
    ranked = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    return [(known[a], known[b], n) for (a, b), n in ranked]


def rename(old: str, new: str) -> dict[str, Any]:
    """The rule that renames a tag everywhere; where the new one is there already, once."""
    return {"rule": "replace", "find": old, "with": new, "match": "tag"}


def remove(*tags: str) -> dict[str, Any]:
    """The rule that removes tags everywhere."""
    return {"rule": "remove", "tags": list(tags)}


# --- filters ----------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Subject:
    """What a filter looks at."""

    caption: str
    name: str = ""                          # the picture, relative, with slashes
    trigger: str = ""
    count_tokens: Callable[[str], int] | None = None


Test = Callable[[Subject], bool]


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str                               # word | text | compare | ( | ) | end
    text: str
    at: int                                 # column, from 1


_TOKENS = re.compile(r"""\s*(?:
    (?P<text>"(?:[^"\\]|\\.)*")
  | (?P<open>["])
  | (?P<compare><=|>=|!=|==|<|>|=)
  | (?P<bracket>[()])
  | (?P<word>(?:\\.|[^\s"()<>=!\\]|!(?!=)|\\\Z)+)
  | (?P<odd>\S)
)""", re.VERBOSE)
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "=": operator.eq, "==": operator.eq, "!=": operator.ne}
_COUNTS: dict[str, Callable[[Subject], int]] = {
    "tokens": lambda one: _tokens(one),
    "tags": lambda one: len(split_tags(one.caption)),
    "words": lambda one: len(one.caption.split()),
    "chars": lambda one: len(one.caption)}
_HAS: dict[str, Test] = {
    "trigger": lambda one: bool(one.trigger.strip()) and bool(
        phrase(one.trigger).search(one.caption)),
    "caption": lambda one: bool(one.caption)}
_FIELDS = ("tag", "text", "file", "has")


def find(expression: str, captions: Mapping[str, str], trigger: str = "",
         count_tokens: Callable[[str], int] | None = None) -> list[str]:
    """The names of the pictures whose captions fit. Raises UserError with the column of a
    mistake."""
    fits = parse(expression)
    return [name for name, caption in captions.items()
            if fits(Subject(caption, name, trigger, count_tokens))]


def parse(expression: str) -> Test:
    """An empty expression fits everything."""
    return _Parser(expression).whole()


def needs_tokens(expression: str) -> bool:
    return any(token.kind == "word" and token.text.lower() == "tokens"
               for token in _tokenised(expression))


def _tokens(one: Subject) -> int:
    if one.count_tokens is None:
        raise UserError("captions.no_tokenizer")
    return one.count_tokens(one.caption)


def _tokenised(expression: str) -> list[_Token]:
    tokens, at = [], 0
    while found := _TOKENS.match(expression, at):
        kind, start = str(found.lastgroup), found.start(str(found.lastgroup)) + 1
        text = found[kind]
        if kind == "open":
            raise UserError("captions.filter_quote", filter=expression, column=start)
        if kind == "odd":
            _wrong(expression, _Token("odd", text, start))
        tokens.append(_Token(text if kind == "bracket" else kind,
                             _unquoted(text) if kind in ("text", "word") else text, start))
        at = found.end()
    return [*tokens, _Token("end", "", len(expression) + 1)]


def _unquoted(text: str) -> str:
    text = text[1:-1] if text.startswith('"') else text
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _wrong(expression: str, token: _Token) -> NoReturn:
    if token.kind == "end":
        raise UserError("captions.filter_ends", filter=expression, column=token.at)
    raise UserError("captions.filter_wrong", filter=expression, column=token.at, found=token.text)


class _Parser:
    """or < and < not < brackets, comparisons, terms."""

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.tokens = _tokenised(expression)
        self.next = 0
        self.depth = 0

    def whole(self) -> Test:
        if self.token.kind == "end":
            return lambda one: True
        test = self._or()
        if self.token.kind != "end":
            _wrong(self.expression, self.token)
        return test

    @property
    def token(self) -> _Token:
        return self.tokens[self.next]

    def _take(self) -> _Token:
        token = self.token
        self.next += token.kind != "end"
        return token

    def _keyword(self, *words: str) -> bool:
        return self.token.kind == "word" and self.token.text.lower() in words

    def _or(self) -> Test:
        tests = [self._and()]
        while self._keyword("or"):
            self._take()
            tests.append(self._and())
        return tests[0] if len(tests) == 1 else lambda one: any(test(one) for test in tests)

    def _and(self) -> Test:
        tests = [self._not()]
        while self._keyword("and") or not (
                self.token.kind in (")", "end") or self._keyword("or")):
            if self._keyword("and"):
                self._take()
            tests.append(self._not())
        return tests[0] if len(tests) == 1 else lambda one: all(test(one) for test in tests)

    def _not(self) -> Test:
        denied = False
        while self._keyword("not"):
            self._take()
            denied = not denied
        test = self._one()
        return (lambda one: not test(one)) if denied else test

    def _one(self) -> Test:
        if self.token.kind == "(":
            return self._bracket()
        if self._keyword(*_COUNTS) and self.tokens[self.next + 1].kind == "compare":
            return self._comparison()
        if self._keyword("empty"):
            self._take()
            return lambda one: not one.caption.strip()
        if self.token.kind == "text":
            return _has_phrase(self._take().text)
        if self.token.kind == "word" and not self._keyword("and", "or"):
            return self._term()
        _wrong(self.expression, self.token)

    def _bracket(self) -> Test:
        opened = self._take()
        self.depth += 1
        if self.depth > 100:                # Python's own stack has an end
            _wrong(self.expression, opened)
        test = self._or()
        if self.token.kind != ")":
            raise UserError("captions.filter_bracket", filter=self.expression, column=opened.at)
        self._take()
        self.depth -= 1
        return test

    def _comparison(self) -> Test:
        measure = _COUNTS[self._take().text.lower()]
        compare = _COMPARE[self._take().text]
        number = self._take()
        if number.kind != "word" or not re.fullmatch("[0-9]{1,9}", number.text):
            raise UserError("captions.filter_number", filter=self.expression, column=number.at,
                            found=number.text or "-")
        limit = int(number.text)
        return lambda one: compare(measure(one), limit)

    def _term(self) -> Test:
        """`field:value`, or all plain words up to something else as one phrase."""
        field, colon, value = self.token.text.partition(":")
        if colon and field.lower() in _FIELDS:
            return self._of_field(field.lower(), value, self._take())
        words = [self._take().text]
        while self.token.kind == "word" and not self._special():
            words.append(self._take().text)
        return _has_phrase(" ".join(words))

    def _special(self) -> bool:
        field, colon, _ = self.token.text.partition(":")
        counts = self._keyword(*_COUNTS) and self.tokens[self.next + 1].kind == "compare"
        return (self._keyword("and", "or", "not", "empty") or counts
                or bool(colon and field.lower() in _FIELDS))

    def _of_field(self, field: str, value: str, token: _Token) -> Test:
        if not value and self.token.kind == "text":             # tag:"red hair"
            value = self._take().text
        if not value:
            _wrong(self.expression, self.token)
        if field == "has":
            if value.lower() not in _HAS:
                raise UserError("captions.filter_has", filter=self.expression, column=token.at,
                                found=value, known=", ".join(f"has:{one}" for one in _HAS))
            return _HAS[value.lower()]
        if field == "file":
            return lambda one: matches(one.name, value)
        key = tag_key(value)
        if field == "text":
            return lambda one: key in tag_key(one.caption)
        return lambda one: any(fits_star(tag_key(tag), key) for tag in split_tags(one.caption))


def _has_phrase(text: str) -> Test:
    """Whole words, with underscores as spaces on both sides."""
    wanted = " ".join(text.replace("_", " ").split())
    if not wanted:
        return lambda one: True
    if "*" in wanted:
        body = r"\s+".join(r"\S*".join(map(re.escape, word.split("*")))
                           for word in wanted.split())
        pattern = re.compile(rf"(?<!\w){body}(?!\w)", re.IGNORECASE)
    else:
        pattern = phrase(wanted)
    return lambda one: bool(pattern.search(one.caption.replace("_", " ")))


def counted(captions: Sequence[str], trigger: str = "") -> dict[str, Any]:
    """A folder's captions in figures."""
    filled = [caption for caption in captions if caption]
    return {"pictures": len(captions), "captioned": len(filled),
            "with_trigger": sum(bool(phrase(trigger).search(one)) for one in filled)
            if trigger.strip() else None,
            "tags": len(count(filled)),
            "mean_tags": sum(len(split_tags(one)) for one in filled) / max(1, len(filled))}
