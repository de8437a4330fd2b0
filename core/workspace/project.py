"""A project: folder, trigger word, preset and own edits; on disk, so that no page holds any state.

projects/<name>.yaml in the data folder, one small file each. What is trained is
family default -> preset -> suggestion, if applied -> own edits (core/workspace/presets.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from core import paths, serialization
from core.config import TrainConfig
from core.config.flat_yaml import usable
from core.errors import UserError
from core.workspace import presets

FIRST = "my-lora"


class Project(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = FIRST
    preset: str = ""                     # file name of a preset, without suffix; "": none
    purpose: str = presets.PURPOSE
    edits: dict[str, Any] = {}           # TrainConfig keys that the user set
    invalid: dict[str, str] = {}         # values that can't be used, by key, as typed
    advised: dict[str, Any] = {}         # values of the suggestion that was applied
    run: str = ""                        # id of the run that is shown; "": the form is
    inference: dict[str, Any] = {}       # the last prompt, seed, ...
    tabs: dict[str, dict[str, Any]] = {}     # the state of other tabs, by tab

    def data(self, output: Path) -> dict[str, Any]:
        """The config's data. LoRAs go to a folder in `output` unless an edit says otherwise."""
        edits = {"output_dir": str(output / self.name), "output_name": self.name} | self.edits
        preset = self.chosen()
        if preset is None:
            return dict(self.advised) | edits
        return presets.apply(preset, edits, self.advised)

    def config(self, output: Path) -> TrainConfig:
        return TrainConfig.model_validate(self.data(output))

    def chosen(self) -> presets.Preset | None:
        """The preset, if it is still there and belongs to the base."""
        if not self.preset:
            return None
        try:
            family = presets.family_of(str(self.edits.get("base_model", "")),
                                       family=str(self.edits.get("family", "auto")))
            return next((preset for preset in presets.list_presets(family=family)
                         if preset.slug == self.preset), None)
        except UserError:
            return None

    def state(self, tab: str, **usual: Any) -> dict[str, Any]:
        """A tab's values, the usual ones for what it lacks. Values of another type don't count:
        the file may have been edited by hand."""
        kept = self.tabs.get(tab, {})
        return {key: kept[key] if isinstance(kept.get(key), type(value)) else value
                for key, value in usual.items()}

    def sources(self) -> dict[str, str]:
        """Who decides a key: own | advised | preset. Other keys have their defaults."""
        preset = self.chosen()
        below = presets.sets(preset, self.advised | self.edits) if preset else ()
        return (dict.fromkeys(below, "preset") | dict.fromkeys(self.advised, "advised")
                | dict.fromkeys(self.edits, "own"))


class Projects:
    """The projects on disk and the one that is open. Safe to share between threads."""

    def __init__(self, name: str = "") -> None:
        self.version = 0
        self.broken: UserError | None = None     # the last file that couldn't be read
        self._lock = threading.RLock()
        known = self.names()
        self.now = self._read(name if name in known else known[0] if known else FIRST)

    def names(self) -> list[str]:
        return sorted((path.stem for path in _folder().glob("*.yaml")), key=str.casefold)

    def open(self, name: str) -> Project:
        """Opens a project, or makes a new one of this name. Raises UserError for a bad name."""
        name = checked_name(name)
        with self._lock:
            self.now, self.version = self._read(name), self.version + 1
            return self.now

    def change(self, **changes: Any) -> Project:
        return self.update(lambda project: project.model_copy(update=changes))

    def edit(self, **edits: Any) -> Project:
        """Edits keys of the config; None takes an edit back. Raises ValidationError where the
        config would be wrong, and changes nothing then."""
        def edited(project: Project) -> Project:
            new = {key: value for key, value in (project.edits | edits).items()
                   if value is not None}
            TrainConfig.model_validate(new)
            invalid = {key: raw for key, raw in project.invalid.items() if key not in edits}
            return project.model_copy(update={"edits": new, "invalid": invalid})
        return self.update(edited)

    def refuse(self, key: str, raw: str) -> Project:
        """Stores a value that can't be used, so that every page shows what was typed."""
        return self.update(lambda project: project.model_copy(
            update={"invalid": project.invalid | {key: raw}}))

    def update(self, change: Callable[[Project], Project]) -> Project:
        """Changes the open project and writes it where it differs."""
        with self._lock:
            new = change(self.now)
            if new != self.now:
                _write(new)
                self.now, self.version = new, self.version + 1
            return new

    def _read(self, name: str) -> Project:
        """What can be used of a project's file. A damaged one is renamed, so that it is not lost
        with the next change."""
        file = _folder() / f"{name}.yaml"
        project, reason = Project(name=name), ""
        try:
            data = serialization.from_yaml(file.read_text("utf-8"))
            project, reason = usable(Project, {**data, "name": name})
            project, wrong = _checked(project)
            reason = reason or wrong
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
        if reason:
            self.broken = UserError("window.project_broken", file=file, reason=reason, name=name,
                                    aside=paths.set_aside(file).name)
            with contextlib.suppress(OSError):
                _write(project)
        return project


def _checked(project: Project) -> tuple[Project, str]:
    """The project without edits that no config can have, and what is wrong with them: with one of
    them no other could be made. What was meant for a field stands there as typed."""
    config, reason = usable(TrainConfig, project.advised | project.edits)
    if not reason:
        return project, ""
    kept = config.model_fields_set
    typed = {key: str(value) for key, value in project.edits.items()
             if key in TrainConfig.model_fields and key not in kept}
    return project.model_copy(update={
        "edits": {key: value for key, value in project.edits.items() if key in kept},
        "advised": {key: value for key, value in project.advised.items() if key in kept},
        "invalid": typed | project.invalid}), reason


def _write(project: Project) -> None:
    data = project.model_dump(exclude_defaults=True) | {"name": project.name}
    paths.write_atomic(_folder() / f"{project.name}.yaml", serialization.to_yaml(data))


def checked_name(name: str) -> str:
    """The name, if every file system can keep it and it is no path. Raises UserError."""
    plain = " ".join(name.split()).strip(". ")
    if len(plain) > 60 or not paths.is_file_name(plain) or plain != name.strip():
        raise UserError("gui.bad_name", name=" ".join(name.split()))
    return plain


def _folder() -> Path:
    return paths.data_dir() / "projects"
