"""The tensors of a .safetensors file, one at a time, of files larger than memory, too.

Each is read through a mapping of its own bytes, for reading alone: systems count a mapping that
could be written to, as safetensors' own reader for torch makes one of the whole file, as memory
that may be needed, and refuse it where the file is larger than RAM and swap.
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
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


class TensorFile:
    """By name; weights with a scale beside them are what both stand for, in fp32."""

    def __init__(self, path: Path) -> None:
        """Reads the header alone. Raises UserError where the file is no whole .safetensors file."""
        self.path = path
        self.header = read_header(path)
        self.scaling = scaling_of(path, self.header)

    def names(self, prefix: str = "") -> list[str]:
        """Of the weights that begin with `prefix`, in the file's order."""
        return [name for name in self.header.tensors
                if name.startswith(prefix) and name not in self.scaling.helpers]

    def shape(self, name: str) -> Tensor:
        """A tensor on the meta device. Raises UserError where its numbers are of a kind that isn't
        read here."""
        info, scaled = self._read(name), name in self.scaling.scales
        return torch.empty(info.shape, device="meta",
                           dtype=torch.float32 if scaled else DTYPES[info.dtype])

    def __getitem__(self, name: str) -> Tensor:
        """Not to be written into: of the file's own bytes, unless it is scaled. Raises UserError as
        `shape` does."""
        found = self._mapped(self._read(name))
        if (scale := self.scaling.scales.get(name)) is None:
            return found
        factor = self._mapped(self.header.tensors[scale]).float()
        sides = (1,) * found.ndim if factor.numel() == 1 else (-1, *(1,) * (found.ndim - 1))
        return found.to(torch.float32, copy=True).mul_(factor.reshape(sides))

    def _read(self, name: str) -> TensorInfo:
        info = self.header.tensors[name]
        kind = self.scaling.unread.get(name, "" if info.dtype in DTYPES else info.dtype)
        if kind:
            raise UserError("families.numbers_unread", path=self.path, key=name, kind=kind)
        return info

    def _mapped(self, info: TensorInfo) -> Tensor:
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        begin = self.header.data_start + info.begin
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), begin - start + info.nbytes,
                               access=mmap.ACCESS_READ, offset=start)
        if sys.platform != "win32":             # in one go from the disk, not page by page
            mapped.madvise(mmap.MADV_WILLNEED)
        if begin % dtype.itemsize:              # some programs' headers are of odd lengths
            copied = bytearray(mapped[begin - start:])
            return torch.frombuffer(copied, dtype=dtype).reshape(info.shape)
        with warnings.catch_warnings():         # torch can't tell that a buffer is for reading
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(mapped, dtype=dtype, count=info.nbytes // dtype.itemsize,
                                    offset=begin - start).reshape(info.shape)
