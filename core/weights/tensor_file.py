"""The tensors of a .safetensors file, one at a time, also of files larger than memory.

Each is read through a read-only mapping of its own bytes. safetensors' own reader for torch makes
one mapping of the whole file that could be written to: systems count it as memory that may be
needed, and refuse it where the file is larger than RAM and swap.
"""

from __future__ import annotations

import mmap
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError
from core.safetensors_header import TensorInfo, read_header
from core.weights.scaled_weights import scaling_of

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz}


class TensorFile:
    """The tensors of a file by name. Weights with a scale beside them come multiplied, in fp32."""

    def __init__(self, path: Path) -> None:
        """Reads the header alone. Raises UserError where the file is no whole .safetensors file."""
        self.path = path
        self.header = read_header(path)
        self.scaling = scaling_of(path, self.header)

    def names(self, prefix: str = "") -> list[str]:
        """The names of weights that begin with `prefix`, in the file's order."""
        return [name for name in self.header.tensors
                if name.startswith(prefix) and name not in self.scaling.helpers]

    def shape(self, name: str) -> Tensor:
        """A tensor on the meta device. Raises UserError where its format can't be read here."""
        info, scaled = self._readable(name), name in self.scaling.scales
        return torch.empty(info.shape, device="meta",
                           dtype=torch.float32 if scaled else DTYPES[info.dtype])

    def __getitem__(self, name: str) -> Tensor:
        """Reads a tensor. It must not be written into: unless it is scaled, it is mapped from the
        file. Raises UserError as `shape` does."""
        stored = self._mapped(self._readable(name))
        if (scale := self.scaling.scales.get(name)) is None:
            return stored
        # One scale for all, or one for each row.
        factor = self._mapped(self.header.tensors[scale]).float()
        sides = (1,) * stored.ndim if factor.numel() == 1 else (-1, *(1,) * (stored.ndim - 1))
        return stored.to(torch.float32, copy=True).mul_(factor.reshape(sides))

    def _readable(self, name: str) -> TensorInfo:
        info = self.header.tensors[name]
        kind = self.scaling.unread.get(name, "" if info.dtype in DTYPES else info.dtype)
        if kind:
            raise UserError("families.numbers_unread", path=self.path, key=name, kind=kind)
        return info

    def _mapped(self, info: TensorInfo) -> Tensor:
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        # A mapping must start at a multiple of the granularity.
        begin = self.header.data_start + info.begin
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), begin - start + info.nbytes,
                               access=mmap.ACCESS_READ, offset=start)
        # Read from the disk at once, not page by page. Windows has no madvise.
        if sys.platform != "win32":
            mapped.madvise(mmap.MADV_WILLNEED)
        # Some programs write headers of odd lengths, behind which tensors are not aligned.
        if begin % dtype.itemsize:
            copied = bytearray(mapped[begin - start:])
            return torch.frombuffer(copied, dtype=dtype).reshape(info.shape)
        # torch knows no read-only tensors and warns of the buffer.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(mapped, dtype=dtype, count=info.nbytes // dtype.itemsize,
                                    offset=begin - start).reshape(info.shape)
