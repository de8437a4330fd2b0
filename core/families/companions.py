"""The files beside a single-file base: its VAE, its text encoders, the tokenizers that the app
can't ship.

They are looked for where people and ComfyUI put them: in the base's folder, in one named like the
base, and in `vae`, `text_encoders`, `clip` and `tokenizers` in or beside the base's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from core import paths, words
from core.families.detection import identify
from core.faults import Fault
from core.reading import from_json
from core.safetensors_header import read_header

FOLDERS = ("vae", "text_encoders", "clip", "tokenizers", "tokenizer")
VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")


def folders(source: Path) -> list[Path]:
    """Those that exist, the nearest first."""
    near = [source.parent / source.stem, source.parent]
    wanted = [*near, *(folder / name for folder in (*near, source.parent.parent)
                       for name in FOLDERS), paths.data_dir() / "tokenizers"]
    return [folder for folder in dict.fromkeys(wanted) if folder.is_dir()]


def find_file(source: Path, what: str, width: int = 0) -> Path | None:
    """A .safetensors file that is `what` (a word of core/families/detection.py); `width`: of a
    language model's words, which come in several sizes."""
    for folder in folders(source):
        for path in sorted(folder.glob("*.safetensors")):
            if path != source and _is(path, what) and _is_wide(path, width):
                return path
    return None


def _is(path: Path, what: str) -> bool:
    try:
        return identify(path).what == what
    except Fault:
        return False


def _is_wide(path: Path, width: int) -> bool:
    words = [info.shape for name, info in read_header(path).tensors.items()
             if name.endswith("embed_tokens.weight")] if width else []
    return all(shape[-1:] == (width,) for shape in words)


def missing(source: Path, what: str) -> Fault:
    return Fault("families.companion_missing", path=source, folder=source.parent,
                 part=words.say(f"families.is_{what}"))


def find_tokenizer(source: Path, kinds: tuple[str, ...], title: str) -> Path:
    """A tokenizer's folder whose tokenizer_config.json names one of `kinds` (T5Tokenizer ...).
    Raises Fault where none is there."""
    for folder in _tokenizers(source):
        try:
            told = from_json((folder / "tokenizer_config.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if str(told.get("tokenizer_class", "")).removesuffix("Fast") in kinds:
            return folder
    raise Fault("families.tokenizer_missing", path=source, title=title, folder=source.parent,
                shared=paths.data_dir() / "tokenizers")


def _tokenizers(source: Path) -> Iterator[Path]:
    for folder in folders(source):
        for one in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
            if any((one / name).is_file() for name in VOCABULARIES):
                yield one
