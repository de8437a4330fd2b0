"""The device and the dtypes of a run, and how its frozen base is quantised."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from core.config import schema
from core.errors import Fix, UserError
from core.weights import precision_rules
from core.weights.offload import Offloaded, offload_
from core.weights.quantization import Quantization, quantize_

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Precision:
    """The device, the dtypes and the quantisation of a base. LoRA weights are always fp32."""

    device: torch.device
    weights: torch.dtype                    # of the frozen base
    compute: torch.dtype                    # of autocast; float32: no autocast
    vae: torch.dtype
    quantization: Quantization = "same"     # of the denoiser's blocks and large text encoders'
    offload: float = 0.0                    # share of the denoiser's blocks that waits in RAM
    # Bytes that a large text encoder may take: the blocks of one that takes more wait in RAM.
    vram_budget: float | None = None

    @classmethod
    def of(cls, device: torch.device, numbers: Mapping[str, str]) -> Precision:
        """From the names of the dtypes, as precision_rules gives them."""
        return cls(device, DTYPES[numbers["weights"]], DTYPES[numbers["compute"]],
                   DTYPES[numbers["vae"]])


def pick_device(name: str) -> torch.device:
    """The device of a name (cuda, mps, cpu); for "auto" the first visible GPU, else the CPU.
    Raises UserError where a named device isn't there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in available.items() if is_there)
    if not available[name]:
        raise UserError("engine.no_device", device=name,
                        fixes=[Fix("fixes.use_cpu", {"device": "cpu"})])
    return torch.device("cuda:0" if name == "cuda" else name)


def choose(precision: schema.Precision, device: str = "auto",
           outgrows_fp16: bool = False) -> Precision:
    """Picks the device, and the dtypes that precision_rules gives for it."""
    picked = pick_device(device)
    capability = torch.cuda.get_device_capability(picked) if picked.type == "cuda" else (0, 0)
    numbers = precision_rules.numbers_for(precision, picked.type, capability, outgrows_fp16)
    return Precision.of(picked, numbers)


def quantize_and_offload_(model: torch.nn.Module, device: torch.device,
                          quantization: Quantization = "same", offload: float = 0.0) -> Offloaded:
    """Quantises a model's blocks, moves a share of them to RAM and the rest of it to `device`."""
    quantize_(model, quantization, device)
    done = offload_(model, offload, device)
    if not any(p.is_meta for p in model.parameters()):
        model.to(device)
    return done


def autocast(precision: Precision) -> contextlib.AbstractContextManager[object]:
    """Autocast to the run's dtype; nothing where that is fp32."""
    if precision.compute == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(precision.device.type, precision.compute)


def total_memory(device: torch.device) -> float:
    """Bytes of a CUDA card; elsewhere 0."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0


def free_memory() -> None:
    """Gives the memory of deleted models back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
