"""Unlimited undo and redo of caption edits, also after a restart.

An append-only journal, history.jsonl, in <data>/captions/<folder's key>/. A line is written
before the files that it describes are changed, so that an interrupted change can be undone. An
action is a `begin` line and its `change` lines; `undo` and `redo` lines follow. A torn last line
(a power cut) costs that line only.

Compaction: when an action begins and the journal is larger than `MOST_BYTES`, actions that can't
be redone any more are dropped first, then the oldest ones, until half of that size is free.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import time
from collections import Counter
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
    """Where a dataset folder's history and progress are kept. Links to the folder share it."""
    real = os.path.realpath(paths.expanded(folder))
    # A readable name for people who look into the data folder, and a hash that is unique.
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(real).lower())[:32].strip("-")
    key = sha256(os.fsencode(real)).hexdigest()[:16]
    return paths.data_dir() / "captions" / "-".join(filter(None, (slug, key)))


@dataclass(slots=True)
class Action:
    """All changes of one click or one job."""

    what: str                               # caption | apply | edit: a key of captions.yaml
    params: dict[str, Any] = field(default_factory=dict)
    id: int = 0                             # 0: not begun yet
    at: float = 0.0                         # Unix time, s
    undone: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    action: Action
    done: list[Swap]                        # what was carried out
    left: list[Swap]                        # what wasn't: its place holds something else by now


class History:
    """The history of one dataset folder. Safe for threads and processes: each call takes a lock.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = Path(os.path.abspath(paths.expanded(folder)))
        self.state = state_dir(folder)
        self.file = self.state / "history.jsonl"
        self.most_bytes = most_bytes
        try:
            self.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(error, self.state) from error
        self._lock = FileLock(self.state / "lock")

    def carry_out(self, action: Action, swaps: Sequence[Swap]) -> Outcome:
        """Journals the swaps as part of the action, then performs them. Raises UserError where the
        journal or a file can't be written."""
        if not swaps:
            return Outcome(action, [], [])
        with self._lock:
            if not action.id:
                self.begin(action)
            # Before the files: what happens in between can be undone.
            self._append_swaps("change", action.id, swaps)
            outcome = self._perform(action, swaps)
            if outcome.left:
                self._append_swaps("left", action.id, outcome.left)
        return outcome

    def begin(self, action: Action) -> None:
        """Gives the action its number, where carry_out() hasn't yet."""
        with self._lock:
            self._compact()
            newest = max((action_id for _, action_id, _ in self._heads()), default=0)
            action.id, action.at = newest + 1, time.time()
            self._append([self._line("begin", action.id, what=action.what, params=action.params,
                                     at=action.at)])

    def actions(self) -> list[Action]:
        """The actions that can be undone, oldest first; then those to redo, the next one first."""
        done, undone = self._stacks()
        return [*done, *reversed(undone)]

    def undo(self) -> Outcome | None:
        """Undoes the newest action. None: there is none."""
        with self._lock:
            done, _ = self._stacks()
            return self._reverse(done[-1], "undo") if done else None

    def redo(self) -> Outcome | None:
        with self._lock:
            _, undone = self._stacks()
            return self._reverse(undone[-1], "redo") if undone else None

    def newest(self, action_id: int) -> Action | None:
        """The action if it is the newest one and not undone: a resumed job adds to it."""
        done, _ = self._stacks()
        return done[-1] if done and done[-1].id == action_id else None

    def changes(self, action_id: int) -> list[Swap]:
        """The swaps of an action, in order, without those that were left."""
        swaps: list[Swap] = []
        for do, line_id, line in self._heads():
            if do not in ("change", "left") or line_id != action_id:
                continue
            with contextlib.suppress(ValueError):
                data = from_json(line)
                place = Place(self.folder / data["file"], data["kind"], data["row"])
                swap = Swap(data["picture"], place, _unpack(data["before"]), _unpack(data["after"]))
                if do == "change":
                    swaps.append(swap)
                else:
                    swaps = [other for other in swaps if other != swap]
        return swaps

    # --- undoing ---

    def _reverse(self, action: Action, do: str) -> Outcome:
        swaps = self.changes(action.id)
        swaps = [swap.back for swap in reversed(swaps)] if do == "undo" else swaps
        outcome = self._perform(action, swaps)
        self._append([self._line(do, action.id)])
        return outcome

    def _perform(self, action: Action, swaps: Sequence[Swap]) -> Outcome:
        left = perform(swaps)
        left_ids = {id(swap) for swap in left}
        return Outcome(action, [swap for swap in swaps if id(swap) not in left_ids], left)

    def _stacks(self) -> tuple[list[Action], list[Action]]:
        """The actions that are done and those that are undone, the newest last. An action without
        a change is none: its changes didn't fit on the disk."""
        begun: dict[int, Action] = {}
        done: list[Action] = []
        undone: list[Action] = []
        for do, action_id, line in self._heads():
            if do == "begin":
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    data = from_json(line)
                    begun[action_id] = Action(data["what"], data["params"], action_id, data["at"])
            elif do == "change" and action_id in begun:
                # A new change ends the possibility to redo.
                undone.clear()
                done.append(begun.pop(action_id))
            elif do in ("undo", "redo"):
                source, target = (done, undone) if do == "undo" else (undone, done)
                if source and source[-1].id == action_id:
                    target.append(source.pop())
                    target[-1].undone = do == "undo"
        return done, undone

    def _heads(self) -> Iterator[tuple[str, int, bytes]]:
        """(`do`, `id`, line) of each whole line: parsing most of them would be wasted time."""
        with contextlib.suppress(FileNotFoundError), open(self.file, "rb") as file:
            for line in file:
                if (match := _HEAD.match(line)) and line.endswith(b"}\n"):
                    yield match[1].decode(), int(match[2]), line

    # --- lines ---

    def _line(self, do: str, action_id: int, **more: Any) -> str:
        """A line of the journal. `do` and `id` come first: _HEAD finds lines by them."""
        return json.dumps({"do": do, "id": action_id, **more}, ensure_ascii=False,
                          separators=(",", ":"))

    def _append(self, lines: Iterable[str]) -> None:
        try:
            append_line(self.file, "\n".join(lines))
            with open(self.file, "rb+") as file:
                # Otherwise a power cut could keep the changed files and lose the journal.
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(error, self.file) from error

    def _append_swaps(self, do: str, action_id: int, swaps: Iterable[Swap]) -> None:
        lines = []
        for swap in swaps:
            file = swap.place.file
            # Relative, as the folder may be opened through a link next time.
            inside = file.is_relative_to(self.folder)
            lines.append(self._line(
                do, action_id, picture=swap.picture, kind=swap.place.kind, row=swap.place.row,
                file=file.relative_to(self.folder).as_posix() if inside else str(file),
                before=_pack(swap.before), after=_pack(swap.after)))
        self._append(lines)

    def _compact(self) -> None:
        if not self.file.exists() or self.file.stat().st_size <= self.most_bytes:
            return
        done, undone = self._stacks()
        sizes: Counter[int] = Counter()
        for _, action_id, line in self._heads():
            sizes[action_id] += len(line)
        remaining = [action.id for action in (*done, *reversed(undone))]
        # The oldest first; the newest action stays, however large it is.
        while len(remaining) > 1 and (
                sum(sizes[action_id] for action_id in remaining) > self.most_bytes // 2):
            remaining.pop(0)
        starts = tuple(f'{{"do":"{do}","id":{action_id},'.encode() for action_id in remaining
                       for do in ("begin", "change", "left"))
        try:
            with paths.atomic(self.file) as temporary, open(temporary, "wb") as new, \
                    open(self.file, "rb") as old:
                new.writelines(line for line in old
                               if line.startswith(starts) and line.endswith(b"\n"))
                # Earlier undo lines are dropped; these undo the same actions in the same order.
                new.writelines(self._line("undo", action.id).encode() + b"\n"
                               for action in undone if action.id in remaining)
        except OSError as error:
            raise cannot_write(error, self.file) from error


def _pack(content: bytes | None) -> str | dict[str, str] | None:
    """Text as it is; bytes of another encoding than UTF-8 in base64, so that none is lost."""
    try:
        return None if content is None else content.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content or b"").decode()}


def _unpack(packed: Any) -> bytes | None:
    if isinstance(packed, dict):
        return base64.b64decode(packed["base64"])
    return None if packed is None else str(packed).encode("utf-8")

