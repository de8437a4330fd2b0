"""Training state on disk: a folder `<name>-000100/` with the LoRA and all that resuming needs.

The folder is written under a temporary name, synced and renamed: after a crash at any moment a
checkpoint is there whole or not at all. Randomness is a function of (seed, sample number), see
objective.py, so that the number of updates is the whole position in the data.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from core import paths
from core.faults import Fault
from core.reading import from_json

FOLDER = "checkpoints"
_PARTS = ("adapter", "optimizer", "random")     # of State, by the first word of a tensor's name
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
    lowered: dict[str, Any] = field(default_factory=dict)    # config keys that the run changed
    samples: int = 0                     # of an epoch
    base_loras: list[str] = field(default_factory=list)      # "name:weight:hash"


@dataclass(frozen=True, slots=True)
class State:
    """How a run stands between two updates: all that decides how it goes on, besides the config.

    Tensors lie on the CPU and are nobody else's, so that a thread may write them.
    """

    update: int                          # optimizer steps done
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    scaler: dict[str, Any] | None = None
    lowered: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, position: Position, state: State,
         write_lora: Callable[[Path], None]) -> Path:
    """-> the checkpoint's folder; `write_lora` puts the LoRA file at the given path."""
    name = f"{position.name}-{position.update:06d}"
    final = folder / FOLDER / name
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=final.parent))
    before = temporary.with_suffix(".old")
    try:
        tensors = {f"{part}.{k}": v for part in _PARTS
                   for k, v in getattr(state, part).items()}
        paths.write_atomic(temporary / "state.safetensors", safetensors.torch.save(tensors))
        write_lora(temporary / f"{name}.safetensors")
        paths.write_atomic(temporary / "state.json", json.dumps(asdict(position), indent=1))
        temporary.chmod(0o755)
        if final.exists():               # the same step, saved again after a resume
            os.replace(final, before)
        os.replace(temporary, final)
        paths.sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if before.exists() and not final.exists():
            os.replace(before, final)
        shutil.rmtree(before, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)
    return final


def load(folder: Path) -> tuple[Position, State]:
    """Raises Fault where it can't be read."""
    try:
        position = Position(**from_json((folder / "state.json").read_text("utf-8")))
        # from bytes, not mapped: the folder stays free to be deleted, on Windows too
        tensors = safetensors.torch.load((folder / "state.safetensors").read_bytes())
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise Fault("engine.bad_checkpoint", path=folder, reason=error) from error
    parts = {part: {k.removeprefix(f"{part}."): v for k, v in tensors.items()
                    if k.startswith(f"{part}.")} for part in _PARTS}
    return position, State(position.update, **parts, scaler=position.scaler,
                           lowered=position.lowered)


def find(outputs: Iterable[Path], name: str) -> list[Path]:
    """The checkpoints of the runs called `name`, `name-2` ..., newest first."""
    own = re.compile(rf"{re.escape(name)}(-\d+)?")
    found = [(p.stat().st_mtime_ns, p) for output in outputs for p in (output / FOLDER).glob("*")
             if (m := _NAME.match(p.name)) and own.fullmatch(m["name"])
             and (p / "state.json").is_file()]
    return [path for _, path in sorted(found, reverse=True)]


def sweep(output: Path, name: str) -> None:
    """Deletes what a killed run of this name was writing. Of two folders that a kill left during
    the exchange, the old one comes back."""
    half = re.compile(rf"\.({re.escape(name)}-\d{{6,}})\.[^.]+\.(tmp|old)")
    for path in (output / FOLDER).glob(".*"):
        if m := half.fullmatch(path.name):
            if m[2] == "old" and not (output / FOLDER / m[1]).exists():
                os.replace(path, output / FOLDER / m[1])
            shutil.rmtree(path, ignore_errors=True)


def prune(output: Path, name: str, keep: int, spare: set[int]) -> None:
    """Deletes all but the newest `keep` checkpoints of this run and those in `spare`."""
    if not keep:
        return
    steps = sorted(steps_of(output, name))
    for step in steps[:-keep]:
        if step not in spare:
            shutil.rmtree(output / FOLDER / f"{name}-{step:06d}", ignore_errors=True)


def steps_of(output: Path, name: str) -> list[int]:
    return [int(m["step"]) for p in (output / FOLDER).glob(f"{glob.escape(name)}-*")
            if (m := _NAME.match(p.name)) and m["name"] == name]
