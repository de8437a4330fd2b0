"""captioner/models/sentences.py: answers of all kinds become captions, or are known as none."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.models import sentences

GOOD = "A red circle on a white table."
# Plain captions, among them all that looks like something to take away.
CAPTIONS = (
    GOOD, "a red disc", "1girl, solo, long_hair, ^_^, *_*, >_<, fate_(series), o_o",
    'A sign that says "go": red.', '"Go" and "stop" in red letters', "A clock at 10:30 on a wall.",
    "A meme with the caption: hello", "This is a sign that reads: STOP", "Great wall of China",
    "Sure footed goat on a rock", "Here is the news poster on a wall", "Sorry sign on a door",
    'A man says: "Hello. Would you like tea?"', "[sks], 1girl, (best quality:1.2), {a|b} hair",
    "I love you written on a wall", "A sorry-looking dog", "no image noise, photo, no, no, no",
    "Thinking man, hand on chin, statue", "2 * 3 * 4 = 24 on a blackboard", "红色的圆，白色的桌子",
    "一个红色的圆放在白色的桌子上。旁边有一只猫。", "好的画，大师之作", "以下 two signs, shop",
    "ok",
    "red; blue", "sks style, a dog; a cat", "tag: a dog, leash", "The image shows a dog. It sits.",
    "A dog's 5.5 m leash. It's 3.5 kg.", "To the left, a sign: please wait",
    "ha ha ha ha, laughing",
    "Option 1 written on a ballot", "a poster titled 'Note: beware'", "3 dogs",
    "👩‍🎨 emoji, sticker",
    "A café; Straße, naïve — “quoted” part.", "x < y > z, math", "white, red, white, red, white")
Wrap = Callable[[str], str]
# What models put around captions, from inside to outside; at most one of each floor.
FLOORS: tuple[tuple[str, ...], ...] = (
    ('"{}"', "“{}”", "**{}**", "「{}」", "`{}`", "_{}_"),
    ("Caption: {}", "**Caption:** {}", "Image description:\n{}", "描述：{}", "Final answer: {}",
     "## Image Description\n\n{}", "**Description**\n{}", "Output: {}", "图片描述：\n{}", "> {}",
     "【描述】{}", "输出：{}", "这张图片的描述如下：{}", "caption: |\n  {}", "<p>{}</p>",
     "Hier ist die Bildbeschreibung:\n\n{}", "Вот описание изображения:\n\n{}",
     "こちらが画像の説明です：\n{}",
     "Here’s a caption: {}", "Title: Red disc\n{}"),
    ("```\n{}\n```", "```text\n{}\n```", "- {}", "{}\n\n---\n\nNote: it is short.",
     "Option 1: {}\n\nOption 2: Another picture.", "{}\n\nOr:\n\nAnother picture.",
     "**Option A (short):**\n{}\n\n**Option B (long):**\nAnother picture.",
     "Here are three captions:\n\n1. {}\n2. Another picture with a dog.\n3. A third picture.",
     "Title: Red\n\nDescription: {}\n\nTags: red, disc",
     "以下是几个选项：\n\n1. {}\n2. 另一张图片有一只狗在那里。"),
    ("Sure — here’s the caption:\n\n{}", "Let’s describe the image.\n\n{}",
     "Here is the caption:\n\n{}", "Sure! Here's a description of the image:\n\n{}", "Sure!\n\n{}",
     "Certainly! Below is a caption for your image:\n{}", "好的，以下是图片的描述：\n\n{}",
     "I'd be happy to help! Here is a caption:\n{}", "Based on the image, here is a caption:\n{}",
     "Okay, here's a caption for training.\n\n{}", "当然可以！以下是描述：\n{}",
     "Here you go:\n{}"),
    ("{}\n\nLet me know if you'd like a different style!", "{}\n\nWould you like me to adjust it?",
     "{}\n\nI hope this helps! 😊", "{}\n\nFeel free to ask.\nI can also make it longer.",
     "{}\n\n希望这对您有帮助！", "{}\n\nThis caption captures the mood.", "{}\n\n(12 words)",
     "{}\n\n#art #red_disc",
     "{}\n\nIf you need anything else, just ask.", "{}\n\n如果您需要修改，请告诉我。"),
    ("<think>The user wants\na caption. Sure!</think>\n\n{}",
    "They want a caption.\n</think>\n\n{}",
     "<thinking>Hm</thinking><answer>{}</answer>", "◁think▷It is red◁/think▷{}",
     "[THINK]It is red[/THINK]{}", "<thought>Red</thought>{}", "<seed:think>Red</seed:think>{}",
     "<|channel>thought\nIt is red<channel|>{}", "<unused94>thought\nIt is red<unused95>{}",
     "<|channel|>analysis<|message|>We need it.<|end|><|start|>assistant<|channel|>final"
     "<|message|>{}<|return|>", "analysisWe need a caption.assistantfinal{}",
     "<|begin_of_thought|>Red<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
     "<|START_THINKING|>Red<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
     "Thinking...\nIt is red.\n...done thinking.\n\n{}", "<reasoning>a</reasoning>\n{}",
     "My steps: red.\n[BEGIN FINAL RESPONSE]\n{}\n[END FINAL RESPONSE]"),
    ("{}<|im_end|>\n<|im_start|>user\nAnd now?", "<|im_start|>assistant\n{}<|im_end|>", "{}</s>",
     "{}<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n{}", "{}<|endoftext|>",
     "<start_of_turn>model\n{}<end_of_turn>", "{}<|end|>", "<|begin_of_box|>{}<|end_of_box|>",
     "{}<｜end▁of▁sentence｜>", "\ufeff{}", " \n{}\n\n",
     "{}<end_of_utterance>", "[OUT]{}", "<assistant>{}</assistant>"))


def dressed(caption: str, wraps: tuple[str | None, ...]) -> str:
    for wrap in wraps:
        caption = wrap.replace("{}", caption) if wrap else caption
    return caption


@pytest.mark.parametrize("wrap", [wrap for floor in FLOORS for wrap in floor])
def test_every_dress_comes_off(wrap: str) -> None:
    assert sentences.read(dressed(GOOD, (wrap,))) == sentences.Answer(GOOD)


@given(st.sampled_from([GOOD, "A cat sits on a wall, in soft light.", "一只猫坐在墙上。"]),
       st.tuples(*(st.one_of(st.none(), st.sampled_from(floor)) for floor in FLOORS)))
def test_any_dresses_together_come_off(caption: str, wraps: tuple[str | None, ...]) -> None:
    assert sentences.read(dressed(caption, wraps)) == sentences.Answer(caption)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_plain_caption_is_never_changed(caption: str) -> None:
    assert sentences.read(caption) == sentences.Answer(caption)


WORDS = st.sampled_from(["red", "a", "sign", "caption", "image", "here", "sure", "note", "or",
"the",
                         "option", "please", "think", "answer", "cat's", "3", "10:30", "(old)",
                         "猫",
                         "“no”", "^_^", "long_hair", "x/y", "50%", "#1", "T-shirt", "I", "is"])


@given(st.lists(WORDS, min_size=2, max_size=9, unique=True), st.sampled_from(["", "."]))
def test_words_of_talk_within_a_caption_stay(words: list[str], end: str) -> None:
    caption = "A " + " ".join(words) + end
    assert sentences.read(caption) == sentences.Answer(caption)


@pytest.mark.parametrize(("said", "caption"), [
    ("1. 1girl\n2. solo\n3. long hair", "1girl, solo, long hair"),
    ("- 1girl\n- solo", "1girl, solo"), ("`1girl`, `solo`", "1girl, solo"),
    ('"1girl", "long hair"', "1girl, long hair"), ("1girl | solo | hat", "1girl, solo, hat"),
    ("A red<br>circle, \u200b<b>bold</b>", "A red circle, bold"),
    (f"Short caption: Red disc\n\nDetailed caption: {GOOD}", GOOD),
    (f"Sure!\n\nBrief description: Red disc\nLong description: {GOOD}", GOOD),
    (f"{GOOD} (12 words)", GOOD), ("<ul><li>1girl</li><li>solo</li></ul>", "1girl, solo"),
    ("- red circle\n- white table\n- flat style", "red circle, white table, flat style"),
    ("red circle\nwhite table\nflat style", "red circle, white table, flat style"),
    ("1. red circle\n2. white table", "red circle, white table"),
    ('1. "red circle"\n2. "white table"', "red circle, white table"),
    ("1、红色圆\n2、白色桌子", "红色圆, 白色桌子"),
    ('["red circle", "white table"]', "red circle, white table"),
    ('```json\n["red circle", "white table"]\n```', "red circle, white table"),
    ("red circle; white table; flat style", "red circle, white table, flat style"),
    ("#red #circle #white_table", "red, circle, white_table"), (f"{GOOD}\n\n{GOOD}", GOOD),
    ("('A red circle on a white table.',)", GOOD),
    ("Tags: red circle, white table", "red circle, white table"),
    ("Here are some tags for the image:\n\n- red circle\n- white table", "red circle, white table"),
    ('{"tags": ["red circle", {"name": "white table"}]}', "red circle, white table"),
    ("- The circle is red.\n- The table is white.", "The circle is red. The table is white."),
    ("A red circle\non a white\ntable.", GOOD), ("A red\0 circle\x1b[0m on a white table.", GOOD),
    ("A red circle on a \ud83dwhite table.", GOOD),
    ("<think>It is red and", ""), ("[THINK]red", ""), ("<|channel|>analysis<|message|>We", ""),
    ("**Caption:** A red circle on a *white* table.", GOOD), ("", ""), ("  \n", "")])
def test_answers_become_captions(said: str, caption: str) -> None:
    assert sentences.read(said) == sentences.Answer(caption)


@pytest.mark.parametrize("value", [
    {"caption": GOOD}, {"description": GOOD, "tags": ["red", "circle"]}, [GOOD],
    [{"caption": GOOD}],
    {"image": {"Image Description": GOOD}}, {"captions": [GOOD, "Another."]}, {"描述": GOOD},
    {"whatever": GOOD}])
def test_captions_in_json(value: object) -> None:
    texts = [json.dumps(value), f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```",
             f"Here is the JSON:\n{json.dumps(value)}\n\nLet me know!", str(value)]
    assert [sentences.read(text) for text in texts] == [sentences.Answer(GOOD)] * 4


@pytest.mark.parametrize("said", [
    '{"a": "red", "b": "blue"}', '{"caption": "A red cir',
    '{"caption": null}', '{"error": "no image"}', "N/A", '<tool_call>{"name": "caption"}',
    '{caption: "A red circle."}', '[{"bbox_2d": [1], "label": ""}, 3, {}]',
    "1. The circle is red.\n2. The circle lies on a table.", "!!!!!!!!!!!!!!!!!!!!!!!!", "...", "-",
    "红色" * 40, "a red circle and " * 18])
def test_what_stays_in_doubt(said: str) -> None:
    answer = sentences.read(said)
    assert answer.doubt == "unclear" or said.startswith("[{")
    assert answer.text


@pytest.mark.parametrize(("start", "round_", "times"), [
    (GOOD, " A dog sits.", 30), ("", "A red circle on a white table. ", 5),
    ("red circle, white table", ", red circle, white table", 20), ("red, blue", ", green", 50),
    ("One. Two.", " Three. Four.", 10)])
def test_a_model_that_repeats_itself_is_heard_once(start: str, round_: str, times: int) -> None:
    once = (start + round_).strip(" ,")
    for cut in (0, 3):                          # the token limit may cut the last round
        said = (start + round_ * times).strip(" ,")
        assert sentences.read(said[:len(said) - cut]).text in (once, start)


@pytest.mark.parametrize("text", [
    "I'm sorry, but I can't help.", "I’m unable to describe this image.",
    "I cannot describe people.",
    "Iʼm not able to see it", "I can`t view images", "I don't see an image.", "Sorry, no.",
    "It seems that no image was attached. Could you please upload the image?",
    "I apologize, but no.",
    "Please provide the image you would like me to describe.", "No image was provided.",
    "As an AI language model, I can't", "Unfortunately, I cannot see the picture.",
    "There is no image attached to your message.", "You haven't attached an image.",
    "Without seeing the image, it is hard to tell.", "To describe the image, I need it first.",
    "The image you mentioned is not here.", "I do not have access to images.", "I need to see it",
    "抱歉，我不能描述。", "对不起，我无法查看图片。", "我看不到图片，请重新上传。", "请上传图片。",
    "您似乎没有上传图片", "作为一个AI语言模型，我不能", "無法識別這張圖片", "申し訳ありません",
    "Es tut mir leid, das kann ich nicht.", '{"caption": "I\'m sorry, I can\'t."}',
    "Извините, я не могу описать это.", "I'm going to have to pass on this one.", "[REDACTED]",
    "My guidelines prevent me from describing this.", "Error: failed to process image",
    "您好，我是AI助手，无法查看图片。", "根据相关规定，该图片不适宜描述。",
    "Hi! I can’t see images.",
    "<think>No.</think>I’m sorry, I can’t assist with that request.", "**I'm sorry**, but no."])
def test_refusals(text: str) -> None:
    assert sentences.read(text).doubt == "refused"


@given(st.text(alphabet="a:\"“”<>/think*-.\n 是描述：[]{}|,;1", max_size=60))
def test_any_text_is_read_calmly(answer: str) -> None:
    said = sentences.read(answer)
    assert "\n" not in said.text
    assert said.text == said.text.strip()
    assert len(said.text) <= len(answer) + answer.count("\n") + answer.count(";")


def test_cut_answers_end_at_a_sentence() -> None:
    assert sentences.whole_sentences("One. Two is cu") == "One."
    assert sentences.whole_sentences("No end in si") == "No end in si"
    assert sentences.whole_sentences("一。二。三没") == "一。二。"
    assert sentences.whole_sentences("3.5 m of rope and") == "3.5 m of rope and"
    assert sentences.whole_parts("One. Two is cu") == "One."
    assert sentences.whole_parts("red disc, white ta") == "red disc"
    assert sentences.whole_parts("红色的圆，白色的") == "红色的圆"
    assert sentences.whole_parts("No end in si") == "No end in si"
