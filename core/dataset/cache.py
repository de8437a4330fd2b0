"""Latents and text embeddings on disk, keyed by content and settings.

An entry is one small safetensors file under cache/<kind>/<fingerprint of the encoder>/. Its name
is the SHA-256 of everything it depends on, so that an entry is never stale: another picture,
crop, background or encoder is another name. A torn entry is made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from core import paths

VERSION = 1
_SAMPLE = 256                   # bytes read of each tensor for a fingerprint


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


def key(*parts: object) -> str:
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()


class Cache:
    """Named tensors by key. With `persistent=False` everything stays in memory."""

    def __init__(self, kind: str, encoder: str, persistent: bool = True) -> None:
        self.folder = paths.cache_dir() / kind / encoder if persistent else None

    def get(self, name: str) -> dict[str, Tensor] | None:
        if self.folder is None:
            return None
        try:
            return safetensors.torch.load_file(self._path(name))
        except (OSError, SafetensorError):
            return None

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.folder is not None:
            own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            paths.write_atomic(self._path(name), safetensors.torch.save(own))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.safetensors"
