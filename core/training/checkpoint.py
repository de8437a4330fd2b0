"""Training state on disk: a folder `<name>-000100/` with the LoRA and all that resuming needs.

The folder is written under a temporary name, synced and renamed: after a crash at any moment a
checkpoint is there whole or not at all. Randomness is a function of (seed, sample number), see
core/objectives/noise.py, so that the samples learned so far are the whole position in the data.
"""

from __future__ import annotations

import functools
import glob
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from core import paths
from core.config.schema import lora_name
from core.errors import UserError
from core.serialization import from_json, json_object

FOLDER = "checkpoints"
STATE = "state.json"
_PARTS = ("adapter", "optimizer", "random")     # of State, by the first word of a tensor's name
_NAME = re.compile(r"(?P<name>.+)-(?P<step>\d{6,})$")


@dataclass(frozen=True, slots=True)
class Position:
    """What a resumed run must know besides tensors; written as state.json."""

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
    base: dict[str, str] = field(default_factory=dict)       # fingerprints of its parts' files
    place: dict[str, Any] | None = None  # sampler.Place in the data; None: of older versions
    start: dict[str, Any] | None = None  # the Place where these settings began
    order: str = ""                      # digest of all that decides the order from there on
    starts: int = 0                      # how often the run had gone on before
    objective: str = ""                  # what the base predicts; empty: of older versions
    rate: float | None = None            # learning rate of the next update, as it was planned


@dataclass(frozen=True, slots=True)
class State:
    """A run between two updates: all that decides how it goes on, besides the config.

    Tensors are copies on the CPU, so that a thread may write them while the run goes on.
    """

    update: int                          # optimizer steps done
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor]
    scaler: dict[str, Any] | None = None
    lowered: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, position: Position, state: State,
         write_lora: Callable[[Path], None]) -> Path:
    """Writes a checkpoint and returns its folder; `write_lora` writes the LoRA to a given path.
    Raises FileExistsError where another run's checkpoint has that name."""
    final = folder_of(folder, position.name, position.update)
    name = final.name
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=final.parent))
    before = temporary.with_suffix(".old")
    try:
        tensors = {f"{part}.{k}": v for part in _PARTS for k, v in getattr(state, part).items()}
        paths.write_atomic(temporary / "state.safetensors", safetensors.torch.save(tensors))
        write_lora(temporary / f"{name}.safetensors")
        paths.write_atomic(temporary / STATE, json.dumps(asdict(position), indent=1))
        temporary.chmod(0o755)          # mkdtemp's are for the owner alone
        if final.exists():               # the same step, saved again after a resume
            if session_of(final) not in (position.session, None):
                raise FileExistsError(17, "a checkpoint of another run", str(final))
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
    """Raises UserError where it can't be read."""
    try:
        position = Position(**from_json((folder / STATE).read_text("utf-8")))
        # from bytes, not mapped: the folder stays free to be deleted, on Windows too
        tensors = safetensors.torch.load((folder / "state.safetensors").read_bytes())
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError("engine.bad_checkpoint", path=folder, reason=error) from error
    parts = {part: {k.removeprefix(f"{part}."): v for k, v in tensors.items()
                    if k.startswith(f"{part}.")} for part in _PARTS}
    return position, State(position.update, **parts, scaler=position.scaler,
                           lowered=position.lowered)


def find(outputs: Iterable[Path], name: str, session: str = "") -> list[Path]:
    """The checkpoints called `name`, and those called `name-2` ... whose run wanted to be called
    `name` and found it taken; or, whatever they are called, those of a session. Newest first."""
    like_it = re.compile(rf"{re.escape(name)}(-\d+)?")
    found = []
    for path in (path for output in outputs for path in (output / FOLDER).glob("*")):
        m = _NAME.match(path.name)
        if m and (path / STATE).is_file() and (session or like_it.fullmatch(m["name"])):
            facts = position_of(path)
            config = facts.get("config")
            config = config if isinstance(config, dict) else {}
            asked = lora_name(str(config.get("output_name", "")),
                              str(config.get("output_dir", "")))
            if facts.get("session") == session if session else name in (m["name"], asked):
                found.append(path)
    return sorted(found, key=_age, reverse=True)


def _age(path: Path) -> tuple[float, int, int]:
    """Orders checkpoints by what they say of themselves: when their run began, how often it had
    gone on, and the step. Folders' times change when they are copied or a clock is set back."""
    facts, named = position_of(path), _NAME.match(path.name)
    step = facts.get("update", int(named["step"]) if named else 0)
    try:
        return float(facts["started"]), int(facts.get("starts", 0)), step
    except (KeyError, TypeError, ValueError):
        return math.inf, 0, step            # a torn one is tried first, and told


def starts_of(folder: Path) -> int:
    """How often a checkpoint's run had gone on before it."""
    return _age(folder)[1]


def newest_first(own: list[Path], torn: list[Path]) -> list[Path]:
    """A run's checkpoints, and by their steps those that don't say any more what they are."""
    latest = max(map(starts_of, own))
    return sorted([*own, *torn], reverse=True, key=lambda path: (
        latest if path in torn else starts_of(path), _age(path)[2]))


def is_called(folder: Path, name: str) -> bool:
    """Whether a checkpoint's folder has the name of this LoRA."""
    m = _NAME.match(folder.name)
    return m is not None and m["name"] == name


def position_of(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json (a Position) as it stands; empty where it can't be read."""
    try:
        return _read(folder / STATE, paths.stamp(folder / STATE))
    except OSError:
        return {}


# The stamp is a part of the key alone: a file that changed is read again.
@functools.lru_cache(maxsize=64)
def _read(path: Path, stamp: tuple[int, int, int]) -> dict[str, Any]:
    values = json_object(path)
    return values if {"name", "session"} <= values.keys() else {}


def session_of(folder: Path) -> str | None:
    """The session that a checkpoint is of; None where it can't be read any more."""
    session = position_of(folder).get("session")
    return None if session is None else str(session)


_HALF = re.compile(r"\.((?P<name>.+)-\d{6,})\.[^.]+\.(?P<kind>tmp|old)")


def half_written(output: Path) -> set[str]:
    """Names of runs that were writing a checkpoint, or are."""
    return {m["name"] for path in (output / FOLDER).glob(".*") if (m := _HALF.fullmatch(path.name))}


def sweep(output: Path, name: str) -> None:
    """Deletes what a killed run of this name was writing; the caller holds the name."""
    # A kill between the two renames of `save` left no checkpoint: the old one comes back.
    for path in (output / FOLDER).glob(".*"):
        if (m := _HALF.fullmatch(path.name)) and m["name"] == name:
            if m["kind"] == "old" and not (output / FOLDER / m[1]).exists():
                os.replace(path, output / FOLDER / m[1])
            shutil.rmtree(path, ignore_errors=True)


def prune(output: Path, name: str, session: str, keep: int, spare: set[int]) -> None:
    """Deletes this run's checkpoints, but for the newest `keep` and those of the steps in `spare`;
    0 keeps all."""
    if not keep:
        return
    # A run that went back has higher steps that are older.
    own = [path for step in steps_of(output, name)
           if session_of(path := folder_of(output, name, step)) == session]
    for path in sorted(own, key=_age)[:-keep]:
        if _age(path)[2] not in spare:
            shutil.rmtree(path, ignore_errors=True)


def folder_of(output: Path, name: str, step: int) -> Path:
    """Where the checkpoint of this name and step is, or would be."""
    return output / FOLDER / f"{name}-{step:06d}"


def steps_of(output: Path, name: str) -> list[int]:
    """The steps of the checkpoints of this name."""
    return [int(m["step"]) for p in (output / FOLDER).glob(f"{glob.escape(name)}-*")
            if (m := _NAME.match(p.name)) and m["name"] == name]


def previews_of(output: Path, name: str) -> Iterator[Path]:
    """The pictures that a run of this name drew while it trained."""
    form = re.compile(rf"{re.escape(name)}-\d{{6,}}-\d+(-\d+)?")
    return (path for path in (output / "samples").glob(f"{glob.escape(name)}-*.png")
            if form.fullmatch(path.stem))


def step_of(preview: Path) -> int:
    """The step at which a preview was drawn."""
    found = re.fullmatch(r".+-(\d{6,})-\d+(-\d+)?", preview.stem)
    return int(found[1]) if found else 0
