"""Others' markup: each kind is known, what only looks like it isn't; weights as in A1111."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import prompt_markup
from core.prompt_markup import CHUNK_END, BadWeight, Spans

SAMPLES = {
    "settings": ['{"prompt": "a|b"}', "a cat --ar 3:2", "a cat --n bad, worse --s 20",
                 "Negative prompt: bad", "Steps: 20, Sampler: Euler a, Seed: 1"],
    "trigger": ["[trigger], a cat", "a [Trigger]"],
    "separator": ["1girl ||| hat", "a;;;b"],
    "lora": ["x <lora:ink:0.8>", "<lyco:ink>", "<hypernet:a:1>", "<lora:ink:0.8",
             "《lora：墨：0.8》", "<loha:ink:1>", "<wildcard:hats>", "<random:a|b>"],
    "embedding": ["embedding:easynegative", "(embedding:bad_hands:1.2)"],
    "choice": ["{red|blue} car", "{2$$a|b|c}", "{0.3::a|b}"],
    "wildcard": ["__colour__ dress", "__hair/colour-*__", "__a__"],
    "schedule": ["[cat:dog:0.5]", "[cat:10]", "[:dog:.3]", "[cat|dog]"],
    "appended": ["(cat)1.3", "(red hair)++", "cat++, dog", "cat--", "a (red:1.3 cat"],
    "weight": ["(red hair:1.3), smile", "（红发：1.3）", "(x: .7 )", "(x:nan)", "(x:1e9)"],
    "brackets": ["((best quality))", "a [small] dog"],
    "escape": [r"ganyu \(genshin impact\)"],
    "chunk": ["a cat BREAK a dog", "BREAK"],
    "prompts": ["a cat AND a dog"],
    "comment": ["# a note", "a cat\n  # a note"],
}
PLAIN = ["ganyu (genshin impact)", ":(, >:), :], ^_^, (o)_(o), |_|, =_=, +_+, \\||/, \\o/",
         "re:zero, c++, 3:4", "snake_case_word, __", "{one}", "[], ( )", "breakfast AND",
         "#compass", "a lorax, explore: here", "AND", "a well-known, half-open--door",
         "steps: two, a stair", "a house -- a big one", "a cat —a dog"]


def test_each_kind_has_its_samples() -> None:
    assert SAMPLES.keys() == prompt_markup.KINDS.keys()


@pytest.mark.parametrize(("kind", "text"), [(k, text) for k, all_ in SAMPLES.items()
                                            for text in all_])
def test_each_kind_is_found(kind: str, text: str) -> None:
    assert [*prompt_markup.found(text)] == [kind]
    assert prompt_markup.found(text, {kind}) == {}


@pytest.mark.parametrize("text", PLAIN)
def test_tags_and_prose_are_none(text: str) -> None:
    assert prompt_markup.found(text) == {}
    assert prompt_markup.spans(text) == [(text, 1.0)]


@pytest.mark.parametrize(("prompt", "expected"), [
    ("(cat:1.4)", [("cat", 1.4)]),
    ("a (cat:0.5), dog", [("a ", 1.0), ("cat", 0.5), (", dog", 1.0)]),
    ("((cat))", [("cat", 1.21)]),
    ("[cat]", [("cat", 1 / 1.1)]),
    ("(a (cat:1.2):1.5)", [("a ", 1.5), ("cat", 1.8)]),
    ("(a [b]:2)", [("a ", 2.0), ("b", 2 / 1.1)]),
    (r"ganyu \(genshin\)", [("ganyu (genshin)", 1.0)]),
    (r"(x:1.2) \[y\]", [("x", 1.2), (" [y]", 1.0)]),
    ("(x:1.2), (y)", [("x", 1.2), (", ", 1.0), ("y", 1.1)]),
    ("a BREAK b", [("a ", 1.0), CHUNK_END, (" b", 1.0)]),
    ("(a BREAK b:1.3)", [("a ", 1.3), CHUNK_END, (" b", 1.3)]),
    ("(a:1.2) (b", [("a", 1.2), (" (b", 1.0)]),
    ("a) (b:1.2)", [("a) ", 1.0), ("b", 1.2)]),
    ("(re:zero), (x:1.2)", [("re:zero", 1.1), (", ", 1.0), ("x", 1.2)]),
    ("(x:1.2), [a:b:0.5]", [("x", 1.2), (", [a:b:0.5]", 1.0)]),
    ("", [("", 1.0)]),
])
def test_weights_as_in_a1111(prompt: str, expected: Spans) -> None:
    spans = prompt_markup.spans(prompt)
    assert [text for text, _ in spans] == [text for text, _ in expected]
    assert "".join(prompt_markup.sections(prompt)) == "".join(text for text, _ in expected)
    assert len(prompt_markup.sections(prompt)) == 1 + expected.count(CHUNK_END)
    assert [weight for _, weight in spans] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("part", ["(a:nan)", "(a:inf)", "(a:1e9)", "(a:1,2)", "(a:)", "(a:-11)"])
def test_what_is_no_weight_is_named(part: str) -> None:
    with pytest.raises(BadWeight) as caught:
        prompt_markup.spans(f"x, {part}, (b:1.2)")
    assert str(caught.value) == part


@given(st.text(st.sampled_from("ab (:)[]1.2\\{|}_<#B"), max_size=30))
def test_no_letter_is_lost_or_read_twice(text: str) -> None:
    try:
        spans = prompt_markup.spans(text)
    except BadWeight:
        return
    assert all(abs(weight) < 1e4 for _, weight in spans)
    letters = [letter for letter in "".join(part for part, _ in spans) if letter in "ab"]
    assert letters == [letter for letter in text if letter in "ab"]
    prompt_markup.found(text)


@given(st.text(st.sampled_from("ab|{}$2:, "), max_size=30), st.integers(0, 99))
def test_alternatives_end_and_are_the_seed_s(text: str, seed: int) -> None:
    chosen = prompt_markup.choose(text, seed)
    assert chosen == prompt_markup.choose(text, seed)
    assert "choice" not in prompt_markup.found(chosen)


def test_alternatives() -> None:
    drawn = {prompt_markup.choose("a {red|0.3::blue|{x|y}} car", seed) for seed in range(40)}
    assert drawn == {f"a {one} car" for one in ("red", "blue", "x", "y")}
    assert {len(prompt_markup.choose("{2$$a|b|c}", seed).split(", ")) for seed in range(9)} == {2}


def test_captions_get_the_trigger_and_commas() -> None:
    assert prompt_markup.placed("photo of [trigger] in a hat", " mi4 ") == "photo of mi4 in a hat"
    assert prompt_markup.placed("[trigger]", "") == "[trigger]"
    assert prompt_markup.joined("1girl, ||| hat;;;boots |||") == "1girl, hat, boots"
    assert prompt_markup.joined("a | b ; c") == "a | b ; c"
    assert prompt_markup.cleaned("# a note\n（红发：１.3）") == "(红发:1.3)"
    assert [*prompt_markup.unread_in("[trigger] ||| (a:1.2)", "mi4")] == ["weight"]
    assert [*prompt_markup.unread_in("[trigger]", "")] == ["trigger"]
