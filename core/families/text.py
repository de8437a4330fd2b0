"""What families share of text: tokenizers, language models that read tokens, stand-ins in plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as splitters
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from core.errors import UserError
from core.families.components import tokenizer_kinds
from core.families.components.tokenizer_kinds import UNIGRAM, Pieces, TokenizerKind

SPACE = "\u2581"                            # sentencepiece's
# Qwen3's chat template as far as captions need it: what a user says, then the beginning of the
# answer, with empty thoughts where thinking is off. Z-Image and Flux.2 klein have learned with it.
QWEN3_CHAT = ("{%- for message in messages %}"
              "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
              "{%- endfor %}"
              "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
              "{%- if enable_thinking is defined and enable_thinking is false %}"
              "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")


def open_tokenizer(folder: Path, kind: TokenizerKind) -> Any:
    """Opens a folder's tokenizer, whichever files it is made of. The app's own one gets the added
    tokens by which its kind differs from the files that ship."""
    has_json = (folder / "tokenizer.json").is_file()
    pieces = None if has_json else tokenizer_kinds.pieces_in(folder)
    tokenizer = (AutoTokenizer.from_pretrained(folder, local_files_only=True) if pieces is None
                 else from_sentencepiece(pieces))
    if folder == kind.folder and kind.more:
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in kind.more])
    # A folder may lack tokenizer_config.json.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = kind.pad
    return tokenizer


def from_sentencepiece(pieces: Pieces) -> Any:
    """Makes a tokenizer of a sentencepiece model, as transformers' own conversion does: a unigram
    model is T5's, byte pairs are Gemma's."""
    words = pieces.numbers
    if pieces.model == UNIGRAM:
        tokenizer = Tokenizer(models.Unigram(pieces.pieces, pieces.unknown, byte_fallback=False))
        table = [normalizers.Precompiled(pieces.characters)] if pieces.characters else []
        tokenizer.normalizer = normalizers.Sequence([
            *table, normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), SPACE)])
        tokenizer.pre_tokenizer = splitters.Metaspace(SPACE, "always")
        tokenizer.decoder = decoders.Metaspace(SPACE, "always")
        mark, template = "</s>", "$A </s>"
    else:
        tokenizer = Tokenizer(models.BPE(words, generate_merges(words), unk_token="<unk>",
                                         fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        mark, template = "<bos>", "<bos> $A"
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in pieces.marks])
    if mark in words:
        tokenizer.post_processor = TemplateProcessing(template, special_tokens=[
            (mark, words[mark])])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>",
             "eos_token": "</s>" if "</s>" in words else "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{
        name: word for name, word in names.items() if word in words})


def padded(tokenizer: Any, prompts: Sequence[str], length: int) -> Any:
    """input_ids and attention_mask (B, length), on the CPU; length 0: the tokenizer's own limit."""
    return tokenizer(list(prompts), padding="max_length", truncation=True,
                     max_length=length or tokenizer.model_max_length, return_tensors="pt")


def masked_tokens(tokenizer: Any, prompts: Sequence[str], length: int) -> dict[str, Tensor]:
    """The tokens of the one text encoder and their mask, as `Family.tokenize` returns them."""
    tokens = padded(tokenizer, prompts, length)
    return {"text_encoder": tokens.input_ids, "text_encoder.mask": tokens.attention_mask}


def count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """How many tokens each prompt has, without the marks at its start and end."""
    return [len(ids) for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]


def chat(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> Sequence[str]:
    """Puts each prompt into the tokenizer's chat template, as what a user says."""
    if isinstance(tokenizer, Blank):
        return prompts
    return [tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
        enable_thinking=thinking) for prompt in prompts]


def read(encoder: Any, tokens: dict[str, Tensor], **options: Any) -> tuple[Any, Tensor]:
    """Calls a language model on tokens (B, L). Returns its output, and the tokens' mask on its
    device."""
    mask = tokens["text_encoder.mask"].to(encoder.device)
    attention_mask: Any = mask.bool()
    # In a plan transformers can't look at the mask's values: it gets one that needs no work.
    if mask.is_meta:
        attention_mask = None if "position_ids" in options else {"full_attention": None}
    return encoder(input_ids=tokens["text_encoder"].to(encoder.device),
                   attention_mask=attention_mask, use_cache=False, **options), mask


def alike(*rows: Tensor) -> list[Tensor]:
    """Makes tensors (B, L, ...) of one length L, by zeros at the end of the shorter ones."""
    longest = max((row.shape[1] for row in rows if row.ndim > 1), default=0)
    return [row if row.ndim < 2 or row.shape[1] == longest else
            F.pad(row, (*[0, 0] * (row.ndim - 2), 0, longest - row.shape[1])) for row in rows]


def masked_arguments(cond: Mapping[str, Tensor], negative: Mapping[str, Tensor]
                     ) -> dict[str, Tensor]:
    """A pipeline's arguments for embeddings with masks; both texts get one length."""
    texts, masks = (alike(cond[name], negative[name]) for name in ("text", "mask"))
    return {"prompt_embeds": texts[0], "prompt_attention_mask": masks[0],
            "negative_prompt_embeds": texts[1], "negative_prompt_attention_mask": masks[1]}


class Blank:
    """Stands for a missing tokenizer in plans: all texts are as long as can be."""

    def __init__(self, length: int, refusal: UserError) -> None:
        self.model_max_length, self.refusal = length, refusal

    def __call__(self, prompts: Sequence[str], max_length: int = 0, **options: Any) -> Any:
        """Raises UserError where tokens are to be counted, which it can't."""
        if not options.get("add_special_tokens", True):
            raise self.refusal
        ids: Tensor = torch.zeros(len(prompts), max_length or self.model_max_length,
                                  dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))
