"""What an interrupted captioning job has described already: one file per job, by what it does.

A description counts for the captioner that made it (the file's key) and the picture's content.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.base import Description, Tag
from captioner.captions.edits import cannot_write
from captioner.captions.undo import state_dir
from core import hashes
from core.jobs.journal import append_line, tail_lines
from core.serialization import from_json


@dataclass(frozen=True, slots=True)
class _Known:
    size: int
    mtime_ns: int
    sha256: str
    said: Description


class Progress:
    def __init__(self, folder: Path, key: str, read_only: bool = False) -> None:
        """`folder`: the dataset's; `key`: of captioner and way of writing, as hex."""
        self.file = state_dir(folder) / f"progress-{key}.jsonl"
        self.read_only = read_only
        self.action = 0                     # its number in the history; 0: none yet
        self._known: dict[str, _Known] = {}
        for line in tail_lines(self.file, 0)[0]:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._learn(from_json(line))

    def recall(self, name: str, picture: Path) -> Description | None:
        """What was said about this picture, unless it is another one by now."""
        known = self._known.get(name)
        if known is None:
            return None
        try:
            stat = picture.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (known.size, known.mtime_ns)
            return known.said if same or hashes.sha256(picture) == known.sha256 else None
        except OSError:
            return None

    def remember(self, name: str, picture: Path, said: Description) -> None:
        try:
            stat = picture.stat()
            self._append({"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
                          "sha256": hashes.sha256(picture), "sentence": said.sentence,
                          "tags": [[tag.name, tag.score, tag.category] for tag in said.tags]})
        except FileNotFoundError:           # deleted since it was read
            return

    def belongs_to(self, action: int) -> None:
        if action != self.action:
            self._append({"action": action})
            self.action = action

    def forget(self) -> None:
        """The job is complete: the next one starts anew."""
        if not self.read_only:
            self.file.unlink(missing_ok=True)

    def _learn(self, told: dict[str, Any]) -> None:
        if "action" in told:
            self.action = int(told["action"])
            return
        tags = tuple(Tag(name, float(score), category) for name, score, category in told["tags"])
        self._known[told["name"]] = _Known(told["size"], told["mtime_ns"], told["sha256"],
                                           Description(told["sentence"], tags))

    def _append(self, told: dict[str, Any]) -> None:
        if self.read_only:
            return
        try:
            append_line(self.file, json.dumps(told, ensure_ascii=False))
        except OSError as error:
            raise cannot_write(error, self.file) from error
