"""Which model a VAE's file was made for, where shapes don't tell; needs no torch.

SD 3's VAE and Flux.1's have the same layers, so have Wan 2.1's and Qwen-Image's. Their published
files are known by their SHA-256, as Hugging Face and ComfyUI's model lists show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from core import paths

FILES = {
    # ae.safetensors of Flux.1, Z-Image and Lumina 2; the same in diffusers' names, in bf16
    "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38": "flux",
    "f5b59a26851551b67ae1fe58d32e76486e1e812def4696a4bea97f16604d40a3": "flux",
    # SD 3.5's in the original names; SD 3's in diffusers'
    "6ad8546282f0f74d6a1184585f1c9fe6f1509f38f284e7c4f7ed578554209859": "sd3",
    "f9b67a279283625caee39d61eacb5324243848477b4eb535355eaaa8423d4e09": "sd3",
    # qwen_image_vae.safetensors and wan_2.1_vae.safetensors of ComfyUI's model lists
    "a70580f0213e67967ee9c95f05bb400e8fb08307e017a924bf3441223e023d1f": "qwen",
    "2fc39d31359a4b0a64f55876d8ff7fa8d780956ae2cb13463b0223e15148976b": "wan",
}
TITLES = {"flux": "Flux.1", "sd3": "Stable Diffusion 3", "qwen": "Qwen-Image", "wan": "Wan 2.1"}
SCALES = {0.3611: "flux", 1.5305: "sd3"}    # of the latents, in their configs


def model_of(config: Mapping[str, Any]) -> str:
    """A key of TITLES for the VAE that a config describes; empty: none that is mistaken easily."""
    if "temperal_downsample" in config:
        return "qwen"
    return SCALES.get(config.get("scaling_factor", 0.0), "")


def model_in(path: Path) -> str:
    """A key of TITLES for a published file, else empty."""
    return FILES.get(sha256(path), "")


def sha256(path: Path) -> str:
    return _sha256(path, paths.stamp(path))


@lru_cache(maxsize=64)
def _sha256(path: Path, stamp: tuple[int, int, int]) -> str:
    return paths.sha256(path)
