"""Reads rules as config.yaml (dicts) and the command line (lines) write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import regex  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from captioner.captions.rules import RULES, Replace, Rule
from core import i18n
from core.config.flat_yaml import problem_of
from core.errors import UserError


def parse(rules: Iterable[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Raises UserError with the rule's number, its key, and the nearest known name."""
    parsed = []
    for number, data in enumerate(rules, 1):
        name = data.get("rule")
        if not isinstance(name, str) or name not in RULES:
            raise UserError("rules.unknown", number=number, rule=name or "?",
                            known=", ".join(RULES))
        # `with` is a keyword of Python, so the field has another name.
        values = {"with_" if key == "with" else str(key): value for key, value in data.items()
                  if key != "rule"}
        try:
            rule: Rule = TypeAdapter(RULES[name]).validate_python(values)
        except ValidationError as error:
            raise _fault(number, name, data, error) from None
        _check_regex(number, rule)
        parsed.append(rule)
    return tuple(parsed)


def _fault(number: int, name: str, data: Mapping[str, Any], error: ValidationError) -> UserError:
    first = error.errors()[0]
    key = str(first["loc"][0]).rstrip("_") if first["loc"] else "?"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ["only", *_keys_of(name)]
        nearest = i18n.nearest(key, known, 1)
        return UserError("rules.unknown_key", number=number, rule=name, key=key,
                         known=", ".join(nearest or known))
    if first["type"].startswith("missing"):
        return UserError("rules.missing_key", number=number, rule=name, key=key)
    return UserError("rules.bad_value", number=number, rule=name, key=key, value=data.get(key),
                     problem=problem_of(first))


def _keys_of(name: str) -> list[str]:
    """The rule's own keys, as a dict has them: `with` for the field `with_`."""
    return [option.name.rstrip("_") for option in fields(RULES[name]) if option.name != "only"]


def _check_regex(number: int, rule: Rule) -> None:
    """Reports a wrong pattern or replacement now, not at the first caption that matches."""
    if not isinstance(rule, Replace) or not rule.regex:
        return
    key, text = "find", rule.find
    try:
        groups = rule.pattern().groups
        key, text = "with", rule.with_
        # The replacement is checked with a pattern that has the same groups and matches "".
        names = "".join(f"(?P<{name}>)" for name in rule.pattern().groupindex)
        bare = "()" * (groups - len(rule.pattern().groupindex))
        regex.compile(names + bare).sub(rule.with_, "")
    except (regex.error, IndexError) as error:
        raise UserError("rules.bad_regex", number=number, rule="replace", key=key, find=text,
                        reason=error) from None


# A line `rule:first` fills the rule's first key, one of these `rule:first=>second` two.
_TWO_KEYS = ("replace", "override")
# Short names for a rule with some keys filled.
_SHORT: dict[str, dict[str, Any]] = {
    "regex": {"rule": "replace", "regex": True}, "rename": {"rule": "replace", "match": "tag"},
    "word": {"rule": "replace", "match": "word"}, "lower": {"rule": "case"}}


def parse_line(line: str, number: int = 1) -> dict[str, Any]:
    """`replace:find=>with`, `remove:tag, tag`, `max_tokens:75`, `dedupe`, ... as a dict."""
    name, _, rest = line.partition(":")
    name = name.strip()
    data = dict(_SHORT.get(name, {"rule": name}))
    if data["rule"] not in RULES:
        raise UserError("rules.unknown", number=number, rule=name,
                        known=", ".join((*RULES, *_SHORT)))
    keys = _keys_of(data["rule"])[:2 if data["rule"] in _TWO_KEYS else 1]
    parts = rest.split("=>", 1) if len(keys) == 2 else [rest] if rest else []
    if len(parts) > len(keys) or (len(keys) == 2 and len(parts) < 2):
        raise UserError("rules.bad_line", number=number, line=line,
                        form=("=>".join(keys) and f"{name}:{'=>'.join(keys)}") or name)
    return data | dict(zip(keys, parts, strict=False))
