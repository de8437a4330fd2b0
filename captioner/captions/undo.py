"""Unlimited undo and redo of caption edits, also after a restart.

An append-only journal, history.jsonl, in <data>/captions/<folder's key>/. A line is written
before the files it is about are changed, so that whatever happens in between can be undone.
An action is a `begin` line and its `change` lines; `undo` and `redo` lines follow. A torn last
line (a power cut) costs that line only.

Compaction: when an action begins and the journal is larger than `MOST_BYTES`, what can't be
redone any more is dropped first, then the oldest actions, until half of that size is free.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from captioner.captions.edits import Place, Swap, cannot_write, perform
from core import paths
from core.jobs.journal import append_line
from core.serialization import from_json

MOST_BYTES = 256 * 2**20

_HEAD = re.compile(rb'\{"do":"(\w+)","id":(\d+)[,}]')


def state_dir(folder: Path) -> Path:
    """Where a dataset folder's history and progress are kept: by its real path."""
    real = os.path.realpath(folder.expanduser())
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(real).lower())[:32].strip("-")
    key = sha256(os.fsencode(real)).hexdigest()[:16]
    return paths.data_dir() / "captions" / "-".join(filter(None, (slug, key)))


@dataclass(slots=True)
class Action:
    """Everything that one click or one job changed."""

    what: str                               # caption | apply | edit: a key of captions.yaml
    params: dict[str, Any] = field(default_factory=dict)
    id: int = 0                             # 0: not begun, as nothing changed yet
    at: float = 0.0                         # Unix time, s
    undone: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    action: Action
    done: list[Swap]                        # what was carried out
    left: list[Swap]                        # what wasn't: something else stands there by now


class History:
    """Of one dataset folder. Safe for several threads and processes: each call takes a lock."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = Path(os.path.abspath(folder.expanduser()))
        self.state = state_dir(folder)
        self.file = self.state / "history.jsonl"
        self.most_bytes = most_bytes
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(error, self.state) from error
        self._lock = FileLock(self.state / "lock")

    def carry_out(self, action: Action, swaps: Sequence[Swap]) -> Outcome:
        """Journals the swaps as part of the action, then makes them. Raises UserError where the
        journal or a file can't be written."""
        if not swaps:
            return Outcome(action, [], [])
        with self._lock:
            if not action.id:
                self.begin(action)
            self._append(self._line("change", action.id, **self._told(swap)) for swap in swaps)
            left = perform(swaps)
            if left:
                self._append(self._line("left", action.id, **self._told(swap)) for swap in left)
        gone = {id(swap) for swap in left}
        return Outcome(action, [swap for swap in swaps if id(swap) not in gone], left)

    def begin(self, action: Action) -> None:
        """Gives the action its number. carry_out() does so itself."""
        with self._lock:
            self._compact()
            newest = max((action_id for _, action_id, _ in self._heads()), default=0)
            action.id, action.at = newest + 1, time.time()
            self._append([self._line("begin", action.id, what=action.what, params=action.params,
                                     at=action.at)])

    def actions(self) -> list[Action]:
        """What can be undone, oldest first, then what can be redone, the next one first."""
        done, undone = self._stacks()
        return [*done, *reversed(undone)]

    def undo(self) -> Outcome | None:
        """Takes the newest action back. None: there is none."""
        with self._lock:
            done, _ = self._stacks()
            return self._back_and_forth(done[-1], "undo") if done else None

    def redo(self) -> Outcome | None:
        with self._lock:
            _, undone = self._stacks()
            return self._back_and_forth(undone[-1], "redo") if undone else None

    def newest(self, action_id: int) -> Action | None:
        """The action, if it is the newest one and stands: a resumed job goes on with it."""
        done, _ = self._stacks()
        return done[-1] if done and done[-1].id == action_id else None

    def changes(self, action_id: int) -> list[Swap]:
        """What an action changed, in order; what it had to leave is not among it."""
        found: list[Swap] = []
        for line in self._lines(f'{{"do":"change","id":{action_id},',
                                f'{{"do":"left","id":{action_id},'):
            swap = self._read(line)
            if line["do"] == "change":
                found.append(swap)
            else:
                found = [one for one in found if one != swap]
        return found

    # --- moving ---

    def _back_and_forth(self, action: Action, do: str) -> Outcome:
        swaps = self.changes(action.id)
        swaps = [swap.back for swap in reversed(swaps)] if do == "undo" else swaps
        left = perform(swaps)
        self._append([self._line(do, action.id)])
        gone = {id(swap) for swap in left}
        return Outcome(action, [swap for swap in swaps if id(swap) not in gone], left)

    def _stacks(self) -> tuple[list[Action], list[Action]]:
        """What stands and what is undone, the newest last. An action counts from its first
        change on: one whose changes didn't fit on the disk has none."""
        begun: dict[int, Action] = {}
        done: list[Action] = []
        undone: list[Action] = []
        for do, action_id, line in self._heads():
            if do == "begin":
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    told = from_json(line)
                    begun[action_id] = Action(told["what"], told["params"], action_id, told["at"])
            elif do == "change" and action_id in begun:
                undone.clear()
                done.append(begun.pop(action_id))
            elif do in ("undo", "redo"):
                source, target = (done, undone) if do == "undo" else (undone, done)
                if source and source[-1].id == action_id:
                    target.append(source.pop())
                    target[-1].undone = do == "undo"
        return done, undone

    def _heads(self) -> Iterator[tuple[str, int, bytes]]:
        """`do` and `id` of each whole line; most needn't be read further."""
        with contextlib.suppress(FileNotFoundError), open(self.file, "rb") as file:
            for line in file:
                if (found := _HEAD.match(line)) and line.endswith(b"}\n"):
                    yield found[1].decode(), int(found[2]), line

    # --- lines ---

    def _line(self, do: str, action_id: int, **more: Any) -> str:
        """`do` and `id` first: lines are picked by their beginning, without reading them all."""
        return json.dumps({"do": do, "id": action_id, **more}, ensure_ascii=False,
                          separators=(",", ":"))

    def _append(self, lines: Iterable[str]) -> None:
        try:
            append_line(self.file, "\n".join(lines))
            with open(self.file, "rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(error, self.file) from error

    def _lines(self, *beginnings: str) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), open(self.file, "rb") as file:
            starts = tuple(beginning.encode() for beginning in beginnings)
            for line in file:
                if line.startswith(starts) and line.endswith(b"}\n"):
                    with contextlib.suppress(ValueError):
                        yield from_json(line)

    def _told(self, swap: Swap) -> dict[str, Any]:
        file = swap.place.file
        inside = file.is_relative_to(self.folder)
        return {"picture": swap.picture, "kind": swap.place.kind, "row": swap.place.row,
                "file": file.relative_to(self.folder).as_posix() if inside else str(file),
                "before": _packed(swap.before), "after": _packed(swap.after)}

    def _read(self, line: dict[str, Any]) -> Swap:
        place = Place(self.folder / line["file"], line["kind"], line["row"])
        return Swap(line["picture"], place, _unpacked(line["before"]), _unpacked(line["after"]))

    # --- size ---

    def _compact(self) -> None:
        try:
            if self.file.stat().st_size <= self.most_bytes:
                return
        except FileNotFoundError:
            return
        done, undone = self._stacks()
        sizes = self._sizes()
        kept = [action.id for action in (*done, *reversed(undone))]
        while len(kept) > 1 and sum(sizes[one] for one in kept) > self.most_bytes // 2:
            kept.pop(0)
        try:
            self._rewrite({f'{{"do":"{do}","id":{one},'.encode() for one in kept
                           for do in ("begin", "change", "left")},
                          [action.id for action in reversed(undone) if action.id in kept])
        except OSError as error:
            raise cannot_write(error, self.file) from error

    def _sizes(self) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for _, action_id, line in self._heads():
            sizes[action_id] = sizes.get(action_id, 0) + len(line)
        return sizes

    def _rewrite(self, beginnings: set[bytes], undone: Sequence[int]) -> None:
        starts = tuple(beginnings)
        with paths.atomic(self.file) as temporary, open(temporary, "wb") as new, \
                open(self.file, "rb") as old:
            new.writelines(line for line in old
                           if line.startswith(starts) and line.endswith(b"\n"))
            new.writelines(self._line("undo", one).encode() + b"\n" for one in reversed(undone))


def _packed(content: bytes | None) -> str | dict[str, str] | None:
    """Text as it is; what is no UTF-8 (an old encoding) in base64, so that it comes back whole."""
    try:
        return None if content is None else content.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content or b"").decode()}


def _unpacked(told: Any) -> bytes | None:
    if isinstance(told, dict):
        return base64.b64decode(told["base64"])
    return None if told is None else str(told).encode("utf-8")

