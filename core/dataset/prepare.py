"""`dataset prepare`: copies of a folder's pictures and captions, mended, in a new folder.

Only copies are written; the user's files stay as they are. Every picture is written whole or not
at all, and has a line in LOG, by which an interrupted run goes on.
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
from core.dataset.curation import Choices
from core.dataset.image_folder import Dataset, relative_name
from core.dataset.render_copy import Options, Task, caption_of, render
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from core.serialization import from_json

LOG = "darkroom-prepare.jsonl"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Done:
    """One line of the log: what became of a picture."""

    name: str                               # dataset.relative_name of the original
    stamp: str                              # its size and time of change
    written: str = ""                       # name in the new folder; "": none
    did: tuple[dict[str, Any], ...] = ()    # {"key": "checks.did_...", parameters}
    fault: str = ""                         # code, where it failed
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
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
    """`facts` are needed for `crop`. Raises UserError where `out` won't do, and where it can't be
    written; looks.Stopped where the user stops during the first look."""
    folder, out = Path(os.path.abspath(folder.expanduser())), Path(os.path.abspath(
        out.expanduser()))
    _refuse(folder, out)
    chosen = curation.load(folder)
    looks = Looks(control)
    data = image_folder.scan(folder, metadata, _progress(emit, "scan"), left_out=chosen.left_out,
                             look_all=looks.look_all)
    log = _Log(out, _asked(folder, options, facts))
    try:
        return _write_all(_plan(data, looks.table, options, chosen), out, options, facts, log,
                          emit, control)
    finally:
        log.close()


def _refuse(folder: Path, out: Path) -> None:
    real, real_out = Path(os.path.realpath(folder)), Path(os.path.realpath(out))
    if real_out == real or real_out.is_relative_to(real):
        raise UserError("checks.out_inside", out=out, folder=folder)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / LOG).exists())):
        raise UserError("checks.out_not_empty", out=out)


def _progress(emit: Callable[[Event], None], name: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done % 20 == 0 or done == total:
            emit(Phase(name=name, done=done, total=total))
    return progress


# --- the plan ---------------------------------------------------------------------------------

def _plan(data: Dataset, table: Table, options: Options, chosen: Choices) -> list[Task]:
    names = [relative_name(one.path, data.folder) for one in data.pictures]
    points = focus_points(data, chosen, table if options.crop_about == "subject" else None)
    dropped = _dropped(table) if options.dedupe else {}
    stems = _stems(data)
    return [Task(one, names[i], stems[i], table[i], points[i],
                  *((names[dropped[i][0]], dropped[i][1]) if i in dropped else ()))
            for i, one in enumerate(data.pictures)]


def _dropped(table: Table) -> dict[int, tuple[int, int]]:
    """Index -> (the copy that is kept, distance)."""
    found: dict[int, tuple[int, int]] = {}
    for group in near_duplicates.group_copies(table):
        for other, distance in zip(group.others, group.distances, strict=True):
            found[other] = group.best, distance
    for index, (best, distance) in found.items():
        if best in found:                   # the best of identical files is near another one
            found[index] = found[best][0], max(distance, found[best][1])
    return found


def _stems(data: Dataset) -> list[str]:
    """Names in the new folder; 01.png and 01.jpg become 01 and 01-2, as captions go by stem."""
    used: set[str] = set()
    stems = []
    for one in data.pictures:
        stem = wanted = one.path.relative_to(data.folder).with_suffix("").as_posix()
        number = 1
        while wanted.casefold() in used:
            number += 1
            wanted = f"{stem}-{number}"
        used.add(wanted.casefold())
        stems.append(wanted)
    return stems


# --- writing ----------------------------------------------------------------------------------

def _write_all(tasks: list[Task], out: Path, options: Options, facts: BaseFacts | None,
               log: _Log, emit: Callable[[Event], None], control: Control | None) -> Prepared:
    progress = _progress(emit, "prepare")
    counts = Counter[str]()
    first_fault = ""

    def work(task: Task) -> tuple[Done, bool]:
        try:
            stamp = task.stamp
            old = log.done.get(task.name)
            if old is not None and old.stamp == stamp and not old.fault:
                return old, True
            return _write(task, stamp, out, options, facts, old), False
        except UserError as fault:
            if fault.code == "checks.cannot_write":
                raise
            shown = {key: str(value) for key, value in fault.params.items()}
            return Done(task.name, "", fault=fault.code, params=shown), False
        except OSError as error:            # the original has just gone
            return Done(task.name, "", fault="dataset.unreadable", params={
                "file": task.name, "reason": error.strerror or str(error)}), False

    with contextlib.closing(threads.in_order(work, tasks, "prepare")) as results:
        for number, (done, known) in enumerate(results, 1):
            counts["before"] += known
            counts["failed" if done.fault else "written" if done.written else "dropped"] += 1
            first_fault = first_fault or (i18n.tr(done.fault, done.params) if done.fault
                                          else "")
            if not known:
                log.add(done)
            progress(number, len(tasks))
            if control is not None and control.stopping:
                break
    if first_fault and not counts["written"]:
        raise UserError("checks.nothing_written", first=first_fault)
    return Prepared(out, log.path, counts["written"], counts["dropped"], counts["failed"],
                    counts["before"], control is not None and control.stopping)


def _write(task: Task, stamp: str, out: Path, options: Options, facts: BaseFacts | None,
           old: Done | None) -> Done:
    if task.best:
        return Done(task.name, stamp, did=({"key": "checks.did_drop", "best": task.best,
                                            "distance": task.distance},))
    content, suffix, did = render(task, options, facts)
    written = f"{task.stem}.{suffix}"
    ours = old is not None and old.written == written
    _put(out / written, content, ours)
    told = caption_of(task.picture)
    if told is not None:
        _put(out / f"{task.stem}{told[0]}", told[1].encode("utf-8", "replace"), ours)
    return Done(task.name, stamp, serialization.readable_name(written), tuple(did))


def _put(path: Path, content: bytes, ours: bool) -> None:
    """`ours`: our log says that an earlier run wrote it. A file of unknown origin stays, unless
    it is the same: then a run was killed before its line in the log."""
    try:
        if path.exists() and not ours:
            if path.read_bytes() != content:
                raise UserError("checks.target_taken", path=path)
            return
        paths.write_atomic(path, content)
    except OSError as error:
        raise UserError("checks.cannot_write", path=path, reason=error.strerror or error) from None


class _Log:
    """The log in the new folder: its first line says what was asked, each other what was done.
    Raises UserError where the folder holds anything else, or was begun with something else."""

    def __init__(self, out: Path, asked: dict[str, Any]) -> None:
        self.path = out / LOG
        self.done: dict[str, Done] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read(out, asked)
            elif any(out.iterdir()):
                raise UserError("checks.out_not_empty", out=out)
            else:
                paths.write_atomic(self.path, _line(asked))
            self._mend()
            self._file = open(self.path, "ab")      # noqa: SIM115  closed by close()
        except OSError as error:
            raise UserError("checks.cannot_write", path=self.path,
                            reason=error.strerror or error) from None

    def add(self, done: Done) -> None:
        try:
            self._file.write(_line(asdict(done)))
            self._file.flush()
        except OSError as error:
            raise UserError("checks.cannot_write", path=self.path,
                            reason=error.strerror or error) from None
        self.done[done.name] = done

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def _read(self, out: Path, asked: dict[str, Any]) -> None:
        entries = [entry for line in self.path.read_bytes().split(b"\n")
                   if (entry := _parsed(line)) is not None]
        if not entries or entries[0] != from_json(_line(asked)):
            raise UserError("checks.out_other", out=out)
        for entry in entries[1:]:
            with contextlib.suppress(TypeError):
                done = Done(**{**entry, "did": tuple(entry.get("did", ()))})
                self.done[done.name] = done

    def _mend(self) -> None:
        """A line that was torn by a crash must not swallow the next one."""
        if not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "ab") as file:
                file.write(b"\n")


def _line(entry: dict[str, Any]) -> bytes:
    # names that aren't UTF-8 are left as \udc.. escapes, which JSON knows
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = from_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _asked(folder: Path, options: Options, facts: BaseFacts | None) -> dict[str, Any]:
    sizes = [facts.area, facts.step, facts.no_upscale] if options.crop and facts else []
    return {"darkroom_prepare": VERSION, "folder": os.fspath(folder), "sizes": sizes,
            **asdict(options)}
