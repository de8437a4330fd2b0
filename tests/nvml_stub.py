"""NVIDIA cards for tests: a stub of libnvidia-ml.so.1, compiled once, configured by a text file
that may change while a process looks. pynvml meets it by its own ctypes path.

    env = nvml_stub.environment([Card.of(8)])        # for a subprocess: found by LD_LIBRARY_PATH
    with nvml_stub.loaded([Card.of(8)]) as stub:     # for this process: put where pynvml looks
        stub.write([Card.of(8, temperature=91)])
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pynvml
import pytest

SOURCE = Path(__file__).with_name("nvml_stub.c")
NAME = "libnvidia-ml.so.1"
MB = 2**20
RESERVED_MB = 300                       # of each card, by the driver
HIDING = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


@dataclass(frozen=True)
class Process:
    pid: int
    mb: float | None                    # None: the driver doesn't tell
    kind: str = "C"                     # C computes, G draws


@dataclass(frozen=True)
class Card:
    """A card, or, in `parts`, a MIG instance. A negative number: not supported."""

    name: str = "NVIDIA GeForce RTX 4060 Laptop GPU"
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    total_mb: float = 8188
    free_mb: float | None = None        # None: what processes and the driver leave
    capability: str = "8.9"
    temperature: int = 45
    power: int = 15_000                 # mW
    limit: int = 80_000
    use: int = 0                        # %
    cores: int = 3072
    clock: int = 2370                   # MHz
    reasons: int = 0                    # bits of nvmlClocksEventReasons
    mig: int = -1
    processes: tuple[Process, ...] = ()
    parts: tuple[Card, ...] = ()

    @classmethod
    def of(cls, gb: float, number: int = 0, **more: Any) -> Self:
        """The number-th card of a computer, with `gb` GB."""
        uuid = f"GPU-{number:08x}-{round(gb * 16):04x}-4000-8000-000000000000"
        return replace(cls(uuid=uuid, total_mb=gb * 1024 - 4), **more)

    def lines(self, title: str = "card") -> Iterator[str]:
        held = sum({process.pid: process.mb or 0 for process in self.processes}.values())
        free = self.total_mb - RESERVED_MB - held if self.free_mb is None else self.free_mb
        yield f"[{title}]"
        yield f"total={round(self.total_mb * MB)}"
        yield f"free={round(free * MB)}"
        for key in ("name", "uuid", "capability", "temperature", "power", "limit", "use", "cores",
                    "clock", "reasons", "mig"):
            yield f"{key}={getattr(self, key)}"
        for one in self.processes:
            yield f"process={one.pid} {-1 if one.mb is None else round(one.mb * MB)} {one.kind}"
        for part in self.parts:
            yield from part.lines("mig")


@dataclass(frozen=True)
class Fail:
    """`function` answers with `code`: on one card or all (-1), after so many good answers."""

    function: str
    code: int
    card: int = -1
    after: int = 0


@dataclass(frozen=True)
class Stub:
    file: Path

    def write(self, cards: Sequence[Card], *fails: Fail, driver: str = "580.65.06",
              cuda: int = 13000) -> None:
        """The new truth, at once and whole."""
        lines = [f"driver={driver}", f"cuda={cuda}"]
        lines += [f"fail={one.function} {one.card} {one.code} {one.after}" for one in fails]
        lines += [line for card in cards for line in card.lines()]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(fresh, self.file)


@functools.cache
def build() -> Path:
    """The folder with the library; skips the test where nothing can compile it."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if os.name == "nt" or not compiler:
        pytest.skip("no C compiler for the NVML stub")
    folder = Path(tempfile.mkdtemp(prefix="nvml-stub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # without a soname: once loaded here, it must not answer for the real one
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(folder / NAME), str(SOURCE),
                    "-lpthread"], check=True)
    return folder


def new(cards: Sequence[Card], *fails: Fail, **more: Any) -> Stub:
    handle, name = tempfile.mkstemp(suffix=".cards", dir=build())
    os.close(handle)
    stub = Stub(Path(name))
    stub.write(cards, *fails, **more)
    return stub


def environment(cards: Sequence[Card], *fails: Fail, **more: Any) -> dict[str, str]:
    """An environment in which a new process finds these cards. Its NVML_STUB is the text file."""
    plain = {key: value for key, value in os.environ.items() if key not in HIDING}
    return {**plain, "LD_LIBRARY_PATH": str(build()),
            "NVML_STUB": str(new(cards, *fails, **more).file)}


@contextlib.contextmanager
def loaded(cards: Sequence[Card], *fails: Fail, **more: Any) -> Iterator[Stub]:
    """These cards in this process, until the end of the block."""
    stub = new(cards, *fails, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVML_STUB", str(stub.file))
        for key in HIDING:
            patch.delenv(key, raising=False)
        patch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(build() / NAME)))
        patch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        yield stub
