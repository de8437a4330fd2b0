"""The user's settings: settings.yaml in the data folder, small and readable. Without torch."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict

from core import i18n, paths, serialization
from core.config.flat_yaml import dump_yaml, usable
from core.errors import UserError

FILE = "settings.yaml"
Theme = Literal["auto", "light", "dark"]


class Settings(BaseModel):
    """Unknown keys are kept: they may be a newer version's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    language: Literal["", "en", "zh-CN"] = ""       # "": the system's
    theme: Theme = "auto"
    project: str = ""                               # the one that was open last
    # where LoRAs go; "": see `output_folder`
    output_root: str = ""
    # the first start has been seen
    welcomed: bool = False
    # program -> the folder to which a LoRA was exported last
    exports: dict[str, str] = {}
    # step of its guide, 1 to 3; 0: the guide ends by itself once something was trained
    first_step: int = 0
    # searched for base models beside the usual folders
    model_folders: list[str] = []
    # address of a mirror of the model hub; "": the hub itself
    mirror: str = ""

    @property
    def spoken(self) -> str:
        return self.language or i18n.language()

    @property
    def output_folder(self) -> Path:
        """Where LoRAs go: the setting, else the user's documents, as they are the user's files."""
        if self.output_root:
            return paths.expanded(self.output_root)
        if paths.data_dir() == Path(platformdirs.user_data_dir(paths.APP, appauthor=False)):
            return Path(platformdirs.user_documents_dir()) / paths.APP
        # DARKROOM_HOME is set: a portable install keeps everything in one folder
        return paths.data_dir() / "output"


class SettingsFile:
    """The settings and their file; safe to share between threads.

    A value that can't be used counts as not set. Such a file is renamed before anything is
    written, and `broken` says so.
    """

    def __init__(self) -> None:
        self.version = 0
        self.broken: UserError | None = None
        self._lock = threading.Lock()
        self.now, reason = _load()
        if reason:
            file = paths.data_dir() / FILE
            self.broken = UserError("window.settings_broken", file=file, reason=reason,
                                    aside=paths.set_aside(file).name)
            with contextlib.suppress(OSError):
                write(self.now)

    def change(self, **changes: Any) -> Settings:
        """Changes settings and writes the file. Raises ValidationError for a wrong value."""
        with self._lock:
            new = Settings.model_validate(self.now.model_dump() | changes)
            if new != self.now:
                write(new)
                self.now, self.version = new, self.version + 1
            return new


def read() -> Settings:
    """The settings as the file has them now."""
    return _load()[0]


def _load() -> tuple[Settings, str]:
    """The settings, and what is wrong with their file ("": nothing)."""
    try:
        data = serialization.from_yaml((paths.data_dir() / FILE).read_text("utf-8"))
    except FileNotFoundError:
        data = None
    except (OSError, ValueError) as error:
        return Settings(), str(error)
    if data is None:            # no file, or an empty one
        return Settings(), ""
    if not isinstance(data, dict):
        return Settings(), "line 1: not `key: value`"
    return usable(Settings, data)


def write(settings: Settings) -> None:
    paths.write_atomic(paths.data_dir() / FILE, dump_yaml(settings))
