"""Traces how much the phases of a run hold: each runs on meta tensors with the engine's own code.

Nothing here knows a model by name: the shapes come from the base's real modules, without weights.
Figures are bytes, but for counts and sizes in px. core/memory/plan.py asks for them and keeps the
answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from core import families
from core.adapters import lora
from core.adapters.text_encoder import TextTraining
from core.config import TrainConfig
from core.families.base import ALL_PARTS, Cond, CropInfo, Family, Parts, Reading
from core.families.detection import Base
from core.families.registry import CHUNK
from core.families.spec import Part
from core.memory.meta_tensors import META, DeviceEmulation, Kind, size_of, traced
from core.objectives import diffusion as objective
from core.objectives.noise import Draw
from core.optim import optimizers
from core.weights.offload import stage_of, waiting
from core.weights.precision import DTYPES, Precision, quantize_and_offload_
from core.weights.quantization import Frozen, Quantization

Figures = dict[str, float]
SIZES_ONLY = dict.fromkeys(("weights", "compute", "vae"), "fp32")
ADAM_STATES = 2                             # fp32 numbers per weight: first and second moment


def base(base: Base, numbers: dict[str, str]) -> Figures:
    """Weights of each part, and the base's own sizes."""
    family, parts = _skeleton(base, numbers)
    small = family.skeleton(base.source, replace(Precision.of(META, numbers), quantization="int8"),
                            frozenset({"text"}))
    encoders, eight = ([size_of(m) for m in loaded.text.values() if isinstance(m, torch.nn.Module)]
                       for loaded in (parts, small))
    return {"denoiser": size_of(parts.denoiser), "vae": size_of(parts.vae),
            "text": sum(encoders), "encoder": max(encoders), "encoder_int8": max(eight),
            "denoiser_parameters": sum(p.numel() for p in parts.denoiser.parameters()),
            "native": parts.native_size, "step": parts.bucket_step,
            "flow": float(parts.flow is not None)}


def sizes(base: Base, numbers: dict[str, str]) -> Figures:
    """The base's own sizes alone: no module is made."""
    parts = families.get(base.family).load(base.source, Precision.of(META, SIZES_ONLY), frozenset())
    return {"native": parts.native_size, "step": parts.bucket_step}


def kept(base: Base, numbers: dict[str, str], quantization: Quantization = "same",
         offload: float = 0.0) -> Figures:
    """The quantized denoiser: what of it lies on the device, and what waits in RAM."""
    _, parts = _skeleton(base, numbers, "denoiser")
    quantize_and_offload_(parts.denoiser, META, quantization, offload)
    return {"denoiser": size_of(parts.denoiser), "waiting": waiting(parts.denoiser)}


def texts(base: Base, numbers: dict[str, str], kind: Kind, batch: int,
          quantization: Quantization = "same", vram_budget: float | None = None) -> Figures:
    """Encoding `batch` captions. `weights`, `peak`: of the encoder that takes the most;
    `waiting`: in RAM, the most; `embedding`: what one caption takes in the cache."""
    family = families.get(base.family)
    compute, most, away, row = DTYPES[numbers["compute"]], (0, 0), 0, 0
    precision = replace(Precision.of(META, numbers), quantization=quantization,
                        vram_budget=vram_budget)
    # One encoder after the other, as the engine loads them.
    for encoder in family.spec.encoders:
        parts = family.skeleton(base.source, precision, frozenset({encoder}))
        known = [m for m in parts.text.values() if isinstance(m, torch.nn.Module)]
        kernels = DeviceEmulation(kind, compute)
        with torch.no_grad():
            for model in known:
                _as_on(model, kind)
                # Blocks in RAM are fetched ahead of their use only once their order is known.
                if stage := stage_of(model):
                    family.encode_text(parts, [""])
                    stage.clear()
            with traced(kernels, known) as tally, kernels.autocast():
                cond = family.encode_text(parts, [""] * batch) if known else {}
                rows = {k: v.to(compute) for k, v in cond.items()}
        most = max(most, (sum(map(size_of, known)), tally.peak), key=sum)
        away = max(away, sum(map(waiting, known)))
        row += sum(v[:1].numel() * v.element_size() for v in rows.values())
    return {"weights": most[0], "peak": most[1], "waiting": away, "embedding": row}


def cache(base: Base, numbers: dict[str, str], kind: Kind, width: int, height: int,
          batch: int) -> Figures:
    """Encoding a batch of pictures; `latents`: bytes that one picture's take in the cache."""
    family, parts = _skeleton(base, numbers, "vae")
    with traced(DeviceEmulation(kind, torch.float32), [parts.vae]) as tally:
        pixels = torch.empty(batch, 3, height, width, device=META)
        latents = family.encode_image(parts, pixels)
    return {"peak": tally.peak, "latents": latents[:1].numel() * 4,
            "mask": latents[0, :1].numel() * 4}


def step(base: Base, numbers: dict[str, str], kind: Kind, width: int, height: int, batch: int,
         rank: int, dropout: bool, targets: str | list[str], checkpointing: bool,
         accumulating: bool, quantization: Quantization = "same", offload: float = 0.0,
         eight_bit: bool = False, text: Mapping[str, float] | None = None,
         adapter: dict[str, Any] | None = None, variant_source: str = "",
         rule: dict[str, Any] | None = None, rule_source: str = "", chunks: int = 1) -> Figures:
    """One micro-batch forward and backward, as the engine runs it.

    `adapter`, `rule` and `text` are further config keys of the adapter, of the optimizer and of
    text encoders that learn; the two `_source` arguments only tell one trace from another. In the
    result `gradients_inside` are the bytes of `peak` that are gradients of this very backward (when
    accumulating, they were there before), and `stepping` is what the optimizer holds for a moment.
    """
    family, parts = _skeleton(base, numbers, "denoiser", "vae", *(["text"] if text else ()))
    latents, cond = _inputs(base, family, parts, numbers, width, height, batch, chunks)
    parts.reading = Reading(CHUNK * chunks)
    quantize_and_offload_(parts.denoiser, META, quantization, offload)
    _as_on(parts.denoiser, kind)
    config = TrainConfig(lora_rank=rank, lora_dropout=0.1 if dropout else 0.0,
                         target_modules=targets, **(adapter or {}), **(rule or {}))
    parameters = lora.attach(parts.denoiser, config, family.spec)
    kernels = DeviceEmulation(kind, DTYPES[numbers["compute"]])
    learner = None
    if text:
        config = config.with_changes(**text, trigger_word="x")
        learner = TextTraining(config, family, parts, Precision.of(META, numbers), kernels.autocast)
        parameters = [*parameters, *learner.parameters]
    if checkpointing:
        parts.denoiser.enable_gradient_checkpointing(kernels.checkpoint)
    lora.set_training(parts.denoiser, True)
    gradients = sum(_held(p, kind) for p in parameters)
    fixed = sum(_held(p, kind) for p in lora.starts(parts.denoiser))
    if accumulating:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
    diffusion = objective.create(parts, config, META)
    _learn_order(family, parts, latents, cond)
    encoders = learner.models.values() if learner else ()
    with traced(kernels, [parts.denoiser, *encoders]) as tally:
        inputs = latents.clone()
        cond = (learner.cond([_text(chunks)] * batch) if learner
                else {k: v.clone() for k, v in cond.items()})
        draw = Draw(torch.empty_like(latents), _times(parts, batch))
        losses = diffusion.losses(family, parts.denoiser, inputs, draw, cond, kernels.autocast)
        torch.autograd.backward([losses.sum() / batch])
    stepping = 0
    if eight_bit:
        # bitsandbytes: two states of a byte a weight with an fp32 scale for every 256; in full
        # below 4096 weights. CUDA hands out memory in pieces of 512 bytes.
        states = 0
        for count in (p.numel() for p in parameters):
            sizes = [count, -(-count // 256) * 4] if count >= 4096 else [count * 4]
            states += 2 * sum(-(-size // 512) * 512 for size in sizes)
    elif rule:
        states, stepping = _stepped(config, parameters, kernels)
    else:
        # torch's AdamW also keeps its step count in a tensor, one for each parameter.
        states = ADAM_STATES * gradients + len(parameters) * (512 if kind == "cuda" else 4)
    return {"peak": tally.peak, "adapter": gradients + fixed, "gradients": gradients,
            "gradients_inside": 0 if accumulating else min(gradients, tally.peak),
            "optimizer": states, "stepping": stepping,
            "parameters": sum(p.numel() for p in parameters), "tensors": len(parameters)}


def draw(base: Base, numbers: dict[str, str], kind: Kind, width: int, height: int, batch: int,
         rank: int, targets: str | list[str], quantization: Quantization = "same",
         offload: float = 0.0, adapter: dict[str, Any] | None = None, variant_source: str = "",
         chunks: int = 1) -> Figures:
    """A preview: denoising with the adapter, `batch` 2 with guidance; then decoding one picture."""
    family, parts = _skeleton(base, numbers, "denoiser", "vae")
    latents, cond = _inputs(base, family, parts, numbers, width, height, batch, chunks)
    quantize_and_offload_(parts.denoiser, META, quantization, offload)
    _as_on(parts.denoiser, kind)
    config = TrainConfig(lora_rank=rank, target_modules=targets, **(adapter or {}))
    lora.attach(parts.denoiser, config, family.spec)
    lora.set_training(parts.denoiser, False)
    known = [parts.denoiser, parts.vae]
    t = _times(parts, batch)
    kernels = DeviceEmulation(kind, DTYPES[numbers["compute"]])
    _learn_order(family, parts, latents, cond)
    with torch.no_grad(), traced(kernels, known) as tally, kernels.autocast():
        picture = latents[:1].clone()                   # stays while the denoiser works
        family.predict(parts.denoiser, latents.clone(), t, cond)
        picture = picture.unsqueeze(2) if parts.is_video_vae else picture
        parts.vae.decode(picture.to(parts.vae.dtype), return_dict=False)
    return {"peak": tally.peak}


TRACES: dict[str, Callable[..., Figures]] = {
    "base": base, "sizes": sizes, "kept": kept, "texts": texts, "cache": cache, "step": step,
    "draw": draw}


def _skeleton(base: Base, numbers: dict[str, str], *only: Part) -> tuple[Family, Parts]:
    family = families.get(base.family)
    return family, family.skeleton(base.source, Precision.of(META, numbers),
                                   frozenset(only) or ALL_PARTS)


def _as_on(model: torch.nn.Module, kind: Kind) -> None:
    """Quantized layers take the kernels that they would take on this kind of device."""
    for layer in model.modules():
        if isinstance(layer, Frozen):
            layer.native = kind == "cuda"


def _learn_order(family: Family, parts: Parts, latents: Tensor, cond: Cond) -> None:
    """One pass, after which blocks that wait in RAM are fetched ahead of their use."""
    if (stage := stage_of(parts.denoiser)) is None:
        return
    t = _times(parts, len(latents))
    with torch.no_grad():
        family.predict(parts.denoiser, latents.to(parts.denoiser.dtype), t, {
            k: v.to(parts.denoiser.dtype) for k, v in cond.items()})
    stage.clear()


def _held(tensor: Tensor, kind: Kind) -> int:
    """Bytes that an allocator hands out for a tensor."""
    grain = 512 if kind == "cuda" else 1
    return -(-tensor.numel() * tensor.element_size() // grain) * grain


def _stepped(config: TrainConfig, parameters: list[torch.nn.Parameter], kernels: DeviceEmulation
             ) -> tuple[int, int]:
    """Bytes of the optimizer's state after a step, and of what a second one holds besides."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = optimizers.create(config, parameters)
    try:
        optimizer.step()
        with traced(kernels, []) as tally:
            optimizer.step()
    except (RuntimeError, NotImplementedError):
        # A rule that looks at values, which meta tensors don't have, counts as Adam.
        return ADAM_STATES * sum(_held(p, kernels.kind) for p in parameters), 0
    tensors = [value for state in optimizer.state.values() for value in state.values()
               if isinstance(value, Tensor)]
    return sum(_held(tensor, kernels.kind) for tensor in tensors), tally.peak


def _times(parts: Parts, batch: int) -> Tensor:
    dtype = torch.int64 if parts.flow is None else torch.float32
    return torch.empty(batch, dtype=dtype, device=META)


def _inputs(base: Base, family: Family, parts: Parts, numbers: dict[str, str], width: int,
            height: int, batch: int, chunks: int) -> tuple[Tensor, Cond]:
    """Latents (B, C, h, w) and embeddings (B, ...) of the shapes that the encoders give."""
    size = width, height
    with torch.no_grad():
        latents = family.encode_image(parts, torch.empty(1, 3, height, width, device=META))
    cond = _embedding(base, numbers["weights"], chunks) | {
        k: v.to(META) for k, v in family.size_conditioning(CropInfo(size, (0, 0), size)).items()}
    compute = DTYPES[numbers["compute"]]
    return (latents.float().repeat(batch, 1, 1, 1),
            {k: v.to(compute).repeat(batch, *[1] * (v.ndim - 1)) for k, v in cond.items()})


@functools.lru_cache(8)
def _embedding(base: Base, weights: str, chunks: int) -> Cond:
    """The embedding of one caption, (1, ...), on meta tensors."""
    family, parts = _skeleton(base, dict.fromkeys(("weights", "compute", "vae"), weights), "text")
    parts.reading = Reading(CHUNK * chunks)
    with torch.no_grad():
        return family.encode_text(parts, [_text(chunks)])


def _text(chunks: int) -> str:
    """A text that fills so many chunks."""
    return " ".join(["a"] * CHUNK * chunks) if chunks > 1 else ""
