"""Runs' records put away and brought back, and the order of those that wait.

A record is the folder runs/<id>; LoRAs, checkpoints and previews in the output folder are never
touched. What is put away lies in removed/, the newest ones are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from core import paths
from core.errors import UserError
from core.jobs.runs import JobView

KEPT = 20                               # removed records
ORDER = ".order.json"                   # in runs/: ids that wait, the next one first


def remove(view: JobView) -> None:
    """Raises UserError for a run that isn't over, or whose folder can't be moved."""
    if not view.over:
        raise UserError("jobs.still_running", id=view.id, state=view.state)
    removed = _removed()
    removed.mkdir(parents=True, exist_ok=True)
    _move(view.folder, removed / view.id)
    for old in sorted(removed.iterdir(), key=lambda one: one.stat().st_ctime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def restore(run_id: str) -> None:
    """Raises UserError where it is no longer kept."""
    if run_id not in _names(_removed()):
        raise UserError("run_history.not_kept", id=run_id)
    _move(_removed() / run_id, paths.runs_dir() / run_id)


def can_restore(run_id: str) -> bool:
    return bool(run_id) and (_removed() / run_id).is_dir()


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:            # Windows: a file in it is open in another program
        raise UserError("run_history.not_moved", folder=source,
                        reason=error.strerror or error) from None


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def _removed() -> Path:
    return paths.data_dir() / "removed"


# --- the queue ---

def in_order(waiting: Sequence[JobView]) -> list[JobView]:
    """The next one first: as they were arranged, then as they came."""
    order = {run_id: place for place, run_id in enumerate(_order())} if len(waiting) > 1 else {}
    return sorted(waiting, key=lambda view: (order.get(view.id, len(order)), view.created, view.id))


def move_up(waiting: Sequence[JobView], run_id: str) -> None:
    """Before the one that is before it. The caller holds the queue's lock."""
    ids = [view.id for view in in_order(waiting)]
    place = ids.index(run_id) if run_id in ids else 0
    if place:
        ids[place - 1], ids[place] = ids[place], ids[place - 1]
        paths.write_atomic(paths.runs_dir() / ORDER, json.dumps(ids))


def _order() -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((paths.runs_dir() / ORDER).read_text("utf-8"))
        return [str(one) for one in found] if isinstance(found, list) else []
    return []
