from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.captions.rule_parser import parse, parse_line
from captioner.captions.rules import (
    RULES,
    About,
    Change,
    Dedupe,
    Escape,
    MaxTokens,
    Override,
    Prefix,
    Remove,
    Replace,
    Sort,
    Suffix,
    Trigger,
    Underscores,
    apply,
    preview,
    with_trigger_rule,
)
from captioner.captions.text import merge, phrase, tag_key, tidy
from captioner.captions.tokens import counter
from core.dataset.captions import split_tags
from core.errors import UserError
from core.i18n import tr

TAGS = st.sampled_from(["cat", "Cat", "red hair", "red_hair", "sks", "sks style", "a cat on a mat",
                        "^_^", "hat (red)", r"hat \(red\)", "猫", "红猫", "1girl", "cat."])
CAPTIONS = st.lists(TAGS, max_size=8).map(", ".join) | st.text(
    alphabet="ab ,，_()\\猫.", max_size=30).map(tidy)


def keys(caption: str) -> list[str]:
    return [tag_key(tag) for tag in split_tags(caption)]


# --- single rules -----------------------------------------------------------------------------

@pytest.mark.parametrize(("rule", "before", "after"), [
    (Trigger("sks"), "a red cat", "sks, a red cat"),
    (Trigger("sks"), "", "sks"),
    (Trigger("sks"), "cat, SKS, hat, sks", "sks, cat, hat"),
    (Trigger("sks"), "sks person, hat", "sks person, hat"),
    (Trigger("sks"), "a photo of sks in town", "sks, a photo of sks in town"),
    (Trigger("sks", inside="move"), "a photo of sks in town", "sks, a photo of in town"),
    (Trigger("sks"), "asks, sks2", "sks, asks, sks2"),
    (Trigger("m1a, oil paint"), "cat, oil paint", "m1a, oil paint, cat"),
    (Trigger("水墨"), "一只猫，水墨", "水墨，一只猫"),
    (Trigger("m1a, ink"), "\\，\\", "m1a，ink，\\，\\"),
    (Trigger("m1a, ink", "move"), "猫，m1a，ink，狗", "m1a，ink，猫，狗"),
    (Trigger("sks"), "sks, 猫，狗, 鸟", "sks, 猫，狗, 鸟"),
    (Replace("cat", "cat, pet", match="tag"), "cat, pet, hat", "cat, pet, hat"),
    (Prefix("a photo of", " "), "cat", "a photo of cat"),
    (Prefix("a photo of", " "), "A photo of cat", "A photo of cat"),
    (Prefix("cat"), "category", "cat, category"),
    (Prefix("best"), "", "best"),
    (Suffix("oil"), "cat,", "cat, oil"),
    (Suffix("oil"), "cat, oil", "cat, oil"),
    (Suffix("oil"), "cat foil", "cat foil, oil"),
    (Replace("girl", "woman"), "1girl, Girl, a girlish cat", "1woman, woman, a womanish cat"),
    (Replace("girl", "woman", match="word"), "1girl, Girl, girlish", "1girl, woman, girlish"),
    (Replace("girl", "woman", match="word", case=True), "Girl, girl", "Girl, woman"),
    (Replace("a.b", "x"), "aab, a.b", "aab, x"),
    (Replace("cat", r"\1"), "cat", r"\1"),
    (Replace("red_hair", "red", match="tag"), "red hair, a red hair cat", "red, a red hair cat"),
    (Replace("cat", "dog", match="tag"), "dog, cat, hat", "dog, hat"),
    (Replace("cat", "dog, pet", match="tag"), "hat, cat, sun", "hat, dog, pet, sun"),
    (Replace("Cat", "cat", match="tag"), "hat, Cat", "hat, cat"),
    (Replace("a photo of ", ""), "a photo of a cat", "a cat"),
    (Replace("cat", ""), "red, cat, hat", "red, hat"),
    (Replace(r"(\d)girls?", r"\1 women", regex=True), "2girls, hat", "2 women, hat"),
    (Remove(("red hair", "*mat")), "cat, Red_Hair, a cat on a mat, hat", "cat, hat"),
    (Remove(("cat?",)), "cats, cat?", "cats"),
    (Remove(text="a photo of"), "A photo of a cat, hat", "a cat, hat"),
    (Dedupe(), "Cat, red hair, cat, red_hair, hat (red), hat \\(red\\)",
     "Cat, red hair, hat (red)"),
    (Dedupe(), "红猫，猫，红猫", "红猫，猫"),
    (Underscores("spaces"), "long_hair, ^_^, o_o, a_b_cd", "long hair, ^_^, o_o, a b cd"),
    (Underscores("underscores"), "long hair, a cat sits on a mat, 1girl",
     "long_hair, a cat sits on a mat, 1girl"),
    (Escape(), r"hat (red), hat \(red\)", r"hat \(red\), hat \(red\)"),
    (Escape("plain"), r"hat \(red\)", "hat (red)"),
    (Escape("plain"), r"hat \\(red)", "hat (red)"),
    (Override("a/1.png", "by hand"), "cat", "cat"),
])
def test_rule(rule: Any, before: str, after: str) -> None:
    assert apply(before, [rule], About("1.png")) == after


def test_sort_by_score_keeps_what_has_none_in_front() -> None:
    about = About(scores={"red hair": .9, "cat": .5, "hat": .7})
    assert apply("sks, cat, a cat on a mat, hat, red_hair", [Sort()], about) == (
        "sks, a cat on a mat, red_hair, hat, cat")
    assert apply("cat, hat, red hair", [Sort(keep_first=1)], about) == "cat, red hair, hat"
    assert apply("b, C, a", [Sort("name")]) == "a, b, C"


def test_sort_by_frequency_in_a_preview() -> None:
    captions = {"1.png": "rare, cat, hat", "2.png": "cat", "3.png": "hat, Cat"}
    assert preview(captions, [Sort("frequency")]) == [
        Change("1.png", "rare, cat, hat", "cat, hat, rare"),
        Change("3.png", "hat, Cat", "Cat, hat")]


def test_max_tokens_by_clips_tokenizer() -> None:
    count = counter()
    assert count("a red cat") == 3
    about = About(count_tokens=count)
    caption = "a cat sitting on a wall, extraordinarily fluffy, hat"
    for limit in range(1, count(caption) + 1):
        cut = apply(caption, [MaxTokens(limit)], about)
        assert caption.startswith(cut)
        assert caption[len(cut):][:1] in ("", ",", " ")             # never within a word
        assert count(cut) <= limit or " " not in cut
    assert apply(caption, [MaxTokens(9)], about) == "a cat sitting on a wall"
    chinese = apply("一只红色的猫坐在墙上", [MaxTokens(8)], about)      # no spaces: by character
    assert "一只红色的猫坐在墙上".startswith(chinese)
    assert 6 <= count(chinese) <= 8


def test_a_token_limit_without_tokenizer() -> None:
    with pytest.raises(UserError, match="Rule 2 \\(max_tokens\\)"):
        apply("cat", [Dedupe(), MaxTokens(3)])


def test_only_some_pictures_and_overrides() -> None:
    rules = parse([{"rule": "suffix", "text": "night", "only": "dark/*.png"},
                   {"rule": "override", "picture": "b.png", "caption": "two\nlines"},
                   {"rule": "trigger", "word": "sks"}])
    captions = {"dark/a.png": "cat", "b.png": "dog", "c.png": "hat"}
    assert {one.path: one.after for one in preview(captions, rules)} == {
        "dark/a.png": "sks, cat, night", "b.png": "sks, two, lines", "c.png": "sks, hat"}


def test_the_trigger_comes_before_a_token_limit() -> None:
    given_ = parse([{"rule": "dedupe"}, {"rule": "max_tokens", "limit": 4}])
    rules = with_trigger_rule(given_, "sks")
    assert [type(rule).__name__ for rule in rules] == ["Dedupe", "Trigger", "MaxTokens"]
    about = About(count_tokens=lambda text: len(text.replace(",", "").split()))
    assert apply("a, b, c, d, e", rules, about) == "sks, a, b, c"
    own = parse([{"rule": "trigger", "word": "mine"}])
    assert with_trigger_rule(own, "sks") == own


# --- catastrophic patterns --------------------------------------------------------------------

@pytest.mark.parametrize("pattern", [
    r"(a+)+$", r"(a|aa)+$", r"(.*a){25}$", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(?:a*)*b"])
def test_a_catastrophic_pattern_ends(pattern: str) -> None:
    began = time.process_time()
    try:
        apply("a" * 5000 + "!", parse([{"rule": "replace", "find": pattern, "regex": True}]))
    except UserError as fault:
        assert fault.code == "rules.regex_slow"  # noqa: PT017 - some patterns are quick
    assert time.process_time() - began < 5


def test_a_pattern_that_never_ends_is_a_fault() -> None:
    rules = parse([{"rule": "suffix", "text": "z"},
                   {"rule": "replace", "regex": True, "find": r"(.*),(.*),(.*),(.*)x\1\2"}])
    began = time.process_time()
    with pytest.raises(UserError, match=r"Rule 2 \(replace\): the regular expression") as caught:
        apply("a, b " * 300, rules)
    assert caught.value.code == "rules.regex_slow"
    assert time.process_time() - began < 5


# --- mistakes ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("rule", "code", "key"), [
    ({"rule": "replcae"}, "rules.unknown", None), ({}, "rules.unknown", None),
    ({"rule": ["x"]}, "rules.unknown", None),
    ({"rule": "replace"}, "rules.missing_key", "find"),
    ({"rule": "replace", "find": ""}, "rules.bad_value", "find"),
    ({"rule": "replace", "find": "a", "wiht": "b"}, "rules.unknown_key", "wiht"),
    ({"rule": "replace", "find": "a", "with": 3}, "rules.bad_value", "with"),
    ({"rule": "replace", "find": "(a", "regex": True}, "rules.bad_regex", "find"),
    ({"rule": "replace", "find": "(a)", "with": r"\2", "regex": True}, "rules.bad_regex", "with"),
    ({"rule": "replace", "find": "a", "with": r"\g<n>", "regex": True}, "rules.bad_regex", "with"),
    ({"rule": "max_tokens", "limit": 0}, "rules.bad_value", "limit"),
    ({"rule": "sort", "by": "size"}, "rules.bad_value", "by"),
    ({"rule": "remove", "tags": 5}, "rules.bad_value", "tags"),
])
def test_mistakes_name_number_and_key(rule: dict[str, Any], code: str, key: str | None) -> None:
    with pytest.raises(UserError) as caught:
        parse([{"rule": "dedupe"}, rule])
    assert (caught.value.code, caught.value.params.get("key")) == (code, key)
    for lang in ("en", "zh-CN"):
        sentence = tr(code, caught.value.params, lang)
        assert "2" in sentence
        assert "{" not in sentence.replace(str(rule), "")


def test_replacements_with_groups_are_fine() -> None:
    for find, with_ in ((r"(a)(b)", r"\2\1"), (r"(?P<n>a)(b)", r"\g<n>\2"), ("(?i)A", "b")):
        parse([{"rule": "replace", "find": find, "with": with_, "regex": True}])


@pytest.mark.parametrize(("line", "rule"), [
    ("replace:girl=>woman", Replace("girl", "woman")), ("replace: a photo of =>", Replace(
        " a photo of ", "")),
    ("regex:(a)=>\\1b", Replace("(a)", "\\1b", regex=True)),
    ("rename:a=>b", Replace("a", "b", match="tag")), ("word:a=>b", Replace("a", "b", match="word")),
    ("remove:a, b", Remove(("a", "b"))), ("dedupe", Dedupe()), ("sort:name", Sort("name")),
    ("sort", Sort()), ("max_tokens:60", MaxTokens(60)), ("trigger:sks", Trigger("sks")),
    ("prefix:x:y", Prefix("x:y")), ("suffix:b", Suffix("b")), ("escape", Escape()),
    ("underscores:underscores", Underscores("underscores")), ("lower", RULES["case"]()),
    ("override:a.png=>x=>y", Override("a.png", "x=>y"))])
def test_lines(line: str, rule: Any) -> None:
    assert parse([parse_line(line)]) == (rule,)


@pytest.mark.parametrize("line", [
    "replace:a", "rename", "dedupe:x", "nonsense:a", "", "override:a"])
def test_bad_lines(line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_line(line, 3)
    assert caught.value.params["number"] == 3


@pytest.mark.parametrize(("data", "rule"), [
    ({"rule": "replace", "find": "a", "with": "b", "match": "tag", "only": ["x.png"]},
     Replace("a", "b", match="tag", only=("x.png",))),
    ({"rule": "remove", "tags": ["a"], "text": "b"}, Remove(("a",), "b")),
    ({"rule": "sort", "by": "name", "keep_first": 2}, Sort("name", 2)),
    ({"rule": "trigger", "word": "x", "inside": "move"}, Trigger("x", "move")),
    ({"rule": "max_tokens", "limit": 5, "base": "base"}, MaxTokens(5, "base")),
    ({"rule": "dedupe"}, Dedupe()),
    ({"rule": "override", "picture": "a", "caption": "b"}, Override("a", "b"))])
def test_dicts(data: dict[str, Any], rule: Any) -> None:
    assert parse([data]) == (rule,)


# --- properties -------------------------------------------------------------------------------

MIXED = CAPTIONS | st.text(alphabet="ab ,，_()\\猫.", max_size=30) | st.lists(
    TAGS | st.sampled_from(["m1a", "ink", "m1a, ink", "m1a，ink"]), max_size=6).flatmap(
        lambda tags: st.lists(st.sampled_from([", ", "，", ",", " "]), min_size=len(tags),
                              max_size=len(tags)).map(
            lambda marks: "".join(sum(zip(tags, marks, strict=True), ()))))
IDEMPOTENT = [Trigger("sks"), Trigger("sks", "move"), Trigger("m1a, ink"),
              Trigger("m1a, ink", "move"), Trigger("猫，ink"), Prefix("m1a, ink"),
              Suffix("猫，ink"), Replace("cat", "cat, ink", match="tag"),
              Replace("ink", "猫，cat", match="tag"), Remove(text="m1a, ink"),
              Prefix("a photo of", " "), Suffix("ink"), Dedupe(), Sort(),
              Sort("name"), Underscores("spaces"), Escape(),
              Escape("plain"), Remove(("cat", "*hair")), Remove(text="cat"), RULES["case"](),
              Replace("cat", "dog", match="tag"), MaxTokens(4)]


@settings(deadline=None)
@given(MIXED, st.sampled_from(IDEMPOTENT))
def test_a_second_time_changes_nothing(caption: str, rule: Any) -> None:
    about = About(scores={"cat": .5, "red hair": .8},
                  count_tokens=lambda text: len(text.replace(",", " ").split()))
    once = apply(caption, [rule], about)
    assert apply(once, [rule], about) == once
    assert len(once.splitlines()) <= 1


@settings(deadline=None)
@given(CAPTIONS, st.sampled_from(["sks", "red hair", "猫"]))
def test_the_trigger_is_first_and_once(caption: str, word: str) -> None:
    result = apply(caption, [Trigger(word)])
    assert phrase(word).match(result)
    assert keys(result).count(tag_key(word)) <= 1
    rest = [key for key in keys(caption) if key != tag_key(word)]
    assert [key for key in keys(result) if key != tag_key(word)] == rest       # nothing else moves
    moved = apply(caption, [Trigger(word, "move")])
    assert len(phrase(word).findall(moved)) == 1
    assert phrase(word).match(moved)


@settings(deadline=None)
@given(CAPTIONS)
def test_dedupe_loses_no_tag_and_keeps_the_order(caption: str) -> None:
    assert keys(apply(caption, [Dedupe()])) == list(dict.fromkeys(keys(caption)))


@settings(deadline=None)
@given(CAPTIONS, st.integers(0, 4))
def test_sorting_only_moves(caption: str, keep: int) -> None:
    about = About(scores={"cat": .5, "red hair": .8, "猫": .1})
    result = apply(caption, [Sort(keep_first=keep)], about)
    assert Counter(split_tags(result)) == Counter(split_tags(caption))
    assert split_tags(result)[:keep] == split_tags(caption)[:keep]


@settings(deadline=None)
@given(CAPTIONS, CAPTIONS)
def test_merging_loses_nothing(existing: str, new: str) -> None:
    assert merge(existing, new, "keep") == (existing or new)
    assert merge(existing, new, "replace") == (new or existing)
    added = merge(existing, new, "add")
    assert set(keys(added)) == set(keys(existing)) | set(keys(new))
    assert keys(added)[:len(keys(existing))] == keys(existing) or not existing
    assert merge(added, new, "add") == added


@settings(deadline=None)
@given(CAPTIONS, st.integers(1, 12))
def test_a_limit_cuts_from_the_end(caption: str, limit: int) -> None:
    def count(text: str) -> int:
        return len(text.replace(",", " ").replace("，", " ").split())

    result = apply(caption, [MaxTokens(limit)], About(count_tokens=count))
    assert count(result) <= limit or len(result.split()) == 1
    tags, left = split_tags(caption), split_tags(result)
    assert left[:-1] == tags[:len(left) - 1]
    assert not left or tags[len(left) - 1].startswith(left[-1])


@settings(deadline=None)
@given(st.sampled_from(list(RULES)), st.dictionaries(
    st.sampled_from(["find", "with", "tags", "text", "by", "limit", "to", "word", "regex"]),
    st.text(max_size=5) | st.integers() | st.none() | st.booleans()))
def test_any_dict_gives_a_rule_or_a_fault(name: str, keys_: dict[str, Any]) -> None:
    try:
        assert parse([keys_ | {"rule": name}])
    except UserError as fault:                                  # and no other exception
        assert fault.code.startswith("rules.")  # noqa: PT017
