"""Facts about the computer: memory, processor, disk, power, graphics chips of all makers.

What only NVIDIA's driver knows is in gpu.py.
"""

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

MB = 2**20                              # bytes; all sizes here are in MiB
CGROUPS = Path("/sys/fs/cgroup")
CARDS = Path("/sys/class/drm")
# Windows' registry: graphics cards, and the first processor
DISPLAY_CLASS = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
PROCESSOR = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"

Vendor = Literal["nvidia", "amd", "intel", "apple"]
VENDORS: dict[int, Vendor] = {0x10de: "nvidia", 0x1002: "amd", 0x8086: "intel"}     # PCI
MAKERS: dict[Vendor, str] = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel"}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A graphics chip as the system names it, with or without a driver for computing."""

    name: str                           # "AMD GPU (1002:744C)" where the system knows no better
    vendor: Vendor

    @property
    def support(self) -> Literal["cuda", "mps", "none"]:
        """The backend of torch that can train there."""
        return "cuda" if self.vendor == "nvidia" else "mps" if self.vendor == "apple" else "none"


def ram() -> tuple[float, float]:
    """Total and available MB, of the computer or of the container where that gives less."""
    memory = psutil.virtual_memory()
    total, free = memory.total / MB, memory.available / MB
    for group in _limited():
        with contextlib.suppress(OSError, ValueError):
            if group.limit_mb < total:
                total, free = group.limit_mb, min(free, max(0.0, group.limit_mb - group.held_mb()))
    return total, free


def private_mb(process: psutil.Process | None = None) -> float:
    """MB that a process (None: this one) holds for itself, without the pages of files that it maps
    (weights, libraries): those give way when memory is short, and count as available."""
    process = process or psutil.Process()
    info = process.memory_info()
    # committed memory, which is what runs out on Windows
    if sys.platform == "win32":
        return float(info.private) / MB
    if sys.platform == "darwin":
        with contextlib.suppress(psutil.Error):
            return float(process.memory_full_info().uss) / MB
    return float(info.rss - getattr(info, "shared", 0)) / MB


class _Limit(NamedTuple):
    """A control group of Linux (a container, a systemd slice) with a limit of its own."""

    folder: Path
    limit_mb: float
    usage_file: str
    cache_key: str                      # of pages of files in memory.stat

    def held_mb(self) -> float:
        """Without pages of files, which give way when memory is short."""
        stat = (self.folder / "memory.stat").read_text()
        cache = re.search(rf"^{self.cache_key} (\d+)", stat, re.MULTILINE)
        usage = int((self.folder / self.usage_file).read_text())
        return (usage - (int(cache[1]) if cache else 0)) / MB


@functools.cache
def _limited() -> tuple[_Limit, ...]:
    """The groups with a limit that this process is in."""
    # cgroups version 2, then version 1
    names = {"memory.max": ("memory.current", "inactive_file"),
             "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file")}
    limits = []
    for folder in _groups():
        for limit_file, (usage_file, cache_key) in names.items():
            # "max" is no number: there is no limit
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / limit_file).read_text()) / MB
                limits.append(_Limit(folder, limit, usage_file, cache_key))
    return tuple(limits)


def _groups() -> Iterator[Path]:
    """The folder of this process's group and of those around it, whose limits count as well."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            # version 2 names no controllers, version 1 several
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                top = CGROUPS / "memory" if controllers else CGROUPS
                group = top / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents)
                            if folder.is_relative_to(top))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_name() -> str:
    name = _registry(PROCESSOR, "ProcessorNameString")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], text=True,
                                  capture_output=True, timeout=5).stdout
        elif sys.platform != "win32":
            cpuinfo = Path("/proc/cpuinfo").read_text("utf-8", "replace")
            # x86, Raspberry Pi, other ARM boards
            match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
            name = match[1] if match else ""
    return " ".join(name.split()) or platform.processor() or platform.machine()


def disk_free(folder: Path) -> float | None:
    """MB free on the disk of `folder`, which need not be there yet."""
    folder = folder.absolute()
    for existing in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(existing).free / MB
    return None


def on_battery() -> bool | None:
    # psutil lacks it on some systems and fails in many ways on others
    with contextlib.suppress(Exception):
        if (battery := psutil.sensors_battery()) and battery.power_plugged is not None:
            return not battery.power_plugged
    return None


def is_wsl() -> bool:
    return sys.platform == "linux" and "microsoft" in platform.release().lower()


# --- graphics ---

def accelerators() -> tuple[Accelerator, ...]:
    """Graphics chips of the makers in VENDORS, as the system lists them."""
    if sys.platform == "win32":
        return tuple(_windows())
    if sys.platform == "darwin":
        apple = platform.machine() == "arm64"
        return (Accelerator(f"{cpu_name()} GPU", "apple"),) if apple else ()
    return tuple(_linux(CARDS))


def _linux(cards: Path) -> Iterator[Accelerator]:
    """cards/card0/device/ has `vendor` ('0x1002'), `uevent` with PCI_ID, at times product_name."""
    for device in sorted(cards.glob("card*[0-9]/device")):
        with contextlib.suppress(OSError, ValueError):
            vendor = VENDORS.get(int((device / "vendor").read_text(), 16))
            # card0-HDMI-A-1 is a plug
            if not vendor or "-" in device.parent.name:
                continue
            name, product = f"{MAKERS[vendor]} GPU", ""
            with contextlib.suppress(OSError):
                uevent = (device / "uevent").read_text()
                if number := re.search(r"^PCI_ID=(\S+)", uevent, re.MULTILINE):
                    name += f" ({number[1]})"
            with contextlib.suppress(OSError):
                product = (device / "product_name").read_text("utf-8", "replace").strip()
            yield Accelerator(product or name, vendor)


def _windows() -> Iterator[Accelerator]:
    # Cards are numbered from 0000 on, with gaps where one was taken out.
    for number in range(16):
        name = _registry(rf"{DISPLAY_CLASS}\{number:04}", "DriverDesc")
        device = _registry(rf"{DISPLAY_CLASS}\{number:04}", "MatchingDeviceId")
        match = re.search(r"ven_([0-9a-f]{4})", device.lower())
        if match and (vendor := VENDORS.get(int(match[1], 16))):
            yield Accelerator(name or f"{MAKERS[vendor]} GPU", vendor)


def _registry(key: str, value: str) -> str:
    """A text of Windows' registry; "" where it is not there."""
    if sys.platform == "win32":
        import winreg
        with contextlib.suppress(OSError), winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as node:
            return str(winreg.QueryValueEx(node, value)[0])
    return ""
