"""NVML facts about NVIDIA cards. Calm everywhere else: no card, driver or library is an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MB = 2**20


@dataclass(frozen=True, slots=True)
class GpuUser:
    """A process that holds memory of a card."""

    pid: int
    used_mb: float | None               # None: the system doesn't tell (Windows, containers)


@dataclass(frozen=True, slots=True)
class GpuInfo:
    index: int                          # NVML's number: PCI bus order
    name: str
    uuid: str
    total_mb: float
    free_mb: float
    driver: str                         # "580.65.06"
    capability: tuple[int, int]         # compute capability; (8, 6): Ampere. (0, 0): unknown
    users: tuple[GpuUser, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuReport:
    gpus: tuple[GpuInfo, ...] = ()
    problem: str = ""                   # why there is no answer; "" where NVML answered


def list_gpus() -> tuple[GpuInfo, ...]:
    return report().gpus


def report() -> GpuReport:
    """Cards, or the reason why none is known. Never raises."""
    try:
        import pynvml
        with _open(pynvml):
            driver = str(pynvml.nvmlSystemGetDriverVersion())
            found = [_ask(pynvml, i, driver) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception as error:          # a broken driver fails in many ways, ctypes' own included
        return GpuReport(problem=str(error) or type(error).__name__)
    return GpuReport(tuple(gpu for gpu in found if gpu is not None))


@contextlib.contextmanager
def _open(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _ask(nvml: Any, index: int, driver: str) -> GpuInfo | None:
    """None for a card that doesn't answer: the others still count."""
    try:
        card = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(card)
    except nvml.NVMLError:
        return None
    major, minor = _or(nvml, (0, 0), nvml.nvmlDeviceGetCudaComputeCapability, card)
    processes = _or(nvml, [], nvml.nvmlDeviceGetComputeRunningProcesses, card)
    return GpuInfo(
        index=index, name=str(_or(nvml, "NVIDIA", nvml.nvmlDeviceGetName, card)),
        uuid=str(_or(nvml, "", nvml.nvmlDeviceGetUUID, card)),
        total_mb=memory.total / MB, free_mb=memory.free / MB, driver=driver,
        capability=(int(major), int(minor)), users=tuple(map(_user, processes)))


def _user(process: Any) -> GpuUser:
    used = process.usedGpuMemory
    return GpuUser(int(process.pid), None if used is None else used / MB)


def _or(nvml: Any, otherwise: Any, ask: Callable[[Any], Any], card: Any) -> Any:
    """A fact that some cards and drivers don't give."""
    try:
        return ask(card)
    except nvml.NVMLError:
        return otherwise
