"""What a run will hold in memory, by phase and part, before it starts; without torch.

A plan is arithmetic over a few traced figures (traces.py): each is asked for by everything
that decides it, and kept on disk under a key of exactly that, so that the second answer is
instant and needs no torch. What a machine showed in earlier runs corrects its later plans.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from core import families, paths, plugins
from core.adapters import base_loras
from core.config import TrainConfig, size_of
from core.dataset import buckets
from core.families import distilled
from core.families.detection import Base
from core.memory import history
from core.memory.trace_keys import adapter_settings, rule_settings, text_settings
from core.serialization import from_json
from core.system.machine import MB
from core.weights.precision_rules import (
    base_settings,
    eight_bit,
    encoder_settings,
    numbers_for,
)

VERSION = 6                             # of the traces; raise it when tracing changes
Kind = Literal["cuda", "mps", "cpu"]
Verdict = Literal["fits", "tight", "too_big"]

CONTEXT_MB = 450.0                      # CUDA context and kernels, on top of torch's own count
WORKSPACE_MB = 150.0                    # cuBLAS and cuDNN scratch memory
FRAGMENTS = 0.06                        # of the tensors: what the allocator reserves and can't use
# RAM of the imports; on the CPU what the process holds for itself (460 MB, measured), and what
# kernels and the C library's allocator keep beside the tensors
PROCESS_MB = {"cuda": 2600.0, "mps": 1200.0, "cpu": 600.0}
MARGIN = 0.08                           # of the memory: "tight" below it
READ_MB = 256.0                         # RAM: what of a file is mapped at a time while it's loaded
PROOF_SIDE = {"cpu": 256, "mps": 512, "cuda": 512}      # px; the proof draws no larger


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run would go: the memory that its plan must fit."""

    kind: Kind
    name: str
    total_mb: float
    free_mb: float
    capability: tuple[int, int] = (0, 0)        # CUDA's; (0, 0): unknown
    ram_mb: float = 0.0                         # free; 0: unknown
    disk_mb: float = 0.0                        # free where the cache lies; 0: unknown


@dataclass(frozen=True, slots=True)
class Data:
    """The pictures of a run, as far as they weigh."""

    pictures: int = 20
    captions: int = 20                          # different ones, shuffles included; of a long one
                                                # each chunk (core/families/clip.py)
    batch: int = 0                              # largest that one bucket fills; 0: the config's
    bucket: tuple[int, int] | None = None       # that bucket; None: the largest possible
    chunks: int = 1                             # of the longest caption
    drawn_chunks: int = 1                       # of the longest prompt of previews


@dataclass(frozen=True, slots=True)
class Phase:
    name: str                                   # texts | cache | train | preview | verify
    parts: Mapping[str, float]                  # MiB by part

    @property
    def mb(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """All in MiB. `phases` hold tensors only; what the driver and the allocator add stands
    apart, since it is the only part that is estimated and not counted."""

    machine: Machine
    phases: tuple[Phase, ...]
    outside: Mapping[str, float]                # context, workspace, fragments or process, dataset
    ram: Mapping[str, float]                    # of the host
    disk: Mapping[str, float]
    bucket: tuple[int, int]
    parameters: int                             # trainable
    base_parameters: int
    learned: bool = False                       # `outside` comes from this machine's own runs

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.mb)

    @property
    def needs_mb(self) -> float:
        return self.peak.mb + sum(self.outside.values())

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def verdict(self, memory_mb: float | None = None, margin: float = MARGIN) -> Verdict:
        """Against `memory_mb`, else what is free on the machine."""
        room = self.machine.free_mb if memory_mb is None else memory_mb
        if self.needs_mb > room:
            return "too_big"
        return "fits" if self.needs_mb <= room * (1 - margin) else "tight"


# --- the plan ---

def plan_run(config: TrainConfig, base: Base, machine: Machine, data: Data | None = None) -> Plan:
    """Raises UserError where the base or a target can't be used."""
    data = data or Data()
    numbers = numbers_of(config.precision, machine, base.family)
    facts = _as_kept(config, base, numbers, machine, ask("base", base, numbers))
    rule = buckets.BucketRule.of(config, facts["native"], facts["step"])
    bucket = data.bucket or rule.largest()
    step = ask("step", base, numbers, **step_settings(config, machine, bucket, data))
    rows = config.cache_batch_size * 2 * max(data.chunks, data.drawn_chunks)
    texts = ask("texts", base, numbers, kind=machine.kind, batch=rows,
                **_encoders(config, machine, facts))
    cache = ask("cache", base, numbers, kind=machine.kind, width=bucket[0], height=bucket[1],
                batch=min(config.cache_batch_size, data.pictures))
    phases = (_phase("texts", text_encoder=texts["weights"], activations=texts["peak"]),
              _phase("cache", vae=facts["vae"], activations=cache["peak"]),
              _training(config, facts, step),
              *_drawing(config, base, numbers, machine, facts, step, data),
              *_regular(config, base, numbers, machine, facts, bucket))
    host = {"dataset": _cached(config, data, cache, texts) / MB}
    outside, learned = _outside(machine, max(phase.mb for phase in phases), host)
    return Plan(
        machine=machine, phases=phases, outside=outside, bucket=bucket,
        ram=_ram(machine, phases, facts, texts, host),
        disk=_disk(config, step, host["dataset"] if config.cache_to_disk else 0.0),
        parameters=int(step["parameters"]), base_parameters=int(facts["denoiser_parameters"]),
        learned=learned)


def numbers_of(precision: str, machine: Machine, family: str) -> dict[str, str]:
    """The number formats of a run of this family on this machine."""
    return numbers_for(precision, machine.kind, machine.capability,
                       families.outgrows_fp16(family))


def step_settings(config: TrainConfig, machine: Machine, bucket: tuple[int, int],
                  data: Data | None = None) -> dict[str, Any]:
    """Everything about a run that decides how much its step holds."""
    targets = config.target_modules
    return {"kind": machine.kind, "width": bucket[0], "height": bucket[1],
            "batch": min(config.batch_size, (data and data.batch) or config.batch_size),
            "rank": config.lora_rank, "dropout": config.lora_dropout > 0,
            "targets": targets if isinstance(targets, str) else sorted(targets),
            "checkpointing": config.gradient_checkpointing,
            "accumulating": config.gradient_accumulation_steps > 1,
            **adapter_settings(config), **base_settings(config, machine.kind),
            **_longer(data.chunks if data else 1),
            **({"eight_bit": True} if eight_bit(config, machine.kind) else rule_settings(config)),
            **({"text": text_settings(config)} if config.trains_text else {})}


def _longer(chunks: int) -> dict[str, int]:
    return {"chunks": chunks} if chunks > 1 else {}


def _encoders(config: TrainConfig, machine: Machine, facts: Mapping[str, float]
              ) -> dict[str, Any]:
    """The same for a trace, in as few ways as there are."""
    found = encoder_settings(config, machine.kind, machine.total_mb)
    held = facts["encoder_int8" if "quantization" in found else "encoder"]
    budget = found.pop("vram_budget", None)
    return found | ({} if budget is None or held <= budget else {"vram_budget": 0.0})


def _as_kept(config: TrainConfig, base: Base, numbers: dict[str, str], machine: Machine,
             facts: Mapping[str, float]) -> dict[str, float]:
    """`denoiser`: bytes on the device; `waiting`: in RAM."""
    kept = base_settings(config, machine.kind)
    held = ask("kept", base, numbers, **kept) if kept else {}
    return {**facts, "waiting": 0.0, **held,
            "base_loras": base_loras.held(config, 4 if numbers["compute"] == "fp32" else 2)}


def _training(config: TrainConfig, facts: Mapping[str, float],
              step: Mapping[str, float]) -> Phase:
    return _phase("train", denoiser=facts["denoiser"], adapter=step["adapter"],
                  optimizer=step["optimizer"], gradients=step["gradients"],
                  activations=max(0.0, step["peak"] - step["gradients_inside"],
                                  step.get("stepping", 0.0)),
                  **_beside(config, facts, step))


def _beside(config: TrainConfig, facts: Mapping[str, float],
            step: Mapping[str, float]) -> dict[str, float]:
    """What some runs hold from the first step to the proof."""
    found = {"text_encoder": facts["text"] if config.trains_text else 0.0,
             "average": step["gradients"] if config.ema_decay else 0.0,
             "base_loras": facts["base_loras"]}
    return {part: size for part, size in found.items() if size}


def _drawing(config: TrainConfig, base: Base, numbers: dict[str, str], machine: Machine,
             facts: Mapping[str, float], step: Mapping[str, float], data: Data) -> list[Phase]:
    """Previews, if asked for, and the proof at the end: the optimizer stays, gradients don't."""
    native = int(facts["native"])
    proof = min(native, PROOF_SIDE[machine.kind])
    wanted = {"verify": ((proof, proof), 1)}
    if config.sample_prompts:
        size = size_of(config.sample_size) or (native, native)
        wanted["preview"] = (size, 1 if _unguided(config, base) else 2)
    targets = step_settings(config, machine, (0, 0))["targets"]
    kept = base_settings(config, machine.kind)
    phases = []
    for name, (size, batch) in wanted.items():
        drawn = ask("draw", base, numbers, kind=machine.kind, width=size[0], height=size[1],
                    batch=batch, rank=config.lora_rank, targets=targets, **kept,
                    **_longer(max(data.chunks, data.drawn_chunks)), **adapter_settings(config))
        phases.append(_phase(name, denoiser=facts["denoiser"], vae=facts["vae"],
                             adapter=step["adapter"], optimizer=step["optimizer"],
                             activations=drawn["peak"], **_beside(config, facts, step)))
    return phases


def _regular(config: TrainConfig, base: Base, numbers: dict[str, str], machine: Machine,
             facts: Mapping[str, float], bucket: tuple[int, int]) -> list[Phase]:
    """The base alone drawing regularisation pictures before the training."""
    if not config.reg_from_base:
        return []
    settings = step_settings(config, machine, bucket)
    drawn = ask("draw", base, numbers, kind=machine.kind, width=bucket[0], height=bucket[1],
                batch=1 if _unguided(config, base) else 2, rank=config.lora_rank,
                targets=settings["targets"], **base_settings(config, machine.kind))
    return [_phase("regular", denoiser=facts["denoiser"], vae=facts["vae"],
                   activations=drawn["peak"])]


def _unguided(config: TrainConfig, base: Base) -> bool:
    """Pictures of a run without guidance take half the batch."""
    few = None if plugins.is_named(base.family) else distilled.of(base.source, config.distilled)
    return distilled.drawing(config.sample_cfg, 1, 2.0, 1, few)[0] <= 1


def _outside(machine: Machine, tensors: float, host: Mapping[str, float]
             ) -> tuple[dict[str, float], bool]:
    if machine.kind == "cpu":
        return {"process": PROCESS_MB["cpu"], **host}, False
    learned = history.overhead(machine.name)
    if learned is not None:
        return {"context": CONTEXT_MB, "allocator": learned * tensors}, True
    return {"context": CONTEXT_MB, "workspace": WORKSPACE_MB,
            "fragments": FRAGMENTS * tensors}, False


def _ram(machine: Machine, phases: Sequence[Phase], facts: Mapping[str, float],
         texts: Mapping[str, float], host: Mapping[str, float]) -> dict[str, float]:
    """Weights go from a mapped file to where they stay; what waits in RAM comes there by way of
    ordinary RAM. On the CPU everything is RAM."""
    process = {"process": PROCESS_MB[machine.kind], **host}
    if machine.kind == "cpu":
        return process | {"tensors": max(phase.mb for phase in phases), "loading": READ_MB}
    waiting, encoder = facts["waiting"] / MB, texts["waiting"] / MB
    by_way = facts["denoiser"] / MB if waiting else 0.0
    return process | ({"waiting": waiting} if waiting else {}) | {
        "loading": READ_MB + max(by_way, encoder - waiting)}


def _disk(config: TrainConfig, step: Mapping[str, float], cached_mb: float) -> dict[str, float]:
    lora = step["parameters"] * (4 if config.save_precision == "fp32" else 2)
    kept = config.keep_checkpoints + 1 if config.keep_checkpoints else 10
    state = step["adapter"] * (2 if config.ema_decay else 1) + step["optimizer"] + lora
    return {"cache": cached_mb, "checkpoints": kept * state / MB, "lora": lora / MB}


def _cached(config: TrainConfig, data: Data, cache: Mapping[str, float],
            texts: Mapping[str, float]) -> float:
    """Bytes of all latents (a mask is one channel more) and embeddings."""
    latents = cache["latents"] + (cache["mask"] if config.masked_loss else 0.0)
    return (data.pictures * latents * (2 if config.flip else 1)
            + (0 if config.trains_text else data.captions * texts["embedding"]))


def _phase(name: str, **sizes: float) -> Phase:
    return Phase(name, {part: size / MB for part, size in sizes.items()})


# --- traced figures, kept on disk ---

def ask(what: str, base: Base, numbers: dict[str, str], **settings: Any) -> dict[str, float]:
    """One of core.memory.traces's traces, in bytes; from the disk where it was asked before."""
    path = paths.cache_dir() / "plans" / f"{_key(what, base, numbers, settings)}.json"
    if (found := _kept(path)) is not None:
        return found
    memory = importlib.import_module("core.memory.traces")             # torch comes in here
    traced: dict[str, float] = memory.TRACES[what](base, numbers, **settings)
    with contextlib.suppress(OSError):                          # a full disk must not hide a plan
        paths.write_atomic(path, json.dumps(traced))
    return traced


def sizes(base: Base) -> dict[str, float]:
    """`native`, `step`: px, as the engine has them of this base."""
    return ask("sizes", base, {})


def known_sizes(base: Base) -> dict[str, float] | None:
    """The same without torch; None where nobody asked yet."""
    return _kept(paths.cache_dir() / "plans" / f"{_key('sizes', base, {}, {})}.json")


def _kept(path: Path) -> dict[str, float] | None:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, float] = from_json(path.read_text("utf-8"))
        return found
    return None


def _key(what: str, base: Base, numbers: dict[str, str], settings: dict[str, Any]) -> str:
    asked = json.dumps([VERSION, _versions(), what, base.family, base.digest, numbers, settings],
                       sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:32]


@functools.cache
def _versions() -> list[str]:
    return [version(name) for name in ("torch", "diffusers", "transformers", "peft")]


def as_dict(plan: Plan) -> dict[str, Any]:
    """For --json and events: rounded to a tenth of a MiB."""
    def rounded(parts: Mapping[str, float]) -> dict[str, float]:
        return {name: round(mb, 1) for name, mb in parts.items()}
    return {"machine": asdict(plan.machine), "needs_mb": round(plan.needs_mb, 1),
            "tensors_mb": round(plan.peak.mb, 1), "peak": plan.peak.name,
            "phases": {p.name: rounded(p.parts) for p in plan.phases},
            "outside": rounded(plan.outside), "ram": rounded(plan.ram),
            "disk": rounded(plan.disk), "bucket": list(plan.bucket),
            "parameters": plan.parameters, "base_parameters": plan.base_parameters,
            "verdict": plan.verdict(), "learned": plan.learned}
