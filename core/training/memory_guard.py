"""Guards a run's memory: planned before it starts, watched while it runs, compared afterwards.

When another program takes the memory that the plan counts on, the run is lowered before it fails,
in the order of core/memory/relief.py: smaller micro-batches (the same samples, the same update),
then activation checkpointing, then blocks of the base in RAM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from core.config import TrainConfig
from core.dataset.examples import Example
from core.errors import UserError
from core.families.detection import Base
from core.jobs.events import Event, Note, Planned
from core.memory import history, plan
from core.memory.monitor import NvmlReader, RamReader, Watch
from core.memory.plan import CONTEXT_MB, Data, Machine, Plan
from core.memory.plan_inputs import chunks_of, drawn_chunks, heaviest_batch, machine_here
from core.system import gpu, machine
from core.system.machine import MB
from core.training import fallbacks

if TYPE_CHECKING:
    from core.training.trainer import Trainer

HEADROOM = 0.03                 # of the memory; less margin than this is pressure


class MemoryGuard:
    """`with MemoryGuard(...) as guard:` around the training."""

    def __init__(self, config: TrainConfig, base: Base, device: torch.device, data: Data,
                 emit: Callable[[Event], None]) -> None:
        self.config, self.base, self.data, self.emit = config, base, data, emit
        self.device, self.machine = device, here(device.type)
        self.plan: Plan | None = None
        self.watch: Watch | None = None
        # The very dict of the trainer, from `go_on` on.
        self.lowered: dict[str, Any] = {}

    def announce(self) -> None:
        """Makes the plan and emits it. One that can't be made doesn't keep a run from starting."""
        self.plan = self._plan(self.config)
        if self.plan is None:
            return
        self.emit(Planned(plan=plan.as_dict(self.plan)))
        if self.plan.verdict() == "too_big":
            self.emit(Note(key="engine.plan_too_big", params={
                "needs": round(self.plan.needs_mb), "free": round(self.machine.free_mb),
                "phase": self.plan.peak.name}))

    def __enter__(self) -> Self:
        if self.plan is not None and (reader := self._reader()) is not None:
            self.watch = Watch(reader, self.plan.needs_mb, HEADROOM * self.machine.total_mb,
                               self.emit)
            self.watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.watch is not None:
            self.watch.__exit__(*_)

    def between_steps(self, trainer: Trainer, step_s: float) -> None:
        """Called after every update; cheap: it looks at two flags of the watching thread."""
        if self.watch and self.watch.spilling(step_s):
            self.lower(trainer, "engine.lowered_for_spill")
        if self.watch and self.watch.pressure():
            self.lower(trainer, "engine.lowered_for_others")

    def lower(self, trainer: Trainer, why: str, most: int = 0) -> bool:
        """Takes the next gentler setting for the rest of the run; False where there is none. `why`
        is the key of the note; `most`: samples that were in memory at once."""
        changes = fallbacks.lower(trainer, most)
        if changes is not None:
            self._tell(why, changes, trainer)
        return changes is not None

    def ease(self, trainer: Trainer) -> dict[str, Any]:
        """Takes gentler numbers or a lower learning rate for the rest of the run, and returns the
        config keys."""
        changes = fallbacks.gentler_numbers(trainer)
        self._planned_anew(trainer)
        return changes

    def go_on(self, trainer: Trainer) -> None:
        """Tells what stays lowered, where the run goes on from one that was."""
        self.lowered = trainer.lowered
        if self.lowered:
            self._tell("engine.stays_lowered", self.lowered, trainer)

    def _tell(self, note: str, changes: dict[str, Any], trainer: Trainer) -> None:
        needs = self._planned_anew(trainer)
        for key, value in changes.items():
            self.emit(Note(key=note, params={"key": key, "value": value, "needs": needs}))

    def _planned_anew(self, trainer: Trainer) -> int | str:
        """MB that the lowered run needs at its peak; "?" where no plan can be made."""
        lowered = self._plan(self.config.with_changes(**trainer.lowered))
        if lowered is None:
            return "?"
        if self.watch is not None:
            self.watch.lowered(lowered.needs_mb)
        return round(lowered.needs_mb)

    def facts(self) -> dict[str, Any]:
        """Planned and real memory, for the run's summary; remembered for this card's next plans."""
        if self.plan is None:
            return {}
        real = round(max(held_mb(self.device), self.watch.peak_mb if self.watch else 0.0), 1)
        memory = {"planned_mb": round(self.plan.needs_mb, 1), "real_mb": real,
                  "phase": self.plan.peak.name, "lowered": self.lowered}
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device) / MB
            reserved = torch.cuda.max_memory_reserved(self.device) / MB
            memory |= {"planned_tensors_mb": round(self.plan.peak.mb, 1),
                       "allocated_mb": round(allocated, 1), "reserved_mb": round(reserved, 1)}
            # A lowered run is another one than was planned.
            if not self.lowered:
                history.remember(self.machine.name, self.plan.peak.mb, allocated, reserved)
        memory["more_than_planned"] = more = real > self.plan.needs_mb * (1 + plan.MARGIN)
        if more:
            self.emit(Note(key="engine.more_than_planned", params={
                "held": round(real), "planned": round(self.plan.needs_mb),
                "free": round(self.machine.free_mb)}))
        return {"memory": memory}

    def _plan(self, config: TrainConfig) -> Plan | None:
        try:
            return plan.plan_run(config, self.base, self.machine, self.data)
        except UserError:
            raise
        except Exception as error:          # an op that meta tensors lack, in a base nobody knew
            self.emit(Note(key="engine.no_plan", params={
                "reason": f"{type(error).__name__}: {str(error)[:200]}"}))
            return None

    def _reader(self) -> NvmlReader | RamReader | None:
        if self.device.type == "cpu":
            return RamReader()
        card = gpu.chosen(gpu.report())
        return None if card is None else NvmlReader(card.uuid or card.index, held=lambda: (
            torch.cuda.memory_reserved(self.device) / MB + CONTEXT_MB))


def here(kind: str) -> Machine:
    """This machine, as far as a plan needs it; `kind`: cpu | cuda | mps."""
    local = machine_here(kind)
    # Without NVML there is no card for `machine_here`, but torch knows the most important of it.
    if kind == "cuda" and local.kind != "cuda":
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info()
            return replace(local, kind="cuda", name=torch.cuda.get_device_name(),
                           total_mb=total / MB, free_mb=free / MB,
                           capability=torch.cuda.get_device_capability())
    return local


def memory_data(items: Sequence[Example], config: TrainConfig, family: str = "") -> Data:
    """The bucket whose batch is the largest, and how much the cache holds."""
    bucket, batch = heaviest_batch([item.bucket for item in items],
                                   [item.picture.repeats for item in items], config.batch_size)
    captions = tuple({"", *(text for item in items for text in item.captions)})
    chunks = chunks_of(captions, family, config.max_tokens)
    return Data(len(items), sum(chunks), batch, bucket, max(chunks), drawn_chunks(config, family))


def held_mb(device: torch.device) -> float:
    """MiB that a run holds, measured as it is planned: on CUDA the most that was reserved and the
    context, else what this process holds for itself (on Apple's chips with the GPU's share)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / MB + CONTEXT_MB
    return machine.private_mb()
