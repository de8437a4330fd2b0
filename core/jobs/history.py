"""Removing and restoring the records of runs, and the order of the queue.

A record is the folder runs/<id>. LoRAs, checkpoints and previews in the output folder are never
touched. Removed records lie in removed/, where the newest ones stay.
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
from core.serialization import json_of

KEPT = 20                               # removed records that can be restored
ORDER = ".order.json"                   # in runs/: ids that wait, the next one first


def remove(view: JobView) -> None:
    """Moves a run's record to removed/. Raises UserError for a run that isn't over, or whose folder
    can't be moved."""
    if not view.over:
        raise UserError("jobs.still_running", id=view.id, state=view.state)
    removed = _removed()
    removed.mkdir(parents=True, exist_ok=True)
    _move(view.folder, removed / view.id)
    # ctime changes when a folder is moved: the order of removal
    for old in sorted(removed.iterdir(), key=lambda folder: folder.stat().st_ctime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def restore(run_id: str) -> None:
    """Brings a removed record back. Raises UserError where it is no longer there."""
    # by the folder's list, so that an id from outside can't lead anywhere else
    removed = os.listdir(_removed()) if _removed().is_dir() else []
    if run_id not in removed:
        raise UserError("run_history.not_kept", id=run_id)
    _move(_removed() / run_id, paths.runs_dir() / run_id)


def can_restore(run_id: str) -> bool:
    return bool(run_id) and (_removed() / run_id).is_dir()


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        # on Windows: a file in it is open in another program
        raise UserError("run_history.not_moved", folder=source,
                        reason=error.strerror or error) from None


def _removed() -> Path:
    return paths.data_dir() / "removed"


# --- the queue ---

def in_order(waiting: Sequence[JobView]) -> list[JobView]:
    """The waiting runs, the next one first: as the user arranged them, then as they came."""
    order: dict[str, int] = {}
    # the file is read ten times a second: only where it matters
    if len(waiting) > 1:
        with contextlib.suppress(OSError, ValueError):
            ids = json_of((paths.runs_dir() / ORDER).read_text("utf-8"), list)
            order = {str(run_id): place for place, run_id in enumerate(ids)}
    return sorted(waiting, key=lambda view: (order.get(view.id, len(order)), view.created, view.id))


def move_up(waiting: Sequence[JobView], run_id: str) -> None:
    """Moves a run one place forward. The caller holds the queue's lock."""
    ids = [view.id for view in in_order(waiting)]
    place = ids.index(run_id) if run_id in ids else 0
    if place:
        ids[place - 1], ids[place] = ids[place], ids[place - 1]
        paths.write_atomic(paths.runs_dir() / ORDER, json.dumps(ids))
