"""By what files and weights are known: hashes of whole files, of tensors alone, of samples."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

from core import paths
from core.safetensors_header import opened, read_header

LEGACY_AT, LEGACY_BYTES = 0x100000, 0x10000     # what A1111 once took for a whole file
_SAMPLE = 256                   # bytes read of each tensor for a fingerprint


def sha256(path: Path) -> str:
    """Of a file's whole content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_hash(path: Path) -> str:
    """SHA-256 of the tensors' bytes: does not change when metadata is edited."""
    with opened(path):
        return _data_hash(path, paths.stamp(path))


@functools.lru_cache(maxsize=64)
def _data_hash(path: Path, stamp: tuple[int, int, int]) -> str:
    with opened(path) as file:
        file.seek(read_header(path).data_start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(path: Path) -> str:
    """The eight digits that A1111 showed before it took SHA-256."""
    with open(path, "rb") as file:
        file.seek(LEGACY_AT)
        return hashlib.sha256(file.read(LEGACY_BYTES)).hexdigest()[:8]


def legacy_hash(content: bytes | memoryview) -> str:
    return hashlib.sha256(content[LEGACY_AT:LEGACY_AT + LEGACY_BYTES]).hexdigest()[:8]


def fingerprint(files: Iterable[tuple[Path, str]]) -> str:
    """Identifies a part of a base by its weights: names, shapes and the first bytes of every
    tensor. `files` are (path, tensor-name prefix); JSON files count whole. Reads kilobytes of
    gigabytes."""
    named = sorted(files)
    return _fingerprint(tuple(named), tuple(paths.stamp(path) for path, _ in named))


@functools.lru_cache(maxsize=64)
def _fingerprint(files: tuple[tuple[Path, str], ...], stamps: tuple[tuple[int, int, int], ...]
                 ) -> str:
    digest = hashlib.sha256()
    for path, prefix in files:
        if path.suffix != ".safetensors":
            digest.update(path.read_bytes())
            continue
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
            for name in sorted(k for k in header if k.startswith(prefix) and k != "__metadata__"):
                digest.update(f"{name}{header[name]['dtype']}{header[name]['shape']}".encode())
                file.seek(8 + length + header[name]["data_offsets"][0])
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:20]
