"""What earlier runs on this machine showed, planned against measured: it corrects later plans."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from core import paths
from core.serialization import json_object


def remember(card: str, planned_mb: float, allocated_mb: float, reserved_mb: float) -> None:
    """Keeps what a run planned for tensors and what torch held in fact, in MiB."""
    if allocated_mb <= 0:
        return
    known = json_object(_file())
    rows = [*known.get(card, []), {
        "planned": planned_mb, "allocated": allocated_mb, "reserved": reserved_mb}]
    with contextlib.suppress(OSError):
        paths.write_atomic(_file(), json.dumps(known | {card: rows[-20:]}))


def overhead(card: str) -> float | None:
    """(reserved - planned tensors) / planned tensors, the worst of the last five runs on this
    card; None before the first. Never below zero: what once ran with less is no promise."""
    rows = json_object(_file()).get(card, [])[-5:]
    worst = [(row["reserved"] - row["planned"]) / row["planned"] for row in rows]
    return max(0.0, *worst) if worst else None


def _file() -> Path:
    return paths.data_dir() / "planned-and-real.json"
