"""What families share of text: tokens, language models that read them, stand-ins in plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from core.errors import UserError
from core.families.components import tokenizer_kinds
from core.families.components.tokenizer_kinds import UNIGRAM, Kind, Pieces

SPACE = "\u2581"                            # sentencepiece's
# Qwen3's chat, as far as captions need it: what a user says, then the answer's beginning, without
# thinking where it is switched off. Z-Image and Flux.2 klein have learned with it.
QWEN3_CHAT = ("{%- for message in messages %}"
              "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
              "{%- endfor %}"
              "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
              "{%- if enable_thinking is defined and enable_thinking is false %}"
              "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")


def open_tokenizer(folder: Path, kind: Kind) -> Any:
    """A folder's tokenizer, of whichever files it is made. The app's own gets the marks by which
    its kind differs from the one that ships."""
    pieces = None
    if not (folder / "tokenizer.json").is_file():
        pieces = tokenizer_kinds.pieces_in(folder)
    tokenizer = (AutoTokenizer.from_pretrained(folder, local_files_only=True) if pieces is None
                 else _unigram(pieces) if pieces.model == UNIGRAM else _byte_pairs(pieces))
    if folder == kind.folder and kind.more:
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in kind.more])
    if tokenizer.pad_token is None:         # of a folder without tokenizer_config.json
        tokenizer.pad_token = kind.pad
    return tokenizer


def _unigram(pieces: Pieces) -> Any:
    """A sentencepiece model of T5's kind, with what transformers' own conversion adds."""
    made = Tokenizer(models.Unigram(pieces.pieces, pieces.unknown, byte_fallback=False))
    table = [normalizers.Precompiled(pieces.characters)] if pieces.characters else []
    made.normalizer = normalizers.Sequence([
        *table, normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), SPACE)])
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "always")
    made.decoder = decoders.Metaspace(SPACE, "always")
    return _wrapped(made, pieces, "$A </s>")


def _byte_pairs(pieces: Pieces) -> Any:
    """A sentencepiece model of Gemma's kind: byte pairs, bytes for what is unknown."""
    words = pieces.numbers
    made = Tokenizer(models.BPE(words, generate_merges(words), unk_token="<unk>", fuse_unk=True,
                                byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(made, pieces, "<bos> $A")


def _wrapped(made: Tokenizer, pieces: Pieces, form: str) -> Any:
    """`form`: the mark that begins or ends a text, and where."""
    words = pieces.numbers
    made.add_special_tokens([AddedToken(word, normalized=False) for word in pieces.marks])
    mark = next(word for word in form.split() if word != "$A")
    if mark in words:
        made.post_processor = processors.TemplateProcessing(form, special_tokens=[
            (mark, words[mark])])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>",
             "eos_token": "</s>" if "</s>" in words else "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{
        name: word for name, word in names.items() if word in words})


def padded(tokenizer: Any, prompts: Sequence[str], length: int = 0) -> Any:
    """input_ids and attention_mask (B, length), on the CPU; 0: the tokenizer's own limit."""
    return tokenizer(list(prompts), padding="max_length", truncation=True,
                     max_length=length or tokenizer.model_max_length, return_tensors="pt")


def count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt without start and end."""
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids
    return [len(one) for one in ids]


def chat(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> Sequence[str]:
    """Each prompt as what a user says, in the chat template that its family has set."""
    if isinstance(tokenizer, Blank):
        return prompts
    return [tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
        enable_thinking=thinking) for prompt in prompts]


def read(encoder: Any, tokens: dict[str, Tensor], **options: Any) -> tuple[Any, Tensor]:
    """What a language model makes of `text_encoder`'s tokens (B, L); their mask, where it works."""
    mask = tokens["text_encoder.mask"].to(encoder.device)
    seen: Any = mask.bool()
    if mask.is_meta:                    # a plan has no numbers to look at: a mask that is made
        seen = None if "position_ids" in options else {"full_attention": None}
    return encoder(input_ids=tokens["text_encoder"].to(encoder.device), attention_mask=seen,
                   use_cache=False, **options), mask


def alike(*rows: Tensor) -> list[Tensor]:
    """(B, L, ...) each, with zeros at the end of the shorter ones."""
    longest = max((row.shape[1] for row in rows if row.ndim > 1), default=0)
    return [row if row.ndim < 2 or row.shape[1] == longest else
            F.pad(row, (*[0, 0] * (row.ndim - 2), 0, longest - row.shape[1])) for row in rows]


def masked_arguments(cond: Mapping[str, Tensor], negative: Mapping[str, Tensor]
                     ) -> dict[str, Tensor]:
    """A pipeline's arguments for embeddings with masks, both texts of one length."""
    texts, masks = (alike(cond[name], negative[name]) for name in ("text", "mask"))
    return {"prompt_embeds": texts[0], "prompt_attention_mask": masks[0],
            "negative_prompt_embeds": texts[1], "negative_prompt_attention_mask": masks[1]}


class Blank:
    """Stands for a tokenizer that isn't there, in plans: all texts are as long as can be."""

    def __init__(self, length: int, refusal: UserError) -> None:
        self.model_max_length, self.refusal = length, refusal

    def __call__(self, prompts: Sequence[str], max_length: int = 0, **options: Any) -> Any:
        """Raises UserError where tokens are to be counted: it can't."""
        if not options.get("add_special_tokens", True):
            raise self.refusal
        ids: Tensor = torch.zeros(len(prompts), max_length or self.model_max_length,
                                  dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
