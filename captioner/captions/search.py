"""Statistics of a folder's captions, and a small filter language to find some of them.

    cat and not dog          whole words or phrases, in any case; underscores are spaces
    "red hair" or (tag:1girl tokens > 75)
    empty   has:trigger   text:catego   tag:*background   file:cat/*.png   tags >= 12

`and` may be left out before a bracket, `not`, or a term with a colon; words side by side are one
phrase. `tag:` means a whole tag, `text:` any part; `*` stands for anything.
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
# Stop words: they say nothing about a picture.
_STOP_WORDS = frozenset(_WORDS.findall(
    "a an the of on in at with and or to is are was were by for from its it his her their there "
    "that this as into over under up down has have very some one two while next"))


def count(captions: Iterable[str]) -> list[tuple[str, int]]:
    """(tag, number of captions that have it), most frequent first. Tags that differ in case and
    underscores only are one, in their most frequent spelling."""
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
    """(word, number of captions that have it), without stop words, most frequent first."""
    counts: Counter[str] = Counter()
    for caption in captions:
        words = {word.casefold() for word in _WORDS.findall(caption.replace("_", " "))}
        counts.update(word for word in words - _STOP_WORDS if not word.isdigit())
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def together(captions: Iterable[str], tag: str) -> list[tuple[str, int, float]]:
    """(other tag, captions that have both, share of the tag's captions), most frequent first."""
    key = tag_key(tag)
    having = [caption for caption in captions if key in map(tag_key, split_tags(caption))]
    return [(other, n, n / len(having)) for other, n in count(having) if tag_key(other) != key]


# --- filters ----------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Subject:
    """What a filter is tested on."""

    caption: str
    name: str = ""                          # the picture, relative, with slashes
    trigger: str = ""
    count_tokens: Callable[[str], int] | None = None

    def tokens(self) -> int:
        if self.count_tokens is None:
            raise UserError("captions.no_tokenizer")
        return self.count_tokens(self.caption)


Test = Callable[[Subject], bool]


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str                               # word | text | compare | ( | ) | end
    text: str
    at: int                                 # column, from 1


# `open` is a quote without an end, `odd` any other sign: both are mistakes to point at.
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
    "tokens": Subject.tokens,
    "tags": lambda subject: len(split_tags(subject.caption)),
    "words": lambda subject: len(subject.caption.split()),
    "chars": lambda subject: len(subject.caption)}
_HAS: dict[str, Test] = {
    "trigger": lambda subject: bool(subject.trigger.strip()) and bool(
        phrase(subject.trigger).search(subject.caption)),
    "caption": lambda subject: bool(subject.caption)}
_FIELDS = ("tag", "text", "file", "has")


def find(expression: str, captions: Mapping[str, str], trigger: str = "",
         count_tokens: Callable[[str], int] | None = None) -> list[str]:
    """The names of the pictures that the filter matches. Raises UserError with the column of a
    mistake."""
    fits = parse(expression)
    return [name for name, caption in captions.items()
            if fits(Subject(caption, name, trigger, count_tokens))]


def parse(expression: str) -> Test:
    """The filter as a function. An empty one is true for all pictures."""
    return _Parser(expression).whole()


def needs_tokens(expression: str) -> bool:
    return any(token.kind == "word" and token.text.lower() == "tokens"
               for token in _tokenise(expression))


def _tokenise(expression: str) -> list[_Token]:
    tokens, at = [], 0
    while match := _TOKENS.match(expression, at):
        kind = str(match.lastgroup)
        text, column = match[kind], match.start(kind) + 1
        if kind == "open":
            raise UserError("captions.filter_quote", filter=expression, column=column)
        if kind == "odd":
            _wrong(expression, _Token("odd", text, column))
        # A backslash takes the special meaning from quotes and brackets.
        if kind in ("text", "word"):
            text = text[1:-1] if text.startswith('"') else text
            text = re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)
        tokens.append(_Token(text if kind == "bracket" else kind, text, column))
        at = match.end()
    return [*tokens, _Token("end", "", len(expression) + 1)]


def _wrong(expression: str, token: _Token) -> NoReturn:
    if token.kind == "end":
        raise UserError("captions.filter_ends", filter=expression, column=token.at)
    raise UserError("captions.filter_wrong", filter=expression, column=token.at, found=token.text)


class _Parser:
    """A recursive-descent parser. `or` binds least, then `and`, then `not`."""

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self.tokens = _tokenise(expression)
        self.next = 0
        self.depth = 0

    def whole(self) -> Test:
        if self.token.kind == "end":
            return lambda subject: True
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
        return tests[0] if len(tests) == 1 else lambda subject: any(test(subject) for test in tests)

    def _and(self) -> Test:
        tests = [self._not()]
        while self._keyword("and") or not (self.token.kind in (")", "end") or self._keyword("or")):
            if self._keyword("and"):
                self._take()
            tests.append(self._not())
        return tests[0] if len(tests) == 1 else lambda subject: all(test(subject) for test in tests)

    def _not(self) -> Test:
        denied = False
        while self._keyword("not"):
            self._take()
            denied = not denied
        test = self._operand()
        return (lambda subject: not test(subject)) if denied else test

    def _operand(self) -> Test:
        """A bracket, `count < number`, `empty`, `field:value`, or words as one phrase."""
        if self.token.kind == "(":
            opened = self._take()
            self.depth += 1
            # Deeper, and Python's own recursion limit would be reached.
            if self.depth > 100:
                _wrong(self.expression, opened)
            test = self._or()
            if self.token.kind != ")":
                raise UserError("captions.filter_bracket", filter=self.expression, column=opened.at)
            self._take()
            self.depth -= 1
            return test
        if self._at_comparison():
            measure = _COUNTS[self._take().text.lower()]
            compare = _COMPARE[self._take().text]
            number = self._take()
            if number.kind != "word" or not re.fullmatch("[0-9]{1,9}", number.text):
                raise UserError("captions.filter_number", filter=self.expression,
                                column=number.at, found=number.text or "-")
            limit = int(number.text)
            return lambda subject: compare(measure(subject), limit)
        if self._keyword("empty"):
            self._take()
            return lambda subject: not subject.caption.strip()
        if self.token.kind == "text":
            return _has_phrase(self._take().text)
        if self.token.kind != "word" or self._keyword("and", "or"):
            _wrong(self.expression, self.token)
        if self._at_field():
            return self._field()
        words = [self._take().text]
        while self.token.kind == "word" and not (self._keyword("and", "or", "not", "empty")
                                                 or self._at_comparison() or self._at_field()):
            words.append(self._take().text)
        return _has_phrase(" ".join(words))

    def _at_comparison(self) -> bool:
        return self._keyword(*_COUNTS) and self.tokens[self.next + 1].kind == "compare"

    def _at_field(self) -> bool:
        field, colon, _ = self.token.text.partition(":")
        return bool(colon) and field.lower() in _FIELDS

    def _field(self) -> Test:
        token = self._take()
        field, _, value = token.text.partition(":")
        # tag:"red hair"
        if not value and self.token.kind == "text":
            value = self._take().text
        if not value:
            _wrong(self.expression, self.token)
        key = tag_key(value)
        if field.lower() == "has":
            if value.lower() not in _HAS:
                raise UserError("captions.filter_has", filter=self.expression, column=token.at,
                                found=value, known=", ".join(f"has:{name}" for name in _HAS))
            return _HAS[value.lower()]
        if field.lower() == "file":
            return lambda subject: matches(subject.name, value)
        if field.lower() == "text":
            return lambda subject: key in tag_key(subject.caption)
        return lambda subject: any(fits_star(tag_key(tag), key)
                                   for tag in split_tags(subject.caption))


def _has_phrase(text: str) -> Test:
    """Tests for whole words; underscores of either side are spaces."""
    words = text.replace("_", " ").split()
    if not words:
        return lambda subject: True
    pattern = phrase(" ".join(words))
    if "*" in text:
        body = r"\s+".join(r"\S*".join(map(re.escape, word.split("*"))) for word in words)
        pattern = re.compile(rf"(?<!\w){body}(?!\w)", re.IGNORECASE)
    return lambda subject: bool(pattern.search(subject.caption.replace("_", " ")))


def counted(captions: Sequence[str], trigger: str = "") -> dict[str, Any]:
    """Figures about the captions of a folder."""
    filled = [caption for caption in captions if caption]
    return {"pictures": len(captions), "captioned": len(filled),
            "with_trigger": sum(bool(phrase(trigger).search(caption)) for caption in filled)
            if trigger.strip() else None, "tags": len(count(filled)),
            "mean_tags": sum(len(split_tags(caption)) for caption in filled) / max(1, len(filled))}
