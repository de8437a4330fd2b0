"""What an interrupted captioning job has already described: one file per job, in the data folder.

A description is valid for the captioner that made it (the file's key) and the picture's content.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from captioner.base import Description, Tag
from captioner.captions.edits import cannot_write
from captioner.captions.undo import state_dir
from core import hashes
from core.jobs.journal import append_line, tail_lines
from core.serialization import from_json


class Progress:
    def __init__(self, folder: Path, key: str, read_only: bool = False) -> None:
        """`folder`: the dataset's; `key`: of captioner and way of writing, as hex."""
        self.file = state_dir(folder) / f"progress-{key}.jsonl"
        self.read_only = read_only
        self.action = 0                     # its number in the history; 0: none yet
        # by picture name: size, mtime_ns, SHA-256, and the description
        self._remembered: dict[str, tuple[int, int, str, Description]] = {}
        for line in tail_lines(self.file, 0)[0]:
            # A damaged line costs one picture's description, not the job.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                data = from_json(line)
                if "action" in data:
                    self.action = int(data["action"])
                    continue
                tags = tuple(Tag(str(name), float(score), str(category))
                             for name, score, category in data["tags"])
                self._remembered[data["name"]] = (data["size"], data["mtime_ns"], data["sha256"],
                                                  Description(str(data["sentence"]), tags))

    def recall(self, name: str, picture: Path) -> Description | None:
        """The picture's description, or None if the file holds another picture by now."""
        if name not in self._remembered:
            return None
        size, mtime_ns, sha256, description = self._remembered[name]
        try:
            stat = picture.stat()
            # A hash takes long, so size and time are compared first.
            same = ((stat.st_size, stat.st_mtime_ns) == (size, mtime_ns)
                    or hashes.sha256(picture) == sha256)
        except OSError:
            return None
        return description if same else None

    def remember(self, name: str, picture: Path, description: Description) -> None:
        try:
            stat = picture.stat()
            self._append({"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns,
                          "sha256": hashes.sha256(picture), "sentence": description.sentence,
                          "tags": [[tag.name, tag.score, tag.category]
                                   for tag in description.tags]})
        except FileNotFoundError:           # deleted since it was read
            return

    def belongs_to(self, action: int) -> None:
        """Notes which action of the history the job writes to."""
        if action != self.action:
            self._append({"action": action})
            self.action = action

    def forget(self) -> None:
        """Deletes the file: the job is complete, and the next one starts anew."""
        if not self.read_only:
            self.file.unlink(missing_ok=True)

    def _append(self, data: dict[str, Any]) -> None:
        if self.read_only:
            return
        try:
            append_line(self.file, json.dumps(data, ensure_ascii=False))
        except OSError as error:
            raise cannot_write(error, self.file) from error
