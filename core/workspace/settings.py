"""The user's settings: settings.yaml in the data folder, small and readable. Without torch."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, Literal

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from core import i18n, paths, serialization
from core.errors import UserError

FILE = "settings.yaml"
Theme = Literal["auto", "light", "dark"]


class Settings(BaseModel):
    """Unknown keys are kept: they may be a newer version's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    language: Literal["", "en", "zh-CN"] = ""      # "": the system's
    theme: Theme = "auto"
    project: str = ""                               # the one that was open last
    output_root: str = ""                           # where LoRAs go; "": see `output_folder`
    welcomed: bool = False                          # the first start has been seen
    exports: dict[str, str] = {}                    # program -> folder that took a LoRA last
    first_step: int = 0                             # of it, 1..3; 0: as long as nothing was trained
    model_folders: list[str] = []                   # searched for bases beside the usual ones
    mirror: str = ""                                # of the model hub; "": the hub itself

    @property
    def spoken(self) -> str:
        return self.language or i18n.language()

    @property
    def output_folder(self) -> Path:
        """LoRAs are the user's own files: they belong where documents are found."""
        if self.output_root:
            return Path(self.output_root).expanduser()
        if paths.data_dir() == Path(platformdirs.user_data_dir(paths.APP, appauthor=False)):
            return Path(platformdirs.user_documents_dir()) / paths.APP
        return paths.data_dir() / "output"          # a portable install keeps together


class SettingsFile:
    """Safe to share between threads. What of the file can't be used counts as not set; such a file
    is put aside before anything is written, and `broken` tells of it."""

    def __init__(self) -> None:
        self.version = 0
        self.broken: UserError | None = None
        self._lock = threading.Lock()
        self._settings, reason = _load()
        if reason:
            file = paths.data_dir() / FILE
            self.broken = UserError("window.settings_broken", file=file, reason=reason,
                                    aside=paths.set_aside(file).name)
            with contextlib.suppress(OSError):
                write(self._settings)

    @property
    def now(self) -> Settings:
        return self._settings

    def change(self, **changes: Any) -> Settings:
        """Writes through. Raises ValidationError for what no setting can be."""
        with self._lock:
            new = Settings.model_validate(self._settings.model_dump() | changes)
            if new != self._settings:
                write(new)
                self._settings, self.version = new, self.version + 1
            return new


def read() -> Settings:
    return _load()[0]


def _load() -> tuple[Settings, str]:
    """The settings, and what is wrong with their file; "": nothing."""
    try:
        found = serialization.from_yaml((paths.data_dir() / FILE).read_text("utf-8"))
        found = {} if found is None else found
        if not isinstance(found, dict):
            return Settings(), "line 1: not `key: value`"
    except FileNotFoundError:
        return Settings(), ""
    except (OSError, ValueError) as error:
        return Settings(), str(error)
    try:
        return Settings.model_validate(found), ""
    except ValidationError as error:
        wrong = {one["loc"][0] for one in error.errors() if one["loc"]}
        first = error.errors()[0]
        kept = {key: value for key, value in found.items()
                if isinstance(key, str) and key not in wrong}
        return (Settings.model_validate(kept),
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def write(settings: Settings) -> None:
    text = yaml.safe_dump(settings.model_dump(exclude_defaults=True), allow_unicode=True,
                          sort_keys=False)
    paths.write_atomic(paths.data_dir() / FILE, text)
