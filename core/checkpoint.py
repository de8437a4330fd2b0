"""Training state on disk: a folder `<name>-000100/` with the LoRA and all that resuming needs.

The folder is written under a temporary name, synced and renamed: after a crash at any moment a
checkpoint is there whole or not at all. Randomness is a function of (seed, sample number), see
objective.py, so that the number of updates is the whole position.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from core import optim, paths
from core.faults import Fault
from core.reading import from_json

FOLDER = "checkpoints"
_NAME = re.compile(r"(?P<name>.+)-(?P<step>\d{6,})$")


@dataclass(frozen=True, slots=True)
class Position:
    """What a resumed run must know besides tensors."""

    update: int                          # optimizer steps done
    name: str                            # of the LoRA
    config: dict[str, Any]
    session: str
    started: float                       # Unix time of the first start, s
    seconds: float                       # of training so far
    best_loss: float | None = None
    best_step: int | None = None
    scaler: dict[str, Any] | None = None


def save(folder: Path, position: Position, adapter: dict[str, Tensor],
         optimizer: torch.optim.Optimizer, write_lora: Callable[[Path], None]) -> Path:
    """-> the checkpoint's folder; `write_lora` puts the LoRA file at the given path."""
    name = f"{position.name}-{position.update:06d}"
    final = folder / FOLDER / name
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=final.parent))
    try:
        tensors = {f"adapter.{k}": v for k, v in adapter.items()}
        tensors |= _optimizer_tensors(optimizer)
        paths.write_atomic(temporary / "state.safetensors", safetensors.torch.save(tensors))
        write_lora(temporary / f"{name}.safetensors")
        paths.write_atomic(temporary / "state.json", json.dumps(asdict(position), indent=1))
        temporary.chmod(0o755)
        if final.exists():               # the same step, saved again after a resume
            shutil.rmtree(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(folder: Path) -> tuple[Position, dict[str, Tensor], dict[str, Tensor]]:
    """-> position, adapter weights, optimizer tensors. Raises Fault where it can't be read."""
    try:
        position = Position(**from_json((folder / "state.json").read_text("utf-8")))
        tensors = safetensors.torch.load_file(folder / "state.safetensors")
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise Fault("engine.bad_checkpoint", path=folder, reason=error) from error
    adapter = {k.removeprefix("adapter."): v for k, v in tensors.items() if k[0] == "a"}
    return position, adapter, {k: v for k, v in tensors.items() if k[0] == "o"}


def find(output: Path, name: str) -> Path | None:
    """The newest whole checkpoint of the runs called `name`, `name-2` ..."""
    found = [(p.stat().st_mtime_ns, p) for p in (output / FOLDER).glob(f"{name}-*")
             if (m := _NAME.match(p.name)) and re.fullmatch(rf"{re.escape(name)}(-\d+)?", m["name"])
             and (p / "state.json").is_file()]
    return max(found)[1] if found else None


def prune(output: Path, name: str, keep: int, spare: set[int]) -> None:
    """Deletes all but the newest `keep` checkpoints of this run and those in `spare`."""
    if not keep:
        return
    steps = sorted(steps_of(output, name))
    for step in steps[:-keep]:
        if step not in spare:
            shutil.rmtree(output / FOLDER / f"{name}-{step:06d}", ignore_errors=True)


def steps_of(output: Path, name: str) -> list[int]:
    return [int(m["step"]) for p in (output / FOLDER).glob(f"{name}-*")
            if (m := _NAME.match(p.name)) and m["name"] == name]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"optimizer.{k}": v for k, v in optim.state(optimizer).items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    optim.load_state(optimizer, {k.removeprefix("optimizer."): v for k, v in tensors.items()})
