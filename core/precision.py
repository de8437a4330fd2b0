"""Which device and which numbers a run uses."""

from __future__ import annotations

import contextlib
import gc

import torch

from core import config
from core.families.base import Precision
from core.faults import Fault, Fix

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(wanted: str) -> torch.device:
    """The first visible GPU, else the CPU. Raises Fault where a named device isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, found in there.items() if found)
    if not there[wanted]:
        raise Fault("engine.no_device", device=wanted,
                    fixes=[Fix("fixes.use_cpu", {"device": "cpu"})])
    return torch.device("cuda:0" if wanted == "cuda" else wanted)


def choose(precision: config.Precision, device: str = "auto") -> Precision:
    """auto: bf16 where the GPU computes it, fp16 on older GPUs, fp32 on the CPU.

    The VAE stays out of fp16: SDXL's overflows there, and it runs only while caching.
    """
    where = pick_device(device)
    if precision == "auto":
        if where.type == "cuda":
            precision = "bf16" if torch.cuda.get_device_capability(where) >= (8, 0) else "fp16"
        else:
            precision = "fp32"
    dtype = DTYPES[precision]
    vae = torch.float32 if dtype == torch.float16 else dtype
    return Precision(device=where, weights=dtype, compute=dtype, vae=vae)


def autocast(precision: Precision) -> contextlib.AbstractContextManager[object]:
    if precision.compute == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(precision.device.type, precision.compute)


def free_memory() -> None:
    """Gives dropped parts back: to the driver on a GPU, to the system on Linux."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
