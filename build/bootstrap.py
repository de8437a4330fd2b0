"""Makes `.venv` beside the launcher and fills it, so that a bare Python is all that is needed.

install.py puts the packages in, repair.py looks what is broken. Standard library only, and readable
by Python 3.8: too old a Python must get a sentence, not a traceback.
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
    """The Python to start again with, its packages installed; None: this one will do.

    `versions`: "locked" or "newest" of all packages; "": those that it was last made with.
    """
    venv = root / ".venv"
    if os.environ.pop(RESTARTED, "") == str(venv):
        return None
    if same(sys.prefix, venv):
        if versions != "newest" and (is_current(root, extra, versions) or not (
                versions or read_stamp(root) or missing(root, extra))):
            return None
    elif not missing(root):             # an environment of the user's own: not ours to fill
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
    """Creates, repairs or completes .venv; does nothing where it is current."""
    venv = root / ".venv"
    if (venv.exists() or venv.is_symlink()) and not venv.is_dir():
        raise Stop("not_a_folder", 2, path=venv)
    why = _why_anew(root)
    if why:
        tell(why, path=venv)
        _remove(venv)
    if not venv.exists():
        _create(root)
    by_hand = not versions and not read_stamp(root) and complete(root, [extra])    # used as it is
    if versions == "newest" or not (is_current(root, extra, versions) or by_hand):
        _install(root, extra, versions)
    return python_of(venv)


def repair(root: Path) -> int:
    """Checks the environment and mends only what is broken. The user's files lie elsewhere."""
    venv = root / ".venv"
    with _alone(root):
        if not venv.exists() and not missing(root):
            return _check_own(Path(sys.prefix))
        make(root)
        tell("checking", count=packages.count(venv))
        chosen, index = _torch_source(root)
        found = packages.broken(venv)
        unfit = not chosen and packages.unfit_torch(venv, nvidia_cards())
        for one in found:
            tell("found_" + one.why, name=one.name, version=one.version, file=one.file)
        if unfit:
            tell("found_torch")
        lacking = not complete(root)
        if not (found or unfit or lacking or any(packages.leftovers(venv))):
            tell("sound")
            return 0
        _mend(root, found, index, unfit)
        if packages.broken(venv) or not complete(root):
            raise Stop("still_broken", path=venv)
        if not chosen and packages.unfit_torch(venv, nvidia_cards()):
            raise Stop("still_unfit", index=index or "PyPI")
    tell("mended")
    return 0


def restart(python: Path, script: Path, argv: list[str]) -> int:
    """Starts `script` again with `python`. On POSIX this process becomes the new one."""
    os.environ[RESTARTED] = str(script.parent / ".venv")
    command = [str(python), str(script), *argv]
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    try:
        if os.name != "nt":
            os.execv(command[0], command)
        os.environ.setdefault("PYTHONUTF8", "1")
        child = subprocess.Popen(command)
    except OSError as error:
        raise Stop("cant_start", python=python, reason=error, path=python.parent.parent) from None
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:       # the child gets Ctrl+C too, and decides
            continue


# Making and filling one


def _why_anew(root: Path) -> str:
    """The reason for a new .venv, as a text's key; empty: the old one is sound or not there."""
    venv = root / ".venv"
    if not venv.exists():
        return ""
    stamp = read_stamp(root)
    if stamp.get("root", os.path.realpath(root)) != os.path.realpath(root):
        return "moved"
    version = version_of(python_of(venv))
    if not version or numbers(version) < OLDEST or stamp.get("state") == "making":
        return "broken"
    return "" if stamp.get("python", version) == version else "broken"


def _check_own(prefix: Path) -> int:
    """An environment of the user's own is told about, and not touched."""
    tell("checking", count=packages.count(prefix))
    found = packages.broken(prefix)
    for one in found:
        tell("found_" + one.why, name=one.name, version=one.version, file=one.file)
    if found:
        raise Stop("mend_own", python=sys.executable,
                   packages=" ".join(f"{one.name}=={one.version}" for one in found))
    tell("sound")
    return 0


def _mend(root: Path, found: list[packages.Broken], torch_from: str, unfit: bool) -> None:
    """The same versions again, a torch for the card, then whatever lacks."""
    stamp = read_stamp(root)
    _stamp(root, {**stamp, "state": "installing"})
    packages.clear_away(root / ".venv", found)
    wanted: dict[str, list[str]] = {}               # where from -> requirements
    for one in found:
        if one.why in ("file", "record") and not (unfit and one.name in ("torch", "torchvision")):
            index = packages.torch_source(one.version)
            line = "" if index else locked(root, one.name, one.version)
            wanted.setdefault("locked" if line else index, []).append(
                line or f"{one.name}=={one.version}")
    try:
        for index, lines in wanted.items():
            with requirements(lines) as file:
                again = ["--force-reinstall", "--no-deps", "--requirement", file]
                if index:
                    again += ["--require-hashes"] if index == "locked" else ["--index-url", index]
                with_one_of(root, functools.partial(run, root, again), "installing_again")
        if unfit:
            with_one_of(root, functools.partial(
                install_torch, root, torch_from, again=True), "installing_again")
    except Stop:                        # installers take nothing away before they have the new
        if all(one.why == "file" for one in found):
            _stamp(root, stamp)
        raise
    extras = stamp.get("extras") or []
    if not complete(root, extras) or unfit:         # whatever is locked, else only what lacks
        versions = "locked" if stamp.get("versions") == "locked" else "ranges"
        install(root, extras, versions, torch_from, "installing_again")
    _stamp(root, {**stamp, "state": "ready"})


def _create(root: Path) -> None:
    venv, uv = root / ".venv", shutil.which("uv")
    found = sys.version_info[:2]
    if found < OLDEST:
        raise Stop("python_too_old", 2, needed=dotted(OLDEST), found=dotted(found))
    needed = ("venv",) if uv else ("venv", "ensurepip")     # Debian ships both apart
    if not all(map(importlib.util.find_spec, needed)):
        raise Stop("no_venv_module", 2, package=f"python{dotted(found)}-venv")
    tell("making", path=venv)
    try:
        venv.mkdir()
        write_stamp(root, {"state": "making", "python": dotted(found)})
    except OSError as error:
        raise Stop("cant_make", path=venv, reason=error) from None
    python = getattr(sys, "_base_executable", "") or sys.executable     # .venv's own may be gone
    command = [python, "-m", "venv", *(["--without-pip"] if uv else []), str(venv)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines() or ["?"]
        raise Stop("cant_make", path=venv, reason=lines[-1])
    _stamp(root, {"state": "made", "python": dotted(found)})


def _remove(venv: Path) -> None:
    if venv.is_symlink():
        venv.unlink()
        return
    old = venv.with_name(f".venv-old-{os.getpid()}")        # half deleted it would look sound
    try:
        os.replace(venv, old)
    except OSError as error:
        raise Stop("cant_remove", path=venv, reason=error) from None
    shutil.rmtree(old, ignore_errors=True)


def _install(root: Path, extra: str, versions: str = "") -> None:
    """`versions`: "locked" or "newest" on the user's word, "" in a start of any kind."""
    before, started = read_stamp(root), time.monotonic()
    ready = before.get("state") == "ready"
    extras = sorted({*filter(None, [extra]), *(before.get("extras") or [])})
    wanted = versions or ("newest" if before.get("versions") == "newest" else "locked")
    chosen, index = _torch_source(root)
    why = "installing"
    if wanted == "newest":
        why = "installing_newest"
    elif ready and before.get("wanted") != fingerprint(root):
        why = "updating"
    if before.get("state") == "installing":
        tell("continuing")
        drop_half_installed(root / ".venv")
    stamp = {"python": version_of(python_of(root / ".venv")), "extras": extras,
             "torch_index": chosen}
    _stamp(root, {**stamp, "state": "installing", "versions": wanted})
    try:
        got = install(root, extras, wanted, index, why)
    except KeyboardInterrupt:
        raise Stop("interrupted", 130) from None
    except Stop as stop:
        if not (ready and complete(root, before.get("extras") or [])):
            raise
        # what ran before still runs
        if versions or not complete(root, extras):
            _stamp(root, before)
            raise
        print(stop, file=sys.stderr)
        tell("update_later")
        _stamp(root, {**before, "versions": "kept", "wanted": fingerprint(root)})
        return
    _stamp(root, {**stamp, "state": "ready", "versions": got})
    tell("ready", minutes=f"{(time.monotonic() - started) / 60:.1f}")


# Small things


def _torch_source(root: Path) -> tuple[str, str]:
    """The index of torch that the user chose, now or when .venv was made, and the one that is
    asked: that or the card's. "": the user's own package sources."""
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
    """One start at a time works on one .venv. The system frees the lock of a dead process."""
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
