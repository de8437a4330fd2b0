"""Caption rules: an ordered list of small changes to a caption's text. No files, no models.

A rule is a frozen dataclass, or the dict that config.yaml has for it:
`{"rule": "replace", "find": "girl", "with": "woman"}`. Every rule takes `only`, a list of the
picture names or globs that it applies to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal

import regex  # type: ignore[import-untyped]
from pydantic import BeforeValidator, ConfigDict, Field

from captioner.captions.text import (
    BARE_BRACKET,
    ESCAPED_BRACKET,
    PIECES,
    WORD,
    by_tags,
    cut,
    fits_star,
    is_face,
    join,
    longest,
    matches,
    phrase,
    tag_key,
    tidy,
)
from core.dataset.captions import one_line, split_tags
from core.errors import UserError

# A pattern such as (a+)+$ can take for ever.
TIME_LIMIT_S = 0.5                          # for one regular expression on one caption
TAG_WORDS = 4                               # more words than that are a sentence


@dataclass(frozen=True, slots=True)
class About:
    """What a rule may need to know beyond the caption."""

    name: str = ""                                      # the picture, relative, with slashes
    scores: Mapping[str, float] = field(default_factory=dict)       # by tag_key
    frequency: Mapping[str, int] = field(default_factory=dict)      # pictures by tag_key
    count_tokens: Callable[[str], int] | None = None    # of the base's tokenizer


class _RuleError(Exception):
    """A rule's own failure; apply() adds the number of the rule."""

    def __init__(self, code: str, **params: Any) -> None:
        super().__init__(code)
        self.code, self.params = code, params


# A list, or one text with commas: 'a, b' -> ['a', 'b']
Words = Annotated[tuple[str, ...], BeforeValidator(
    lambda value: split_tags(value) if isinstance(value, str) else value)]
Filled = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Rule:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    only: Words = field(default=(), kw_only=True)       # names or globs of pictures; empty: all

    def change(self, caption: str, about: About) -> str:
        raise NotImplementedError

    def meant_for(self, name: str) -> bool:
        return not self.only or any(matches(name, glob) for glob in self.only)


@dataclass(frozen=True, slots=True)
class Trigger(Rule):
    """Puts the trigger word first, and only there as a tag. Inside a sentence or a longer tag it
    stays, as cutting it out would break the sentence; `inside: move` cuts it out."""

    word: Filled
    inside: Literal["keep", "move"] = "keep"

    def change(self, caption: str, about: About) -> str:
        word = " ".join(self.word.split()).strip(",， ")
        if not word:
            return caption
        trigger_keys = [tag_key(tag) for tag in split_tags(word)]
        keys = [tag_key(tag) for tag in split_tags(caption)]
        count = len(trigger_keys)
        once = len(phrase(word).findall(caption)) == 1 if self.inside == "move" else (
            not set(trigger_keys) & set(keys[count:]))
        # Where all is in place already, the caption stays as it is, to the letter.
        if once and keys[:count] == trigger_keys and phrase(word).match(caption):
            return caption
        like = caption if len(keys) > 1 else word
        word = join(split_tags(word), like=like)
        if self.inside == "move":
            return join([word, cut(caption, phrase(word))], like=like)
        rest = by_tags(caption, lambda tags: [tag for tag in tags
                                              if tag_key(tag) not in trigger_keys])
        return rest if phrase(word).match(rest) else join([word, rest], like=like)


@dataclass(frozen=True, slots=True)
class Prefix(Rule):
    """Puts a text before the caption, unless it begins so already."""

    text: Filled
    join: str = ", "

    def change(self, caption: str, about: About) -> str:
        if not caption:
            return self.text.strip()
        has = phrase(self.text).match(caption) if self.text.strip() else True
        return caption if has else self.text.strip() + self.join + caption


@dataclass(frozen=True, slots=True)
class Suffix(Rule):
    """Puts a text after the caption, unless it ends so already."""

    text: Filled
    join: str = ", "

    def change(self, caption: str, about: About) -> str:
        if not caption:
            return self.text.strip()
        ends = [match.end() for match in phrase(self.text).finditer(caption)]
        has = len(caption) in ends or not self.text.strip()
        return caption if has else caption.rstrip(",， ") + self.join + self.text.strip()


@dataclass(frozen=True, slots=True)
class Replace(Rule):
    """Finds and replaces any text, whole words, whole tags, or a regular expression."""

    find: Filled
    with_: str = ""                                     # `with` in a dict
    match: Literal["text", "word", "tag"] = "text"
    regex: bool = False
    case: bool = False                                  # True: upper and lower case differ

    def change(self, caption: str, about: About) -> str:
        if self.match == "tag" and not self.regex:
            return by_tags(caption, self._rename)
        if self.regex:
            try:
                changed = str(self.pattern().sub(self.with_, caption, timeout=TIME_LIMIT_S))
            except TimeoutError:
                raise _RuleError("regex_slow", find=self.find, seconds=TIME_LIMIT_S) from None
            except (regex.error, IndexError) as error:
                raise _RuleError("bad_regex", key="with", find=self.with_, reason=error) from None
        elif self.match == "word" and not self.case:
            changed = phrase(self.find).sub(lambda _: self.with_, caption)
        else:
            body = re.escape(self.find)
            body = rf"(?<!{WORD}){body}(?!{WORD})" if self.match == "word" else body
            # A function, as backslashes in the new text would be read as group references.
            changed = re.sub(body, lambda _: self.with_, caption,
                             flags=0 if self.case else re.IGNORECASE)
        return caption if changed == caption else tidy(changed)

    def _rename(self, tags: list[str]) -> list[str]:
        """Puts the new tag where the old one was, unless the caption has the new one already."""
        old = tag_key(self.find)
        at = next((i for i, tag in enumerate(tags) if tag_key(tag) == old), None)
        if at is None:
            return tags
        others = {tag_key(tag) for tag in tags} - {old}
        new = [tag for tag in split_tags(self.with_) if tag_key(tag) not in others]
        return [*tags[:at], *new, *(tag for tag in tags[at:] if tag_key(tag) != old)]

    def pattern(self) -> Any:
        return regex.compile(self.find, 0 if self.case else regex.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Remove(Rule):
    """Removes whole tags (`*` stands for anything), or a phrase anywhere."""

    tags: Words = ()
    text: str = ""

    def change(self, caption: str, about: About) -> str:
        globs = [tag_key(tag) for tag in self.tags]
        rest = by_tags(caption, lambda tags: [
            tag for tag in tags if not any(fits_star(tag_key(tag), glob) for glob in globs)])
        return cut(rest, phrase(self.text)) if self.text.strip() else rest


@dataclass(frozen=True, slots=True)
class Dedupe(Rule):
    """Leaves each tag once, at its first place."""

    def change(self, caption: str, about: About) -> str:
        def unique(tags: list[str]) -> list[str]:
            first: dict[str, str] = {}
            for tag in tags:
                first.setdefault(tag_key(tag), tag)
            return list(first.values())
        return by_tags(caption, unique)


@dataclass(frozen=True, slots=True)
class Sort(Rule):
    """Highest score or frequency first. Tags without a score (a sentence, the trigger word) stay
    in front, in their order."""

    by: Literal["score", "frequency", "name"] = "score"
    keep_first: Annotated[int, Field(ge=0)] = 0         # leading tags that stay

    def change(self, caption: str, about: About) -> str:
        def rank(tag: str) -> tuple[float, str]:
            key = tag_key(tag)
            if self.by == "name":
                return 0.0, key
            known = about.scores if self.by == "score" else about.frequency
            # Without a score: in front of all others.
            return (-known[key] if key in known else float("-inf")), ""
        return by_tags(caption, lambda tags: [
            *tags[:self.keep_first], *sorted(tags[self.keep_first:], key=rank)])


@dataclass(frozen=True, slots=True)
class Underscores(Rule):
    """long_hair <-> long hair. Sentences (more than four words) and faces such as ^_^ stay."""

    to: Literal["spaces", "underscores"] = "spaces"

    def change(self, caption: str, about: About) -> str:
        def convert(tag: str) -> str:
            if self.to == "spaces":
                return tag if is_face(tag) else " ".join(tag.replace("_", " ").split()) or tag
            is_tag = len(tag.split()) <= TAG_WORDS or tag_key(tag) in about.scores
            return "_".join(tag.split()) if is_tag else tag
        return by_tags(caption, lambda tags: [convert(tag) for tag in tags])


@dataclass(frozen=True, slots=True)
class Escape(Rule):
    r"""Writes brackets as \( \) for A1111 and Forge, where bare ones weigh words; `to: plain`
    removes the escapes."""

    to: Literal["escaped", "plain"] = "escaped"

    def change(self, caption: str, about: About) -> str:
        if self.to == "plain":
            return ESCAPED_BRACKET.sub(r"\1", caption)
        return BARE_BRACKET.sub(lambda match: "\\" + match[0], caption)


@dataclass(frozen=True, slots=True)
class Case(Rule):
    to: Literal["lower", "upper"] = "lower"

    def change(self, caption: str, about: About) -> str:
        return caption.lower() if self.to == "lower" else caption.upper()


@dataclass(frozen=True, slots=True)
class MaxTokens(Rule):
    """Cuts to a number of the text encoder's tokens: whole tags from the end, then whole words of
    the last tag. The first word always stays."""

    limit: Annotated[int, Field(ge=1)] = 75
    base: str = ""                                      # whose tokenizer; empty: CLIP's own

    def change(self, caption: str, about: About) -> str:
        count = about.count_tokens
        if count is None:
            raise _RuleError("no_tokenizer")
        if count(caption) <= self.limit:
            return caption
        tags = split_tags(caption)
        fitting = longest(len(tags), lambda n: count(join(tags[:n], like=caption)) <= self.limit)
        if fitting:
            return join(tags[:fitting], like=caption)
        ends = [piece.end() for piece in PIECES.finditer(tags[0])] if tags else []
        fitting = longest(len(ends), lambda n: count(tags[0][:ends[n - 1]]) <= self.limit)
        return tags[0][:ends[max(fitting, 1) - 1]] if ends else caption


@dataclass(frozen=True, slots=True)
class Override(Rule):
    """Sets one picture's caption by hand; the rules after it still apply."""

    picture: Filled                                     # relative name, with slashes
    caption: str

    def change(self, caption: str, about: About) -> str:
        return one_line(self.caption) if about.name == self.picture else caption


RULES: dict[str, type[Rule]] = {
    "trigger": Trigger, "prefix": Prefix, "suffix": Suffix, "replace": Replace,
    "remove": Remove, "dedupe": Dedupe, "sort": Sort, "underscores": Underscores,
    "escape": Escape, "case": Case, "max_tokens": MaxTokens, "override": Override}


def name_of(rule: Rule) -> str:
    return next(name for name, cls in RULES.items() if cls is type(rule))


# --- a list of them ---------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Change:
    path: str                                           # the picture, as it was given
    before: str
    after: str


def apply(caption: str, rules: Sequence[Rule], about: About | None = None) -> str:
    """Applies all rules in order. Raises UserError with the number of the rule that failed."""
    about = about or About()
    for number, rule in enumerate(rules, 1):
        if rule.meant_for(about.name):
            try:
                caption = rule.change(caption, about)
            except _RuleError as error:
                raise UserError(f"rules.{error.code}", number=number, rule=name_of(rule),
                                **error.params) from None
    return caption


def preview(captions: Mapping[Any, str], rules: Sequence[Rule],
            count_tokens: Callable[[str], int] | None = None,
            scores: Mapping[str, Mapping[str, float]] | None = None) -> list[Change]:
    """The changes that the rules would make, in the order of `captions`. Nothing is written."""
    frequency = Counter(key for caption in captions.values()
                        for key in {tag_key(tag) for tag in split_tags(caption)})
    changes = []
    for path, before in captions.items():
        name = PurePath(path).as_posix()
        about = About(name, (scores or {}).get(name, {}), frequency, count_tokens)
        after = apply(before, rules, about)
        if after != before:
            changes.append(Change(str(path), before, after))
    return changes


def with_trigger_rule(rules: Sequence[Rule], trigger: str) -> tuple[Rule, ...]:
    """The rules and a trigger rule after them, unless the user has one. It comes before a token
    limit, so that the trigger word counts there."""
    if not trigger.strip() or any(isinstance(rule, Trigger) for rule in rules):
        return tuple(rules)
    at = next((i for i, rule in enumerate(rules) if isinstance(rule, MaxTokens)), len(rules))
    return (*rules[:at], Trigger(trigger), *rules[at:])
