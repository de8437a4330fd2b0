"""Turns the answers of language models into captions: one grammar for all models. Text only.

An answer is peeled from outside to inside: signs that no text has, the control marks and thoughts
of any model, JSON and code fences, chat before and after, one of several alternatives, labels,
quotes. A caption of one line meets strict rules only, so that a plain one is never changed. What
stays in doubt is said to be: the caller shows it instead of saving it.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from core.dataset.captions import one_line

MOST = 20_000                   # characters that are looked at: far more than any caption has
Doubt = Literal["", "refused", "html", "unclear"]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str                               # one line; empty where all was thoughts
    doubt: Doubt = ""                       # why it shouldn't be saved


def read(answer: str) -> Answer:
    """The caption in a model's answer, and whether it may be no caption."""
    text = without_thoughts(without_signs(re.sub("<br ?/?>", " ", answer))).strip()[:MOST]
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+(?=\n|[ \t])", "", text))
    plural = _PLURAL.search(_FIRST_ITEM.split(text)[0]) is not None
    before = None
    # Again and again, as each may hide another.
    while before != text:
        before = text
        text = _unwrapped(_chosen(text, plural))
        if text[:1] in tuple("{[(") and (inner := _of_json(text)) is not None:
            text = inner
        text = _bare(text)
    broken = re.match(r"(?:<tool_call>\s*)?\{\s*[\"']?\w[^\"'\n]*[\"']?\s*:\s*[\"'\[{n]|"
                      r"(?:null|none|n/a)\Z", text, re.IGNORECASE)
    doubt: Doubt = "unclear" if broken else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and len(set(lines)) == 1:
        text = lines[0]
    elif len(lines) > 1 and all(_BULLET.match(line) for line in lines):
        items = [unquoted(_BULLET.sub("", line).strip().rstrip(",;，；")) for line in lines]
        sentences = any(_END.search(item) for item in items)
        # Numbered sentences: parts of one description, or three to choose from?
        doubt = "unclear" if sentences and lines[0][0].isdigit() else doubt
        text = " ".join(items) if sentences else ", ".join(items)
    elif found := re.fullmatch(r"[^;；|,.!?:\n]{1,40}([;；|])[^;；|,.!?:\n]{1,40}"
                               r"(?:\1[^;；|,.!?:\n]{1,40})+", text):
        text = ", ".join(part.strip() for part in text.split(found[1]))
    elif re.fullmatch(r"""([`"'])[^`"'\n]+\1(?:,\s*\1[^`"'\n]+\1)+,?""", text):
        text = text.replace(text[0], "")
    elif re.fullmatch(r"(?:#[^\s#]{2,}[\s,]*){2,}", text):
        text = ", ".join(re.findall(r"#([^\s#,]+)", text))
    text, endless = _without_loop(one_line(text))
    if is_refusal(text):
        doubt = "refused"
    elif re.match(r"<!doctype|<html", text, re.IGNORECASE):
        doubt = "html"
    elif text and (endless or not re.search(r"[^\W_]|\^_\^", text)):
        doubt = "unclear"
    return Answer(text, doubt)


# --- signs, marks and thoughts ----------------------------------------------------------------

# Terminal sequences, control characters but line ends and tabs, signs that turn the reading
# direction or have no width, halves of characters (no file can hold them), byte order marks.
_SIGNS = re.compile("\x1b\\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b"
                    "\u2060\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")


def without_signs(text: str) -> str:
    """The text without control characters, which no caption holds and no file should."""
    return _SIGNS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


_NAMES = (r"(?:think|thinking|thoughts?|reasoning|reason|reflection|analysis|scratchpad|"
          r"inner_monologue|seed:think)")
# How models open and close their thoughts: tags, Mistral's brackets, Kimi's triangles, the
# words between bars of Open Thoughts and Cohere, MedGemma's unused tokens.
_OPENS = (rf"<\|?{_NAMES}\|?>|◁{_NAMES}▷|(?-i:\[THINK\])|<\|begin_of_thought\|>|"
          r"<\|start_thinking\|>|<unused94>(?:thought)?|\AThinking\.\.\.\n")
_CLOSES = (rf"<\|?/{_NAMES}\|?>|<\|/?end_{_NAMES}\|>|◁/{_NAMES}▷|(?-i:\[/THINK\])|"
           r"<\|end_of_thought\|>|<\|end_thinking\|>|<unused95>|\n\.\.\.done thinking\.|"
           r"\[BEGIN FINAL RESPONSE\]")
# gpt-oss and Gemma speak in channels; only the final one is for others. Servers that swallow the
# marks leave their words behind.
_CHANNELS = re.compile(r"<\|?channel\|?>\s*(?:analysis|commentary|thought)\b.*?"
                       r"(?:<\|end\|>|<channel\|>|(?=<\|start\|>)|(?=<\|channel\|>\s*final)|\Z)",
                       re.DOTALL)
_SWALLOWED = re.compile(r"\A\s*analysis(?=[A-Z\s]).*?assistant\s*final", re.DOTALL)
_TURN = re.compile(r"(?:<\|(?:im_start|start_header_id|start|turn)\|?>|<start_of_turn>)\s*"
                   r"(?:assistant|model)?\s*(?:<\|end_header_id\|>)?|"
                   r"<\|channel\|>\s*final\b[^<\n]{0,20}(?:<\|constrain\|>\w+)?\s*", re.IGNORECASE)
# What follows the end of a turn is a turn that the model makes up.
_OVER = re.compile(r"(?<=\S)\s*(?:<\|(?:im_end|eot_id|end|return|endoftext|end_of_text|eom_id|user|"
                   r"end_response)\|>|<end_of_(?:turn|utterance)>|</s>|<eos>|<turn\|>|"
                   r"\[(?:/?INST|end of text|END FINAL RESPONSE)\]|<｜end▁of▁sentence｜>).*\Z",
                   re.DOTALL | re.IGNORECASE)
_INNER = re.compile(r"<(answer|final_answer|caption|description|response|output|solution)>(.*?)"
                    r"(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_MARKS = re.compile(r"<\|[\w:/. -]{1,40}\|>|<｜[^｜<>]{1,40}｜>|"
                    r"</?(?:s|bos|eos|pad|unk|image|img|assistant)>|\[/?(?:INST|OUT|ASSISTANT)\]|"
                    r"<(?:start|end)_of_turn>|</?(?:b|i|em|strong|span|ul|ol)>",
                    re.IGNORECASE)
_LINES = re.compile(r"</?(?:p|li|div|h[1-6]) ?/?>", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """The answer without what its model thought, and without the marks around turns."""
    text = _CHANNELS.sub("", text)
    flags = re.DOTALL | re.IGNORECASE
    text = re.sub(rf"(?:{_OPENS})(?:(?!{_OPENS}).)*?(?:{_CLOSES})", "", text, flags=flags)
    # Without a beginning: the chat template of some servers swallows it.
    text = re.sub(rf"\A.*(?:{_CLOSES})", "", text, flags=flags)
    # Without an end: the token limit cut the answer.
    text = re.sub(rf"(?:{_OPENS}).*\Z", "", text, flags=flags)
    text = _OVER.sub("", _TURN.sub("", text))
    if inner := _INNER.findall(text):
        text = inner[-1][1]
    return _SWALLOWED.sub("", _LINES.sub("\n", _MARKS.sub("", text)))


# --- what is around a caption -----------------------------------------------------------------

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[\w-]*[ \t]*\n(.*?)(?:\n[ \t]*\1[ \t]*$|\Z)",
                    re.DOTALL | re.MULTILINE)
_KIND = (r"(?:captions?|descriptions?|prompts?|tags|tag list|keywords|answer|alt[ -]text|output|"
         r"response|assistant)")
# Words before it, so that "a meme with caption: hello" stays.
_WHICH = (r"(?:(?:the|an?|my|your|one|image|picture|photo|training|detailed|short|brief|long|final|"
          r"concise|suggested|possible|generated|lora|new|revised|full|visual|scene|english|"
          r"danbooru|booru|single|simple|accurate|stable diffusion)[ -])")
_POLITE = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|okay|ok|absolutely|alright|got it|no problem|great|"
    r"(?:i'd|i would) be (?:happy|glad) to (?:help|assist|describe)[^.!:\n]{0,60}|"
    r"(?:thank you|thanks) for (?:sharing|providing|the)[^.!:\n]{0,60}|"
    r"(?:(?:hi|hello|hey)(?: there)?|[您你]好)(?=[!！])|好的|好|当然(?:可以)?|没问题)"
    r"(?:[,.!:，。！：]+\s*|\s+[—–-]+\s+|\s*\n+)", re.IGNORECASE)
# "Here is a short caption for the image:" and its like. They are short and end in a colon.
_INTRODUCTION = re.compile(
    rf"(?:(?:(?:based on|looking at)[^:.\n]{{0,60}}, )?(?:here(?:'s| is| are)|below (?:is|are))\b"
    rf"[^:.\n]{{0,60}}\b(?:captions?|descriptions?|prompts?|tags|keywords|options|versions|image|"
    rf"picture|photo|json)\b[^:.\n]{{0,60}}|here(?: it is| you go)|"
    rf"(?:this is|the following is) {_WHICH}*{_KIND}\b[^:.\n]{{0,60}}|"
    rf"{_WHICH}{{0,4}}{_KIND}(?: (?:for|of|could be|would be|might be)\b[^:.\n]{{0,40}})?|"
    r"(?:以下|下面|这)(?:是|为)[^：:。\n]{0,30}|"
    r"(?:这[张幅]|该|本)?(?:图片|图像|画面|图)?(?:内容)?的?(?:描述|说明|标题|标签|标注|提示词|输出|回答|答案)"
    r"(?:如下|是)?)\s*[:：]\s*(?:[|>]-?\n\s*)?|\A【[^】\n]{1,10}】\s*", re.IGNORECASE)
# A first line of talk, with more after it: it may be bolder, as a plain caption has no second.
_ABOUT = (r"\b(?:caption|describ|description|prompt|tags|keywords|image|picture|photo|help)|"
          r"描述|标注|图|\bbild|описани|説明|설명")
_FIRST_LINE = re.compile(
    rf"\A(?:json|(?:title|标题)[:：][^\n]*|[^\n]{{0,100}}(?:{_ABOUT})[^\n.!?]{{0,80}}[:：]|"
    rf"#{{1,6}} [^\n]{{1,80}}|\*\*[^*\n]{{1,80}}(?<![.!?。！？])\*\*:?|(?:sure|certainly|of course|"
    rf"okay|ok|here|based on|let me|let's|i need|i'll|i will|i can|i'd|great|thank)\b[^\n]{{0,80}}"
    rf"(?:{_ABOUT})[^\n]{{0,80}}|(?:以下|下面|好的|当然)[^\n]{{0,60}}|"
    rf"{_WHICH}{{0,4}}{_KIND}|(?:图片|图像|画面)?(?:描述|说明|标注))[ \t]*\n+(?=\s*\S)",
    re.IGNORECASE)
# Offers and questions to the user, and all after them.
_OFFER = (r"(?:(?:please )?let me know|(?:please )?feel free to|would you like|do you want me|"
          r"shall i |should i |is there anything|if you(?:'d| would) (?:like|prefer)|"
          r"if you (?:need|want)|(?:i )?hope (?:this|that|it) |i can also |"
          r"(?:please )?don't hesitate|how can i |how does (?:this|that) |"
          r"does (?:this|that) (?:work|help)|希望(?:这|以上|对|能)|如果[您你]|如需|请告诉我|"
          r"\((?:word count|\d+ (?:words|characters|tokens)\b)|"
          r"请随时|需要我|是否需要|还有什么|有什么需要|[您你]?还需要)")
_LAST_WORDS = re.compile(
    rf"(?:(?<=\n)|(?<=[.!?…] )|(?<=[.!?][\"”'*)] )|(?<=[。！？]))\s*{_OFFER}.*\Z",
    re.DOTALL | re.IGNORECASE)
_LAST_LINE = re.compile(
    r"\n\s*(?:\W{0,3}note\b|\(?word count|\(?\d+ words|this (?:caption|description|prompt)\b|"
    r"these (?:captions|tags)\b|the (?:caption|description) above|i(?:'ve| have) |enjoy|"
    r"以上(?:是|就是)|注[:：]|（注|(?:#[^\W\d][\w-]*\s*){2,}\Z)[^\n]*(?:\n.*)?\Z",
    re.DOTALL | re.IGNORECASE)
_RULE = re.compile(r"^[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*$", re.MULTILINE)
_MARKUP = re.compile(r"\*\*(?=\S)(.+?)\*\*|(?<!\w)__(?=\S)([^_\n]+)__(?!\w)|"
                     r"(?<![\w*])\*([^\W_][^*\n]*)\*(?![\w*])")
_BULLET = re.compile(r"^\s*(?:[-*•–·]|\d{1,2}[.)、])(?:\s+(?=\S)|(?=[^\s\d]))")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "『": "』", "«": "»", "`": "`",
           "_": "_"}


def _unwrapped(text: str) -> str:
    """Without code fence, chat and markup around it, one layer of each."""
    if fenced := _FENCE.search(text):
        return fenced[2].strip()
    text = _RULE.sub("", text).strip()
    for last in (_LAST_WORDS, _LAST_LINE):
        found = last.search(_straight(text))
        # What a picture says may be talk: 'a sign: "Hello. Would you like tea?"'
        if found and found.start() and found[0].count('"') % 2 == 0 and (
                found[0].count("“") == found[0].count("”")):
            text = text[:found.start()].rstrip()
    for first in (_FIRST_LINE, _POLITE, _INTRODUCTION):
        found = first.match(_straight(text))
        # Politeness goes only where more follows it, so that a caption of one word stays.
        if found and text[found.end():].strip(" *"):
            return text[found.end():].lstrip()
    return text


def _bare(text: str) -> str:
    """Without emphasis, a heading's or a single bullet's sign, and quotes."""
    text = _MARKUP.sub(lambda match: match[1] or match[2] or match[3], text)
    text = re.sub(r"^#{1,6}\s+|^>\s+", "", text, flags=re.MULTILINE)
    if not re.search(r"\n\s*[-*•]\s", text):
        text = re.sub(r"^[-*•]\s+", "", text)
    return unquoted(text.strip())


def unquoted(text: str) -> str:
    """Removes quotes around the whole text; those inside stay."""
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        if text[0] not in inner and text[-1] not in inner:
            return inner.strip()
    return text


# --- several captions -------------------------------------------------------------------------

_PLURAL = re.compile(r"\b(?:captions|options|descriptions|versions|alternatives|variations|"
                     r"suggestions|ideas|choices|prompts)\b|选项|几个|几种|多个|[两三四五]个|[两三四五]种",
                     re.IGNORECASE)
_OPTION = re.compile(
    r"(?:^|(?<=[.!?。！？\"”] )|(?<=[。！？]))[ \t]*(?:#{1,6} |[-*•] )?\**(?:option|caption|"
    r"version|alternative|variation|variant|description|选项|方案|版本|描述) ?#?"
    r"(?:\d|[a-d一二三四]\b|one\b|two\b)[^:：\n]{0,40}[:：]\**\s*", re.IGNORECASE | re.MULTILINE)
_OR = re.compile(r"\n\s*\**(?:or|alternatively|another option|或者|或)\b\**[^\n.。]{0,40}"
                 r"(?:[:：,，]|$).*\Z", re.DOTALL | re.IGNORECASE | re.MULTILINE)
_FIRST_ITEM = re.compile(r"^\s*(?:[-*•]|1[.)、])\s*\S", re.MULTILINE)
_ITEM = re.compile(r"\s*(?:[-*•]|1[.)、])\s*(.*?)(?=^\s*(?:[-*•]|2[.)、]))",
                   re.DOTALL | re.MULTILINE)
_SECTION = re.compile(r"^[ \t]*(?:#{1,6} |[-*•] )?\**(?:(?:short|brief|"
                      r"long|detailed|full) )?(title|caption|description|"
                      r"(?:positive )?prompt|tags|keywords|alt text|negative prompt|标题|描述|"
                      r"标签|提示词|关键词)\**[ \t]*(?:[:：]\**|$)", re.IGNORECASE | re.MULTILINE)
# By what says most of a picture.
_WANTED = ("caption", "description", "描述", "prompt", "positive prompt", "提示词", "alt text",
           "tags", "标签", "keywords", "关键词", "title", "标题")


def _chosen(text: str, plural: bool) -> str:
    """The first of several alternatives; of named sections the one that describes the picture.
    `plural`: the introduction has promised several."""
    item = _ITEM.match(text) if plural else None
    if item and (_END.search(item[1]) or len(item[1].split()) > 4):
        return item[1].strip()
    if (first := _OPTION.match(text)) is not None:
        second = _OPTION.search(text, first.end())
        return text[first.end():second.start() if second else None].strip()
    sections = list(_SECTION.finditer(text))
    if len(sections) > 1 and sections[0].start() == 0:
        ends = [section.start() for section in sections[1:]] + [len(text)]
        parts = {section[1].lower(): text[section.end():end].strip()
                 for section, end in zip(sections, ends, strict=True)}
        return next((parts[name] for name in _WANTED if parts.get(name)), text)
    either = _OR.search(text)
    return text[:either.start()].strip() if either and either.start() else text


_KEYS = ("caption", "imagecaption", "detailedcaption", "longcaption", "description",
         "imagedescription", "detaileddescription", "shortcaption", "prompt", "text", "answer",
         "response", "result", "output", "content", "描述", "图片描述", "标注", "提示词", "tags",
         "keywords", "tag", "name", "label", "标签", "captions", "descriptions", "options")


def _of_json(text: str) -> str | None:
    """The caption in JSON, or in Python's way of writing it; None where it is neither."""
    try:
        value, _ = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return _said(value)


def _said(value: Any) -> str | None:
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, dict):
        plain = {re.sub(r"[\W_]", "", str(key)).casefold(): one for key, one in value.items()}
        for key in _KEYS:
            if key in plain and (found := plain[key]):
                several = key in ("captions", "descriptions", "options") and isinstance(found, list)
                return _said(found[0] if several else found)
        return _said(*value.values()) if len(value) == 1 and "error" not in value else None
    if isinstance(value, list | tuple) and value:
        items = [_said(item) for item in value]
        if len(items) == 1:
            return items[0]
        if all(item and not _END.search(item) for item in items):
            return ", ".join(item for item in items if item)
    return None


# --- what an answer is, or isn't --------------------------------------------------------------

# Chinese sentences may follow one another without a space.
_END = re.compile(r"[.!?。！？][\"'”’」』)]*(?=\s|$|(?<=[。！？]))")
# Only at the start of an answer: "sorry" may be written on a picture. Apostrophes are straight.
_PICTURE = r"(?:image|picture|photo|attachment|file)"
_REFUSAL = re.compile(r"(?:(?:but|well|however|hm+|oh|oops|hi|hello|[您你]好)\b[,.!…，！ ]+)?"
                      "(?:" + "|".join((
    # that it can't, won't, or isn't made for it
    r"i(?:'m| am) (?:(?:very|really|so|truly) )?(?:sorry|unable|afraid)",
    r"i(?:'m| am) (?:not (?:able|comfortable|seeing)|(?:just |only )?an? (?:ai|text|language))",
    r"i (?:can(?:not|'t| not)|do not|don't|won't|will not|couldn't|could not|did not|didn't)\b",
    r"i(?:'m going to| will| must|) (?:have to |must )?(?:decline|pass)\b|my (?:guidelines|policy|"
    r"policies|programming)\b|(?:api |server |internal )?error:|\[redacted\]|"
    r"content (?:is |was )?(?:not allowed|blocked|filtered)",
    r"i (?:see no|need (?:the|an?|to see|you to))\b",
    r"(?:i )?apologi[sz]e|(?:my )?apologies|sorry(?:[,.!]| but| i\b| for| about)",
    r"as an? (?:ai|artificial|large|language|text)\b|unfortunately,? (?:i|the|no|it|this|we)\b",
    r"(?:in order )?to (?:describe|help|caption|write|provide|create)[^.\n]{0,50}, (?:i|please)\b",
    r"(?:this|your|the) (?:image|content|request|prompt) (?:violates|may violate|can(?:no|')t be|"
    r"(?:was|has been) (?:blocked|flagged))",
    # that there is no picture
    rf"(?:it (?:seems|looks like|appears)|there (?:isn't|doesn't|wasn't|does not))[^.\n]{{0,60}}\b"
    rf"(?:{_PICTURE}|attach|upload)",
    r"(?:please|can you|could you(?: please)?|kindly) (?:provide|upload|share|attach|send|describe|"
    r"give|paste|try again)\b",
    rf"no {_PICTURE}s? (?:was|is|were|has|have|provided|attached|found|uploaded|received)\b",
    rf"there (?:is|was|seems to be|appears to be) no {_PICTURE}\b",
    rf"without (?:seeing|access|an?|the)\b[^.\n]{{0,20}}{_PICTURE}",
    r"you (?:haven't|have not|didn't|did not|forgot)\b",
    rf"the {_PICTURE} (?:you|has(?: no|n')t|was(?: no|n')t|did(?: no|n')t|could(?: no|n')t|"
    rf"can(?:no|')t|failed|is missing|is not (?:visible|available|attached))",
    # the same in other languages
    r"(?:很|非常|十分)?抱歉|对不起|對不起|不好意思|(?:作为|我(?:只)?是)(?:一个|一名)?(?:ai|人工智能|大?语言模型)",
    r"(?:目前|暂时)?我?(?:目前|暂时)?(?:无法|無法|不能|没法|沒辦法)(?:直接)?(?:查看|看到|看见|识别|識別|"
    r"描述|处理|處理|提供|协助|回答|访问|打开|分析|生成|满足|为)",
    r"我?(?:看不到|看不见|没有?看到|並未看到|并未看到|没有收到|未收到|没有检测到|未检测到)",
    r"[您你](?:似乎|好像)?还?(?:没有|并未|未|忘记)|请[您你]?[先重新再]*(?:上传|提供|发送|附上|分享)",
    r"請[您你]?[先重新再]*(?:上傳|提供)|(?:该|此|这个)?(?:图片|内容|请求)(?:违反|涉及敏感|包含敏感|未上传|无法)",
    r"根据(?:相关|有关|我的)|申し訳|すみません|죄송|es tut mir leid|je suis désolée?|lo siento|"
    r"mi dispiace|desculpe|извините|к сожалению,? я|я не могу")) + ")", re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """"I'm sorry, but I can't ...", "No image was attached": no caption."""
    return _REFUSAL.match(_straight(text.strip())) is not None


def _straight(text: str) -> str:
    """The same text, of the same length, with one kind of apostrophe."""
    return re.sub("[’ʼ‘´`＇]", "'", text)


def whole_sentences(text: str) -> str:
    """Cuts a text that hit the token limit back to its last full sentence, if it has one."""
    ends = [match.end() for match in _END.finditer(text)]
    return text[:ends[-1]] if ends else text


def whole_parts(text: str) -> str:
    """The same for captions: back to the last full sentence, else to the last full tag."""
    if _END.search(text):
        return whole_sentences(text)
    return re.split(r"[,，][^,，]*\Z", text)[0]


def _without_loop(text: str) -> tuple[str, bool]:
    """-> the text where a model that couldn't stop first began to repeat itself, and whether that
    leaves no whole part, so that nobody can say what the caption was."""
    for split, least in ((r"(?<=[.!?])\s+|(?<=[。！？])", 3), (r"(?<=[,，])\s*", 4)):
        parts = [part for part in re.split(split, text) if part]
        # The limit may have cut the last one.
        bare = [part.strip(" .,，").casefold() for part in parts]
        first = _round(bare, least)
        if not first and any(part.startswith(bare[-1]) for part in bare[:-1]):
            first = _round(bare[:-1], least)
        if first:
            return " ".join(part.strip() for part in parts[:first]).rstrip(", ，"), False
    words = text.split()
    first = _round([word.strip(".,").casefold() for word in words], 6)
    loop = re.search(r"(\S.{0,20}?|\S)\1{11,}\S{0,20}\Z", text[-2000:], re.DOTALL)
    if not first and not loop:
        return text, False
    start = " ".join(words[:first]) if first else text[:-len(loop[0])] if loop else ""
    cut = whole_sentences(start)
    return (cut, False) if _END.search(cut) else (text, True)


def _round(parts: list[str], least: int) -> int:
    """How many parts there are until the second of at least `least` equal rounds that the list ends
    with; 0: it ends with none."""
    count = len(parts)
    for period in range(1, min(60, count // least) + 1):
        start = count - period
        while start > 0 and parts[start - 1] == parts[start - 1 + period]:
            start -= 1
        if count - start >= least * period:
            return start + period
    return 0
