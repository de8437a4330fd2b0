"""Plans how much memory a run will hold, by phase and part, before it starts. Without torch.

A plan is arithmetic over a few traced figures (traces.py). Each figure is kept on disk under a key
of everything that decides it, so that the second answer is instant and needs no torch. What a
machine showed in earlier runs corrects its later plans.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
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
from core.weights import precision_rules
from core.weights.precision_rules import base_settings

VERSION = 6                             # of the traces; raise it when tracing changes
Kind = Literal["cuda", "mps", "cpu"]
Verdict = Literal["fits", "tight", "too_big"]

CONTEXT_MB = 450.0                      # CUDA context and kernels, on top of torch's own count
WORKSPACE_MB = 150.0                    # cuBLAS and cuDNN scratch memory
FRAGMENTS = 0.06                        # of the tensors: reserved by the allocator, but unusable
# RAM of the imports; on the CPU what the process holds for itself (460 MB, measured), and what
# kernels and the C library's allocator keep beside the tensors
PROCESS_MB = {"cuda": 2600.0, "mps": 1200.0, "cpu": 600.0}
MARGIN = 0.08                           # of the memory: "tight" below it
GROWTH, MOST_GROWTH_MB = 0.25, 512.0    # what other programs may take on top of what they hold
READ_MB = 256.0                         # RAM: of a file, mapped at a time while it is loaded
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
    # Different ones, shuffles included; a long one counts by its chunks (core/families/clip.py).
    captions: int = 20
    batch: int = 0                              # largest that one bucket fills; 0: the config's
    bucket: tuple[int, int] | None = None       # that bucket; None: the largest possible
    chunks: int = 1                             # of the longest caption
    drawn_chunks: int = 1                       # of the longest prompt of previews


@dataclass(frozen=True, slots=True)
class Phase:
    """What lies in memory together at some time of the run."""

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

    def verdict(self, memory_mb: float | None = None) -> Verdict:
        """Whether the plan fits the machine, or a card of its own with `memory_mb` free; "tight"
        where it fits now, but another program may end that."""
        free, sure = (self.machine.free_mb, room(self.machine)) if memory_mb is None else (
            memory_mb, memory_mb)
        return ("too_big" if self.needs_mb > free
                else "fits" if self.needs_mb <= sure * (1 - MARGIN) else "tight")

    @property
    def fits(self) -> bool:
        return self.verdict() == "fits"


def room(machine: Machine) -> float:
    """MiB that a run may count on: what is free, less what other programs (a desktop, a browser)
    may still take. On a card without a screen next to nothing is held, so little is kept back."""
    others = max(0.0, machine.total_mb - machine.free_mb)
    return max(0.0, machine.free_mb - min(GROWTH * others, MOST_GROWTH_MB))


# --- the plan ---

def plan_run(config: TrainConfig, base: Base, machine: Machine, data: Data | None = None) -> Plan:
    """Plans a run. Raises UserError where the base or a target can't be used."""
    data = data or Data()
    numbers = numbers_of(config.precision, machine, base.family)
    # The base as it is kept: quantized, or with blocks that wait in RAM ("waiting"), it takes less
    # of the device.
    kept = base_settings(config, machine.kind)
    facts = {**ask("base", base, numbers), "waiting": 0.0,
             **(ask("kept", base, numbers, **kept) if kept else {}),
             "base_loras": base_loras.size_in_bytes(
                 config, 4 if numbers["compute"] == "fp32" else 2)}
    rule = buckets.BucketRule.of(config, facts["native"], facts["step"])
    bucket = data.bucket or rule.largest()
    step = ask("step", base, numbers, **step_settings(config, machine, bucket, data))
    # Twice as many texts as pictures are encoded at once (core/dataset/examples.py).
    rows = config.cache_batch_size * 2 * max(data.chunks, data.drawn_chunks)
    texts = ask("texts", base, numbers, kind=machine.kind, batch=rows,
                **_encoders(config, machine, facts))
    cache = ask("cache", base, numbers, kind=machine.kind, width=bucket[0], height=bucket[1],
                batch=min(config.cache_batch_size, data.pictures))
    phases = (_phase("texts", text_encoder=texts["weights"], activations=texts["peak"]),
              _phase("cache", vae=facts["vae"], activations=cache["peak"]),
              _phase("train", denoiser=facts["denoiser"], adapter=step["adapter"],
                     optimizer=step["optimizer"], gradients=step["gradients"],
                     activations=max(0.0, step["peak"] - step["gradients_inside"],
                                     step.get("stepping", 0.0)),
                     **_beside(config, facts, step)),
              *_drawing(config, base, numbers, machine, facts, step, data, bucket))
    # All latents and embeddings lie in RAM; a mask is one channel more.
    latents = cache["latents"] + (cache["mask"] if config.masked_loss else 0.0)
    cached = (data.pictures * latents * (2 if config.flip else 1)
              + (0 if config.trains_text else data.captions * texts["embedding"]))
    host = {"dataset": cached / MB}
    # Checkpoints: one more than are kept, for the time until the oldest is deleted; 10 stand for
    # "all of them".
    lora = step["parameters"] * (4 if config.save_precision == "fp32" else 2)
    checkpoints = config.keep_checkpoints + 1 if config.keep_checkpoints else 10
    state = step["adapter"] * (2 if config.ema_decay else 1) + step["optimizer"] + lora
    # What is held besides tensors: this machine's own runs tell it best.
    tensors = max(phase.mb for phase in phases)
    overhead = None if machine.kind == "cpu" else history.overhead(machine.name)
    if machine.kind == "cpu":
        outside = {"process": PROCESS_MB["cpu"], **host}
    elif overhead is not None:
        outside = {"context": CONTEXT_MB, "allocator": overhead * tensors}
    else:
        outside = {"context": CONTEXT_MB, "workspace": WORKSPACE_MB,
                   "fragments": FRAGMENTS * tensors}
    return Plan(
        machine=machine, phases=phases, outside=outside, bucket=bucket,
        ram=_ram(machine, tensors, facts, texts, host),
        disk={"cache": host["dataset"] if config.cache_to_disk else 0.0,
              "checkpoints": checkpoints * state / MB, "lora": lora / MB},
        parameters=int(step["parameters"]), base_parameters=int(facts["denoiser_parameters"]),
        learned=overhead is not None)


def numbers_of(precision: str, machine: Machine, family: str) -> dict[str, str]:
    """The number formats of a run of this family on this machine."""
    return precision_rules.numbers_for(precision, machine.kind, machine.capability,
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
            **({"eight_bit": True} if precision_rules.eight_bit(config, machine.kind)
               else rule_settings(config)),
            **({"text": text_settings(config)} if config.trains_text else {})}


def _longer(chunks: int) -> dict[str, int]:
    return {"chunks": chunks} if chunks > 1 else {}


def _encoders(config: TrainConfig, machine: Machine, facts: Mapping[str, float]
              ) -> dict[str, Any]:
    """How the text encoders are kept. The size of the room for them matters to a trace only where
    they don't fit into it: all larger ones share a key."""
    settings = precision_rules.encoder_settings(config, machine.kind, machine.total_mb)
    size = facts["encoder_int8" if "quantization" in settings else "encoder"]
    budget = settings.pop("vram_budget", None)
    return settings | ({} if budget is None or size <= budget else {"vram_budget": 0.0})


def _beside(config: TrainConfig, facts: Mapping[str, float], step: Mapping[str, float]
            ) -> dict[str, float]:
    """What some runs hold from the first step to the proof, in bytes."""
    sizes = {"text_encoder": facts["text"] if config.trains_text else 0.0,
             "average": step["gradients"] if config.ema_decay else 0.0,
             "base_loras": facts["base_loras"]}
    return {part: size for part, size in sizes.items() if size}


def _drawing(config: TrainConfig, base: Base, numbers: dict[str, str], machine: Machine,
             facts: Mapping[str, float], step: Mapping[str, float], data: Data,
             bucket: tuple[int, int]) -> Iterator[Phase]:
    """The proof at the end, previews, and regularisation pictures that the base draws."""
    native = int(facts["native"])
    proof = min(native, PROOF_SIDE[machine.kind])
    drawings = {"verify": ((proof, proof), 1)}
    if config.sample_prompts:
        size = size_of(config.sample_size) or (native, native)
        drawings["preview"] = (size, 1 if _unguided(config, base) else 2)

    def peak(size: tuple[int, int], batch: int, **more: Any) -> float:
        targets = step_settings(config, machine, (0, 0))["targets"]
        return ask("draw", base, numbers, kind=machine.kind, width=size[0], height=size[1],
                   batch=batch, rank=config.lora_rank, targets=targets,
                   **base_settings(config, machine.kind), **more)["peak"]

    longest = _longer(max(data.chunks, data.drawn_chunks))
    for name, (size, batch) in drawings.items():
        # The optimizer stays meanwhile, the gradients don't.
        yield _phase(name, denoiser=facts["denoiser"], vae=facts["vae"], adapter=step["adapter"],
                     optimizer=step["optimizer"],
                     activations=peak(size, batch, **longest, **adapter_settings(config)),
                     **_beside(config, facts, step))
    # Before the training there is neither adapter nor optimizer.
    if config.reg_from_base:
        yield _phase("regular", denoiser=facts["denoiser"], vae=facts["vae"],
                     activations=peak(bucket, 1 if _unguided(config, base) else 2))


def _unguided(config: TrainConfig, base: Base) -> bool:
    """Whether pictures are drawn without guidance, which takes half the batch."""
    few = None if plugins.is_named(base.family) else distilled.of(base.source, config.distilled)
    return distilled.drawing(config.sample_cfg, 1, 2.0, 1, few)[0] <= 1


def _ram(machine: Machine, tensors: float, facts: Mapping[str, float],
         texts: Mapping[str, float], host: Mapping[str, float]) -> dict[str, float]:
    """The host's RAM in MiB. On the CPU everything is there."""
    process = {"process": PROCESS_MB[machine.kind], **host}
    if machine.kind == "cpu":
        return process | {"tensors": tensors, "loading": READ_MB}
    waiting, encoder = facts["waiting"] / MB, texts["waiting"] / MB
    # Weights go from a mapped file to where they stay. Where some wait in pinned RAM, all of them
    # pass through ordinary RAM.
    by_way = facts["denoiser"] / MB if waiting else 0.0
    return process | ({"waiting": waiting} if waiting else {}) | {
        "loading": READ_MB + max(by_way, encoder - waiting)}


def _phase(name: str, **sizes: float) -> Phase:
    return Phase(name, {part: size / MB for part, size in sizes.items()})


# --- traced figures, kept on disk ---

def ask(what: str, base: Base, numbers: dict[str, str], **settings: Any) -> dict[str, float]:
    """One of core.memory.traces's traces, in bytes; from the disk where it was asked before."""
    path = _file(what, base, numbers, settings)
    if (known := _read(path)) is not None:
        return known
    # Imported by name, and only here: this module is free of torch, as the window needs it.
    traces = importlib.import_module("core.memory.traces")
    figures: dict[str, float] = traces.TRACES[what](base, numbers, **settings)
    with contextlib.suppress(OSError):          # a full disk must not hide a plan
        paths.write_atomic(path, json.dumps(figures))
    return figures


def sizes(base: Base) -> dict[str, float]:
    """`native` and `step` of this base, px, as the engine reads them."""
    return ask("sizes", base, {})


def known_sizes(base: Base) -> dict[str, float] | None:
    """The same without torch; None where nobody asked yet."""
    return _read(_file("sizes", base, {}, {}))


def _read(path: Path) -> dict[str, float] | None:
    with contextlib.suppress(OSError, ValueError):
        figures: dict[str, float] = from_json(path.read_text("utf-8"))
        # Someone's hand or a bad disk: it is traced anew.
        if isinstance(figures, dict) and all(isinstance(figure, int | float)
                                             for figure in figures.values()):
            return figures
    return None


def _file(what: str, base: Base, numbers: dict[str, str], settings: dict[str, Any]) -> Path:
    """Where a trace is kept, by everything that decides it."""
    question = json.dumps([VERSION, _versions(), what, base.family, base.digest, numbers, settings],
                          sort_keys=True)
    key = hashlib.sha256(question.encode()).hexdigest()[:32]
    return paths.cache_dir() / "plans" / f"{key}.json"


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
