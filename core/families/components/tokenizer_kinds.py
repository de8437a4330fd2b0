"""Which tokenizer a folder holds, told from its words and their token numbers; needs no torch.

Class names don't tell: Qwen2.5 and Qwen3 are both "Qwen2Tokenizer", T5 and UMT5 "T5Tokenizer",
Gemma 2 and 3 "GemmaTokenizer". The numbers of some words do.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from core import paths
from core.serialization import from_json

PIECES = ("spiece.model", "tokenizer.model")            # sentencepiece's own format
FILES = ("tokenizer.json", *PIECES, "vocab.json")
MARKS = ("tokenizer_config.json", "added_tokens.json")  # may add to the words of those
UNIGRAM = 1                                             # one of sentencepiece's model types
CONTROL, USER = 3, 4                                    # types of pieces that are marks
SENTINELS = 100                                         # T5's <extra_id_...>, after its pieces


@dataclass(frozen=True, slots=True)
class TokenizerKind:
    """A tokenizer that families read with, and how it is recognised."""

    title: str
    marks: Mapping[str, int]                # words that must have these numbers
    absent: tuple[str, ...] = ()            # words that only its nearest relative has
    shipped: str = ""                       # its folder among those that come with the app
    more: tuple[str, ...] = ()              # tokens to add to those of the shipped files
    pad: str = "<pad>"

    @property
    def folder(self) -> Path | None:
        """The app's own files of this kind."""
        return paths.TOKENIZERS / self.shipped if self.shipped else None

    def fits(self, words: Mapping[str, int], rows: int) -> bool:
        """Whether these are its words, and an encoder with so many rows of embeddings has one for
        each."""
        return (all(words.get(word) == number for word, number in self.marks.items())
                and not any(word in words for word in self.absent)
                and max(words.values(), default=0) < rows)


THINKING = ("<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
        "<|vision_start|>": 151652, "<|file_sep|>": 151664}
GEMMA = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
# By name. Qwen3-VL has the words of Qwen3, Gemma 1 those of Gemma 2.
KINDS = {
    "qwen25": TokenizerKind("Qwen2.5", QWEN, THINKING, "qwen2", pad="<|endoftext|>"),
    "qwen3": TokenizerKind(
        "Qwen3", QWEN | {word: 151665 + n for n, word in enumerate(THINKING)}, (),
        "qwen2", THINKING, "<|endoftext|>"),
    "t5": TokenizerKind(
        "T5", {"<pad>": 0, "</s>": 1, "<unk>": 2, "\u2581the": 8, "<extra_id_0>": 32099}, (), "t5"),
    "gemma2": TokenizerKind("Gemma 2", GEMMA | {"<start_of_turn>": 106, "<end_of_turn>": 107}),
}


def words_in(folder: Path) -> dict[str, int]:
    """The words and marks of a folder's tokenizer with their numbers. Raises OSError or ValueError
    where the folder holds none that can be read."""
    stamps = tuple((info.st_mtime_ns, info.st_size) for info in (
        (folder / name).stat() for name in (*FILES, *MARKS) if (folder / name).is_file()))
    try:
        return _words_in(folder, stamps)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not a tokenizer's files: {error}") from error


# `stamps` makes the answer forgotten when a file changes.
@lru_cache(maxsize=16)
def _words_in(folder: Path, stamps: tuple[tuple[int, int], ...]) -> dict[str, int]:
    def json_of(name: str) -> Any:
        return from_json((folder / name).read_text("utf-8"))

    if (folder / "tokenizer.json").is_file():
        tokenizer = json_of("tokenizer.json")
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram models list (piece, score) in the order of their numbers.
        words = (dict(vocabulary) if isinstance(vocabulary, dict)
                 else {piece[0]: n for n, piece in enumerate(vocabulary)})
        words |= {mark["content"]: mark["id"] for mark in tokenizer.get("added_tokens") or ()}
    elif (folder / "vocab.json").is_file():
        words = dict(json_of("vocab.json"))
    elif (pieces := pieces_in(folder)) is not None:
        words = dict(pieces.numbers)
    else:
        raise FileNotFoundError(folder / "tokenizer.json")
    contents = (json_of(name) if (folder / name).is_file() else {} for name in MARKS)
    config, added = (content if isinstance(content, dict) else {} for content in contents)
    words |= {mark["content"]: int(number)
              for number, mark in config.get("added_tokens_decoder", {}).items()}
    return words | added


def digest(words: Mapping[str, int]) -> str:
    """A hash that is the same for the same words and numbers, in whichever files they lie."""
    return hashlib.sha256(repr(sorted(words.items())).encode("utf-8", "replace")).hexdigest()


# --- sentencepiece ---

@dataclass(slots=True)
class Pieces:
    """What tokens depend on in a sentencepiece model."""

    pieces: list[tuple[str, float]] = field(default_factory=list)       # with their scores
    marks: list[str] = field(default_factory=list)      # control symbols and users' own
    model: int = UNIGRAM
    unknown: int = 0                                    # number of the piece for unknown text
    characters: bytes = b""                             # the table that normalises characters

    @property
    def numbers(self) -> dict[str, int]:
        return {piece: n for n, (piece, _) in enumerate(self.pieces)}


def pieces_in(folder: Path) -> Pieces | None:
    """Reads spiece.model or tokenizer.model; None where the folder has neither. T5's sentinels,
    which its file lacks, are added. Raises OSError or ValueError."""
    path = next((folder / name for name in PIECES if (folder / name).is_file()), None)
    if path is None:
        return None
    model = Pieces()
    try:
        # The numbers of fields are those of sentencepiece_model.proto: in its ModelProto pieces
        # are 1, trainer_spec is 2, normalizer_spec is 3.
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece: dict[int, Any] = {1: b"", 2: 0.0, 3: 1} | dict(_fields(value))
                word = piece[1].decode("utf-8")
                model.pieces.append((word, piece[2]))
                if piece[3] in (CONTROL, USER):
                    model.marks.append(word)
            elif number == 2:
                trainer = {3: UNIGRAM, 40: 0} | dict(_fields(value))
                model.model, model.unknown = trainer[3], trainer[40]
            elif number == 3:
                model.characters = dict(_fields(value)).get(2, b"")
    except (IndexError, struct.error, TypeError) as error:
        raise ValueError(f"{path.name} is no sentencepiece model: {error}") from error
    if not model.pieces:
        raise ValueError(f"{path.name} is no sentencepiece model")
    if model.model == UNIGRAM and not any(p.startswith("<extra_id_") for p, _ in model.pieces):
        sentinels = [f"<extra_id_{n}>" for n in reversed(range(SENTINELS))]
        model.pieces += [(word, 0.0) for word in sentinels]
        model.marks += sentinels
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message; values are integers, floats or bytes."""
    # The lowest three bits of a key are the type of the value: 0 a varint, 1 and 5 a double and a
    # float, 2 bytes behind their length.
    place = 0
    while place < len(data):
        key, place = _integer(data, place)
        if key & 7 == 0:
            value, place = _integer(data, place)
            yield key >> 3, value
        elif key & 7 in (1, 5):
            form = "<d" if key & 7 == 1 else "<f"
            yield key >> 3, struct.unpack_from(form, data, place)[0]
            place += struct.calcsize(form)
        elif key & 7 == 2:
            length, place = _integer(data, place)
            if place + length > len(data):
                raise IndexError("it ends too early")
            yield key >> 3, data[place:place + length]
            place += length
        else:
            raise TypeError(f"a field of type {key & 7}")


def _integer(data: bytes, place: int) -> tuple[int, int]:
    """The varint at `place`, and where it ends."""
    value = shift = 0
    while data[place] & 128:
        value |= (data[place] & 127) << shift
        shift, place = shift + 7, place + 1
    return value | data[place] << shift, place + 1
