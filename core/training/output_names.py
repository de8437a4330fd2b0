"""Where a run's files go and what they are called: the name is claimed for as long as it runs.

`.<name>.taken` in the output folder says which process holds the name, by its number and start
time, since a number alone may be a later process's. The file is made in one step, so that of two
runs that start at once each gets a name of its own; a claim that a dead process left is free again.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil
from filelock import FileLock

from core import paths
from core.config import TrainConfig
from core.dataset.cache import key
from core.errors import Fix, UserError
from core.failures import one_line
from core.jobs.events import Event, Note
from core.jobs.runs import Owner, process_of
from core.lora_files import textual_inversion
from core.lora_files.formats import file_name
from core.serialization import from_json
from core.training import checkpoint

UNREADABLE_S = 10.0             # a claim without content may be just being written
# The contents of this process's own claims. A claim with our process number that isn't among them
# was left by a run that is over, on a disk that became read-only meanwhile.
_OURS: set[str] = set()


class Output:
    """`with Output(folder, config, emit) as output:` around a run. Its LoRA, checkpoints and
    previews are called `name`; the names of finished runs and of living ones are left alone.

    Raises UserError `engine.cant_save` where neither the folder nor the spare one can be written.
    """

    def __init__(self, folder: Path, config: TrainConfig, emit: Callable[[Event], None]) -> None:
        self.folder = folder
        self._rescued = paths.data_dir() / "rescued"
        self._mark = f"{folder.name[:40]}-{key(str(folder))[:8]}"
        self.config, self.emit = config, emit
        self.session = _new_session()
        self.name = ""
        self._claims: dict[Path, str] = {}          # file -> what we wrote into it

    @property
    def spare(self) -> Path:
        """The folder for this run's last state where its own takes nothing any more."""
        return self._rescued / f"{self._mark}-{self.session}"

    def _folders(self) -> list[Path]:
        """Where files of this folder's runs may lie: there, and in the runs' spare folders."""
        return [self.folder, *self._rescued.glob(f"{glob.escape(self._mark)}*/")]

    def __enter__(self) -> Self:
        # What killed runs were writing is cleared away first.
        for name in {name for folder in self._folders()
                     for name in checkpoint.half_written(folder)}:
            if self.take(name):
                self._sweep(name)
                self._release(*self._claims.popitem())
        return self

    def __exit__(self, *_: object) -> None:
        while self._claims:
            self._release(*self._claims.popitem())

    def _release(self, path: Path, content: str) -> None:
        _OURS.discard(content)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            # The folder may have gone and come back, with another run's claim.
            if path.read_text("utf-8") == content:
                path.unlink()

    def rename(self, name: str = "") -> None:
        """Sets the name, or takes the next free one. Later starts of this run find it in its
        journal (core/jobs/runs.py)."""
        self.name = name = name or self.next_name()
        self.emit(Note(key="engine.named", params={
            "name": name, "folder": str(self.folder), "session": self.session}))

    def start_anew(self) -> None:
        """Makes it another run than the one that was to go on."""
        self.session = _new_session()
        self.rename()

    def next_name(self) -> str:
        """Takes the first free name and returns it, with a note where it isn't the config's."""
        for path in paths.numbered(self.folder / self.config.name):
            if self._is_free(path.name) and self.take(path.name):
                self._sweep(path.name)
                # A run may have ended between the question and the claim.
                if self._is_free(path.name):
                    break
        if path.name != self.config.name:
            self.emit(Note(key="engine.other_name", params={
                "wanted": self.config.name, "name": path.name, "folder": str(self.folder)}))
        return path.name

    def take(self, name: str) -> bool:
        """Claims the name until the end of the run; False where a living process has it."""
        spare = self._rescued / f".{key(str(self.folder), name)[:20]}.taken"
        for path in (self.folder / f".{name}.taken", spare):
            if path in self._claims:
                return True
            try:
                content = _claim(path)
            except OSError as error:
                if path != spare:
                    reason = one_line(error)
                    continue
                raise self._cant_save(reason) from None
            if content and path == spare and not self._claims:
                self.emit(Note(key="engine.output_elsewhere", params={
                    "folder": str(self.folder), "spare": str(self.spare), "reason": reason}))
            if content:
                self._claims[path] = content
            return bool(content)
        return False

    def somewhere(self, write: Callable[[Path], Path]) -> Path:
        """Calls `write` with the output folder; where that is full, gone or forbidden, with the
        spare one. Raises UserError `engine.cant_save` where neither will do."""
        try:
            return write(self.folder)
        except OSError as error:
            reason = one_line(error)
        try:
            path = write(self.spare)
        except OSError:
            raise self._cant_save(reason) from None
        self.emit(Note(key="engine.saved_elsewhere", params={
            "folder": str(self.folder), "path": str(path), "reason": reason}))
        return path

    def checkpoints(self, session: str = "") -> list[Path]:
        """The checkpoints of this run's earlier starts, newest first: those whose config asked for
        this name, or those of a session."""
        return checkpoint.find(self._folders(), self.config.name, session)

    def go_on_as(self, name: str, session: str) -> None:
        """Takes the name of an earlier start, or the next free one where others' checkpoints have
        that name by now. Raises UserError where that run is still going on."""
        self.session = session
        if not self.take(name):
            raise UserError("engine.still_going", name=name, file=self.folder / f".{name}.taken")
        sessions = {checkpoint.session_of(checkpoint.folder_of(folder, name, step))
                    for folder in self._folders()
                    for step in checkpoint.steps_of(folder, name)} - {None}
        self.rename(name if sessions == {session} else "")

    def _sweep(self, name: str) -> None:
        """Deletes what a killed run of this name was writing; the name must be claimed."""
        half = re.compile(rf"\.{re.escape(name)}\.[^.]+\.tmp")
        for folder in self._folders():
            checkpoint.sweep(folder, name)
            for path in folder.glob(".*.tmp"):
                if half.fullmatch(path.name) and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)

    def _is_free(self, name: str) -> bool:
        formats = {"kohya", self.config.save_format}
        return not any(
            checkpoint.steps_of(folder, name)
            or textual_inversion.beside(folder / f"{name}.safetensors").exists()
            or any(os.path.lexists(folder / file_name(name, format_)) for format_ in formats)
            for folder in self._folders())

    def _cant_save(self, reason: str) -> UserError:
        elsewhere = str(Path.home() / self.folder.name)
        return UserError("engine.cant_save", folder=self.folder, spare=self.spare, reason=reason,
                         fixes=[Fix("fixes.save_again", {"resume": True}),
                                Fix("fixes.other_folder", {"output_dir": elsewhere})])


def _new_session() -> str:
    return str(uuid.uuid4().int % 10**10)


def _claim(path: Path) -> str:
    """Makes the file that says that this process has a name, and returns its content; an empty
    text where a living process was there first. Raises OSError."""
    process = psutil.Process()
    content = json.dumps({"pid": process.pid, "create_time": process.create_time(),
                          "host": platform.node(), "mark": uuid.uuid4().hex})
    while True:
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with paths.atomic(path, paths.move) as temporary:
                temporary.write_text(content, "utf-8")
            _OURS.add(content)
            return content
        if not path.parent.is_dir():
            raise NotADirectoryError(20, "not a folder", str(path.parent))
        if _lives(path):
            return ""
        paths.data_dir().mkdir(parents=True, exist_ok=True)
        # Under a lock, so that nobody deletes a claim that was made since we looked.
        with FileLock(paths.data_dir() / ".names.lock"):
            if not _lives(path):
                path.unlink(missing_ok=True)


def _lives(path: Path) -> bool:
    """Whether the process that made a claim may still be alive."""
    try:
        content = path.read_text("utf-8")
        claim = from_json(content)
        owner = Owner(int(claim["pid"]), float(claim["create_time"]))
        # Another computer's processes, of a shared folder, can't be looked up.
        if claim["host"] != platform.node():
            return True
        process = process_of(owner)
        return process is not None and (process.pid != os.getpid() or content in _OURS)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError):
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime < UNREADABLE_S
        return False
