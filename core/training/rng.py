"""The state of every random generator of this process, as tensors.

Samples draw from generators of their own (objective.py); what an extension or a dropout takes
from the common ones goes on after a resume as if nothing had been.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """All of them, so that a run doesn't depend on what its preparations took."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def state(device: torch.device) -> dict[str, Tensor]:
    """Python's, numpy's, torch's, and the device's own."""
    _, numbers, spare = random.getstate()
    kept = np.random.get_state(legacy=False)
    assert isinstance(kept, dict)
    own = kept["state"]
    found = {
        "python": torch.tensor(numbers), "torch": torch.get_rng_state(),
        "python_spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.tensor([*own["key"].tolist(), own["pos"], kept["has_gauss"]]),
        "numpy_spare": torch.tensor([kept["gauss"]], dtype=torch.float64)}
    if device.type in ("cuda", "mps"):
        found[device.type] = getattr(torch, device.type).get_rng_state()
    return found


def load_state(kept: dict[str, Tensor], device: torch.device) -> None:
    """Puts `state` back; what another device kept stays out."""
    spare = kept["python_spare"].tolist()
    random.setstate((3, tuple(kept["python"].tolist()), spare[0] if spare else None))
    *key, place, has_spare = kept["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), place, has_spare,
                         kept["numpy_spare"].item()))
    torch.set_rng_state(kept["torch"])
    if device.type in kept:
        getattr(torch, device.type).set_rng_state(kept[device.type])
