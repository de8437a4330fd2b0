"""Where things live, in a source checkout and in a frozen app alike; atomic writes; free names."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

APP = "LoRA Darkroom"
ROOT = Path(getattr(sys, "_MEIPASS", Path(__file__).resolve().parent.parent))
PRESETS = ROOT / "presets"
DEMO = PRESETS / "demo"
_SUFFIXES = frozenset((".safetensors", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".webp"))
_NO_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]')
_DEVICE = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]", re.IGNORECASE)
FAMILIES = ROOT / "core" / "families"
TOKENIZERS = ROOT / "core" / "families" / "tokenizers"   # that families share


def family_configs(family: str) -> Path:
    """The configs of a family that single files need, as its diffusers folder has them."""
    return FAMILIES / family / "configs"


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
def atomic(path: Path, put: Callable[[Path, Path], object] | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed over `path`, or
    put there by `put(temporary, path)`.

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
        (put or os.replace)(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


# --- names that are free: taken in one step, so that of two programs each gets one of its own ---

def create(wanted: Path, write: Callable[[Path], object], once: bool = False) -> Path:
    """`write` fills a temporary file, which gets the wanted name or the next free one; nothing
    that is there is replaced. -> where it is, whole. `once`: see `place`."""
    placed: list[Path] = []
    with atomic(wanted, lambda fresh, path: placed.append(place(fresh, path, once))) as temporary:
        write(temporary)
    return placed[0]


def place(fresh: Path, wanted: Path, once: bool = False) -> Path:
    """Moves a file or folder to the wanted name or the next free one of its own file system.
    -> where it is. `once`: a file of the same bytes that has one of these names is enough."""
    for path in numbered(wanted):
        if once and path.is_file() and filecmp.cmp(fresh, path, shallow=False):
            fresh.unlink()
            break
        with contextlib.suppress(FileExistsError):
            move(fresh, path)
            break
    return path


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then a-2.safetensors, a-3.safetensors ... A folder's dots are no suffix."""
    has_suffix = path.suffix.lower() in _SUFFIXES
    stem, suffix = (path.stem, path.suffix) if has_suffix else (path.name, "")
    yield path
    yield from (path.with_name(f"{stem}-{number}{suffix}") for number in itertools.count(2))


def move(fresh: Path, path: Path) -> None:
    """Raises FileExistsError where anything has that name, also if it came this very moment."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if os.name == "nt" or fresh.is_dir():   # Windows' rename, and one of folders, replaces nothing
        try:
            os.rename(fresh, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, error.strerror, str(path)) from None
            raise
        return
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:                     # exFAT and some network drives know no links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(fresh, path)
        except OSError:
            os.unlink(path)
            raise
    else:
        os.unlink(fresh)


def set_aside(path: Path) -> Path:
    """A file of ours that can't be read gets out of the way, never lost: x.yaml.broken."""
    aside = path.with_name(path.name + ".broken")
    with contextlib.suppress(OSError):
        return place(path, aside)
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


def stamp(path: Path) -> tuple[int, int, int]:
    """Changes with the file: what is known of one may be kept under it. Raises OSError."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino
