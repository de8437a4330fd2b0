"""What an exception means: memory, a full disk. Without torch, which may not be loaded."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, the GPU's or the computer's, here or in what caused `error`."""
    return any(gpu_memory(cause) or memory(cause) for cause in causes(error))


def gpu_memory(error: BaseException) -> bool:
    known = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    return isinstance(error, known) or (isinstance(error, RuntimeError) and _says(
        error, "CUDA out of memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def memory(error: BaseException) -> bool:
    code, windows = getattr(error, "errno", 0), getattr(error, "winerror", 0)
    return (isinstance(error, MemoryError) or code == errno.ENOMEM
            or windows == 1455                            # the paging file is too small
            or _says(error, "DefaultCPUAllocator", "can't allocate memory", "not enough memory"))


def disk_full(error: BaseException) -> bool:
    return (getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            or _says(error, "(os error 28)", "(os error 112)"))      # as safetensors tells it


def causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _says(error: BaseException, *texts: str) -> bool:
    return any(text in str(error) for text in texts)
