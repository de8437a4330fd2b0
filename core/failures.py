"""What an exception means: memory ran out, a disk is full. Never loads torch."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator

# What torch, the drivers' libraries, C++ and Rust say where memory runs out.
_OF_THE_GPU = re.compile(
    r"\b(CUDA|HIP|MPS|XPU|cudaMalloc)\b.*\bout of memory"
    r"|\bcu(blas|dnn|solver|sparse|fft).*[_ ]alloc|cudaErrorMemoryAllocation|hipErrorOutOfMemory"
    r"|Invalid buffer size", re.IGNORECASE)
_OF_THE_COMPUTER = re.compile(
    r"\bbad[_ ]alloc|DefaultCPUAllocator|alloc_cpu\.cpp|(can't|cannot|unable to|failed to) allocate"
    r"|(not enough|insufficient|out of) memory|paging file is too small|\(os error (12|1455)\)",
    re.IGNORECASE)


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, the GPU's or the computer's, here or in what caused `error`."""
    return any(gpu_memory(cause) or memory(cause) for cause in causes(error))


def gpu_memory(error: BaseException) -> bool:
    """Whether this error says that the GPU's memory ran out."""
    # Where torch is not loaded, none of its errors can be there: () matches nothing.
    torch_error = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    return isinstance(error, torch_error) or (
        isinstance(error, RuntimeError) and bool(_OF_THE_GPU.search(_flat(error))))


def memory(error: BaseException) -> bool:
    """Whether this error says that the computer's memory ran out."""
    # winerror 1455: the paging file is too small
    return (isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM
            or getattr(error, "winerror", 0) == 1455
            or bool(_OF_THE_COMPUTER.search(_flat(error))))


def disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a file system's largest file size is exhausted."""
    # safetensors, written in Rust, gives the number in its text only: 28 on Linux, 112 on Windows
    return (getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            or _says(error, "(os error 28)", "(os error 112)"))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, as a traceback shows them; a cycle ends the walk."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def one_line(error: BaseException) -> str:
    """'ValueError: its text', at most 300 characters of it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _flat(error: BaseException) -> str:
    """The whole text: compiled code's errors name their cause at the end."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _says(error: BaseException, *texts: str) -> bool:
    return any(text in str(error) for text in texts)
