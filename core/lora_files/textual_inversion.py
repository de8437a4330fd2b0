"""New words for a text encoder: rows beside its token table, learned by pivotal tuning.

A word of N rows takes the place of the trigger word in prompts. It is kept beside the LoRA as
`<name>_emb.safetensors`, the textual-inversion file of kohya, A1111 and ComfyUI (Gal et al. 2022,
arXiv 2208.01618); the form that A1111 and OneTrainer bundle into a LoRA is read as well, but not
written: diffusers refuses a LoRA that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core import paths
from core.dataset import captions
from core.errors import UserError
from core.lora_files.formats import BUNDLED
from core.lora_files.library import WORDS
from core.safetensors_header import read_header

WORD_KEY = "darkroom.word"
_ALONE = "emb_params"                       # a file for one encoder
_SHORT = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}    # for several


@dataclass(frozen=True, slots=True)
class NewWord:
    word: str                               # as it stands in prompts
    rows: Mapping[str, Tensor]              # encoder -> (N, width); "": the only one


class Rows(nn.Module):
    """A frozen token table, and below it trainable rows in fp32."""

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.table = table
        self.first = first                  # number of the first row
        # in a list: the rows must not be among the encoder's parameters, which are its adapter's
        self._rows = [nn.Parameter(rows.to(table.weight.device, torch.float32, copy=True))]

    @property
    def rows(self) -> nn.Parameter:
        return self._rows[0]

    def forward(self, ids: Tensor) -> Tensor:
        known: Tensor = self.table(ids.clamp(max=self.first - 1))
        new = F.embedding((ids - self.first).clamp(min=0), self.rows).to(known.dtype)
        return torch.where((ids >= self.first)[..., None], new, known)


def encoders(text: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Parts.text -> the tokenizer and the encoder by the encoder's name."""
    return {name: (text[name.replace("text_encoder", "tokenizer")], model)
            for name, model in text.items() if isinstance(model, nn.Module)}


def install(tokenizer: Any, encoder: Any, rows: Tensor) -> tuple[Rows, str]:
    """Adds (N, width) rows to an encoder. -> the module that holds them, and the tokens that
    stand for them in a text. Further words go below earlier ones, which no longer train then."""
    first = len(tokenizer)
    tokens = [f"<|word-{first + n}|>" for n in range(len(rows))]
    tokenizer.add_tokens(tokens)
    table = encoder.get_input_embeddings()
    if isinstance(table, Rows):
        rows = torch.cat([table.rows.detach(), rows.to(table.rows)])
        first, table = table.first, table.table
    held = Rows(table, first, rows)
    encoder.set_input_embeddings(held)
    return held, " ".join(tokens)


def start_rows(tokenizer: Any, encoder: Any, text: str, count: int) -> Tensor:
    """Rows (count, width) that begin as the words of `text`, repeated where they are too few."""
    ids = tokenizer(text, add_special_tokens=False).input_ids or [tokenizer.unk_token_id]
    table: Tensor = encoder.get_input_embeddings().weight
    return table[torch.tensor([ids[n % len(ids)] for n in range(count)], device=table.device)]


def expand(text: str, words: Mapping[str, str]) -> str:
    """Puts each word's tokens in its place; the longest words first."""
    for word in sorted(words, key=len, reverse=True):
        text = captions.phrase(word).sub(words[word], text)     # tokens hold no backslash
    return text


# --- files ---

def beside(lora: Path) -> Path:
    """The path of the file that holds a LoRA's new words."""
    return lora.with_name(lora.stem + WORDS)


def write(path: Path, word: NewWord, dtype: torch.dtype) -> None:
    rows = {(_ALONE if len(word.rows) == 1 else _SHORT.get(name, name)):
            tensor.detach().to("cpu", dtype).contiguous() for name, tensor in word.rows.items()}
    paths.write_atomic(path, safetensors.torch.save(rows, {WORD_KEY: word.word, "name": word.word}))


def read(lora: Path) -> list[NewWord]:
    """The words of a LoRA: those bundled in it, and those in the file beside it. Raises UserError
    where a file can't be read."""
    bundled: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load(lora).items() if _bundles(lora) else ():
        if key.startswith(BUNDLED) and tensor.ndim == 2:
            word, _, part = key.removeprefix(BUNDLED).partition(".")
            bundled.setdefault(word, {})[_long(part)] = tensor
    words = [NewWord(word, rows) for word, rows in bundled.items()]
    path = beside(lora)
    if path.is_file():
        tensors, header = _load(path), read_header(path)
        rows = {_long(key): tensor for key, tensor in tensors.items() if tensor.ndim == 2}
        if not rows:
            raise UserError("generate.bad_words", file=path, keys=", ".join(sorted(tensors)[:3]))
        words.append(NewWord(header.metadata.get(WORD_KEY) or path.stem, rows))
    return words


def unbundled(lora: Path) -> dict[str, Tensor] | None:
    """The LoRA's own tensors where words are bundled with it; None: no words are."""
    if not _bundles(lora):
        return None
    return {key: tensor for key, tensor in _load(lora).items() if not key.startswith(BUNDLED)}


def _bundles(lora: Path) -> bool:
    # a folder, as PEFT saves it, holds no words
    return not lora.is_dir() and any(key.startswith(BUNDLED) for key in read_header(lora).tensors)


def _long(key: str) -> str:
    """clip_l -> text_encoder; "" for the key of a file for one encoder."""
    return {short: name for name, short in _SHORT.items()}.get(key, "")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError("lora_file.unreadable", file=path, reason=error) from None


def add_to(text: Mapping[str, Any], words: Sequence[NewWord], file: Path) -> dict[str, str]:
    """Installs words in a pipeline's encoders (Parts.text). -> word: its tokens in a text.
    Raises UserError where they were trained for another base."""
    tokens: dict[str, str] = {}
    for word in words:
        for name, (tokenizer, encoder) in encoders(text).items():
            rows = word.rows.get(name, word.rows.get(""))
            width = encoder.config.hidden_size
            if rows is None or rows.shape[1] != width:
                raise UserError("generate.words_refused", file=file, word=word.word, width=width,
                                there=0 if rows is None else rows.shape[1])
            _, tokens[word.word] = install(tokenizer, encoder, rows)
    return tokens
