"""Caption rules: an ordered list of small changes to a caption's text. Pure: no files, no models.

A rule is a frozen dataclass, or the dict that config.yaml has for it:
`{"rule": "replace", "find": "girl", "with": "woman"}`. Every rule takes `only`, a list of
picture names or globs that it is meant for.
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

TIME_LIMIT_S = 0.5                          # for one regular expression on one caption
TAG_WORDS = 4                               # more words than that are a sentence


@dataclass(frozen=True, slots=True)
class About:
    """What a rule may need to know beyond the caption."""

    name: str = ""                                      # the picture, relative, with slashes
    scores: Mapping[str, float] = field(default_factory=dict)       # by tag_key
    frequency: Mapping[str, int] = field(default_factory=dict)      # pictures by tag_key
    count_tokens: Callable[[str], int] | None = None    # of the base's tokenizer


class _Trouble(Exception):
    """A rule's own failure; apply() knows which number the rule has."""

    def __init__(self, what: str, **params: Any) -> None:
        super().__init__(what)
        self.what, self.params = what, params


def _listed(value: Any) -> Any:
    """'a, b' -> ['a', 'b']"""
    return split_tags(value) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_listed)]
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
    """The trigger word first, and once as a tag. Where it stands inside a sentence or a longer
    tag it stays, as cutting it out would tear the sentence; `inside: move` cuts it out."""

    word: Filled
    inside: Literal["keep", "move"] = "keep"

    def change(self, caption: str, about: About) -> str:
        word = " ".join(self.word.split()).strip(",， ")
        if not word or self._stands(caption, word):
            return caption
        like = caption if len(split_tags(caption)) > 1 else word
        word = join(split_tags(word), like=like)
        if self.inside == "move":
            return join([word, cut(caption, phrase(word))], like=like)
        own = {tag_key(tag) for tag in split_tags(word)}
        rest = by_tags(caption, lambda tags: [tag for tag in tags if tag_key(tag) not in own])
        return rest if phrase(word).match(rest) else join([word, rest], like=like)

    def _stands(self, caption: str, word: str) -> bool:
        """First and once already: then the caption stays to the letter."""
        own = [tag_key(tag) for tag in split_tags(word)]
        tags = [tag_key(tag) for tag in split_tags(caption)]
        once = len(phrase(word).findall(caption)) == 1 if self.inside == "move" else (
            not set(own) & set(tags[len(own):]))
        return once and tags[:len(own)] == own and phrase(word).match(caption) is not None


@dataclass(frozen=True, slots=True)
class Prefix(Rule):
    """Before the caption, unless it begins so already."""

    text: Filled
    join: str = ", "

    def change(self, caption: str, about: About) -> str:
        if not caption:
            return self.text.strip()
        has = phrase(self.text).match(caption) if self.text.strip() else True
        return caption if has else self.text.strip() + self.join + caption


@dataclass(frozen=True, slots=True)
class Suffix(Rule):
    """After the caption, unless it ends so already."""

    text: Filled
    join: str = ", "

    def change(self, caption: str, about: About) -> str:
        if not caption:
            return self.text.strip()
        found = [match.end() for match in phrase(self.text).finditer(caption)]
        has = len(caption) in found or not self.text.strip()
        return caption if has else caption.rstrip(",， ") + self.join + self.text.strip()


@dataclass(frozen=True, slots=True)
class Replace(Rule):
    """Find and replace: any text, whole words, whole tags, or a regular expression."""

    find: Filled
    with_: str = ""                                     # `with` in a dict
    match: Literal["text", "word", "tag"] = "text"
    regex: bool = False
    case: bool = False                                  # True: upper and lower case differ

    def change(self, caption: str, about: About) -> str:
        if self.match == "tag" and not self.regex:
            return by_tags(caption, self._rename)
        changed = self._searched(caption) if self.regex else self._plain().sub(
            lambda _: self.with_, caption)
        return caption if changed == caption else tidy(changed)

    def _plain(self) -> re.Pattern[str]:
        if self.match == "word" and not self.case:
            return phrase(self.find)
        body = re.escape(self.find)
        body = rf"(?<!{WORD}){body}(?!{WORD})" if self.match == "word" else body
        return re.compile(body, 0 if self.case else re.IGNORECASE)

    def _rename(self, tags: list[str]) -> list[str]:
        """The new tag where the old one was; not a second time where it is there already."""
        old = tag_key(self.find)
        at = next((i for i, tag in enumerate(tags) if tag_key(tag) == old), None)
        if at is None:
            return tags
        others = {tag_key(tag) for tag in tags} - {old}
        fresh = [tag for tag in split_tags(self.with_) if tag_key(tag) not in others]
        return [*tags[:at], *fresh, *(tag for tag in tags[at:] if tag_key(tag) != old)]

    def pattern(self) -> Any:
        return regex.compile(self.find, 0 if self.case else regex.IGNORECASE)

    def _searched(self, caption: str) -> str:
        try:
            return str(self.pattern().sub(self.with_, caption, timeout=TIME_LIMIT_S))
        except TimeoutError:
            raise _Trouble("regex_slow", find=self.find, seconds=TIME_LIMIT_S) from None
        except (regex.error, IndexError) as error:
            raise _Trouble("bad_regex", key="with", find=self.with_, reason=error) from None


@dataclass(frozen=True, slots=True)
class Remove(Rule):
    """Whole tags (`*` stands for anything), or a phrase wherever it stands."""

    tags: Words = ()
    text: str = ""

    def change(self, caption: str, about: About) -> str:
        globs = [tag_key(tag) for tag in self.tags]
        rest = by_tags(caption, lambda tags: [
            tag for tag in tags if not any(fits_star(tag_key(tag), glob) for glob in globs)])
        return cut(rest, phrase(self.text)) if self.text.strip() else rest


@dataclass(frozen=True, slots=True)
class Dedupe(Rule):
    """Each tag once, where it stood first."""

    def change(self, caption: str, about: About) -> str:
        def once(tags: list[str]) -> list[str]:
            first: dict[str, str] = {}
            for tag in tags:
                first.setdefault(tag_key(tag), tag)
            return list(first.values())
        return by_tags(caption, once)


@dataclass(frozen=True, slots=True)
class Sort(Rule):
    """Highest score or frequency first. What has no score (a sentence, the trigger word) stays
    in front, in its order."""

    by: Literal["score", "frequency", "name"] = "score"
    keep_first: Annotated[int, Field(ge=0)] = 0         # leading tags that stay

    def change(self, caption: str, about: About) -> str:
        def rank(tag: str) -> tuple[float, str]:
            key = tag_key(tag)
            if self.by == "name":
                return 0.0, key
            known = about.scores if self.by == "score" else about.frequency
            return (-known[key] if key in known else float("-inf")), ""
        return by_tags(caption, lambda tags: [
            *tags[:self.keep_first], *sorted(tags[self.keep_first:], key=rank)])


@dataclass(frozen=True, slots=True)
class Underscores(Rule):
    """long_hair <-> long hair. Sentences (more than four words) and faces such as ^_^ stay."""

    to: Literal["spaces", "underscores"] = "spaces"

    def change(self, caption: str, about: About) -> str:
        return by_tags(caption, lambda tags: [self._one(tag, about) for tag in tags])

    def _one(self, tag: str, about: About) -> str:
        if self.to == "spaces":
            return tag if is_face(tag) else " ".join(tag.replace("_", " ").split()) or tag
        is_tag = len(tag.split()) <= TAG_WORDS or tag_key(tag) in about.scores
        return "_".join(tag.split()) if is_tag else tag


@dataclass(frozen=True, slots=True)
class Escape(Rule):
    r"""\( \) for prompts of A1111 and Forge, where brackets weigh words; `to: plain` takes the
    escapes away."""

    to: Literal["escaped", "plain"] = "escaped"

    def change(self, caption: str, about: About) -> str:
        if self.to == "plain":
            return ESCAPED_BRACKET.sub(r"\1", caption)
        return BARE_BRACKET.sub(lambda found: "\\" + found[0], caption)


@dataclass(frozen=True, slots=True)
class Case(Rule):
    to: Literal["lower", "upper"] = "lower"

    def change(self, caption: str, about: About) -> str:
        return caption.lower() if self.to == "lower" else caption.upper()


@dataclass(frozen=True, slots=True)
class MaxTokens(Rule):
    """At most so many tokens of the base's text encoder; whole tags go from the end, then whole
    words of the last tag left. The first word always stays."""

    limit: Annotated[int, Field(ge=1)] = 75
    base: str = ""                                      # whose tokenizer; empty: CLIP's own

    def change(self, caption: str, about: About) -> str:
        count = about.count_tokens
        if count is None:
            raise _Trouble("no_tokenizer")
        if count(caption) <= self.limit:
            return caption
        tags = split_tags(caption)
        kept = longest(len(tags), lambda n: count(join(tags[:n], like=caption)) <= self.limit)
        if kept:
            return join(tags[:kept], like=caption)
        ends = [piece.end() for piece in PIECES.finditer(tags[0])] if tags else []
        kept = longest(len(ends), lambda n: count(tags[0][:ends[n - 1]]) <= self.limit)
        return tags[0][:ends[max(kept, 1) - 1]] if ends else caption


@dataclass(frozen=True, slots=True)
class Override(Rule):
    """One picture's caption, given by hand; the rules after it still apply."""

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
    """The caption after all rules, in order. Raises UserError that names the rule's number."""
    about = about or About()
    for number, rule in enumerate(rules, 1):
        if rule.meant_for(about.name):
            try:
                caption = rule.change(caption, about)
            except _Trouble as trouble:
                raise UserError(f"rules.{trouble.what}", number=number, rule=name_of(rule),
                                **trouble.params) from None
    return caption


def preview(captions: Mapping[Any, str], rules: Sequence[Rule],
            count_tokens: Callable[[str], int] | None = None,
            scores: Mapping[str, Mapping[str, float]] | None = None) -> list[Change]:
    """What the rules would change, by picture in the given order; nothing is written."""
    tagged = Counter(key for caption in captions.values()
                     for key in {tag_key(tag) for tag in split_tags(caption)})
    changes = []
    for path, before in captions.items():
        name = PurePath(path).as_posix()
        about = About(name, (scores or {}).get(name, {}), tagged, count_tokens)
        after = apply(before, rules, about)
        if after != before:
            changes.append(Change(str(path), before, after))
    return changes


def with_trigger_rule(rules: Sequence[Rule], trigger: str) -> tuple[Rule, ...]:
    """The rules with the trigger word put first at their end, but before a token limit, so that
    it counts there. A trigger rule of the user's own stays the only one."""
    if not trigger.strip() or any(isinstance(rule, Trigger) for rule in rules):
        return tuple(rules)
    at = next((i for i, rule in enumerate(rules) if isinstance(rule, MaxTokens)), len(rules))
    return (*rules[:at], Trigger(trigger), *rules[at:])
