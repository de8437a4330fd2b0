"""A LoRA file for other programs: where they keep theirs, and a copy there that replaces nothing.

A1111 and Forge read models/Lora, ComfyUI models/loras; all three read kohya's format.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from core import paths
from core.faults import Fault

PROGRAMS = {"a1111": ("models", "Lora"), "forge": ("models", "Lora"),
            "comfyui": ("models", "loras"), "diffusers": ()}
_NAMES = re.compile(r"webui|comfyui|stability ?matrix|forge|automatic", re.IGNORECASE)
_USUAL = ("Desktop", "Documents", "Downloads", "AI", "ai", "apps", "git", "src", "Projects")


@dataclass(frozen=True, slots=True)
class Place:
    program: str                            # a1111 | forge | comfyui
    folder: Path                            # the one that holds LoRAs


def find_places() -> list[Place]:
    """Installed programs in the usual places, two folders deep; what can't be read is passed
    over."""
    found: dict[str, Place] = {}
    for parent in _parents():
        for app in (one for one in _folders(parent) if _NAMES.search(one.name)):
            for root in (app, *_folders(app)):          # portable builds lie one folder deeper
                if place := place_of(root):
                    found.setdefault(os.path.realpath(place.folder), place)
    return list(found.values())


def place_of(root: Path) -> Place | None:
    """What is installed in a folder, told by the folders inside."""
    models = root / "models"
    if (models / "loras").is_dir() and (models / "checkpoints").is_dir():
        return Place("comfyui", models / "loras")
    if (models / "Stable-diffusion").is_dir():
        forge = "forge" in root.as_posix().lower() or (root / "modules_forge").is_dir()
        return Place("forge" if forge else "a1111", models / "Lora")
    return None


def target_folder(typed: str, program: str) -> Path:
    """The folder for LoRAs that a typed path means: a program's own folder, or one within it.
    Raises Fault where there is none."""
    folder = Path(typed.strip().strip('"')).expanduser()
    if not typed.strip() or not folder.is_absolute() or not folder.is_dir():
        raise Fault("tab_inference.no_folder", folder=typed.strip() or "-")
    inner = PROGRAMS[program]
    if inner and (folder / inner[0]).is_dir():
        return folder.joinpath(*inner)
    return folder


def copy_to(file: Path, folder: Path) -> Path:
    """-> the copy; a file that is there stays, the copy gets the next free name, unless it is the
    same file already. Raises Fault where it can't be written."""
    if not file.is_file():
        raise Fault("lora_file.missing", file=file, folder=file.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = free_name(file, folder)
        if not target.exists():
            with paths.atomic(target) as fresh:
                shutil.copyfile(file, fresh)
    except OSError as error:
        raise Fault("tab_inference.not_exported", folder=folder,
                    reason=error.strerror or error) from None
    return target


def free_name(file: Path, folder: Path) -> Path:
    """The file's own name or the next free one; the path of an equal file if one is there."""
    number, target = 1, folder / file.name
    while target.exists() and not filecmp.cmp(file, target, shallow=False):
        number += 1
        target = folder / f"{file.stem}-{number}{file.suffix}"
    return target


def _folders(parent: Path) -> list[Path]:
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        return sorted(parent / one.name for one in entries
                      if not one.name.startswith((".", "$")) and one.is_dir())
    return []


def _parents() -> Iterator[Path]:
    """Where people unpack such programs: home, its usual folders, and each drive."""
    home = Path.home()
    yield home
    yield from (home / name for name in _USUAL)
    yield Path(platformdirs.user_documents_dir())
    drives = [Path(f"{letter}:\\") for letter in string.ascii_uppercase] if os.name == "nt" else [
        Path("/opt")]
    for drive in drives:
        yield drive
        yield from (drive / name for name in ("AI", "SD", "Stable Diffusion"))
