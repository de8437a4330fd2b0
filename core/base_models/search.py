"""Finds base models on this machine: in our folder, other programs' folders, the hub's cache.

Only headers and small JSON files are read, within limits of time and depth. Without torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import string
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from core import families, i18n, paths
from core.base_models import catalog
from core.errors import UserError
from core.families import detection
from core.safetensors_header import PICKLES

SECONDS = 20.0                          # for one search
DEPTH = 4                               # folders below a place that holds models
LEAST = 20_000_000                      # bytes; smaller files are no base models
APPS = re.compile(r"webui|comfyui|fooocus|stability ?matrix|forge|sd\.?next|swarmui|automatic",
                  re.IGNORECASE)
INSIDE = ("models/Stable-diffusion", "models/StableDiffusion", "models/checkpoints",
          "Models/Stable-Diffusion", "Models/StableDiffusion", "Data/Models/StableDiffusion")
# kinds of files that lie beside base models and are not worth a line in a list
PARTS = frozenset(("lora", "unknown", "part_folder", *(what for what, _ in detection.PARTS)))


@dataclass(frozen=True, slots=True)
class Found:
    """A file or model folder that was found."""

    path: Path
    family: str                         # a key of families.SPECS; "": none of these
    mb: int                             # 10^6 bytes
    # why it can't be trained, a key of strings/*/model_search.yaml; "": it can
    reason: str = ""
    # what it is, a key of strings/*/families.yaml after "is_"
    what: str = ""

    def why(self, language: str) -> str:
        """The reason as a sentence."""
        kind = i18n.tr(f"families.is_{self.what}", lang=language) if self.what else ""
        return i18n.tr(f"model_search.{self.reason}", {"what": kind}, language)


def search(folders: Iterable[Path], seconds: float = SECONDS, depth: int = DEPTH
           ) -> Iterator[Found]:
    """The base models below the folders, each once, without LoRAs, VAEs and the like. Ends early
    when the time is over. Files that can't be read are skipped."""
    until, seen = time.monotonic() + seconds, set[str]()
    for folder in folders:
        for path in _candidates(folder, depth, seen, until):
            with contextlib.suppress(OSError, UserError):
                if model := look(path):
                    yield model


def look(path: Path) -> Found | None:
    """What a file or folder is; None: no base model. Raises UserError for a malformed file."""
    is_folder = path.is_dir()
    if not is_folder and path.suffix.lower() in PICKLES:
        return Found(path, "", round(path.stat().st_size / 1e6), "pickle")
    try:
        base = detection.identify(path)
    except UserError as fault:
        if fault.code == "families.not_a_folder":
            return None
        raise
    if base.what in PARTS:
        return None
    reason = ""
    if is_folder:
        # diffusers' layout: each part's weights lie in its own folder
        files = [file for file in path.glob("*/*") if file.suffix in (".safetensors", ".bin")]
        safe = [file for file in files if file.suffix == ".safetensors"]
        mb = round(sum(file.stat().st_size for file in safe or files) / 1e6)
        if not safe:
            reason = "pickle" if files else "no_weights"
    else:
        mb = round(path.stat().st_size / 1e6)
    if base.family not in families.SPECS:
        reason = "other"
    return Found(path, base.family, mb, reason, base.what)


def usual_places(extra: Sequence[str] = ()) -> list[Path]:
    """Folders to search: the user's own (`extra`) first, then those of ours, of the hub's cache
    and of other programs that exist."""
    from huggingface_hub.constants import HF_HUB_CACHE
    # each snapshot of the hub's cache lies three folders below
    folders = [*(paths.expanded(folder) for folder in extra if folder.strip()),
               catalog.models_dir(), Path(HF_HUB_CACHE),
               *(root / inner for root in installed() for inner in INSIDE)]
    # A folder under two names counts once, by its first name: the last one written wins in a dict.
    existing = {os.path.realpath(folder): folder for folder in reversed(folders) if folder.is_dir()}
    return list(reversed(existing.values()))


def installed() -> Iterator[Path]:
    """Folders in the usual places that are named as other programs are, and the folders in them:
    portable builds lie one deeper."""
    home = Path.home()
    if os.name == "nt":
        data = Path(platformdirs.user_data_dir(roaming=True)).parent
        drives = [Path(f"{letter}:\\") for letter in string.ascii_uppercase
                  if os.path.exists(f"{letter}:\\")]
    else:
        data, drives = Path(platformdirs.user_data_dir()), [Path("/opt")]
    inner = [drive / name for drive in drives for name in ("AI", "ai", "SD", "Stable Diffusion")]
    named = [home / name for name in ("Desktop", "Documents", "Downloads", "AI", "ai", "apps",
                                      "git", "src", "Projects")]
    for parent in (home, *named, data, Path(platformdirs.user_documents_dir()), *drives, *inner):
        for app in (folder for folder in _folders(parent) if APPS.search(folder.name)):
            yield from (app, *_folders(app))


# --- walking ---

def _candidates(folder: Path, depth: int, seen: set[str], until: float) -> Iterator[Path]:
    """Model folders and large enough weight files. Links are followed, each folder once."""
    # by the real path, as links may lead in a circle
    real = os.path.realpath(folder)
    if real in seen or time.monotonic() > until:
        return
    seen.add(real)
    if (folder / "model_index.json").is_file():
        yield folder
        return
    inner = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name.casefold()):
            if entry.is_dir() and not entry.name.startswith("."):
                inner.append(folder / entry.name)
            elif Path(entry.name).suffix.lower() in {".safetensors", ".ckpt"}:
                # a broken link has no size
                with contextlib.suppress(OSError):
                    if entry.stat().st_size >= LEAST:
                        yield folder / entry.name
    for subfolder in inner if depth else ():
        yield from _candidates(subfolder, depth - 1, seen, until)


def _folders(parent: Path) -> list[Path]:
    """The folders in a folder, in order of name, without hidden ones. A folder that can't be read
    has none."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        # $RECYCLE.BIN and the like on Windows
        return sorted(parent / entry.name for entry in entries
                      if not entry.name.startswith((".", "$")) and entry.is_dir())
    return []
