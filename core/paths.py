"""Where things live, in a source checkout and in a frozen app alike; and atomic writes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs

APP = "LoRA Darkroom"
ROOT = Path(getattr(sys, "_MEIPASS", Path(__file__).resolve().parent.parent))
PRESETS = ROOT / "presets"
DEMO = PRESETS / "demo"
_SUFFIXES = {".safetensors", ".yaml", ".yml"}
_NO_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]')
_DEVICE = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]", re.IGNORECASE)
FAMILY_CONFIGS = ROOT / "core" / "families" / "configs"
TOKENIZERS = ROOT / "core" / "families" / "tokenizers"   # that families share


def data_dir() -> Path:
    """Runs and settings. DARKROOM_HOME moves everything (tests, portable installs)."""
    home = os.environ.get("DARKROOM_HOME")
    return Path(home) if home else Path(platformdirs.user_data_dir(APP, appauthor=False))


def cache_dir() -> Path:
    home = os.environ.get("DARKROOM_HOME")
    return (Path(home) / "cache" if home
            else Path(platformdirs.user_cache_dir(APP, appauthor=False)))


def log_dir() -> Path:
    """Of the program itself; each run's log lies in its own folder."""
    home = os.environ.get("DARKROOM_HOME")
    return (Path(home) / "logs" if home
            else Path(platformdirs.user_log_dir(APP, appauthor=False)))


def runs_dir() -> Path:
    return data_dir() / "runs"


def is_file_name(name: str) -> bool:
    """A name that every system takes for a file of the folder it is put in: no path, no device of
    Windows (CON, NUL, COM1 ...), nothing that gets lost at the end."""
    return bool(name) and len(name.encode("utf-8", "replace")) <= 200 and not (
        _NO_NAME.search(name) or name[-1] in " ." or _DEVICE.fullmatch(name.split(".")[0].strip()))


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed over `path`.

    After a crash at any moment `path` holds either its old content or its whole new content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def free(path: Path) -> Path:
    """`path`, or the next free name beside it: a-2.safetensors. A folder's dots are no suffix."""
    stem, suffix = ((path.stem, path.suffix) if path.suffix.lower() in _SUFFIXES
                    else (path.name, ""))
    number, found = 1, path
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{stem}-{number}{suffix}")
    return found


def set_aside(path: Path) -> Path:
    """A file of ours that can't be read gets out of the way, never lost: x.yaml.broken."""
    aside = free(path.with_name(path.name + ".broken"))
    with contextlib.suppress(OSError):
        os.replace(path, aside)
    return aside


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    if os.name == "nt":         # Windows has no fsync for folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
