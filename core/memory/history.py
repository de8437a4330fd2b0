"""What earlier runs on this machine showed, planned against measured: it corrects later plans."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from core import paths
from core.serialization import json_object


def remember(card: str, planned_mb: float, allocated_mb: float, reserved_mb: float) -> None:
    """Keeps what a run planned for tensors and what torch held in fact, in MiB."""
    if allocated_mb <= 0:
        return
    known = json_object(_file())
    rows = [*_rows(known, card), {
        "planned": planned_mb, "allocated": allocated_mb, "reserved": reserved_mb}]
    with contextlib.suppress(OSError):
        paths.write_atomic(_file(), json.dumps(known | {card: rows[-20:]}))


def overhead(card: str) -> float | None:
    """(reserved - planned tensors) / planned tensors, the worst of the last five runs on this
    card; None before the first. Never below zero: what once ran with less is no promise."""
    rows = _rows(json_object(_file()), card)[-5:]
    worst = [(row["reserved"] - row["planned"]) / row["planned"] for row in rows]
    return max(0.0, *worst) if worst else None


def _rows(known: dict[str, Any], card: str) -> list[dict[str, float]]:
    """The card's rows that can be used: the file may be damaged, and is only a help."""
    rows = known.get(card)
    return [row for row in rows if isinstance(row, dict) and all(
        isinstance(row.get(key), int | float) and 0 < row[key] < 1e9
        for key in ("planned", "reserved"))] if isinstance(rows, list) else []


def _file() -> Path:
    return paths.data_dir() / "planned-and-real.json"
