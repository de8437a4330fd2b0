"""What the libraries say when memory runs out or a disk is full, and what only sounds like it."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from core.failures import disk_full, gpu_memory, memory, ran_out
from core.families.loading import as_user_error

OF_THE_GPU = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.76 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA driver error: out of memory", "HIP out of memory. Tried to allocate 20.00 MiB",
    "MPS backend out of memory (MPS allocated: 9.02 GB, other allocations: 384 KB)",
    "XPU out of memory. Tried to allocate 1.50 GiB", "Invalid buffer size: 20.25 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuBLAS alloc failed", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED", "cuFFT error: CUFFT_ALLOC_FAILED",
    "CUDA runtime: cudaErrorMemoryAllocation", "hipErrorOutOfMemory",
    "cudaMalloc failed: out of memory"]
OF_THE_COMPUTER = [
    "std::bad_alloc", "bad allocation",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory",
    "Unable to allocate 1.20 GiB for an array with shape (1,)", "out of memory",
    "unable to mmap 4265146304 bytes from file: Cannot allocate memory (12)",
    "I/O error: Cannot allocate memory (os error 12)",
    "The paging file is too small for this operation to complete. (os error 1455)",
    "Not enough memory resources are available to process this command."]
NEITHER = [
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDNN_STATUS_EXECUTION_FAILED", "invalid buffer", "size mismatch for weight",
    "mat1 and mat2 shapes cannot be multiplied", "Input type and weight type should be the same",
    "view size is not compatible with memory format", "pin_memory needs a card", "reallocated"]


@pytest.mark.parametrize("text", OF_THE_GPU)
def test_a_gpu_out_of_memory(text: str) -> None:
    assert gpu_memory(RuntimeError(text))
    assert not gpu_memory(ValueError("cuda"))


@pytest.mark.parametrize("text", OF_THE_COMPUTER)
@pytest.mark.parametrize("kind", [RuntimeError, OSError, MemoryError, torch.AcceleratorError])
def test_a_computer_out_of_memory(text: str, kind: type[Exception]) -> None:
    assert memory(kind(text))
    wrapped = ValueError("reading failed")
    wrapped.__cause__ = kind(text)
    assert ran_out(wrapped)


@pytest.mark.parametrize("text", NEITHER)
def test_what_is_no_lack_of_memory(text: str) -> None:
    assert not ran_out(RuntimeError(text))
    assert not disk_full(RuntimeError(text))


def test_errors_of_the_libraries_themselves() -> None:
    for call in (lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytes(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            call()
        assert memory(caught.value), caught.value
    assert memory(OSError(errno.ENOMEM, "x"))
    for error in (RuntimeError("std::bad_alloc"), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(RuntimeError) as passed, as_user_error(Path()):
            raise error
        assert passed.value is error        # it says nothing about the files
    with pytest.raises(UserError), as_user_error(Path()):
        raise RuntimeError("size mismatch")
