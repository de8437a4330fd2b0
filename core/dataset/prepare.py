"""`dataset prepare`: copies of a folder's pictures and captions, mended, in a new folder.

Only copies are written; the user's files stay as they are. Every picture is written whole or not
at all, and gets a line in LOG, from which an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core import i18n, paths, serialization, threads
from core.dataset import curation, image_folder
from core.dataset.checks import near_duplicates
from core.dataset.checks.image_stats import Looks, Table, focus_points
from core.dataset.crops import BaseFacts
from core.dataset.render_copy import Options, Task, caption_of, render
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from core.jobs.journal import append_line

LOG = "darkroom-prepare.jsonl"
VERSION = 1                     # of the log's first line


@dataclass(frozen=True, slots=True)
class Done:
    """One line of the log: what became of a picture."""

    name: str                               # image_folder.relative_name of the original
    stamp: str                              # its size and time of change
    written: str = ""                       # name in the new folder; "": none
    did: tuple[dict[str, Any], ...] = ()    # {"key": "checks.did_...", parameters}
    fault: str = ""                         # code, where it failed
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` has done; all numbers are pictures."""

    folder: Path
    log: Path
    written: int
    dropped: int                            # copies of others
    failed: int
    before: int                             # of all these: done by an earlier, interrupted run
    stopped: bool = False


def prepare(folder: Path, out: Path, options: Options, *, facts: BaseFacts | None = None,
            metadata: Path | None = None, emit: Callable[[Event], None] = lambda event: None,
            control: Control | None = None) -> Prepared:
    """Writes mended copies of the pictures and captions in `folder` into the folder `out`.

    `facts` are needed for `options.crop`. Raises UserError where `out` won't do and where it can't
    be written; image_stats.Stopped where the user stops before the first copy.
    """
    folder = Path(os.path.abspath(paths.expanded(folder)))
    out = Path(os.path.abspath(paths.expanded(out)))
    # Real paths: a copy inside of the original folder would itself be copied the next time.
    real_out = Path(os.path.realpath(out))
    if real_out.is_relative_to(os.path.realpath(folder)):
        raise UserError("checks.out_inside", out=out, folder=folder)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / LOG).exists())):
        raise UserError("checks.out_not_empty", out=out)
    choices = curation.load(folder)
    looks = Looks(control)
    data = image_folder.scan(folder, metadata, _progress(emit, "scan"), left_out=choices.left_out,
                             look_all=looks.look_all)
    # A run can go on only with the very same settings: they stand in the log's first line.
    sizes = [facts.area, facts.step, facts.no_upscale] if options.crop and facts else []
    known = _begin_log(out, {"darkroom_prepare": VERSION, "folder": os.fspath(folder),
                             "sizes": sizes, **asdict(options)})
    tasks = _plan(data, looks.table, options, choices)
    return _write_all(tasks, out, options, facts, known, emit, control)


def _progress(emit: Callable[[Event], None], name: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done % 20 == 0 or done == total:
            emit(Phase(name=name, done=done, total=total))
    return progress


# --- the plan ---------------------------------------------------------------------------------

def _plan(data: image_folder.Dataset, table: Table, options: Options,
          choices: curation.Choices) -> list[Task]:
    names = data.names
    points = focus_points(data, choices, table if options.crop_about == "subject" else None)
    # Index of a copy -> index of the one that stays, and the distance of their hashes.
    dropped: dict[int, tuple[int, int]] = {}
    for group in near_duplicates.group_copies(table) if options.dedupe else ():
        for copy, distance in zip(group.others, group.distances, strict=True):
            dropped[copy] = group.best, distance
    for index, (best, distance) in dropped.items():
        # The best of identical files may itself be near another picture.
        if best in dropped:
            dropped[index] = dropped[best][0], max(distance, dropped[best][1])
    used: set[str] = set()
    tasks = []
    for index, picture in enumerate(data.pictures):
        # 01.png and 01.jpg become 01 and 01-2: captions go by the stem.
        free = paths.free_name(
            picture.path.relative_to(data.folder).with_suffix("").as_posix(), used)
        used.add(free.casefold())
        original, distance = dropped.get(index, (-1, 0))
        tasks.append(Task(picture, names[index], free, table[index], points[index],
                          "" if original < 0 else names[original], distance))
    return tasks


# --- writing ----------------------------------------------------------------------------------

def _write_all(tasks: list[Task], out: Path, options: Options, facts: BaseFacts | None,
               known: dict[str, Done], emit: Callable[[Event], None],
               control: Control | None) -> Prepared:
    progress, log = _progress(emit, "prepare"), out / LOG
    counts = Counter[str]()
    first_fault = ""

    def work(task: Task) -> tuple[Done, bool]:
        """Returns the line of the log, and whether it stands there already."""
        try:
            stamp = task.stamp
            old = known.get(task.name)
            if old is not None and old.stamp == stamp and not old.fault:
                return old, True
            return _write(task, stamp, out, options, facts, old), False
        except UserError as fault:
            # Where one file can't be written, the next ones can't either.
            if fault.code == "checks.cannot_write":
                raise
            params = {key: str(value) for key, value in fault.params.items()}
            return Done(task.name, "", fault=fault.code, params=params), False
        except OSError as error:
            # The original has just gone.
            return Done(task.name, "", fault="dataset.unreadable", params={
                "file": task.name, "reason": error.strerror or str(error)}), False

    with contextlib.closing(threads.in_order(work, tasks, "prepare")) as results:
        for number, (done, noted) in enumerate(results, 1):
            counts["before"] += noted
            counts["failed" if done.fault else "written" if done.written else "dropped"] += 1
            if done.fault and not first_fault:
                first_fault = i18n.tr(done.fault, done.params)
            if not noted:
                try:
                    append_line(log, _line(asdict(done)))
                except OSError as error:
                    raise _cannot_write(log, error) from None
            progress(number, len(tasks))
            if control is not None and control.stopping:
                break
    if first_fault and not counts["written"]:
        raise UserError("checks.nothing_written", first=first_fault)
    return Prepared(out, log, counts["written"], counts["dropped"], counts["failed"],
                    counts["before"], control is not None and control.stopping)


def _write(task: Task, stamp: str, out: Path, options: Options, facts: BaseFacts | None,
           old: Done | None) -> Done:
    """Writes one picture with its caption. `old` is what an earlier run says about it."""
    if task.best:
        return Done(task.name, stamp, did=({"key": "checks.did_drop", "best": task.best,
                                            "distance": task.distance},))
    content, suffix, did = render(task, options, facts)
    written = f"{task.stem}.{suffix}"
    ours = old is not None and old.written == written
    _put(out / written, content, ours)
    if caption := caption_of(task.picture):
        caption_suffix, text = caption
        _put(out / f"{task.stem}{caption_suffix}", text.encode("utf-8", "replace"), ours)
    return Done(task.name, stamp, serialization.readable_name(written), tuple(did))


def _put(path: Path, content: bytes, ours: bool) -> None:
    """Writes a file. `ours`: our log says that an earlier run wrote the one that is there."""
    try:
        if path.exists() and not ours:
            # A file of unknown origin stays. Where it is the same, a run was killed before it
            # wrote the line of its log.
            if path.read_bytes() != content:
                raise UserError("checks.target_taken", path=path)
            return
        paths.write_atomic(path, content)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError("checks.cannot_write", path=path, reason=error.strerror or error)


def _begin_log(out: Path, settings: dict[str, Any]) -> dict[str, Done]:
    """Makes the new folder and its log. Returns what an earlier run noted there, by name.

    The log's first line has the settings, each other one a picture. Raises UserError where the
    folder holds anything else, or was begun with other settings.
    """
    path = out / LOG
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(out.iterdir()):
                raise UserError("checks.out_not_empty", out=out)
            paths.write_atomic(path, _line(settings) + "\n")
        open(path, "ab").close()                    # one that can't grow is told before the work
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise _cannot_write(path, error) from None
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(entry := serialization.from_json(line), dict):
                entries.append(entry)
    # Compared as JSON: a tuple has become a list there.
    if not entries or entries[0] != serialization.from_json(_line(settings)):
        raise UserError("checks.out_other", out=out)
    known = {}
    for entry in entries[1:]:
        # Keys of a later version are no reason to stop: that picture is written again.
        with contextlib.suppress(TypeError):
            done = Done(**{**entry, "did": tuple(entry.get("did", ()))})
            known[done.name] = done
    return known


def _line(entry: dict[str, Any]) -> str:
    # Names that aren't UTF-8 are left as \udc.. escapes, which JSON knows.
    text = json.dumps(entry, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()
