"""Base models that lie on this machine: in our folder, other programs' folders, the hub's cache.

Only headers and small JSON files are read, within bounds of time and depth. Without torch.
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

from core import families, i18n
from core.base_models import catalog
from core.errors import UserError
from core.families import detection
from core.safetensors_header import PICKLES

SECONDS = 20.0                          # for one search
DEPTH = 4                               # folders below a place that holds models
LEAST = 20_000_000                      # bytes; what is smaller is no base
APPS = re.compile(r"webui|comfyui|fooocus|stability ?matrix|forge|sd\.?next|swarmui|automatic",
                  re.IGNORECASE)
INSIDE = ("models/Stable-diffusion", "models/StableDiffusion", "models/checkpoints",
          "Models/Stable-Diffusion", "Models/StableDiffusion", "Data/Models/StableDiffusion")
# What lies beside bases and is none; not worth a line in a list.
PARTS = frozenset(("lora", "unknown", "part_folder", *(what for what, _ in detection.PARTS)))


@dataclass(frozen=True, slots=True)
class Found:
    """One file or model folder. `reason` "": it can be trained; else a key of
    strings/*/model_search.yaml."""

    path: Path
    family: str                         # a key of families.SPECS; "": none of these
    mb: int                             # 10^6 bytes
    reason: str = ""
    what: str = ""                      # a key of strings/*/families.yaml, after "is_"

    def why(self, language: str) -> str:
        """The reason as a sentence."""
        kind = i18n.tr(f"families.is_{self.what}", lang=language) if self.what else ""
        return i18n.tr(f"model_search.{self.reason}", {"what": kind}, language)


def search(folders: Iterable[Path], seconds: float = SECONDS, depth: int = DEPTH
           ) -> Iterator[Found]:
    """Bases below the folders, each once; LoRAs, VAEs and the like are left out. Ends early when
    the time is over; what can't be read is passed over."""
    until, seen = time.monotonic() + seconds, set[str]()
    for folder in folders:
        for path in _candidates(folder, depth, seen, until):
            with contextlib.suppress(OSError, UserError):
                if found := look(path):
                    yield found


def look(path: Path) -> Found | None:
    """What a file or folder is; None: no base. Raises UserError where a file is malformed."""
    is_folder = path.is_dir()
    if not is_folder and path.suffix.lower() in PICKLES:
        return Found(path, "", round(path.stat().st_size / 1e6), "pickle")
    try:
        found = detection.identify(path)
    except UserError as fault:
        if fault.code == "families.not_a_folder":
            return None
        raise
    if found.what in PARTS:
        return None
    mb, reason = _weights(path) if is_folder else (round(path.stat().st_size / 1e6), "")
    if found.family not in families.SPECS:
        reason = "other"
    return Found(path, found.family, mb, reason, found.what)


def usual_places(extra: Sequence[str] = ()) -> list[Path]:
    """The user's own folders first, then those that are there of all that we know."""
    own = [Path(one).expanduser() for one in extra if one.strip()]
    found = [*own, catalog.models_dir(), _hub_cache(),
             *(root / inner for root in installed() for inner in INSIDE)]
    there = {os.path.realpath(one): one for one in reversed(found) if one.is_dir()}
    return list(reversed(there.values()))


def installed() -> Iterator[Path]:
    """Folders named as other programs' are, in the usual places, and the folders within: portable
    builds lie one deeper."""
    for parent in _parents():
        for app in (one for one in _folders(parent) if APPS.search(one.name)):
            yield from (app, *_folders(app))


def _weights(folder: Path) -> tuple[int, str]:
    """-> 10^6 bytes, and what is wrong with them."""
    weights = [one for one in folder.glob("*/*") if one.suffix in (".safetensors", ".bin")]
    safe = [one for one in weights if one.suffix == ".safetensors"]
    mb = round(sum(one.stat().st_size for one in safe or weights) / 1e6)
    return mb, "" if safe else "pickle" if weights else "no_weights"


# --- walking ---

def _candidates(folder: Path, depth: int, seen: set[str], until: float) -> Iterator[Path]:
    """Model folders and large enough weight files; links are followed, each place once."""
    real = os.path.realpath(folder)
    if real in seen or time.monotonic() > until:
        return
    seen.add(real)
    if (folder / "model_index.json").is_file():
        yield folder
        return
    inner = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name.casefold()):
            if entry.is_dir() and not entry.name.startswith("."):
                inner.append(folder / entry.name)
            elif Path(entry.name).suffix.lower() in {".safetensors", ".ckpt"} and _large(entry):
                yield folder / entry.name
    for one in inner if depth else ():
        yield from _candidates(one, depth - 1, seen, until)


def _large(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        return entry.stat().st_size >= LEAST
    return False


def _folders(parent: Path) -> list[Path]:
    """Not hidden ones, in order of name; a folder that can't be read has none."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        return sorted(parent / one.name for one in entries
                      if not one.name.startswith((".", "$")) and one.is_dir())
    return []


def _parents() -> list[Path]:
    """Where people unpack such programs: home, its usual folders, and each drive."""
    home = Path.home()
    data = Path(platformdirs.user_data_dir(roaming=True)).parent if os.name == "nt" else (
        Path(platformdirs.user_data_dir()))
    drives = [Path(f"{letter}:\\") for letter in string.ascii_uppercase
              if os.path.exists(f"{letter}:\\")] if os.name == "nt" else [Path("/opt")]
    inner = [drive / name for drive in drives for name in ("AI", "ai", "SD", "Stable Diffusion")]
    named = [home / name for name in ("Desktop", "Documents", "Downloads", "AI", "ai", "apps",
                                      "git", "src", "Projects")]
    return [home, *named, data, Path(platformdirs.user_documents_dir()), *drives, *inner]


def _hub_cache() -> Path:
    """Each snapshot of the hub's cache lies three folders below."""
    from huggingface_hub.constants import HF_HUB_CACHE
    return Path(HF_HUB_CACHE)
