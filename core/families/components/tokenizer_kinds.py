"""Which tokenizer a folder holds, told from its words and their numbers; needs no torch.

Class names don't tell: Qwen2.5 and Qwen3 are both "Qwen2Tokenizer", T5 and UMT5 "T5Tokenizer",
Gemma 2 and 3 "GemmaTokenizer". Their numbers of single words do.
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
UNIGRAM = 1                                             # of sentencepiece's model types
CONTROL, USER = 3, 4                                    # kinds of pieces that are marks
SENTINELS = 100                                         # <extra_id_...>, T5's, after its pieces


@dataclass(frozen=True, slots=True)
class Kind:
    """A tokenizer that families read with."""

    title: str
    marks: Mapping[str, int]                # words that have these numbers
    absent: tuple[str, ...] = ()            # words that its nearest relative has
    shipped: str = ""                       # its folder among those that come with the app
    more: tuple[str, ...] = ()              # marks that follow those of the shipped files
    pad: str = "<pad>"

    @property
    def folder(self) -> Path | None:
        return paths.TOKENIZERS / self.shipped if self.shipped else None

    def fits(self, words: Mapping[str, int], rows: int) -> bool:
        """Whether these are its words, and an encoder of so many rows knows them all."""
        return (all(words.get(word) == number for word, number in self.marks.items())
                and not any(word in words for word in self.absent)
                and max(words.values(), default=0) < rows)


THINKING = ("<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
        "<|vision_start|>": 151652, "<|file_sep|>": 151664}
GEMMA = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
# By name. Qwen3-VL has the words of Qwen3, Gemma 1 those of Gemma 2.
KINDS = {
    "qwen25": Kind("Qwen2.5", QWEN, THINKING, "qwen2", pad="<|endoftext|>"),
    "qwen3": Kind("Qwen3", QWEN | {word: 151665 + n for n, word in enumerate(THINKING)}, (),
                  "qwen2", THINKING, "<|endoftext|>"),
    "t5": Kind("T5", {"<pad>": 0, "</s>": 1, "<unk>": 2, "\u2581the": 8, "<extra_id_0>": 32099},
               (), "t5"),
    "gemma2": Kind("Gemma 2", GEMMA | {"<start_of_turn>": 106, "<end_of_turn>": 107}),
}


def words_in(folder: Path) -> dict[str, int]:
    """A tokenizer's words and marks with their numbers. Raises OSError or ValueError where the
    folder holds none that can be read."""
    stamps = tuple((info.st_mtime_ns, info.st_size) for info in (
        (folder / name).stat() for name in (*FILES, *MARKS) if (folder / name).is_file()))
    try:
        return _words_in(folder, stamps)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not a tokenizer's files: {error}") from error


@lru_cache(maxsize=16)
def _words_in(folder: Path, stamps: tuple[tuple[int, int], ...]) -> dict[str, int]:
    if (folder / "tokenizer.json").is_file():
        told = from_json((folder / "tokenizer.json").read_text("utf-8"))
        known = told["model"]["vocab"]
        words = (dict(known) if isinstance(known, dict)
                 else {piece[0]: n for n, piece in enumerate(known)})
        words |= {mark["content"]: mark["id"] for mark in told.get("added_tokens") or ()}
    elif (folder / "vocab.json").is_file():
        words = dict(from_json((folder / "vocab.json").read_text("utf-8")))
    elif (pieces := pieces_in(folder)) is not None:
        words = dict(pieces.numbers)
    else:
        raise FileNotFoundError(folder / "tokenizer.json")
    config, added = (_json(folder / name) for name in MARKS)
    words |= {mark["content"]: int(number)
              for number, mark in config.get("added_tokens_decoder", {}).items()}
    return words | added


def _json(path: Path) -> dict[str, Any]:
    found = from_json(path.read_text("utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def digest(words: Mapping[str, int]) -> str:
    """The same for tokenizers of the same words and numbers, in whichever files they lie."""
    return hashlib.sha256(repr(sorted(words.items())).encode("utf-8", "replace")).hexdigest()


# --- sentencepiece ---

@dataclass(slots=True)
class Pieces:
    """A sentencepiece model, as far as tokens depend on it."""

    pieces: list[tuple[str, float]] = field(default_factory=list)       # with their scores
    marks: list[str] = field(default_factory=list)      # control symbols and users' own
    model: int = UNIGRAM
    unknown: int = 0                                    # number of the word for what is unknown
    characters: bytes = b""                             # a table that normalises characters

    @property
    def numbers(self) -> dict[str, int]:
        return {piece: n for n, (piece, _) in enumerate(self.pieces)}


def pieces_in(folder: Path) -> Pieces | None:
    """Of spiece.model or tokenizer.model; T5's sentinels, which that file lacks, are added.
    Raises OSError or ValueError."""
    path = next((folder / name for name in PIECES if (folder / name).is_file()), None)
    if path is None:
        return None
    found = Pieces()
    try:
        _read_model(path.read_bytes(), found)
    except (IndexError, struct.error, TypeError) as error:
        raise ValueError(f"{path.name} is no sentencepiece model: {error}") from error
    if not found.pieces:
        raise ValueError(f"{path.name} is no sentencepiece model")
    if found.model == UNIGRAM and not any(p.startswith("<extra_id_") for p, _ in found.pieces):
        sentinels = [f"<extra_id_{n}>" for n in reversed(range(SENTINELS))]
        found.pieces += [(word, 0.0) for word in sentinels]
        found.marks += sentinels
    return found


def _read_model(data: bytes, found: Pieces) -> None:
    """ModelProto of sentencepiece_model.proto: pieces are 1, trainer_spec 2, normalizer_spec 3."""
    for number, value in _fields(data):
        if number == 1:
            piece: dict[int, Any] = {1: b"", 2: 0.0, 3: 1} | dict(_fields(value))
            word = piece[1].decode("utf-8")
            found.pieces.append((word, piece[2]))
            if piece[3] in (CONTROL, USER):
                found.marks.append(word)
        elif number == 2:
            trained = {3: UNIGRAM, 40: 0} | dict(_fields(value))
            found.model, found.unknown = trained[3], trained[40]
        elif number == 3:
            found.characters = dict(_fields(value)).get(2, b"")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: integers, floats, bytes."""
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
    """A varint, and where it ends."""
    value = shift = 0
    while data[place] & 128:
        value |= (data[place] & 127) << shift
        shift, place = shift + 7, place + 1
    return value | data[place] << shift, place + 1
