"""A LoRA file for other programs: where they keep theirs, and a copy there that replaces nothing.

A1111 and Forge read models/Lora, ComfyUI models/loras; all three read kohya's format. Other
formats are converted by `darkroom lora convert`, in a child process: the window takes no torch.
docs/interop.md has the table of who reads what; tests/adapters/test_layer_keys.py proves it,
key by key.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from core import paths
from core.base_models import search
from core.errors import UserError
from core.families.registry import naming
from core.lora_files import files
from core.safetensors_header import read_header
from core.system import processes

PROGRAMS = {"a1111": ("models", "Lora"), "forge": ("models", "Lora"),
            "comfyui": ("models", "loras"), "diffusers": ()}
# Other formats are converted to the first.
READS = {"a1111": ("kohya",), "forge": ("kohya",), "comfyui": ("kohya", "comfyui"),
         "diffusers": ("diffusers", "peft", "diffusers-old")}
# What keys begin with in diffusers' files.
_PARTS = ("unet.", "transformer.", "text_encoder")
CONVERT_S = 300.0                           # a large file on a slow disk


@dataclass(frozen=True, slots=True)
class Place:
    program: str                            # a1111 | forge | comfyui
    folder: Path                            # the one that holds LoRAs


def find_places() -> list[Place]:
    """The LoRA folders of installed programs in the usual places."""
    places: dict[str, Place] = {}
    for root in search.installed():
        if place := place_of(root):
            # programs may share a folder by a link
            places.setdefault(os.path.realpath(place.folder), place)
    return list(places.values())


def place_of(root: Path) -> Place | None:
    """The program that is installed in a folder, recognised by the folders inside."""
    models = root / "models"
    if (models / "loras").is_dir() and (models / "checkpoints").is_dir():
        return Place("comfyui", models / "loras")
    if (models / "Stable-diffusion").is_dir():
        forge = "forge" in root.as_posix().lower() or (root / "modules_forge").is_dir()
        return Place("forge" if forge else "a1111", models / "Lora")
    return None


def target_folder(typed: str, program: str) -> Path:
    """The folder for LoRAs that a typed path means: a program's own folder, or one within it.
    Raises UserError where there is none."""
    folder = paths.expanded(typed.strip().strip('"'))
    if not typed.strip() or not folder.is_absolute() or not folder.is_dir():
        raise UserError("tab_inference.no_folder", folder=typed.strip() or "-")
    # the program's folder, or already the one for LoRAs
    inner = PROGRAMS[program]
    if inner and (folder / inner[0]).is_dir():
        return folder.joinpath(*inner)
    return folder


def reads(program: str, family: str) -> tuple[str, ...]:
    """The formats of a family's LoRA that a program reads.

    ComfyUI knows diffusers' names of transformers; of a UNet's attention only those before PEFT.
    It takes q, k and v for equally high there."""
    part = naming(family)[0]
    equal = all(len(set(rename.rows[:3])) == 1 for rename in part.renames)
    diffusers = program == "comfyui" and part.name == "transformer" and equal
    return (*READS[program], "diffusers") if diffusers else READS[program]


def fits(file: Path, program: str) -> bool:
    """Whether a program reads the file as it is. Raises UserError where it is no LoRA."""
    info = files.describe(file)
    if not info.is_lora:
        raise UserError("lora_file.not_a_lora", file=file, what=info.format)
    named = all(key.startswith(_PARTS) for key in read_header(file).tensors)
    format_ = "diffusers" if info.format == "peft" and named else info.format
    return format_ in reads(program, info.family)


def convert_to(file: Path, program: str, folder: Path, language: str) -> Path:
    """Like `copy_to`, but converts to the format that the program reads. Takes seconds."""
    with tempfile.TemporaryDirectory(dir=paths.cache_dir(), prefix="export-") as temporary:
        converted = Path(temporary) / file.name
        process = subprocess.run(
            processes.command("lora", "convert", str(file), "--to", READS[program][0],
                              "--out", str(converted)),
            env=processes.environment(DARKROOM_LANG=language), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=CONVERT_S,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
        if process.returncode or not converted.is_file():
            # the last line is the fault, those before it are notes
            lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            raise UserError("tab_inference.not_converted", file=file.name,
                            reason=lines[-1] if lines else f"exit code {process.returncode}")
        return copy_to(converted, folder)


def copy_to(file: Path, folder: Path) -> Path:
    """Copies a LoRA into a folder under the next free name. -> the copy, or the file that is there
    already with the same content. Raises UserError where it can't be written."""
    if not file.is_file():
        raise UserError("lora_file.missing", file=file, folder=file.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return paths.create(folder / file.name, lambda fresh: shutil.copyfile(file, fresh),
                            once=True)
    except OSError as error:
        raise UserError("tab_inference.not_exported", folder=folder,
                        reason=error.strerror or error) from None
