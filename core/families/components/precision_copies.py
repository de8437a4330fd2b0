"""Files of the same weights in different dtypes, as people have T5 in fp16 and fp8: the finest
stands for all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from core.errors import UserError
from core.weights.tensor_file import DTYPES, TensorFile

FINENESS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)    # then all others
# Weights that are compared, anywhere in the file; of each a corner of so many numbers. Larger ones
# are left out: fp8 weights with scales are read whole.
COMPARED = 24
ROWS, COLUMNS, LARGEST = 8, 256, 2**26
# The share of numbers that must be equal once rounded. Weights that were fp32 once and were rounded
# to fp16 differ in 6 % when they are rounded to bf16 then; another model's in more than half.
EQUAL = 0.9


def finest(paths: Iterable[Path]) -> list[Path]:
    """The files without those whose weights another of them holds in a finer dtype."""
    def fineness(path: Path) -> int:
        file = TensorFile(path)
        dtypes = [_dtype(file, name) for name in file.names()]
        most = max(dtypes, key=dtypes.count, default=torch.float32)
        return FINENESS.index(most) if most in FINENESS else len(FINENESS)

    result: list[Path] = []
    for path in sorted(paths, key=fineness):
        if not any(_is_copy(finer, path, (finer.stat().st_mtime_ns, path.stat().st_mtime_ns))
                   for finer in result):
            result.append(path)
    return result


def _dtype(file: TensorFile, name: str) -> torch.dtype:
    return DTYPES.get(file.header.tensors[name].dtype, torch.uint8)


# `changed` makes the answer forgotten when a file changes.
@lru_cache(maxsize=256)
def _is_copy(finer: Path, coarser: Path, changed: tuple[int, int]) -> bool:
    fine, coarse = TensorFile(finer), TensorFile(coarser)
    shapes, others = ({name: file.header.tensors[name].shape for name in sorted(file.names())}
                      for file in (fine, coarse))
    if shapes != others:
        return False
    matrices = [name for name, shape in shapes.items()
                if len(shape) == 2 and math.prod(shape) < LARGEST]
    # Two files in the same dtypes are two finetunes: exact copies were sorted out before.
    if not any(_dtype(fine, name) != _dtype(coarse, name) for name in matrices):
        return False
    sample = random.Random(0).sample(matrices, min(COMPARED, len(matrices)))
    try:
        return all(_agree(fine, coarse, name) for name in sample)
    except UserError:                           # a format that isn't read here
        return False


def _agree(fine: TensorFile, coarse: TensorFile, name: str) -> bool:
    """Whether a corner of the finer weight, rounded to the other's dtype, is the other's corner."""
    dtype = _dtype(coarse, name)
    ours, theirs = (file[name][:ROWS, :COLUMNS].float() for file in (fine, coarse))
    scale_name = coarse.scaling.scales.get(name)
    scale = coarse[scale_name].float().reshape(-1, 1)[:ROWS] if scale_name else torch.ones(1)
    ours = ours / scale
    if not dtype.is_floating_point:
        ours = ours.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    rounded = ours.to(dtype).float() * scale
    return torch.isclose(rounded, theirs, rtol=1e-6, atol=0.0).float().mean().item() >= EQUAL
