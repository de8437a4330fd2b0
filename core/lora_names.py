"""What a prompt's `<lora:name:0.8>` and `--lora name:0.8` mean: names, weights, files. No torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import lora_file, paths, words
from core.faults import Fault

DEFAULT_WEIGHT = 0.8
TAG = re.compile(r"<lora:([^:<>]+?)(?::([-+]?\d*\.?\d+))?>")
STATE = "state.safetensors"                 # of a checkpoint's folder: no LoRA
WORDS = "_emb.safetensors"                  # new words beside a LoRA
FOLDER = "adapter_config.json"              # of a LoRA that is a folder, as PEFT saves it


@dataclass(frozen=True, slots=True)
class Lora:
    path: Path
    weight: float


def split_prompt(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """'a cat <lora:ink:0.5>' -> ('a cat', [('ink', 0.5)]); the weight's default is 0.8."""
    found = [(m[1].strip(), float(m[2]) if m[2] else DEFAULT_WEIGHT)
             for m in TAG.finditer(prompt)]
    return re.sub(r"\s{2,}", " ", TAG.sub("", prompt)).strip(), found


def refuse_paths(names: Iterable[str]) -> None:
    """Of a prompt's tags: prompts are passed on, so they name and don't reach. Raises Fault."""
    for name in names:
        if not paths.is_file_name(name):
            raise Fault("generate.lora_path", name=name)


def parse_lora(text: str) -> tuple[str, float]:
    """'ink.safetensors:0.5' -> (name, weight). A colon of a Windows drive is no weight."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon and name else (text, DEFAULT_WEIGHT)
    except ValueError:
        return text, DEFAULT_WEIGHT


def find_lora(name: str, weight: float, folders: Sequence[Path] = ()) -> Lora:
    """A path, or a name looked up in `folders`, ./output and the finished runs' folders.

    Raises Fault `generate.unknown_lora` with the nearest names.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):        # no path of this system
        direct = Path(name).expanduser()
        for path in (direct, direct.with_name(f"{direct.name}.safetensors")):
            if path.is_file() or (path / FOLDER).is_file():
                return Lora(path.absolute(), weight)
    known = files_by_name([*folders, Path("output"), *_run_folders()])
    if name in known:
        return Lora(known[name], weight)
    raise unknown(name, known)


def files_by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """File name without suffix -> path, all folders below included; of the same name the first."""
    known: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("**/*.safetensors")) if folder.is_dir() else ():
            if path.name != STATE and not path.name.endswith(WORDS):
                known.setdefault(path.stem, path.absolute())
    return known


def unknown(name: str, known: Iterable[str]) -> Fault:
    names = list(known)
    close = words.nearest(name, names)
    return Fault("generate.unknown_lora", name=" ".join(name.split()),
                 nearest=", ".join(close) or ", ".join(names[:5]) or "-")


def checked(path: Path, family: str) -> lora_file.Info:
    """What a LoRA file is, by its header alone. Raises Fault where it is none, or of another
    family than the base; a family that the file doesn't tell passes."""
    info = lora_file.describe(path)
    if info.format in lora_file.NOT_LORA:
        raise Fault("lora_file.not_a_lora", file=path, what=info.format)
    if info.family not in ("unknown", family):
        raise Fault("generate.other_family", file=path, family=info.family, base=family)
    return info


def _run_folders() -> list[Path]:
    from core import runs
    folders = [Path(view.output_dir) for view in runs.list_runs() if view.output_dir]
    return list(dict.fromkeys(folders))
