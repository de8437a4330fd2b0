"""Makes `.venv` beside the launcher and installs the packages, so that users need only Python.

install.py installs, repair.py finds what is broken. Standard library only, and readable by Python
3.8: too old a Python must get a sentence, not a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import repair as packages
from environment import (
    OLDEST,
    complete,
    dotted,
    drop_half_installed,
    fingerprint,
    is_current,
    locked,
    missing,
    numbers,
    nvidia_cards,
    python_of,
    read_stamp,
    same,
    torch_index,
    torch_lines,
    version_of,
    write_stamp,
)
from install import install, install_torch, requirements, run, with_one_of
from messages import Stop, tell, tr

__all__ = ["Stop", "make", "missing", "prepare", "repair", "restart", "tr"]    # the launcher's

RESTARTED = "DARKROOM_RESTARTED"        # tells the second start that the first prepared it


# What the launcher calls


def prepare(root: Path, extra: str = "", versions: str = "") -> Path | None:
    """Returns the Python to restart with, its packages installed; None: this one will do.

    `versions`: "locked" or "newest" of all packages; "": as .venv was last made.
    """
    venv = root / ".venv"
    if os.environ.pop(RESTARTED, "") == str(venv):
        return None
    if same(sys.prefix, venv):
        if versions != "newest" and (is_current(root, extra, versions) or not (
                versions or read_stamp(root) or missing(root, extra))):
            return None
    elif not missing(root):
        # An environment of the user's own: nothing is installed there.
        lacking = missing(root, extra) if extra else []
        if versions == "newest":
            raise Stop("newest_own", 2, python=sys.executable)
        if not lacking:
            return None
        if not venv.exists():
            raise Stop("no_extra", 2, missing=", ".join(lacking), python=sys.executable,
                       extra=extra)
    with _alone(root):
        return make(root, extra, versions)


def make(root: Path, extra: str = "", versions: str = "") -> Path:
    """Creates, replaces or completes .venv, unless it is current."""
    venv = root / ".venv"
    if (venv.exists() or venv.is_symlink()) and not venv.is_dir():
        raise Stop("not_a_folder", 2, path=venv)
    why = _why_anew(root)
    if why:
        tell(why, path=venv)
        if venv.is_symlink():
            venv.unlink()
        else:
            # Renamed first: half deleted it would look sound.
            old = venv.with_name(f".venv-old-{os.getpid()}")
            try:
                os.replace(venv, old)
            except OSError as error:
                raise Stop("cant_remove", path=venv, reason=error) from None
            shutil.rmtree(old, ignore_errors=True)
    if not venv.exists():
        _create(root)
    # A complete .venv that the user made is used as it is.
    by_hand = not versions and not read_stamp(root) and complete(root, [extra])
    if versions == "newest" or not (is_current(root, extra, versions) or by_hand):
        _install(root, extra, versions)
    return python_of(venv)


def repair(root: Path) -> int:
    """Checks the environment and reinstalls only what is broken."""
    venv = root / ".venv"
    with _alone(root):
        if not venv.exists() and not missing(root):
            # An environment of the user's own is reported on, and not touched.
            broken = _report_broken(Path(sys.prefix))
            if broken:
                raise Stop("mend_own", python=sys.executable,
                           packages=" ".join(f"{one.name}=={one.version}" for one in broken))
            tell("sound")
            return 0
        make(root)
        chosen, index = _torch_source(root)
        broken = _report_broken(venv)
        unfit = not chosen and packages.unfit_torch(venv, nvidia_cards())
        if unfit:
            tell("found_torch")
        lacking = not complete(root)
        if not (broken or unfit or lacking or any(packages.leftovers(venv))):
            tell("sound")
            return 0
        _mend(root, broken, index, unfit)
        if packages.broken(venv) or not complete(root):
            raise Stop("still_broken", path=venv)
        if not chosen and packages.unfit_torch(venv, nvidia_cards()):
            raise Stop("still_unfit", index=index or "PyPI")
    tell("mended")
    return 0


def restart(python: Path, script: Path, argv: list[str]) -> int:
    """Restarts `script` with `python`; on POSIX in this process. Returns the exit code."""
    os.environ[RESTARTED] = str(script.parent / ".venv")
    command = [str(python), str(script), *argv]
    # Buffers are lost when the process is replaced.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    try:
        if os.name != "nt":
            # Signals and the terminal then belong to the program itself.
            os.execv(command[0], command)
        # Windows has no exec, so this process waits for its child.
        os.environ.setdefault("PYTHONUTF8", "1")
        child = subprocess.Popen(command)
    except OSError as error:
        raise Stop("cant_start", python=python, reason=error, path=python.parent.parent) from None
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            # The child gets Ctrl+C too, and decides.
            continue


# Making and filling one


def _why_anew(root: Path) -> str:
    """The reason to replace .venv, as the key of a text; "": it is sound or not there."""
    venv = root / ".venv"
    if not venv.exists():
        return ""
    stamp = read_stamp(root)
    # Scripts and editable installs hold absolute paths.
    if stamp.get("root", os.path.realpath(root)) != os.path.realpath(root):
        return "moved"
    version = version_of(python_of(venv))
    # The interpreter was removed or replaced, or the last start ended while it made .venv.
    if not version or numbers(version) < OLDEST or stamp.get("state") == "making":
        return "broken"
    return "" if stamp.get("python", version) == version else "broken"


def _report_broken(prefix: Path) -> list[packages.Broken]:
    tell("checking", count=packages.count(prefix))
    broken = packages.broken(prefix)
    for one in broken:
        tell("found_" + one.why, name=one.name, version=one.version, file=one.file)
    return broken


def _mend(root: Path, broken: list[packages.Broken], torch_from: str, unfit: bool) -> None:
    """Reinstalls the broken packages in their versions and a torch for the card, then installs
    what is missing."""
    stamp = read_stamp(root)
    _stamp(root, {**stamp, "state": "installing"})
    packages.clear_away(root / ".venv", broken)
    lines_by_source: dict[str, list[str]] = {}      # "locked", an index, or "": the user's own
    for one in broken:
        if one.why in ("file", "record") and not (unfit and one.name in ("torch", "torchvision")):
            index = packages.torch_source(one.version)
            line = "" if index else locked(root, one.name, one.version)
            lines_by_source.setdefault("locked" if line else index, []).append(
                line or f"{one.name}=={one.version}")
    try:
        for source, lines in lines_by_source.items():
            with requirements(lines) as file:
                again = ["--force-reinstall", "--no-deps", "--requirement", file]
                if source:
                    again += (["--require-hashes"] if source == "locked"
                              else ["--index-url", source])
                with_one_of(root, functools.partial(run, root, again), "installing_again")
        if unfit:
            with_one_of(root, functools.partial(
                install_torch, root, torch_from, again=True), "installing_again")
    except Stop:
        # Installers remove nothing before they have the new files: all is as it was.
        if all(one.why == "file" for one in broken):
            _stamp(root, stamp)
        raise
    extras = stamp.get("extras") or []
    if not complete(root, extras) or unfit:
        # Everything of the lock, or otherwise only what is missing.
        versions = "locked" if stamp.get("versions") == "locked" else "ranges"
        install(root, extras, versions, torch_from, "installing_again")
    _stamp(root, {**stamp, "state": "ready"})


def _create(root: Path) -> None:
    venv, uv = root / ".venv", shutil.which("uv")
    version = sys.version_info[:2]
    if version < OLDEST:
        raise Stop("python_too_old", 2, needed=dotted(OLDEST), found=dotted(version))
    # Debian has both modules in packages of their own.
    needed = ("venv",) if uv else ("venv", "ensurepip")
    if not all(map(importlib.util.find_spec, needed)):
        raise Stop("no_venv_module", 2, package=f"python{dotted(version)}-venv")
    tell("making", path=venv)
    try:
        venv.mkdir()
        write_stamp(root, {"state": "making", "python": dotted(version)})
    except OSError as error:
        raise Stop("cant_make", path=venv, reason=error) from None
    # Not .venv's own Python, which may have been removed just now.
    python = getattr(sys, "_base_executable", "") or sys.executable
    command = [python, "-m", "venv", *(["--without-pip"] if uv else []), str(venv)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines() or ["?"]
        raise Stop("cant_make", path=venv, reason=lines[-1])
    _stamp(root, {"state": "made", "python": dotted(version)})


def _install(root: Path, extra: str, versions: str = "") -> None:
    """`versions`: "locked" or "newest" if the user asked for it, "" at any other start."""
    before, started = read_stamp(root), time.monotonic()
    ready = before.get("state") == "ready"
    extras = sorted({*filter(None, [extra]), *(before.get("extras") or [])})
    which = versions or ("newest" if before.get("versions") == "newest" else "locked")
    chosen, index = _torch_source(root)
    why = "installing"
    if which == "newest":
        why = "installing_newest"
    elif ready and before.get("wanted") != fingerprint(root):
        why = "updating"
    # The last start was interrupted.
    if before.get("state") == "installing":
        tell("continuing")
        drop_half_installed(root / ".venv")
    stamp = {"python": version_of(python_of(root / ".venv")), "extras": extras,
             "torch_index": chosen}
    _stamp(root, {**stamp, "state": "installing", "versions": which})
    try:
        installed = install(root, extras, which, index, why)
        # By its own word, not by the installer's, whose settings may lead elsewhere.
        if not complete(root, extras):
            raise Stop("not_there", path=root / ".venv")
    except KeyboardInterrupt:
        raise Stop("interrupted", 130) from None
    except Stop as stop:
        if not (ready and complete(root, before.get("extras") or [])):
            raise
        # What ran before still runs, so an update that failed doesn't stop the start.
        if versions or not complete(root, extras):
            _stamp(root, before)
            raise
        print(stop, file=sys.stderr)
        tell("update_later")
        _stamp(root, {**before, "versions": "kept", "wanted": fingerprint(root)})
        return
    _stamp(root, {**stamp, "state": "ready", "versions": installed})
    tell("ready", minutes=f"{(time.monotonic() - started) / 60:.1f}")


# Small things


def _torch_source(root: Path) -> tuple[str, str]:
    """(index of torch that the user chose, now or when .venv was made; index to use: that one or
    the card's). "": the user's own package sources."""
    chosen = os.environ.get("DARKROOM_TORCH_INDEX", read_stamp(root).get("torch_index", ""))
    return chosen, (chosen or torch_index(nvidia_cards())) if torch_lines(root) else ""


def _stamp(root: Path, stamp: dict[str, Any]) -> None:
    try:
        write_stamp(root, stamp)
    except OSError as error:
        raise Stop("failed_disk" if error.errno == errno.ENOSPC else "failed_rights",
                   path=root) from None


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Lets one start at a time work on a .venv. The system frees the lock of a dead process."""
    # By user and checkout; in the temporary folder, as .venv may not exist yet.
    user = os.getuid() if hasattr(os, "getuid") else ""
    name = hashlib.sha256(os.path.realpath(root).encode("utf-8", "replace")).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"darkroom-{user}-{name}.lock", "a+b") as file:
        if not _try_lock(file):
            tell("waiting")
            while not _try_lock(file):
                time.sleep(0.5)
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
