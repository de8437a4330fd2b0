"""Where files lie, in a source checkout and in a frozen app alike; atomic writes; free names."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import platformdirs

APP = "LoRA Darkroom"
# PyInstaller unpacks a frozen app to sys._MEIPASS.
ROOT = Path(getattr(sys, "_MEIPASS", Path(__file__).resolve().parent.parent))
PRESETS = ROOT / "presets"
DEMO = PRESETS / "demo"
CLIP_TOKENIZER = DEMO / "base" / "tokenizer"    # CLIP's own: SD 1.x, and the first of SDXL
FAMILIES = ROOT / "core" / "families"
TOKENIZERS = FAMILIES / "tokenizers"        # those that several families use

MARK = ".lora-darkroom"         # a file in folders of pictures that we drew: they never train

_SUFFIXES = frozenset((".safetensors", ".yaml", ".yml", ".png", ".jpg", ".jpeg", ".webp"))
# what Windows refuses in a file name, and halves of surrogate pairs, which are no text
BAD_CHARACTERS = re.compile(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]')
# names of devices on Windows, in any folder and with any suffix
_DEVICE = re.compile(r"con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]", re.IGNORECASE)


def family_configs(family: str) -> Path:
    """The configs of a family, in the layout of its diffusers folder: single files bring none."""
    return FAMILIES / family / "configs"


def data_dir() -> Path:
    """Runs and settings. DARKROOM_HOME moves everything (tests, portable installs)."""
    return _home("") or Path(platformdirs.user_data_dir(APP, appauthor=False))


def cache_dir() -> Path:
    return _home("cache") or Path(platformdirs.user_cache_dir(APP, appauthor=False))


def log_dir() -> Path:
    """The program's own logs; each run's log lies in the run's folder."""
    return _home("logs") or Path(platformdirs.user_log_dir(APP, appauthor=False))


def _home(folder: str) -> Path | None:
    home = os.environ.get("DARKROOM_HOME")
    return Path(home) / folder if home else None


def is_ours(name: object) -> bool:
    """Whether a path lies in one of the folders that we write to."""
    return isinstance(name, str) and any(
        Path(name).absolute().is_relative_to(folder.absolute())
        for folder in (data_dir(), cache_dir(), log_dir()))


def keep_private() -> None:
    """Makes the folders of records, prompts and pictures readable for their owner alone, as far as
    they are ours. A folder that the user named keeps its own rights; ours in it don't."""
    whole = _home("") is None
    folders = [data_dir(), cache_dir(), log_dir()] if whole else [
        data_dir() / name for name in ("runs", "projects", "pictures", "cache", "logs")]
    if os.name == "nt":
        return
    for folder in folders:
        # Of another user, or on a disk that knows no rights: it stays as it is.
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_mode & 0o077:
                folder.chmod(0o700)


def runs_dir() -> Path:
    return data_dir() / "runs"


def mark(folder: Path) -> None:
    """Makes a folder for pictures that we draw, and marks it as such."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        (folder / MARK).touch()


def expanded(name: str | Path) -> Path:
    """A path as users write it, `~` filled in. Never raises: of a user who isn't there it stays."""
    return Path(os.path.expanduser(name))


def is_file_name(name: str) -> bool:
    """Whether every system can have a file of this name: no path, no device of Windows (CON, NUL,
    COM1 ...), no space or dot at the end, which Windows drops."""
    # 200 bytes: file systems take 255, and suffixes such as -2.safetensors.broken are added
    return bool(name) and len(name.encode("utf-8", "replace")) <= 200 and not (
        BAD_CHARACTERS.search(name) or name[-1] in " ."
        or _DEVICE.fullmatch(name.split(".")[0].strip()))


@contextlib.contextmanager
def atomic(path: Path, put: Callable[[Path, Path], object] | None = None,
           private: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed over `path`, or
    put there by `put(temporary, path)`. `private`: other users of the computer can't read it.

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
        # mkstemp makes a file that only its owner can read; others may read what users write
        if not private:
            os.chmod(temporary, 0o666 & ~umask())
        (put or os.replace)(temporary, path)
        # without it a power cut may lose the new name, though the content is on the disk
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


# --- free names ---
# A name is taken in one step, so that of two programs each gets one of its own.

def create(path: Path, write: Callable[[Path], object], once: bool = False) -> Path:
    """Makes a file: `write` fills a temporary one, which gets the name `path` or the next free
    one. Nothing that is there is replaced. Returns the file's path. `once`: see `place`."""
    placed: list[Path] = []
    with atomic(path, lambda fresh, path: placed.append(place(fresh, path, once))) as temporary:
        write(temporary)
    return placed[0]


def place(fresh: Path, path: Path, once: bool = False) -> Path:
    """Moves a file or folder to `path` or the next free name on the same file system. Returns its
    new path. `once`: a file of the same bytes that has one of these names already is enough."""
    for candidate in numbered(path):
        if once and candidate.is_file() and filecmp.cmp(fresh, candidate, shallow=False):
            fresh.unlink()
            break
        with contextlib.suppress(FileExistsError):
            move(fresh, candidate)
            break
    return candidate


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then a-2.safetensors, a-3.safetensors ... Dots in a folder's name are no suffix."""
    has_suffix = path.suffix.lower() in _SUFFIXES
    stem, suffix = (path.stem, path.suffix) if has_suffix else (path.name, "")
    yield path
    yield from (path.with_name(f"{stem}-{number}{suffix}") for number in itertools.count(2))


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, or the first of name-2, name-3 ... that is not taken. `taken`: names in case-folded
    letters, as Windows and macOS know no difference."""
    return next(path.as_posix() for path in numbered(Path(name))
                if path.as_posix().casefold() not in taken)


def move(fresh: Path, path: Path) -> None:
    """Renames; raises FileExistsError where anything has that name, even if another program made
    it this very moment."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    # Renaming replaces nothing on Windows, nor does renaming a folder elsewhere.
    if os.name == "nt" or fresh.is_dir():
        try:
            os.rename(fresh, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, error.strerror, str(path)) from None
            raise
        return
    # A POSIX rename would replace a file that has just come; making a hard link never does.
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:
        # exFAT and some network drives know no links: an empty file takes the name first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(fresh, path)
        except OSError:
            os.unlink(path)
            raise
    else:
        os.unlink(fresh)


def set_aside(path: Path) -> Path:
    """Renames a file of ours that can't be read to x.yaml.broken, so that it is not lost when a
    new one is written. Returns the new path, also where renaming failed."""
    aside = path.with_name(path.name + ".broken")
    with contextlib.suppress(OSError):
        return place(path, aside)
    return aside


def umask() -> int:
    # the system tells it only to those who set it
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
    """A key for caches that changes when the file does. Raises OSError."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
