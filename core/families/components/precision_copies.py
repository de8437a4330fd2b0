"""Files of the same weights in different numbers, as people have T5 in fp16 and fp8: the finest
stands for all of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError
from core.weights.tensor_file import DTYPES, TensorFile

FINENESS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)    # then the others
LOOKED_AT = 24                              # weights, anywhere in the file
ROWS, COLUMNS, MOST = 8, 256, 2**26         # of each; numbers of those that are looked at
# Of the numbers that must be equal once rounded. Weights that were fp32 once and were rounded to
# fp16 differ in 6 % when they are rounded to bf16 then; another model's in more than half.
EQUAL = 0.9


def finest(found: Iterable[Path]) -> list[Path]:
    """Without those that another of them holds in finer numbers."""
    kept: list[Path] = []
    for path in sorted(found, key=_fineness):
        if not any(_same(one, path, (one.stat().st_mtime_ns, path.stat().st_mtime_ns))
                   for one in kept):
            kept.append(path)
    return kept


def _fineness(path: Path) -> int:
    file = TensorFile(path)
    dtypes = [_numbers(file, name) for name in file.names()]
    most = max(dtypes, key=dtypes.count, default=torch.float32)
    return FINENESS.index(most) if most in FINENESS else len(FINENESS)


def _numbers(file: TensorFile, name: str) -> torch.dtype:
    return DTYPES.get(file.header.tensors[name].dtype, torch.uint8)


@lru_cache(maxsize=256)
def _same(fine: Path, coarse: Path, changed: tuple[int, int]) -> bool:
    one, other = TensorFile(fine), TensorFile(coarse)
    names = sorted(one.names())
    if names != sorted(other.names()) or any(
            one.header.tensors[name].shape != other.header.tensors[name].shape for name in names):
        return False
    names = [name for name in names if len(one.header.tensors[name].shape) == 2
             and torch.Size(one.header.tensors[name].shape).numel() < MOST]
    if not any(_numbers(one, name) != _numbers(other, name) for name in names):
        return False                        # in the same numbers they are two
    try:
        some = random.Random(0).sample(names, min(LOOKED_AT, len(names)))
        return all(_agree(one, other, name) for name in some)
    except UserError:                           # numbers that aren't read here
        return False


def _agree(fine: TensorFile, coarse: TensorFile, name: str) -> bool:
    """Whether a weight's first numbers, rounded to those of the other file, are its."""
    dtype = _numbers(coarse, name)
    ours, theirs = (file[name][:ROWS, :COLUMNS].float() for file in (fine, coarse))
    scale = torch.ones(1)
    if (helper := coarse.scaling.scales.get(name)) is not None:
        scale = coarse[helper].float().reshape(-1, 1)[:ROWS]
    ours = ours / scale
    if not dtype.is_floating_point:
        ours = ours.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return _share(ours.to(dtype).float() * scale, theirs) >= EQUAL


def _share(ours: Tensor, theirs: Tensor) -> float:
    return torch.isclose(ours, theirs, rtol=1e-6, atol=0.0).float().mean().item()
