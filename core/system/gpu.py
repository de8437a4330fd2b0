"""Facts about NVIDIA cards from NVML, the driver's library. Where there is no card, driver or
library, that is an answer and no error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import psutil

from core.system.machine import MB, is_wsl, ram

State = Literal["ok", "no_driver", "no_library", "mismatch", "no_permission", "no_cards", "hidden",
                "broken"]
Throttle = Literal["thermal", "power", "hw_slowdown"]

# codes of nvml.h
_STATES: dict[int, State] = {4: "no_permission", 6: "no_cards", 9: "no_driver", 12: "no_library",
                             18: "mismatch", 28: "no_cards"}
_NOT_SUPPORTED = 3
_LOST = {6, 15, 16, 28}                 # not found, lost, needs a reset, GPU not found
# bits of nvmlClocksEventReasons, of thermal and power those of software and of hardware
_THROTTLES: dict[Throttle, int] = {"thermal": 0x20 | 0x40, "power": 0x04 | 0x80,
                                   "hw_slowdown": 0x08}
_LAPTOP = re.compile(r"Laptop|Mobile|Notebook|Max-Q(?! Workstation)|\d{3}MX?\b|\bMX\d{3}\b")


@dataclass(frozen=True, slots=True)
class GpuUser:
    """A process that holds memory of a card."""

    pid: int
    used_mb: float | None               # None: the system doesn't tell (Windows, containers)


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """A card, or a MIG instance of one. None: the driver doesn't know."""

    index: int                          # NVML's number: PCI bus order; of an instance, its card's
    name: str
    uuid: str                           # "GPU-...", of an instance "MIG-..."
    total_mb: float
    free_mb: float
    driver: str                         # "580.65.06"
    capability: tuple[int, int]         # compute capability; (8, 6): Ampere. (0, 0): unknown
    users: tuple[GpuUser, ...] = ()
    cuda_version: str = ""              # the newest CUDA that the driver speaks, "13.0"
    temperature_c: float | None = None
    throttled: tuple[Throttle, ...] = ()
    mig: bool = False
    speed: float = 0.0                  # cores x top clock in MHz; 0: unknown

    @property
    def laptop(self) -> bool:
        return bool(_LAPTOP.search(self.name))


@dataclass(frozen=True, slots=True)
class GpuReport:
    gpus: tuple[GpuInfo, ...] = ()      # all that answer, hidden ones too
    problem: str = ""                   # the reason in NVML's words; "" where all is well
    state: State = "ok"
    lost: tuple[int, ...] = ()          # cards that are there and don't answer
    wsl: bool = False                   # Windows' driver, seen from Linux


@dataclass(frozen=True, slots=True)
class GpuState:
    """One reading of a card. None: the driver gave no answer this time."""

    free_mb: float | None = None
    total_mb: float | None = None
    ours_mb: float | None = None             # None: the system doesn't tell what we hold
    users: tuple[GpuUser, ...] = ()
    temperature_c: float | None = None
    throttled: tuple[Throttle, ...] = ()
    lost: bool = False                       # fell off the bus, or waits for a reset


# --- once ---

def report(environ: Mapping[str, str] | None = None) -> GpuReport:
    """The cards, or the reason why none is known. Never raises. `environ` (None: this process's)
    decides which cards CUDA sees."""
    wsl = is_wsl()
    try:
        import pynvml
        pynvml.nvmlInit()
        try:
            cards, refused = _query_cards(pynvml)
        finally:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
    except Exception as error:
        # a broken driver fails in many ways, ctypes' own included
        return _failure(error, (), wsl)
    lost = tuple(refused)
    if not cards:
        return (_failure(refused[lost[0]], lost, wsl) if lost
                else GpuReport(problem="0", state="no_cards", wsl=wsl))
    report = GpuReport(cards, lost=lost, wsl=wsl)
    if visible(report, environ):
        return report
    setting = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES", "")
    return GpuReport(cards, f'CUDA_VISIBLE_DEVICES="{setting}"', "hidden", lost, wsl)


def _failure(error: Exception, lost: tuple[int, ...], wsl: bool) -> GpuReport:
    state: State = ("no_library" if isinstance(error, ImportError)
                    else _STATES.get(getattr(error, "value", 0), "broken"))
    return GpuReport(problem=str(error) or type(error).__name__, state=state, lost=lost, wsl=wsl)


def _query_cards(nvml: Any) -> tuple[tuple[GpuInfo, ...], dict[int, Exception]]:
    """The cards that answer, and the numbers of the others, each with its error."""
    driver = str(nvml.nvmlSystemGetDriverVersion())
    infos: list[GpuInfo] = []
    refused: dict[int, Exception] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            devices = [card]
            # In MIG mode CUDA gives the card's instances and nothing else; some may be missing.
            if _or([0], nvml.nvmlDeviceGetMigMode, card)[0]:
                instances = (_or(None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, number)
                             for number in range(_or(0, nvml.nvmlDeviceGetMaxMigDeviceCount, card)))
                devices = [instance for instance in instances if instance is not None]
            if not devices:
                raise nvml.NVMLError(nvml.NVML_ERROR_GPU_NOT_FOUND)
            infos += [_query(nvml, index, card, device, driver) for device in devices]
        except nvml.NVMLError as error:
            refused[index] = error
    return tuple(infos), refused


def _query(nvml: Any, index: int, card: Any, device: Any, driver: str) -> GpuInfo:
    """`device` is the card or an instance of it; some facts only the card itself has."""
    total, free = _memory(nvml, device)
    major, minor = _or((0, 0), nvml.nvmlDeviceGetCudaComputeCapability, card)
    clock = _or(0, nvml.nvmlDeviceGetMaxClockInfo, card, nvml.NVML_CLOCK_SM)
    # 12040 is CUDA 12.4
    cuda = _or(0, nvml.nvmlSystemGetCudaDriverVersion_v2)
    return GpuInfo(
        index=index, name=str(_or("NVIDIA", nvml.nvmlDeviceGetName, device)),
        uuid=str(_or("", nvml.nvmlDeviceGetUUID, device)), total_mb=total, free_mb=free,
        driver=driver, capability=(int(major), int(minor)), users=_users(nvml, device),
        cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
        temperature_c=_temperature(nvml, card), throttled=_throttled(nvml, card),
        mig=device is not card, speed=float(clock * _or(0, nvml.nvmlDeviceGetNumGpuCores, card)))


# --- single facts ---

def _or(default: Any, query: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of NVML, or the default where this card or driver gives none."""
    try:
        return query(*arguments)
    except Exception:
        # every kind: pynvml's mismatch error is no NVMLError
        return default


def _memory(nvml: Any, card: Any) -> tuple[float, float]:
    """Total and free MB."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(card)
    except nvml.NVMLError as error:
        if error.value != _NOT_SUPPORTED:
            raise
        # chips such as the GB10 share the computer's memory
        return ram()
    return memory.total / MB, memory.free / MB


def _users(nvml: Any, card: Any) -> tuple[GpuUser, ...]:
    """The processes that hold memory of the card."""
    # A process that computes and draws is listed twice, with the same memory.
    memory: dict[int, float | None] = {}
    for process in (*_or((), nvml.nvmlDeviceGetComputeRunningProcesses, card),
                    *_or((), nvml.nvmlDeviceGetGraphicsRunningProcesses, card)):
        used = None if process.usedGpuMemory is None else process.usedGpuMemory / MB
        memory[int(process.pid)] = used if memory.get(process.pid) is None else memory[process.pid]
    return tuple(GpuUser(pid, used) for pid, used in sorted(memory.items()))


def _temperature(nvml: Any, card: Any) -> float | None:
    degrees = _or(None, nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU)
    return None if degrees is None else float(degrees)


def _throttled(nvml: Any, card: Any) -> tuple[Throttle, ...]:
    """Why the clocks are lowered."""
    # drivers before 535 have the older name only
    bits = _or(None, nvml.nvmlDeviceGetCurrentClocksEventReasons, card)
    bits = _or(0, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, card) if bits is None else bits
    return tuple(name for name, mask in _THROTTLES.items() if bits & mask)


# --- what CUDA will see ---

def chosen(report: GpuReport, environ: Mapping[str, str] | None = None) -> GpuInfo | None:
    """The card that training takes: the first visible one."""
    return next(iter(visible(report, environ)), None)


def visible(report: GpuReport, environ: Mapping[str, str] | None = None) -> tuple[GpuInfo, ...]:
    """The cards that CUDA gives this process, in the order in which it numbers them.

    `environ` (None: this process's) may have CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER. Of MIG
    instances a process gets one. Without CUDA_DEVICE_ORDER=PCI_BUS_ID the order is "fastest
    first", by a rule that NVIDIA doesn't publish; cores x clock is assumed here (see
    `order_assumed`). Source: CUDA C++ Programming Guide, Environment Variables; torch.cuda.
    """
    environ = os.environ if environ is None else environ
    cards = list(report.gpus)
    if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        # The sort is stable, so that instances of one card keep their order.
        cards.sort(key=lambda card: (card.speed, card.capability, not card.mig and card.total_mb),
                   reverse=True)
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    if setting is not None and setting.startswith(("GPU-", "MIG-")):
        cards = _by_uuid(cards, setting.split(","), setting[:4])
    else:
        # a card in MIG mode has one number, and is then its first instance
        numbered: dict[int, GpuInfo] = {}
        for card in cards:
            numbered.setdefault(card.index, card)
        cards = list(numbered.values())
        if setting is not None:
            cards = _by_number(cards, setting.split(","))
    whole = [card for card in cards if not card.mig]
    return tuple(whole or cards[:1])


def order_assumed(report: GpuReport, environ: Mapping[str, str] | None = None) -> bool:
    """Whether cards differ and CUDA orders them by speed, so that `visible` may be wrong."""
    environ = os.environ if environ is None else environ
    return (environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
            and len({card.name for card in report.gpus if not card.mig}) > 1)


def _by_number(cards: list[GpuInfo], entries: list[str]) -> list[GpuInfo]:
    """The cards of CUDA_VISIBLE_DEVICES=0,1. As CUDA reads it, the first invalid entry ends the
    list, and a repeated one empties it."""
    # CUDA reads as strtoul does: '1gpu' is 1
    digits = (re.match(r"[+-]?[0-9]+", entry.strip()) for entry in entries)
    numbers = list(itertools.takewhile(
        lambda number: number >= 0, (int(match[0]) if match else -1 for match in digits)))
    if len(set(numbers)) < len(numbers):
        return []
    return [cards[number] for number in itertools.takewhile(
        lambda number: number < len(cards), numbers)]


def _by_uuid(cards: list[GpuInfo], entries: list[str], prefix: str) -> list[GpuInfo]:
    """The cards of CUDA_VISIBLE_DEVICES=GPU-1f,GPU-2e: beginnings of UUIDs. The first entry that is
    unknown, ambiguous or of another kind ends the list; a repeated one empties it."""
    beginnings = list(itertools.takewhile(lambda entry: entry.startswith(prefix), entries))
    named: list[GpuInfo] = []
    for beginning in beginnings:
        fitting = [card for card in cards if card.uuid.startswith(beginning)]
        if len(fitting) != 1:
            break
        named += fitting
    twice = len(set(beginnings)) < len(beginnings) or len(set(named)) < len(named)
    return [] if twice else named


# --- again and again ---

class Reader:
    """Polls cards with a single nvmlInit. Never raises. Threads may share it, also across close().

    `root`: the process (None: this one) that counts, with its descendants, as ours.
    """

    def __init__(self, root: int | None = None) -> None:
        self.root = os.getpid() if root is None else root
        self._lock = threading.RLock()
        self._nvml: Any = None
        # handles by what `poll` was asked for: of the instance or card, and of the card itself
        self._cards: dict[str | int, tuple[Any, Any]] = {}
        self._ours: dict[int, bool] = {}

    def open(self) -> Self:
        """Where NVML can't be reached, every poll returns an empty GpuState."""
        with self._lock, contextlib.suppress(Exception):
            if self._nvml is None:
                import pynvml
                pynvml.nvmlInit()
                self._nvml = pynvml
        return self

    def close(self) -> None:
        with self._lock:
            nvml, self._nvml = self._nvml, None
            self._cards.clear()
            if nvml is not None:
                _or(None, nvml.nvmlShutdown)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def poll(self, which: str | int) -> GpuState:
        """The state of a card now, by UUID or by NVML's number."""
        with self._lock:
            if self._nvml is None:
                return GpuState()
            try:
                return self._read(which)
            except Exception as error:
                # the card may come back under another handle
                self._cards.pop(which, None)
                return GpuState(lost=getattr(error, "value", 0) in _LOST)

    def _read(self, which: str | int) -> GpuState:
        nvml = self._nvml
        if which not in self._cards:
            device = card = (nvml.nvmlDeviceGetHandleByIndex(which) if isinstance(which, int)
                             else nvml.nvmlDeviceGetHandleByUUID(which))
            if isinstance(which, str) and which.startswith("MIG-"):
                card = _or(device, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, device)
            self._cards[which] = device, card
        device, card = self._cards[which]
        total, free = _memory(nvml, device)
        users = _users(nvml, device)
        self._ours = {user.pid: self.is_ours(user.pid) for user in users}
        # None where our processes are not among the users: they hold nothing, or have other
        # numbers outside of their container.
        held = [user.used_mb for user in users if self._ours[user.pid]]
        ours = sum(used for used in held if used is not None) if held and None not in held else None
        return GpuState(
            free_mb=free, total_mb=total, ours_mb=ours, users=users,
            temperature_c=_temperature(nvml, card), throttled=_throttled(nvml, card))

    def is_ours(self, pid: int) -> bool:
        """Whether a user of the card belongs to our process tree."""
        if (known := self._ours.get(pid)) is not None:
            return known
        with contextlib.suppress(psutil.Error):
            return pid == self.root or any(parent.pid == self.root
                                           for parent in psutil.Process(pid).parents())
        return False
