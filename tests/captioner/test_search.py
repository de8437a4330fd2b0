from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.captions import search
from captioner.captions.rule_parser import parse as parse_rules
from captioner.captions.rules import preview
from captioner.captions.search import Subject, parse
from captioner.captions.text import tag_key
from core.dataset.captions import split_tags
from core.errors import UserError
from core.i18n import tr

CAPTIONS = {
    "1.png": "sks, cat, red hair, hat", "2.png": "dog, Red_Hair", "3.png": "",
    "sub/4.png": "a photo of a Cat on a mat", "sub/5.jpg": "sks, catalogue, hat (red), cats",
    "6.png": "一只猫，水墨"}


def names(expression: str, **more: Any) -> list[str]:
    return search.find(expression, CAPTIONS, **{"trigger": "sks", **more})


# --- statistics -------------------------------------------------------------------------------

def test_counts_by_case_and_underscores() -> None:
    assert search.count(["Cat, red_hair, cat", "cat, red hair", "dog", ""]) == [
        ("cat", 2), ("red_hair", 2), ("dog", 1)]


def test_words_of_sentences() -> None:
    captions = ["a red scarf on the cat", "Red_scarf, 24 cats, don't", "the"]
    assert search.count_words(captions) == [
        ("red", 2), ("scarf", 2), ("cat", 1), ("cats", 1), ("don't", 1)]


def test_what_stands_together() -> None:
    captions = ["cat, hat, mat", "cat, Hat", "hat, mat", "cat"]
    assert search.together(captions, "CAT") == [("hat", 2, 2 / 3), ("mat", 1, 1 / 3)]
    assert search.together(captions, "dog") == []


def test_a_folder_in_figures() -> None:
    told = search.counted(list(CAPTIONS.values()), "sks")
    assert told == {"pictures": 6, "captioned": 5, "with_trigger": 2, "tags": 11,
                    "mean_tags": pytest.approx(13 / 5)}
    assert search.counted([])["mean_tags"] == 0


def test_rename_and_remove_everywhere_are_rules() -> None:
    rules = parse_rules([
        {"rule": "replace", "find": "red hair", "with": "red_haired", "match": "tag"},
        {"rule": "remove", "tags": ["hat*", "sks"]}])
    assert {one.path: one.after for one in preview(CAPTIONS, rules)} == {
        "1.png": "cat, red_haired", "2.png": "dog, red_haired", "sub/5.jpg": "catalogue, cats"}


# --- filters ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("expression", "found"), [
    ("", "1 2 3 4 5 6"), ("cat", "1 4"), ("CAT and not mat", "1"), ("cat or dog", "1 2 4"),
    ("cats", "5"), ("cat*", "1 4 5"), ("red hair", "1 2"), ('"red hair"', "1 2"),
    ("red_hair", "1 2"), ("hair red", ""), ("hat and red hair", "1"), ("猫", "6"), ("水墨", "6"),
    ("empty", "3"), ("not empty", "1 2 4 5 6"), ("has:trigger", "1 5"),
    ("has:caption not cat", "2 5 6"),
    ("tag:cat", "1"), ('tag:"red hair"', "1 2"), ("tag:*hair", "1 2"), ("tag:cat*", "1 5"),
    ("text:at", "1 4 5"), ('"hat (red)"', "5"), (r"hat \(red\)", "5"),
    ("file:sub/*", "4 5"), ("file:*.jpg or file:2.png", "2 5"),
    ("tags > 3", "1 5"), ("tags>3 cat", "1"), ("tags = 0", "3"),
    ("tags != 0 and tags <= 2", "2 4 6"),
    ("chars >= 25", "4 5"), ("words < 2", "3 6"),
    ("not (cat or dog) and not empty", "5 6"), ("not not cat", "1 4"),
    ("not cat dog", "1 2 3 4 5 6"),
    ("cat and cat or dog", "1 2 4"), ("dog or cat and hat", "1 2"), ("(dog or cat) and hat", "1"),
    ("((cat))", "1 4"), ("cat (hat or mat)", "1 4"), ("AND", None), ("tokens", ""),
    ('"and"', ""), ("a:b", ""),
])
def test_filters(expression: str, found: str | None) -> None:
    if found is None:
        with pytest.raises(UserError):
            names(expression)
    else:
        assert [name.split("/")[-1].split(".")[0] for name in names(expression)] == found.split()


def test_tokens_are_counted_by_the_given_tokenizer() -> None:
    assert names("tokens >= 4", count_tokens=lambda text: len(text.split(","))) == [
        "1.png", "sub/5.jpg"]
    assert search.needs_tokens("cat and (tokens > 3)")
    assert not search.needs_tokens('cat and "tokens"')
    with pytest.raises(UserError) as caught:
        names("tokens > 4")
    assert caught.value.code == "captions.no_tokenizer"


@pytest.mark.parametrize(("expression", "code", "column"), [
    ("cat and", "filter_ends", 8), ("(cat or dog", "filter_bracket", 1),
    ("cat )", "filter_wrong", 5), ('cat "dog', "filter_quote", 5), ("or cat", "filter_wrong", 1),
    ("cat or or dog", "filter_wrong", 8),
    ("tags > many", "filter_number", 8), ("tags >", "filter_number", 7), ("> 3", "filter_wrong", 1),
    ("has:hat", "filter_has", 1), ("cat has:hat", "filter_has", 5), ("tag:", "filter_ends", 5),
    ("()", "filter_wrong", 2), ("not", "filter_ends", 4), ("cat = 3", "filter_wrong", 5),
    ("(" * 200 + "cat" + ")" * 200, "filter_wrong", 101),
])
def test_mistakes_are_found_at_their_place(expression: str, code: str, column: int) -> None:
    with pytest.raises(UserError) as caught:
        parse(expression)
    assert (caught.value.code, caught.value.params["column"]) == (f"captions.{code}", column)
    for lang in ("en", "zh-CN"):
        assert str(column) in tr(caught.value.code, caught.value.params, lang)


# --- properties -------------------------------------------------------------------------------

WORDS = ["cat", "dog", "red hair", "hat"]
TREES = st.recursive(st.sampled_from(WORDS), lambda inner: st.one_of(
    st.tuples(st.just("not"), inner), st.tuples(st.sampled_from(("and", "or")), inner, inner)),
    max_leaves=8)


def written(tree: Any) -> str:
    if isinstance(tree, str):
        return tree
    if tree[0] == "not":
        return f"not ({written(tree[1])})"
    return f"({written(tree[1])}) {tree[0]} ({written(tree[2])})"


def meant(tree: Any, caption: str) -> bool:
    if isinstance(tree, str):
        return tree in caption.split(", ")
    if tree[0] == "not":
        return not meant(tree[1], caption)
    both = meant(tree[1], caption), meant(tree[2], caption)
    return all(both) if tree[0] == "and" else any(both)


@settings(deadline=None)
@given(TREES, st.lists(st.sampled_from(WORDS), unique=True).map(", ".join))
def test_expressions_mean_what_they_say(tree: Any, caption: str) -> None:
    assert parse(written(tree))(Subject(caption)) == meant(tree, caption)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog", "and", "or", "not"]), min_size=1, max_size=9),
       st.sampled_from(["cat", "dog", "cat, dog", ""]))
def test_precedence_is_pythons(words: list[str], caption: str) -> None:
    """`not` before `and` before `or`: Python reads the same, where words stand alone."""
    adjacent = any(a not in ("and", "or", "not") and b in ("cat", "dog", "not")
                   for a, b in pairwise(words))
    if adjacent:                            # one phrase or an `and` left out: no Python
        return
    code = " ".join({"cat": "('cat' in c)", "dog": "('dog' in c)"}.get(w, w) for w in words)
    try:
        expected = bool(eval(code, {"c": caption}))
    except SyntaxError:
        expected = None                     # type: ignore[assignment]
    try:
        found: bool | None = parse(" ".join(words))(Subject(caption))
    except UserError:
        found = None
    assert found == expected


@settings(deadline=None)
@given(st.text(alphabet='catnodr "()<>=!:*\\猫7', max_size=25), st.text(max_size=10))
def test_any_text_is_a_filter_or_a_mistake_with_a_column(expression: str, caption: str) -> None:
    try:
        result = parse(expression)(Subject(caption, "a.png", "sks", len))
    except UserError as fault:
        assert 1 <= fault.params["column"] <= len(expression) + 1  # noqa: PT017
    else:
        assert isinstance(result, bool)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["cat", "Cat", "red_hair", "red hair", "hat"]))
                .map(", ".join)))
def test_counts_are_pictures(captions: list[str]) -> None:
    expected = Counter(key for caption in captions
                       for key in {tag_key(tag) for tag in split_tags(caption)})
    assert {tag_key(tag): n for tag, n in search.count(captions)} == dict(expected)
