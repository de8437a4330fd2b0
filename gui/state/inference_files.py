"""What the Inference tab knows beside the project: LoRA files and their headers, the pictures that
were drawn and those deleted, which one is shown large. One for all pages; nothing of it is kept."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import paths
from core.dataset import import_files
from core.errors import UserError
from core.inference import trash
from core.jobs.runs import JobView
from core.lora_files import files as lora_file
from core.lora_files import library
from core.lora_files.export import Place, convert_to, copy_to, find_places, fits
from gui.state.app_state import AppState, Snapshot, pictures_folder

LOOK_S = 10.0                           # between two looks at the folders of LoRAs
MOST_FILES = 500
PER_PAGE = 24


class InferenceFiles:
    """Every method may be called from any thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.open = ""                  # 'run/number' of the picture that is shown large
        self.page = 0                   # of the gallery
        self.dropped: lora_file.Info | None = None      # the LoRA that was dropped last
        self.said = ""                  # where the last export went
        self.places: list[Place] | None = None          # other programs; None: not looked yet
        self.deleted: list[tuple[Path, Path]] = []      # where it is, where it was; newest last
        self._changed = changed
        self._files: tuple[float, str, tuple[Path, ...]] = (0.0, "", ())
        self._infos: dict[tuple[str, int, int], lora_file.Info | None] = {}
        self._pictures: tuple[Any, list[tuple[JobView, int]]] = ((), [])
        self._lock = threading.Lock()

    def show(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        self._changed()

    # --- LoRA files ---

    def files(self, output: Path) -> tuple[Path, ...]:
        """Those in the output folder and those that were dropped; looked for now and then."""
        looked, where, found = self._files
        if where != str(output) or time.monotonic() - looked > LOOK_S:
            with contextlib.suppress(OSError):
                known = library.files_by_name([dropped_folder(), output])
                found = tuple(known.values())[:MOST_FILES]
            self._files = (time.monotonic(), str(output), found)
        return found

    def look_again(self) -> None:
        self._files = (0.0, "", ())

    def info(self, path: Path) -> lora_file.Info | None:
        """What a file is, by its header; None where it is no safetensors file (any more)."""
        try:
            facts = path.stat()
            key = (str(path), facts.st_mtime_ns, facts.st_size)
            if key not in self._infos:
                self._infos[key] = lora_file.describe(path)
            return self._infos[key]
        except (OSError, UserError):
            return None

    def take(self, file: Path, kind: str) -> lora_file.Info:
        """A copy of a LoRA that was dropped, as uploads don't last. Raises UserError where it is no
        LoRA for the base, whose family is `kind`; empty: one that takes any."""
        if kind:
            library.checked(file, kind)
        clean = file.with_name(f"{import_files.clean(file.stem)}.safetensors")
        if clean != file:
            file = file.rename(clean)
        copy = copy_to(file, dropped_folder())
        self.look_again()
        self.dropped = lora_file.describe(copy)
        return self.dropped

    # --- pictures ---

    def pictures(self, snap: Snapshot) -> list[tuple[JobView, int]]:
        """Drawings of this project that are still there: newest first, each with its number."""
        drawings = [view for view in snap.runs if view.samples and is_of(view, snap)]
        key = (tuple((view.id, len(view.samples)) for view in drawings), len(self.deleted))
        if self._pictures[0] != key:
            found = [(view, number) for view in drawings
                     for number in reversed(range(len(view.samples)))
                     if Path(view.samples[number].path).is_file()]
            self._pictures = (key, found)
        return self._pictures[1]

    def delete(self, file: Path) -> None:
        with self._lock:
            self.deleted.append((trash.discard(file), file))
        self._changed()

    def undelete(self) -> None:
        """Brings back what was deleted last."""
        with self._lock:
            if not self.deleted:
                return
            trash.restore(*self.deleted[-1])
            self.deleted.pop()
        self._changed()

    # --- other programs ---

    def look_for_places(self) -> None:
        """Once, in a thread: a network drive may take its time."""
        if self.places is None:
            self.places = []
            threading.Thread(target=self._find_places, name="places", daemon=True).start()

    def export(self, file: Path, program: str, folder: Path, told: Callable[..., str],
               language: str) -> None:
        """A copy at once, or a conversion in a thread; `said` tells how it went. `told`: makes a
        sentence of a key, or of a fault's code, with parameters."""
        if fits(file, program):
            self.show(said=told("tab_inference.exported", file=copy_to(file, folder)))
            return

        def work() -> None:
            try:
                copy = convert_to(file, program, folder, language)
                self.show(said=told("tab_inference.exported", file=copy))
            except (UserError, OSError, subprocess.TimeoutExpired) as error:
                fault = error if isinstance(error, UserError) else UserError(
                    "tab_inference.not_converted", file=file.name, reason=error)
                self.show(said=told(fault.code, **fault.params))
        self.show(said=told("tab_inference.converting", file=file.name))
        threading.Thread(target=work, name="export", daemon=True).start()

    def _find_places(self) -> None:
        self.places = find_places()
        self._changed()


def dropped_folder() -> Path:
    return paths.data_dir() / "loras"


def is_of(view: JobView, snap: Snapshot) -> bool:
    """A drawing of this project."""
    return (view.job == "generate"
            and view.config.get("out") == str(pictures_folder() / snap.project.name))


# --- of a house ---

_DESKS: weakref.WeakKeyDictionary[AppState, InferenceFiles] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def desk_of(app_state: AppState) -> InferenceFiles:
    """The one desk of all pages."""
    with _making:
        if app_state not in _DESKS:
            seen = weakref.ref(app_state)
            _DESKS[app_state] = InferenceFiles(lambda: _poke(seen()))
        return _DESKS[app_state]


def _poke(app_state: AppState | None) -> None:
    if app_state is not None:
        app_state.touch()
