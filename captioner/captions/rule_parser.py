"""Rules as config.yaml and the command line write them: dicts and lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import regex  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from captioner.captions.rules import RULES, Replace, Rule, name_of
from core import i18n
from core.config.flat_yaml import problem_of
from core.errors import UserError


def parse(rules: Iterable[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Raises UserError with the rule's number, its key, and the nearest known name."""
    return tuple(_parsed(number, given) for number, given in enumerate(rules, 1))


def as_dict(rule: Rule) -> dict[str, Any]:
    """The dict that `parse` takes: only what differs from the defaults."""
    told: dict[str, Any] = {"rule": name_of(rule)}
    for one in fields(rule):
        value = getattr(rule, one.name)
        if value != one.default:
            told[one.name.rstrip("_")] = list(value) if isinstance(value, tuple) else value
    return told


def _parsed(number: int, given: Mapping[str, Any]) -> Rule:
    name = given.get("rule")
    if not isinstance(name, str) or name not in RULES:
        raise UserError("rules.unknown", number=number, rule=name or "?", known=", ".join(RULES))
    cls = RULES[name]
    values = {"with_" if key == "with" else str(key): value for key, value in given.items()
              if key != "rule"}
    try:
        rule: Rule = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise _refused(number, name, cls, given, error) from None
    _check_regex(number, rule)
    return rule


def _refused(number: int, name: str, cls: type[Rule], given: Mapping[str, Any],
             error: ValidationError) -> UserError:
    first = error.errors()[0]
    key = str(first["loc"][0]).rstrip("_") if first["loc"] else "?"
    known = [one.name.rstrip("_") for one in fields(cls)]
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = i18n.nearest(key, known, 1)
        return UserError("rules.unknown_key", number=number, rule=name, key=key,
                         known=", ".join(close or known))
    if first["type"].startswith("missing"):
        return UserError("rules.missing_key", number=number, rule=name, key=key)
    return UserError("rules.bad_value", number=number, rule=name, key=key, value=given.get(key),
                     problem=problem_of(first))


def _check_regex(number: int, rule: Rule) -> None:
    """A wrong pattern or replacement is told now, not at the first caption that fits."""
    if not isinstance(rule, Replace) or not rule.regex:
        return
    key, text = "find", rule.find
    try:
        groups = rule.pattern().groups
        key, text = "with", rule.with_
        names = "".join(f"(?P<{name}>)" for name in rule.pattern().groupindex)
        bare = "()" * (groups - len(rule.pattern().groupindex))
        regex.compile(names + bare).sub(rule.with_, "")
    except (regex.error, IndexError) as error:
        raise UserError("rules.bad_regex", number=number, rule="replace", key=key, find=text,
                        reason=error) from None


_LINES: dict[str, tuple[str, ...]] = {      # the keys that `rule:first=>second` fills
    "trigger": ("word",), "prefix": ("text",), "suffix": ("text",),
    "replace": ("find", "with"), "remove": ("tags",), "sort": ("by",), "underscores": ("to",),
    "escape": ("to",), "case": ("to",), "max_tokens": ("limit",),
    "override": ("picture", "caption"), "dedupe": ()}
_SHORT: dict[str, dict[str, Any]] = {       # other words for a rule with some keys filled
    "regex": {"rule": "replace", "regex": True}, "rename": {"rule": "replace", "match": "tag"},
    "word": {"rule": "replace", "match": "word"}, "lower": {"rule": "case"}}


def parse_line(line: str, number: int = 1) -> dict[str, Any]:
    """`replace:find=>with`, `remove:tag, tag`, `max_tokens:75`, `dedupe`, ... as a dict."""
    name, _, rest = line.partition(":")
    name = name.strip()
    told = dict(_SHORT.get(name, {"rule": name}))
    if told["rule"] not in RULES:
        raise UserError("rules.unknown", number=number, rule=name,
                        known=", ".join((*RULES, *_SHORT)))
    keys = _LINES[str(told["rule"])]
    parts = rest.split("=>", 1) if len(keys) == 2 else [rest] if rest else []
    if len(parts) > len(keys) or (len(keys) == 2 and len(parts) < 2):
        raise UserError("rules.bad_line", number=number, line=line,
                        form=("=>".join(keys) and f"{name}:{'=>'.join(keys)}") or name)
    return told | dict(zip(keys, parts, strict=False))
