"""NVML facts about NVIDIA cards. Calm everywhere else: no card, driver or library is an answer."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import psutil

from core import i18n
from core.system.machine import MB, is_wsl, ram
from core.system.machine import machine as machine

State = Literal["ok", "no_driver", "no_library", "mismatch", "no_permission", "no_cards", "hidden",
                "broken"]
Throttle = Literal["thermal", "power", "hw_slowdown"]

# codes of nvml.h
_STATES: dict[int, State] = {4: "no_permission", 6: "no_cards", 9: "no_driver", 12: "no_library",
                             18: "mismatch", 28: "no_cards"}
_NOT_SUPPORTED, _LOST = 3, {6, 15, 16, 28}     # not found, lost, needs a reset, GPU not found
# bits of nvmlClocksEventReasons: by software and by hardware each
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
    """A card, or a MIG instance of one. None: the card doesn't tell."""

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
    power_w: float | None = None
    power_limit_w: float | None = None
    utilization: float | None = None    # % of the time in the last second
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

    @property
    def text(self) -> str:
        """What the state means, and what to do about it."""
        params = {"reason": self.problem}
        said = [i18n.tr(f"gpu.{self.state}", params)]
        if self.state != "ok":
            said.append(i18n.tr(f"gpu.{self.state}_mend", params))
        return " ".join(said)


@dataclass(frozen=True, slots=True)
class GpuState:
    """One reading of a card. None: not told this time."""

    free_mb: float | None = None
    total_mb: float | None = None
    ours_mb: float | None = None             # None: the system doesn't tell what we hold
    used_by_others_mb: float | None = None   # total - free - ours; where ours is not told, all
    users: tuple[GpuUser, ...] = ()
    temperature_c: float | None = None
    throttled: tuple[Throttle, ...] = ()
    lost: bool = False                       # fell off the bus, or waits for a reset


# --- once ---

def list_gpus() -> tuple[GpuInfo, ...]:
    return report().gpus


def report(environ: Mapping[str, str] | None = None) -> GpuReport:
    """Cards, or the reason why none is known. Never raises."""
    wsl = is_wsl()
    try:
        import pynvml
        with _open(pynvml):
            cards, refused = _census(pynvml)
    except Exception as error:          # a broken driver fails in many ways, ctypes' own included
        return GpuReport(problem=_reason(error), state=_state(error), wsl=wsl)
    lost = tuple(refused)
    if not cards:
        why = next(iter(refused.values()), None)
        return (GpuReport(problem=_reason(why), state=_state(why), lost=lost, wsl=wsl) if why
                else GpuReport(problem="0", state="no_cards", wsl=wsl))
    told = GpuReport(cards, lost=lost, wsl=wsl)
    if visible(told, environ):
        return told
    hider = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES", "")
    return GpuReport(cards, f'CUDA_VISIBLE_DEVICES="{hider}"', "hidden", lost, wsl)


def _state(error: Exception) -> State:
    if isinstance(error, ImportError):
        return "no_library"
    return _STATES.get(getattr(error, "value", 0), "broken")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _open(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _census(nvml: Any) -> tuple[tuple[GpuInfo, ...], dict[int, Exception]]:
    """Cards that answer, and the numbers of the others, each with its error."""
    driver = str(nvml.nvmlSystemGetDriverVersion())
    found: list[GpuInfo] = []
    refused: dict[int, Exception] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            found += [_ask(nvml, index, card, part, driver) for part in _parts(nvml, card)]
        except nvml.NVMLError as error:
            refused[index] = error
    return tuple(found), refused


def _parts(nvml: Any, card: Any) -> list[Any]:
    """The card itself, or its MIG instances: in that mode CUDA gives nothing else."""
    if not _or([0], nvml.nvmlDeviceGetMigMode, card)[0]:
        return [card]
    parts = [_or(None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, card, number)
             for number in range(_or(0, nvml.nvmlDeviceGetMaxMigDeviceCount, card))]
    if not (parts := [part for part in parts if part is not None]):
        raise nvml.NVMLError(nvml.NVML_ERROR_GPU_NOT_FOUND)
    return parts


def _ask(nvml: Any, index: int, card: Any, part: Any, driver: str) -> GpuInfo:
    """`part` is the card or an instance of it; a few facts only the card itself has."""
    total, free = _memory(nvml, part)
    major, minor = _or((0, 0), nvml.nvmlDeviceGetCudaComputeCapability, card)
    used = _or(None, nvml.nvmlDeviceGetUtilizationRates, card)
    clock = _or(0, nvml.nvmlDeviceGetMaxClockInfo, card, nvml.NVML_CLOCK_SM)
    return GpuInfo(
        index=index, name=str(_or("NVIDIA", nvml.nvmlDeviceGetName, part)),
        uuid=str(_or("", nvml.nvmlDeviceGetUUID, part)), total_mb=total, free_mb=free,
        driver=driver, capability=(int(major), int(minor)), users=_users(nvml, part),
        cuda_version=_cuda(_or(0, nvml.nvmlSystemGetCudaDriverVersion_v2)),
        temperature_c=_told(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
        power_w=_told(nvml.nvmlDeviceGetPowerUsage, card, unit=1000),
        power_limit_w=_told(nvml.nvmlDeviceGetEnforcedPowerLimit, card, unit=1000),
        utilization=None if used is None else float(used.gpu),
        throttled=_throttled(nvml, card), mig=part is not card,
        speed=float(clock * _or(0, nvml.nvmlDeviceGetNumGpuCores, card)))


# --- single facts ---

def _or(otherwise: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """A fact that some cards and drivers don't give."""
    try:
        return ask(*arguments)
    except Exception:                   # pynvml's mismatch error is no NVMLError
        return otherwise


def _memory(nvml: Any, card: Any) -> tuple[float, float]:
    """Total and free MB. Cards that share the computer's memory tell none: its own, then."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(card)
    except nvml.NVMLError as error:
        if error.value != _NOT_SUPPORTED:
            raise
        return ram()
    return memory.total / MB, memory.free / MB


def _users(nvml: Any, card: Any) -> tuple[GpuUser, ...]:
    """A process that computes and draws is listed twice, with the same memory."""
    found: dict[int, float | None] = {}
    for process in (*_or((), nvml.nvmlDeviceGetComputeRunningProcesses, card),
                    *_or((), nvml.nvmlDeviceGetGraphicsRunningProcesses, card)):
        used = None if process.usedGpuMemory is None else process.usedGpuMemory / MB
        found[int(process.pid)] = used if found.get(process.pid) is None else found[process.pid]
    return tuple(GpuUser(pid, used) for pid, used in sorted(found.items()))


def _told(ask: Callable[..., Any], *arguments: Any, unit: float = 1.0) -> float | None:
    number = _or(None, ask, *arguments)
    return None if number is None else number / unit


def _throttled(nvml: Any, card: Any) -> tuple[Throttle, ...]:
    """Why the clocks are lowered. Drivers before 535 know the question by its older name."""
    bits = _or(None, nvml.nvmlDeviceGetCurrentClocksEventReasons, card)
    if bits is None:
        bits = _or(0, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, card)
    return tuple(name for name, mask in _THROTTLES.items() if bits & mask)


def _cuda(number: int) -> str:
    """12040 -> '12.4'"""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


# --- what CUDA will see ---

def chosen(report: GpuReport, environ: Mapping[str, str] | None = None) -> GpuInfo | None:
    """The card that training takes: the first visible one."""
    return next(iter(visible(report, environ)), None)


def visible(report: GpuReport, environ: Mapping[str, str] | None = None) -> tuple[GpuInfo, ...]:
    """Cards in the order in which CUDA numbers them, by CUDA_VISIBLE_DEVICES and
    CUDA_DEVICE_ORDER (default: the process's own environment).

    As CUDA and torch read it: numbers, or (beginnings of) UUIDs; the first invalid entry ends the
    list, a repeated one empties it. Of MIG instances a process gets one. CUDA's own order is
    "fastest first", by a rule that it doesn't tell; cores x clock is assumed here (see
    `order_assumed`). Source: CUDA C++ Programming Guide, Environment Variables; torch.cuda.
    """
    environ = os.environ if environ is None else environ
    cards = list(report.gpus)
    if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        cards.sort(key=lambda card: (card.speed, card.capability, not card.mig and card.total_mb),
                   reverse=True)        # stable: instances keep their order
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and wanted.startswith(("GPU-", "MIG-")):
        return _one_instance(_by_uuid(cards, wanted.split(","), wanted[:4]))
    numbered: dict[int, GpuInfo] = {}
    for card in cards:                  # a card in MIG mode counts once, as its first instance
        numbered.setdefault(card.index, card)
    units = list(numbered.values())
    return _one_instance(units if wanted is None else _by_number(units, wanted.split(",")))


def order_assumed(report: GpuReport, environ: Mapping[str, str] | None = None) -> bool:
    """Cards differ and CUDA orders them by speed: `visible` may have another order."""
    environ = os.environ if environ is None else environ
    return (environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
            and len({card.name for card in report.gpus if not card.mig}) > 1)


def _by_number(cards: list[GpuInfo], entries: list[str]) -> list[GpuInfo]:
    """CUDA reads as strtoul does: '1gpu' is 1."""
    numbers: list[int] = []
    for entry in entries:
        digits = re.match(r"[+-]?[0-9]+", entry.strip())
        number = int(digits[0]) if digits else -1
        if number in numbers:
            return []
        if number < 0:
            break
        numbers.append(number)
    there = itertools.takewhile(lambda number: number < len(cards), numbers)
    return [cards[number] for number in there]


def _by_uuid(cards: list[GpuInfo], entries: list[str], prefix: str) -> list[GpuInfo]:
    named = list(itertools.takewhile(lambda entry: entry.startswith(prefix), entries))
    found: list[GpuInfo] = []
    for entry in named:
        fitting = [card for card in cards if card.uuid.startswith(entry)]
        if len(fitting) != 1:           # unknown, or ambiguous
            break
        found += fitting
    twice = len(set(named)) < len(named) or len(set(found)) < len(found)
    return [] if twice else found


def _one_instance(cards: list[GpuInfo]) -> tuple[GpuInfo, ...]:
    whole = [card for card in cards if not card.mig]
    return tuple(whole or cards[:1])


# --- again and again ---

class Reader:
    """Polls cards with one nvmlInit. Never raises; threads may share it, also across close().

    `root`: the process whose tree counts as ours (default: this one).
    """

    def __init__(self, root: int | None = None) -> None:
        self.root = os.getpid() if root is None else root
        self._lock = threading.RLock()
        self._nvml: Any = None
        self._cards: dict[str | int, tuple[Any, Any]] = {}      # instance or card, and its card
        self._ours: dict[int, bool] = {}

    def open(self) -> Self:
        """Where NVML can't be reached, every poll answers that nothing is told."""
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
                part, card = self._handles(which)
                return self._read(part, card)
            except Exception as error:
                self._cards.pop(which, None)
                return GpuState(lost=getattr(error, "value", 0) in _LOST)

    def _handles(self, which: str | int) -> tuple[Any, Any]:
        if which not in self._cards:
            nvml = self._nvml
            part = (nvml.nvmlDeviceGetHandleByIndex(which) if isinstance(which, int)
                    else nvml.nvmlDeviceGetHandleByUUID(which))
            mig = isinstance(which, str) and which.startswith("MIG-")
            card = _or(part, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, part) if mig \
                else part
            self._cards[which] = part, card
        return self._cards[which]

    def _read(self, part: Any, card: Any) -> GpuState:
        nvml = self._nvml
        total, free = _memory(nvml, part)
        users = _users(nvml, part)
        ours = self._held(users)
        return GpuState(
            free_mb=free, total_mb=total, ours_mb=ours, users=users,
            used_by_others_mb=max(0.0, total - free - (ours or 0.0)),
            temperature_c=_told(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
            throttled=_throttled(nvml, card))

    def _held(self, users: tuple[GpuUser, ...]) -> float | None:
        """None where our processes are not among the users: they hold nothing, or, in containers,
        have other numbers there."""
        self._ours = {user.pid: self.is_ours(user.pid) for user in users}
        held = [user.used_mb for user in users if self._ours[user.pid]]
        return sum(used for used in held if used is not None) if held and None not in held else None

    def is_ours(self, pid: int) -> bool:
        """Whether a user of the card belongs to our process tree."""
        if (known := self._ours.get(pid)) is not None:
            return known
        try:
            return pid == self.root or any(one.pid == self.root
                                           for one in psutil.Process(pid).parents())
        except psutil.Error:
            return False
