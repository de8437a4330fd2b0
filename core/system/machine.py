"""The computer beside NVML: memory, processor, disk, power, and other makers' graphics."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from core import i18n

MB = 2**20
CGROUPS = Path("/sys/fs/cgroup")
CARDS = Path("/sys/class/drm")
DISPLAY_CLASS = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
PROCESSOR = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"

Vendor = Literal["nvidia", "amd", "intel", "apple"]
VENDORS: dict[int, Vendor] = {0x10de: "nvidia", 0x1002: "amd", 0x8086: "intel"}     # PCI
MAKERS: dict[Vendor, str] = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel", "apple": "Apple"}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A graphics chip as the system names it, with or without a driver for computing."""

    name: str                           # "AMD GPU (1002:744C)" where the system knows no better
    vendor: Vendor

    @property
    def support(self) -> Literal["cuda", "mps", "none"]:
        """By what torch can train there."""
        return "cuda" if self.vendor == "nvidia" else "mps" if self.vendor == "apple" else "none"

    @property
    def text(self) -> str:
        return i18n.tr(f"gpu.support_{self.support}", {"name": self.name})


@dataclass(frozen=True, slots=True)
class Machine:
    system: str                         # Linux | Windows | Darwin
    cpu: str
    cores: int                          # that this process may use
    ram_mb: float
    ram_free_mb: float                  # what a program can get without swapping
    disk_free_mb: float | None
    accelerators: tuple[Accelerator, ...] = ()
    wsl: bool = False
    on_battery: bool | None = None      # None: no battery, or not told


def machine(folder: Path | None = None) -> Machine:
    """Facts about this computer and the disk of `folder` (default: the working folder).
    Never raises."""
    total, free = ram()
    return Machine(
        system=platform.system(), cpu=cpu_name(), cores=cores(), ram_mb=total, ram_free_mb=free,
        disk_free_mb=disk_free(folder or Path()), accelerators=accelerators(), wsl=is_wsl(),
        on_battery=on_battery())


def ram() -> tuple[float, float]:
    """Total and available MB: the computer's, or of the container where that gives less."""
    memory = psutil.virtual_memory()
    total, free = memory.total / MB, memory.available / MB
    for group in _limited():
        with contextlib.suppress(OSError, ValueError):
            if group.most_mb < total:
                total, free = group.most_mb, min(free, max(0.0, group.most_mb - group.held_mb()))
    return total, free


def private_mb(process: psutil.Process | None = None) -> float:
    """What a process holds for itself. Pages of files that it maps (weights, libraries) aren't
    among it: they give way when memory is short, and count as available."""
    process = process or psutil.Process()
    told = process.memory_info()
    if sys.platform == "win32":
        return float(told.private) / MB         # committed, which is what runs out there
    if sys.platform == "darwin":
        with contextlib.suppress(psutil.Error):
            return float(process.memory_full_info().uss) / MB
    return float(told.rss - getattr(told, "shared", 0)) / MB


class _Limit(NamedTuple):
    """A control group with a limit of its own."""

    folder: Path
    most_mb: float
    used: str                           # file
    cache: str                          # key in memory.stat: files' pages, which give way

    def held_mb(self) -> float:
        stat = (self.folder / "memory.stat").read_text()
        files = re.search(rf"^{self.cache} (\d+)", stat, re.MULTILINE)
        held = int((self.folder / self.used).read_text()) - (int(files[1]) if files else 0)
        return held / MB


@functools.cache
def _limited() -> tuple[_Limit, ...]:
    """The groups that this process is in, versions 2 and 1."""
    names = {"memory.max": ("memory.current", "inactive_file"),
             "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file")}
    found = []
    for folder in _groups():
        for limit, (used, cache) in names.items():
            with contextlib.suppress(OSError, ValueError):      # "max": no number, no limit
                most = int((folder / limit).read_text()) / MB
                found.append(_Limit(folder, most, used, cache))
    return tuple(found)


def _groups() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "" or "memory" in kinds.split(","):
                top = CGROUPS / "memory" if kinds else CGROUPS
                inner = top / path.lstrip("/")
                yield from (one for one in (inner, *inner.parents) if one.is_relative_to(top))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_name() -> str:
    name = ""
    if sys.platform == "win32":
        name = _registry(PROCESSOR, "ProcessorNameString")
    elif sys.platform == "darwin":
        name = _said(["sysctl", "-n", "machdep.cpu.brand_string"])
    else:
        with contextlib.suppress(OSError):
            listed = Path("/proc/cpuinfo").read_text("utf-8", "replace")
            found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", listed, re.MULTILINE)
            name = found[1] if found else ""
    return " ".join(name.split()) or platform.processor() or platform.machine()


def disk_free(folder: Path) -> float | None:
    """MB free where `folder` is, or will be."""
    folder = folder.absolute()
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free / MB
    return None


def on_battery() -> bool | None:
    with contextlib.suppress(Exception):        # missing on some systems, broken on others
        battery = psutil.sensors_battery()
        if battery is not None and battery.power_plugged is not None:
            return not battery.power_plugged
    return None


def is_wsl() -> bool:
    return sys.platform == "linux" and "microsoft" in platform.release().lower()


# --- graphics ---

def accelerators() -> tuple[Accelerator, ...]:
    """Graphics chips of makers that we know, by what the system lists."""
    if sys.platform == "win32":
        found = list(_windows())
    elif sys.platform == "darwin":
        apple = platform.machine() == "arm64"
        found = [Accelerator(f"{cpu_name()} GPU", "apple")] if apple else []
    else:
        found = list(_linux(CARDS))
    return tuple(found)


def _linux(cards: Path) -> Iterator[Accelerator]:
    """cards/card0/device/: vendor '0x1002', uevent with PCI_ID, on some a product_name."""
    for device in sorted(cards.glob("card*[0-9]/device")):      # card0-HDMI-A-1 is a plug
        with contextlib.suppress(OSError, ValueError):
            vendor = VENDORS.get(int((device / "vendor").read_text(), 16))
            if vendor and "-" not in device.parent.name:
                yield Accelerator(_linux_name(device, vendor), vendor)


def _linux_name(device: Path, vendor: Vendor) -> str:
    with contextlib.suppress(OSError):
        if name := (device / "product_name").read_text("utf-8", "replace").strip():
            return name
    with contextlib.suppress(OSError):
        number = re.search(r"^PCI_ID=(\S+)", (device / "uevent").read_text(), re.MULTILINE)
        if number:
            return f"{MAKERS[vendor]} GPU ({number[1]})"
    return f"{MAKERS[vendor]} GPU"


def _windows() -> Iterator[Accelerator]:
    for number in range(16):
        name = _registry(rf"{DISPLAY_CLASS}\{number:04}", "DriverDesc")
        device = _registry(rf"{DISPLAY_CLASS}\{number:04}", "MatchingDeviceId")
        found = re.search(r"ven_([0-9a-f]{4})", device.lower())
        if found and (vendor := VENDORS.get(int(found[1], 16))):
            yield Accelerator(name or f"{MAKERS[vendor]} GPU", vendor)


def _registry(key: str, value: str) -> str:
    if sys.platform == "win32":
        import winreg
        with contextlib.suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as node:
            return str(winreg.QueryValueEx(node, value)[0])
    return ""


def _said(command: list[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return ""
