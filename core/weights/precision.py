"""Which device and which numbers a run uses, and how its frozen base is kept."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core import families
from core.config import schema
from core.errors import Fault, Fix
from core.families.base import Family, Precision
from core.jobs.events import Event, Note
from core.memory import plan
from core.weights.offload import Offloaded, offload_
from core.weights.quantization import Kind, quantise_

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


def choose(precision: schema.Precision, device: str = "auto", family: str = "") -> Precision:
    """The device, and the number formats that core.memory.plan's rule gives for it and a family."""
    where = pick_device(device)
    cuda = where.type == "cuda"
    capability = torch.cuda.get_device_capability(where) if cuda else (0, 0)
    numbers = plan.numbers_for(precision, where.type, capability, family)
    return Precision(device=where, weights=DTYPES[numbers["weights"]],
                     compute=DTYPES[numbers["compute"]], vae=DTYPES[numbers["vae"]])


def tell_numbers(wanted: schema.Precision, family: str, precision: Precision,
                 emit: Callable[[Event], None]) -> None:
    """Where a family's numbers outgrow fp16: that fp16 was asked for all the same, or that fp32
    takes its place on a GPU without bf16."""
    if not families.outgrows_fp16(family):
        return
    title = families.MODULES[family].title
    if precision.compute == torch.float16:
        emit(Note(key="precision.outgrows_fp16", params={"title": title}))
    elif wanted == "auto" and precision.device.type == "cuda" and (
            precision.compute == torch.float32):
        emit(Note(key="precision.fp32_for_fp16", params={"title": title}))


def load_denoiser(config: schema.TrainConfig, family: Family, source: Path, precision: Precision,
                  emit: Callable[[Event], None] | None = None) -> Any:
    """The base's denoiser as the run keeps it: quantised, part of it in RAM; frozen.

    Weights come one after the other, in the bits that they keep: the whole never has to fit the
    GPU. Raises Fault as the family's `load` does.
    """
    kept = plan.kept_settings(config, precision.device.type)
    if config.offload and "offload" not in kept and emit:
        emit(Note(key="precision.offload_useless", params={"device": precision.device.type}))
    model = family.load(source, replace(precision, **kept), frozenset({"denoiser"})).denoiser
    done = keep_(model, precision.device, **kept)   # families of one's own may have left it
    if done.blocks and not done.pinned and emit:
        emit(Note(key="precision.not_pinned"))
    return model


def keep_(model: torch.nn.Module, device: torch.device, kept: Kind = "same",
          offload: float = 0.0) -> Offloaded:
    """Quantises the blocks, sends a share of them to RAM, moves the rest to `device`."""
    quantise_(model, kept, device)
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
