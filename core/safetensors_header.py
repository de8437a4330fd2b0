"""Safetensors headers, read strictly and without torch: names, types, shapes, metadata.

A file is: 8 bytes header length (little endian), a JSON header, then the tensors' bytes. The
library's own `safe_open` names neither the tensor that is wrong nor where the bytes lie, both of
which are needed here.
"""

from __future__ import annotations

import functools
import json
import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from core import paths
from core.errors import UserError

MAX_HEADER = 100_000_000                   # bytes; the format's own limit
MAX_ELEMENTS = 2**62                       # beyond it, the library's 64-bit sizes overflow
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
    # the stamp of a file that is missing or unreadable would fail without a sentence
    with opened(path):
        return _read(path, paths.stamp(path))


@functools.lru_cache(maxsize=16)
def _read(path: Path, stamp: tuple[int, int, int]) -> Header:
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(9)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or head[8:] != b"{" or length > MAX_HEADER:
            # no safetensors file: say what it is, as far as the first bytes tell
            if is_pickle(head) or path.suffix.lower() in PICKLES:
                raise UserError("lora_file.pickle", file=path)
            if (text := head.lstrip()[:8].lower()).startswith((b"<!docty", b"<html", b"<?xml")):
                raise UserError("lora_file.web_page", file=path)
            if text == b"version ":
                raise UserError("lora_file.git_pointer", file=path)
            if len(head) < 9:
                raise UserError("lora_file.truncated", file=path, size=len(head), needed=9)
            if length > MAX_HEADER:
                raise UserError("lora_file.header_length", file=path, length=length)
            raise UserError("lora_file.bad_header", file=path, reason="no { at byte 8")
        if 8 + length > size:
            raise UserError("lora_file.truncated", file=path, size=size, needed=8 + length)
        entries = _parse(head[8:] + file.read(length - 1), path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError("lora_file.bad_metadata", file=path, key="__metadata__")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise UserError("lora_file.bad_metadata", file=path, key=key)
    tensors = {name: _tensor(name, entry, path) for name, entry in entries.items()}

    # The tensors must fill the rest of the file without gap or overlap.
    reached, name, available = 0, "", size - 8 - length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < reached:
            raise UserError("lora_file.overlap", file=path, key=name)
        if info.begin > reached:
            raise UserError("lora_file.gap", file=path, begin=reached, end=info.begin)
        reached = info.end
    if reached > available:
        raise UserError("lora_file.outside", file=path, key=name, missing=reached - available)
    if reached < available:
        raise UserError("lora_file.gap", file=path, begin=reached, end=available)
    return Header(metadata, tensors, 8 + length, size)


def read_scalars(path: Path, header: Header, names: list[str]) -> dict[str, float]:
    """Values of one-element tensors; names of other shapes or types are left out."""
    values: dict[str, float] = {}
    with opened(path) as file:
        for name in names:
            info = header.tensors[name]
            if all(side == 1 for side in info.shape) and info.dtype in {*SCALARS, "BF16"}:
                file.seek(header.data_start + info.begin)
                dtype, content = info.dtype, file.read(info.nbytes)
                if dtype == "BF16":
                    # the upper half of a float32
                    dtype, content = "F32", b"\0\0" + content
                values[name] = float(struct.unpack(SCALARS[dtype], content)[0])
    return values


def opened(path: Path) -> BufferedReader:
    """The file, open for reading. Raises UserError where it can't be opened."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError("lora_file.missing", file=path, folder=Path.cwd()) from None
    except OSError as error:               # a folder, no permission
        raise UserError("lora_file.unreadable", file=path, reason=error.strerror or error) from None


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a pickle, or torch's archive of one."""
    pickled = head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}
    # the length of a safetensors header may look the same: then the header's { follows
    return (pickled or head[:4] == b"PK\x03\x04") and head[8:9] != b"{"


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON header, as strictly as the safetensors library reads it, and without double keys,
    of which the library takes the last."""
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
        # JSON can spell half a UTF-16 pair, which no file can hold as text
        if "\\u" in decoded:
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError("lora_file.bad_header", file=path, reason=error) from None
    assert isinstance(entries, dict)       # it starts with {
    return entries


def _tensor(name: str, entry: Any, path: Path) -> TensorInfo:
    match entry:
        # True is an int of Python, but no side of a tensor
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
                dtype in BITS
                and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
                and begin <= end):
            info = TensorInfo(dtype, tuple(shape), begin, end)
        case _:
            raise UserError("lora_file.bad_tensor", file=path, key=name)
    count = 1
    for side in shape:
        count *= side
        # `side` too: behind a 0 the product says nothing
        if max(count, side) > MAX_ELEMENTS:
            raise UserError("lora_file.bad_tensor", file=path, key=name)
    if count * BITS[dtype] != info.nbytes * 8:
        raise UserError("lora_file.wrong_size", file=path, key=name, shape=list(shape), dtype=dtype,
                        bytes=info.nbytes)
    return info
