"""The state of every random generator of this process, as tensors.

Samples draw from generators of their own (core/objectives/noise.py). What an extension or a dropout
takes from the common ones goes on after a resume as if the run had never stopped.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Seeds all of them, so that a run doesn't depend on what its preparations took."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def state(device: torch.device) -> dict[str, Tensor]:
    """The states of Python's, numpy's and torch's generator, and of the device's own."""
    # `spare`: normal numbers are drawn in pairs, and the second one waits for the next call.
    _, numbers, spare = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    mersenne = legacy["state"]
    tensors = {
        "python": torch.tensor(numbers), "torch": torch.get_rng_state(),
        "python_spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.tensor([*mersenne["key"].tolist(), mersenne["pos"], legacy["has_gauss"]]),
        "numpy_spare": torch.tensor([legacy["gauss"]], dtype=torch.float64)}
    if device.type in ("cuda", "mps"):
        tensors[device.type] = getattr(torch, device.type).get_rng_state()
    return tensors


def load_state(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Puts `state` back, but for the state of another kind of device."""
    spare = tensors["python_spare"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), spare[0] if spare else None))
    *key, place, has_spare = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), place, has_spare,
                         tensors["numpy_spare"].item()))
    torch.set_rng_state(tensors["torch"])
    if device.type in tensors:
        getattr(torch, device.type).set_rng_state(tensors[device.type])
