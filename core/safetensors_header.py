"""Safetensors headers, read strictly and without torch: names, types, shapes, metadata.

A file is: 8 bytes header length (little endian), a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from core import paths
from core.errors import UserError

MAX_HEADER = 100_000_000                   # bytes; the format's own limit
MAX_ELEMENTS = 2**62
BITS = {                                   # of one element
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}
SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h",
           "I8": "<b", "U8": "<B", "U64": "<Q", "U32": "<I", "U16": "<H"}
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    begin: int                             # bytes, from the first byte after the header
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int                        # bytes before the first tensor
    size: int                              # bytes of the whole file


def read_header(path: Path) -> Header:
    """Reads and checks the header alone. Raises UserError with the file and what is wrong in it."""
    with opened(path):                      # else a UserError says why it can't be
        return _kept(path, paths.stamp(path))


@functools.lru_cache(maxsize=16)
def _kept(path: Path, stamp: tuple[int, int, int]) -> Header:
    with opened(path) as file:
        return _read(file, path)


def read_scalars(path: Path, header: Header, names: list[str]) -> dict[str, float]:
    """Values of one-element tensors; names of other shapes or types are left out."""
    values: dict[str, float] = {}
    with opened(path) as file:
        for name in names:
            info = header.tensors[name]
            if all(side == 1 for side in info.shape) and info.dtype in {*SCALARS, "BF16"}:
                file.seek(header.data_start + info.begin)
                values[name] = _number(info.dtype, file.read(info.nbytes))
    return values


def _read(file: BufferedReader, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:] != b"{" or length > MAX_HEADER:
        _refuse_foreign(path, head, length)
    if 8 + length > size:
        raise UserError("lora_file.truncated", file=path, size=size, needed=8 + length)
    entries = _parse(head[8:] + file.read(length - 1), path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = {name: _tensor(name, entry, path) for name, entry in entries.items()}
    _check_layout(tensors, size - 8 - length, path)
    return Header(metadata, tensors, 8 + length, size)


def opened(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError("lora_file.missing", file=path, folder=Path.cwd()) from None
    except OSError as error:               # a folder, no permission
        raise UserError("lora_file.unreadable", file=path, reason=error.strerror or error) from None


def is_pickle(head: bytes) -> bool:
    """By the first bytes: a pickle, or torch's archive of one. A safetensors file whose header is
    as long as a pickle begins has its { at byte 8."""
    pickled = head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}
    return (pickled or head[:4] == b"PK\x03\x04") and head[8:9] != b"{"


def _refuse_foreign(path: Path, head: bytes, length: int) -> NoReturn:
    """Not the start of a safetensors file: says what it is, as far as the first bytes tell."""
    if is_pickle(head) or path.suffix.lower() in PICKLES:
        raise UserError("lora_file.pickle", file=path)
    if len(head) < 9:
        raise UserError("lora_file.truncated", file=path, size=len(head), needed=9)
    if length > MAX_HEADER:
        raise UserError("lora_file.header_length", file=path, length=length)
    raise UserError("lora_file.bad_header", file=path, reason="no { at byte 8")


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in entries if names.count(name) > 1)
            raise UserError("lora_file.duplicate_key", file=path, key=twice)
        return entries

    def natural(digits: str) -> int:
        return -1 if digits.startswith("-") else int(digits)    # "-0" is no natural number

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        decoded = text.decode("utf-8")
        entries = json.loads(decoded, object_pairs_hook=unique, parse_int=natural,
                             parse_constant=no_constant)
        _refuse_surrogates(entries)
    except (ValueError, RecursionError) as error:
        raise UserError("lora_file.bad_header", file=path, reason=error) from None
    assert isinstance(entries, dict)       # it starts with {
    return entries


def _refuse_surrogates(value: Any) -> None:
    """JSON can spell half a UTF-16 pair, which no file can hold as text."""
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _refuse_surrogates(key)
            _refuse_surrogates(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_surrogates(inner)


def _metadata(entry: Any, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise UserError("lora_file.bad_metadata", file=path, key="__metadata__")
    for key, value in entry.items():
        if not isinstance(value, str):
            raise UserError("lora_file.bad_metadata", file=path, key=key)
    return entry


def _tensor(name: str, entry: Any, path: Path) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
                dtype in BITS and all(map(_is_natural, [*shape, begin, end])) and begin <= end):
            info = TensorInfo(dtype, tuple(shape), begin, end)
        case _:
            raise UserError("lora_file.bad_tensor", file=path, key=name)
    count = 1
    for side in shape:
        count *= side
        if max(count, side) > MAX_ELEMENTS:
            raise UserError("lora_file.bad_tensor", file=path, key=name)
    if count * BITS[dtype] != info.nbytes * 8:
        raise UserError("lora_file.wrong_size", file=path, key=name, shape=list(shape), dtype=dtype,
                        bytes=info.nbytes)
    return info


def _is_natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_layout(tensors: Mapping[str, TensorInfo], size: int, path: Path) -> None:
    """The tensors must fill the rest of the file without gap or overlap."""
    reached, name = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < reached:
            raise UserError("lora_file.overlap", file=path, key=name)
        if info.begin > reached:
            raise UserError("lora_file.gap", file=path, begin=reached, end=info.begin)
        reached = info.end
    if reached > size:
        raise UserError("lora_file.outside", file=path, key=name, missing=reached - size)
    if reached < size:
        raise UserError("lora_file.gap", file=path, begin=reached, end=size)


def _number(dtype: str, content: bytes) -> float:
    if dtype == "BF16":                    # the upper half of a float32
        dtype, content = "F32", b"\0\0" + content
    return float(struct.unpack(SCALARS[dtype], content)[0])
