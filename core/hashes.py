"""Hashes that identify files and weights: of whole files, of the tensors alone, of samples."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from core import paths
from core.safetensors_header import opened, read_header

LEGACY_AT, LEGACY_BYTES = 0x100000, 0x10000     # what A1111 once took for a whole file
_SAMPLE = 256                   # bytes read of each tensor for a fingerprint


def sha256(path: Path) -> str:
    """The SHA-256 of a file's whole content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_hash(path: Path) -> str:
    """SHA-256 of the tensors' bytes: does not change when metadata is edited."""
    # the stamp of a file that is missing or unreadable would fail without a sentence
    with opened(path):
        return _data_hash(path, paths.stamp(path))


@functools.lru_cache(maxsize=64)
def _data_hash(path: Path, stamp: tuple[int, int, int]) -> str:
    with opened(path) as file:
        file.seek(read_header(path).data_start)
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(path: Path) -> str:
    """The eight digits that A1111 showed before it used SHA-256: of 64 KiB that
    begin at the second megabyte."""
    with open(path, "rb") as file:
        file.seek(LEGACY_AT)
        return hashlib.sha256(file.read(LEGACY_BYTES)).hexdigest()[:8]


def legacy_hash(content: bytes | memoryview) -> str:
    """The same eight digits, of a file in memory."""
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
            # a config is small and decides what the weights mean
            digest.update(path.read_bytes())
            continue
        header = read_header(path)
        with open(path, "rb") as file:
            for name in sorted(name for name in header.tensors if name.startswith(prefix)):
                info = header.tensors[name]
                digest.update(f"{name}{info.dtype}{list(info.shape)}".encode())
                file.seek(header.data_start + info.begin)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:20]
