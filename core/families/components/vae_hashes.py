"""Which model a VAE's file was made for, where its shapes don't tell; needs no torch.

SD 3's VAE and Flux.1's have the same layers, so have Wan 2.1's and Qwen-Image's. Their published
files are known by their SHA-256, as Hugging Face and ComfyUI's model lists show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from core import hashes, paths
from core.families.registry import SPECS

SIGNS = {spec.id: spec.vae for spec in SPECS.values() if spec.vae}
WAN = "wan"                                 # wan_2.1_vae.safetensors of ComfyUI's model lists
FILES = {digest: name for name, signs in SIGNS.items() for digest in signs.files} | {
    "2fc39d31359a4b0a64f55876d8ff7fa8d780956ae2cb13463b0223e15148976b": WAN}
TITLES = {name: signs.title for name, signs in SIGNS.items()} | {WAN: "Wan 2.1"}


def model_of(config: Mapping[str, Any]) -> str:
    """A key of TITLES for the VAE that a config describes; empty for one that has no twins."""
    return next((name for name, signs in SIGNS.items() if signs.key in config or (
        signs.scale and config.get("scaling_factor") == signs.scale)), "")


def model_in(path: Path) -> str:
    """A key of TITLES for a published file, else empty."""
    return FILES.get(sha256(path), "")


def sha256(path: Path) -> str:
    """The hash of a whole file, computed again only when the file has changed."""
    return _sha256(path, paths.stamp(path))


@lru_cache(maxsize=64)
def _sha256(path: Path, stamp: tuple[int, int, int]) -> str:
    return hashes.sha256(path)
