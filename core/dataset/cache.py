"""Latents and text embeddings on disk, keyed by content and settings.

An entry is one small safetensors file under cache/<kind>/<fingerprint of the encoder>/. Its name
is the SHA-256 of everything it depends on, so that an entry is never out of date: another picture,
crop, background or encoder is another name. A file that a crash cut off is made again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from core import paths

VERSION = 1                     # of how entries are made; a change makes all of them anew


def key(*parts: object) -> str:
    """Returns the name of an entry that depends on `parts`, whose repr must be stable."""
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()


class Cache:
    """Named tensors by key. With `persistent=False` everything stays in memory."""

    def __init__(self, kind: str, encoder: str, persistent: bool = True) -> None:
        self.folder = paths.cache_dir() / kind / encoder if persistent else None

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Returns the tensors of an entry; None where there is none that can be read."""
        if self.folder is None:
            return None
        try:
            return safetensors.torch.load_file(self._path(name))
        except (OSError, SafetensorError):
            return None

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps an entry. Raises OSError where the disk takes no more."""
        if self.folder is not None:
            # safetensors refuses tensors that share memory, as rows of a batch do.
            copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            paths.write_atomic(self._path(name), safetensors.torch.save(copies))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        # File systems grow slow with 100,000 files in one folder.
        return self.folder / name[:2] / f"{name}.safetensors"
