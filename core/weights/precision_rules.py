"""The dtypes of a run and the quantisation of its frozen models, from its config and the card.

Plans and runs ask the same functions, so that a plan counts what the run will do. Needs no torch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from core.config import TrainConfig
from core.system.machine import MB

# A large text encoder that takes more than this share of a card waits in RAM.
ENCODER_SHARE = 0.25


def numbers_for(precision: str, device: str, capability: tuple[int, int],
                outgrows_fp16: bool = False) -> dict[str, str]:
    """The dtypes of weights, computation and VAE (fp32, fp16, bf16), on a device of type `device`.

    "auto" is bf16 where the GPU computes in it, fp16 on older GPUs unless the model's activations
    outgrow it, else fp32.
    """
    if precision == "auto":
        is_older = (0, 0) < capability < (8, 0)
        half = "bf16" if not is_older else "fp32" if outgrows_fp16 else "fp16"
        precision = half if device == "cuda" else "fp32"
    # SDXL's VAE overflows in fp16.
    return {"weights": precision, "compute": precision,
            "vae": "fp32" if precision == "fp16" else precision}


def base_settings(config: TrainConfig, device: str) -> dict[str, Any]:
    """Fields of `Precision` for the frozen denoiser; empty: it is on the device in full."""
    settings: dict[str, Any] = {}
    if config.base_precision != "same":
        settings["quantization"] = config.base_precision
    # Only a card has memory of its own: elsewhere the base would wait in the memory that it works
    # in.
    if config.offload and device == "cuda":
        settings["offload"] = config.offload
    return settings


def encoder_settings(config: TrainConfig, device: str, total_mb: float) -> dict[str, Any]:
    """Fields of `Precision` for frozen text encoders of a billion parameters and more, while
    captions are encoded. On a card of `total_mb` MiB those that would take much of it wait in RAM,
    but for two blocks."""
    # Never 4 bits: the captions would lose by it, and encoders are there for minutes only.
    settings: dict[str, Any] = {} if config.base_precision == "same" else {"quantization": "int8"}
    return settings | ({"vram_budget": total_mb * MB * ENCODER_SHARE} if device == "cuda" else {})


def eight_bit(config: TrainConfig, device: str) -> bool:
    """Whether the 8-bit optimizer is wanted and available: bitsandbytes on CUDA."""
    return (config.optimizer == "adamw8bit" and device == "cuda"
            and importlib.util.find_spec("bitsandbytes") is not None)
