"""Number formats of a run, and how its frozen parts are kept, from its config and the card alone.

Plans and runs ask the same functions, so that a plan counts what the run will do. Without torch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from core.config import TrainConfig
from core.system.machine import MB

ENCODER_SHARE = 0.25                    # of a card: a large text encoder that takes more travels


def numbers_for(precision: str, kind: str, capability: tuple[int, int],
                outgrows_fp16: bool = False) -> dict[str, str]:
    """Number formats by use. auto: bf16 where the GPU computes it, fp16 on older GPUs unless the
    model's numbers outgrow it, else fp32. The VAE stays out of fp16: SDXL's overflows there."""
    if precision == "auto":
        older = (0, 0) < capability < (8, 0)
        half = "bf16" if not older else "fp32" if outgrows_fp16 else "fp16"
        precision = half if kind == "cuda" else "fp32"
    return {"weights": precision, "compute": precision,
            "vae": "fp32" if precision == "fp16" else precision}


def kept_settings(config: TrainConfig, kind: str) -> dict[str, Any]:
    """How the frozen base is kept; empty: in full. Offload only helps a card with memory of its
    own: elsewhere the base would wait in the memory that it works in."""
    found: dict[str, Any] = {}
    if config.base_precision != "same":
        found["kept"] = config.base_precision
    if config.offload and kind == "cuda":
        found["offload"] = config.offload
    return found


def encoder_settings(config: TrainConfig, kind: str, total_mb: float) -> dict[str, Any]:
    """How frozen text encoders of a billion parameters and more are kept while captions are
    encoded: in int8 where the base is in few bits (4 bits would cost what they say, and they stay
    for minutes), in RAM but for two blocks where they'd take much of a card."""
    found: dict[str, Any] = {} if config.base_precision == "same" else {"kept": "int8"}
    return found | ({"room": total_mb * MB * ENCODER_SHARE} if kind == "cuda" else {})


def eight_bit(config: TrainConfig, kind: str) -> bool:
    """Whether the 8-bit optimizer is wanted and can be had: bitsandbytes on CUDA."""
    return (config.optimizer == "adamw8bit" and kind == "cuda"
            and importlib.util.find_spec("bitsandbytes") is not None)
