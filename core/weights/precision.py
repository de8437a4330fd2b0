"""Which device and which numbers a run uses, and how its frozen base is kept."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass

import torch

from core.config import schema
from core.errors import Fix, UserError
from core.weights import precision_rules
from core.weights.offload import Offloaded, offload_
from core.weights.quantization import Kind, quantize_

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Precision:
    """Where the base lives and in which numbers it computes. LoRA weights are always fp32."""

    device: torch.device
    weights: torch.dtype                    # of the frozen base
    compute: torch.dtype                    # of autocast; float32: no autocast
    vae: torch.dtype
    kept: Kind = "same"                     # of the denoiser's blocks and of large text encoders'
    offload: float = 0.0                    # share of the denoiser's blocks that waits in RAM
    room: float | None = None               # bytes; blocks of larger text encoders wait in RAM


def pick_device(wanted: str) -> torch.device:
    """The first visible GPU, else the CPU. Raises UserError where a named device isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, found in there.items() if found)
    if not there[wanted]:
        raise UserError("engine.no_device", device=wanted,
                        fixes=[Fix("fixes.use_cpu", {"device": "cpu"})])
    return torch.device("cuda:0" if wanted == "cuda" else wanted)


def choose(precision: schema.Precision, device: str = "auto",
           outgrows_fp16: bool = False) -> Precision:
    """The device, and the number formats that precision_rules gives for it."""
    where = pick_device(device)
    cuda = where.type == "cuda"
    capability = torch.cuda.get_device_capability(where) if cuda else (0, 0)
    numbers = precision_rules.numbers_for(precision, where.type, capability, outgrows_fp16)
    return Precision(device=where, weights=DTYPES[numbers["weights"]],
                     compute=DTYPES[numbers["compute"]], vae=DTYPES[numbers["vae"]])


def keep_(model: torch.nn.Module, device: torch.device, kept: Kind = "same",
          offload: float = 0.0) -> Offloaded:
    """Quantises the blocks, sends a share of them to RAM, moves the rest to `device`."""
    quantize_(model, kept, device)
    done = offload_(model, offload, device)
    if not any(p.is_meta for p in model.parameters()):
        model.to(device)
    return done


def autocast(precision: Precision) -> contextlib.AbstractContextManager[object]:
    if precision.compute == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(precision.device.type, precision.compute)


def total_memory(device: torch.device) -> float:
    """Bytes of a CUDA card; elsewhere 0."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0


def free_memory() -> None:
    """Gives dropped parts back: to the driver on a GPU, to the system on Linux."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
