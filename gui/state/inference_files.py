"""What the Inference tab knows beside the project: LoRA files and their headers, the pictures that
were drawn and those deleted, which one is shown large. One for all pages; nothing of it is kept."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
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
from gui.state.app_state import Context, Snapshot, pictures_folder

# Seconds between two looks at the folders of LoRAs.
LOOK_S = 10.0
MOST_FILES = 500
PER_PAGE = 24


class InferenceFiles:
    """Every method may be called from any thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        # 'run/number' of the picture that is shown large, and the page of the gallery.
        self.open = ""
        self.page = 0
        # The LoRA that was dropped last.
        self.dropped: lora_file.Info | None = None
        # What is told of the last export.
        self.message = ""
        # Folders of other programs; None: not looked for yet.
        self.places: list[Place] | None = None
        # Pictures that were deleted: where they are, where they were; the newest last.
        self.deleted: list[tuple[Path, Path]] = []
        self._changed, self._lock = changed, threading.Lock()
        # When it was looked for last, in which folder, and what was found.
        self._loras: tuple[float, str, tuple[Path, ...]] = (0.0, "", ())
        # By path, time of the last change and size: a file that changes is read anew.
        self._infos: dict[tuple[str, int, int], lora_file.Info | None] = {}
        # What the list was made of, and the list.
        self._pictures: tuple[Any, list[tuple[JobView, int]]] = ((), [])

    def show(self, **changes: Any) -> None:
        """Sets attributes, and has all pages painted."""
        for name, value in changes.items():
            setattr(self, name, value)
        self._changed()

    # --- LoRA files ---

    def loras(self, output: Path) -> tuple[Path, ...]:
        """Those in the output folder and those that were dropped; looked for now and then."""
        looked_at, folder, files = self._loras
        if folder != str(output) or time.monotonic() - looked_at > LOOK_S:
            # A drive that was pulled out: what was found last stays.
            with contextlib.suppress(OSError):
                by_name = library.files_by_name([dropped_folder(), output])
                files = tuple(by_name.values())[:MOST_FILES]
            self._loras = (time.monotonic(), str(output), files)
        return files

    def info(self, path: Path) -> lora_file.Info | None:
        """What a file is, by its header; None where it is no safetensors file (any more)."""
        try:
            stat = path.stat()
            key = (str(path), stat.st_mtime_ns, stat.st_size)
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
        copy = copy_to(file if clean == file else file.rename(clean), dropped_folder())
        self._loras = (0.0, "", ())
        self.dropped = lora_file.describe(copy)
        return self.dropped

    # --- pictures ---

    def pictures(self, snap: Snapshot) -> list[tuple[JobView, int]]:
        """Drawings of this project that are still there: newest first, each with its number."""
        drawings = [view for view in snap.runs if view.samples and is_of(view, snap)]
        key = (tuple((view.id, len(view.samples)) for view in drawings), len(self.deleted))
        if self._pictures[0] != key:
            self._pictures = (key, [
                (view, number) for view in drawings for number in reversed(range(len(view.samples)))
                if os.path.isfile(view.samples[number].path)])
        return self._pictures[1]

    def delete(self, file: Path) -> None:
        """Puts a picture into our own trash, from which `undelete` brings it back."""
        with self._lock:
            self.deleted.append((trash.discard(file), file))
        self._changed()

    def undelete(self) -> None:
        """Brings back what was deleted last."""
        with self._lock:
            if self.deleted:
                trash.restore(*self.deleted[-1])
                self.deleted.pop()
        self._changed()

    # --- other programs ---

    def look_for_places(self) -> None:
        """Once, in a thread: a network drive may take its time."""
        if self.places is None:
            self.places = []
            threading.Thread(target=lambda: self.show(places=find_places()), name="places",
                             daemon=True).start()

    def export(self, ctx: Context, file: Path, program: str, folder: Path) -> None:
        """A copy at once, or a conversion in a thread; `message` tells how it went."""
        if fits(file, program):
            self.show(message=ctx.tr("tab_inference.exported", file=copy_to(file, folder)))
            return

        def work() -> None:
            try:
                copy = convert_to(file, program, folder, ctx.language)
                self.show(message=ctx.tr("tab_inference.exported", file=copy))
            except UserError as error:
                self.show(message=ctx.error_text(error))
            except (OSError, subprocess.TimeoutExpired) as error:
                self.show(message=ctx.tr("tab_inference.not_converted", file=file.name,
                                         reason=error))
        self.show(message=ctx.tr("tab_inference.converting", file=file.name))
        threading.Thread(target=work, name="export", daemon=True).start()


def dropped_folder() -> Path:
    """Where LoRAs are copied that were dropped onto a page."""
    return paths.data_dir() / "loras"


def is_of(view: JobView, snap: Snapshot) -> bool:
    """Whether a run is a drawing of this project."""
    return (view.job == "generate"
            and view.config.get("out") == str(pictures_folder() / snap.project.name))
