"""Makes `.venv` beside the launcher and fills it, so that a bare Python is all that is needed.

What goes in stands in build/lock/*.txt, version by version with hashes (build/lock.py makes them);
`setup --newest` takes the newest that pyproject.toml allows instead. Standard library only, and
readable by Python 3.8: too old a Python must get a sentence, not a traceback. Texts:
core/strings/<language>/bootstrap.yaml, one `key: "JSON string"` a line.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import importlib.util
import json
import locale
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import repair as packages
from environment import (
    OLDEST,
    dotted,
    drop_half_installed,
    fingerprint,
    installed_versions,
    is_current,
    locked,
    missing,
    numbers,
    nvidia_cards,
    python_of,
    read_stamp,
    same,
    site_packages,
    torch_index,
    torch_lines,
    torch_locked,
    version_of,
    write_stamp,
)

RESTARTED = "DARKROOM_RESTARTED"        # tells the second start that the first prepared it
LOCK = "build/lock/{}.txt"
HASHED = ["--require-hashes", "--no-deps"]      # a lock names everything: nothing is resolved


class Stop(Exception):
    """A sentence for the user, and the exit code."""

    def __init__(self, key: str, exit_code: int = 1, **params: object) -> None:
        super().__init__(say(key, **params))
        self.key, self.exit_code, self.params = key, exit_code, params


# What the launcher calls


def prepare(root: Path, extra: str = "", versions: str = "") -> Path | None:
    """The Python to start again with, its packages installed; None: this one will do.

    `versions`: "locked" or "newest" of all packages; "": those that it was last made with.
    """
    venv = root / ".venv"
    if os.environ.pop(RESTARTED, "") == str(venv):
        return None
    if same(sys.prefix, venv):
        if versions != "newest" and (is_current(root, extra, versions)
                                     or not (read_stamp(root) or missing(root, extra))):
            return None
    elif not missing(root):
        lacking = missing(root, extra) if extra else []
        if not lacking and versions != "newest":
            return None
        if not venv.exists():           # an environment of the user's own: not ours to fill
            raise (Stop("no_extra", 2, missing=", ".join(lacking), python=sys.executable,
                        extra=extra) if lacking else Stop("newest_own", 2, python=sys.executable))
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
    if versions == "newest" or not (is_current(root, extra, versions)
                                    or _complete_without_us(root, extra)):
        _install(root, extra, versions)
    return python_of(venv)


def repair(root: Path) -> int:
    """Checks the environment and mends only what is broken. The user's files lie elsewhere."""
    venv = root / ".venv"
    with _alone(root):
        if not venv.exists() and not missing(root):
            return _check_own(Path(sys.prefix))
        python = make(root)
        tell("checking", count=packages.count(venv))
        found, unfit = packages.broken(venv), packages.unfit_torch(venv, nvidia_cards())
        for one in found:
            tell("found_" + one.why, name=one.name, version=one.version, file=one.file)
        if unfit:
            tell("found_torch")
        lacking = not _complete(python, root, "")
        if not (found or unfit or lacking or any(packages.leftovers(venv))):
            tell("sound")
            return 0
        _mend(root, found, unfit)
        if packages.broken(venv) or not _complete(python, root, ""):
            raise Stop("still_broken", path=venv)
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


def _complete_without_us(root: Path, extra: str) -> bool:
    """A .venv that someone filled by hand, offline perhaps: use it as it is."""
    return not read_stamp(root) and _complete(python_of(root / ".venv"), root, extra)


def _complete(python: Path, root: Path, extra: str) -> bool:
    check = [str(python), str(Path(__file__)), "complete", str(root), extra]
    return subprocess.run(check, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL).returncode == 0


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


def _mend(root: Path, found: list[packages.Broken], unfit: bool) -> None:
    """The same versions again, a torch for the card, then whatever lacks."""
    stamp, python = read_stamp(root), version_of(python_of(root / ".venv"))
    extras, versions = stamp.get("extras") or [], str(stamp.get("versions", ""))
    write_stamp(root, "installing", python, extras, versions)
    packages.clear_away(root / ".venv", found)
    wanted: dict[str, list[str]] = {}               # where from -> requirements
    for one in found:
        if one.why in ("file", "record") and not (unfit and one.name in ("torch", "torchvision")):
            index = packages.torch_source(one.version)
            line = "" if index else locked(root, one.name, one.version)
            wanted.setdefault("locked" if line else index, []).append(
                line or f"{one.name}=={one.version}")
    if unfit:
        wanted.setdefault(torch_index(nvidia_cards()), []).extend(torch_locked(root))
    for index, lines in wanted.items():
        with _requirements(lines) as file:
            again = ["--force-reinstall", "--no-deps", "--requirement", file]
            if index:
                again += ["--require-hashes"] if index == "locked" else ["--index-url", index]
            try:
                _with_one_of(root, functools.partial(_installer, root, again))
            except Stop:                # installers take nothing away before they have the new
                if all(one.why == "file" for one in found):
                    write_stamp(root, str(stamp.get("state")), python, extras, versions)
                raise
    _install(root, "")


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
        write_stamp(root, "making", dotted(found), [])
    except OSError as error:
        raise Stop("cant_make", path=venv, reason=error) from None
    python = getattr(sys, "_base_executable", "") or sys.executable     # .venv's own may be gone
    command = [python, "-m", "venv", *(["--without-pip"] if uv else []), str(venv)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines() or ["?"]
        raise Stop("cant_make", path=venv, reason=lines[-1])
    write_stamp(root, "made", dotted(found), [])


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
    stamp, started = read_stamp(root), time.monotonic()
    python = python_of(root / ".venv")
    extras = sorted({*filter(None, [extra]), *(stamp.get("extras") or [])})
    versions = versions or ("newest" if stamp.get("versions") == "newest" else "locked")
    if stamp.get("state") == "installing":
        tell("continuing")
        drop_half_installed(root / ".venv")
    if versions == "newest":
        why = "installing_newest"
    else:
        old = stamp.get("state") == "ready" and stamp.get("wanted") != fingerprint(root)
        why = "updating" if old else "installing"
    write_stamp(root, "installing", version_of(python), extras, versions)
    try:
        got = _with_one_of(root, functools.partial(_install_with, root, extras, versions), why)
    except KeyboardInterrupt:
        raise Stop("interrupted", 130) from None
    write_stamp(root, "ready", version_of(python), extras, got)
    tell("ready", minutes=f"{(time.monotonic() - started) / 60:.1f}")


def _with_one_of(root: Path, install: Callable[[str], Any], why: str = "installing") -> Any:
    """uv is quick, but pip may know a mirror or proxy that uv wasn't told of."""
    for tool in ["uv", "pip"] if shutil.which("uv") else ["pip"]:
        tell(why, tool=tool)
        try:
            if tool == "pip":
                _have_pip(root)
            return install(tool)
        except Stop:
            if tool == "pip" or not importlib.util.find_spec("ensurepip"):
                raise
            tell("uv_failed")


def _install_with(root: Path, extras: list[str], versions: str, tool: str) -> str:
    """-> the versions that came: "locked", "newest"; "ranges" where a source lacks the locked."""
    index = torch_index(nvidia_cards()) if torch_lines(root) else ""
    if index:
        tell("torch_for_card", index=index)
    if versions == "locked":
        try:
            _install_locked(root, extras, index, tool)
            if all(_complete(python_of(root / ".venv"), root, extra) for extra in extras or [""]):
                return versions
            tell("lock_behind")         # someone changed pyproject.toml
        except Stop as stop:            # an offline folder of another day, a mirror that lags
            if stop.key != "failed_lacking" or (
                    tool == "uv" and importlib.util.find_spec("ensurepip")):    # pip may have it
                raise
            tell("lock_lacking", package=stop.params["package"])
        versions = "ranges"
    newer = ["--upgrade"] if versions == "newest" else []
    if index:
        _installer(root, [*newer, "--index-url", index, *torch_lines(root)], tool)
    project = ["-e", f".[{','.join(extras)}]" if extras else "."]
    if not newer:
        _installer(root, project, tool)
        return versions
    # the card's torch is not to be exchanged for a newer one of another index
    held = installed_versions(root / ".venv", "torch", "torchvision") if index else []
    eager = ["--upgrade-strategy", "eager"] if tool == "pip" else []
    with _requirements(held) as file:
        _installer(root, [*newer, *eager, "--constraint", file, *project], tool)
    return versions


def _install_locked(root: Path, extras: list[str], index: str, tool: str) -> None:
    """pip and setuptools, then all but torch, then torch, then the project itself.

    pip goes first since from 25.2 on it goes on with a download that broke off, and torch's has
    gigabytes. torch has builds of other hashes at other indexes: there the version alone is held,
    and pip compares with the hash that the index tells.
    """
    _installer(root, [*HASHED, "--requirement", LOCK.format("build")], tool)
    for extra in extras or ["base"]:
        _installer(root, [*HASHED, "--requirement", LOCK.format(extra)], tool)
    pinned = torch_locked(root)
    if index:
        try:
            _installer(root, ["--index-url", index, *pinned], tool)
        except Stop as stop:
            if stop.key != "failed_lacking":
                raise
            tell("torch_lacking", index=index, versions=" ".join(pinned))
            _installer(root, ["--index-url", index, *torch_lines(root)], tool)
    elif pinned and (own := _own_torch(root)):
        tell("torch_build", file=own)
        _installer(root, pinned, tool)
    elif pinned:
        try:
            _installer(root, [*HASHED, "--requirement", LOCK.format("torch")], tool)
        except Stop as stop:
            if stop.key != "failed_hash" or "+" not in str(stop.params["file"]):
                raise
            tell("torch_build", file=stop.params["file"])       # a folder of the user's own
            _installer(root, pinned, tool)
    _installer(root, ["--no-deps", "--no-build-isolation", "-e", "."], tool)


def _own_torch(root: Path) -> str:
    """The place for builds of torch that the user's own settings of pip or uv name; "": none."""
    command = [str(python_of(root / ".venv")), "-m", "pip", "config", "list"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL)
    told = [done.stdout.decode("utf-8", "replace"),
            *(value for name, value in os.environ.items() if name.startswith("UV_"))]
    found = re.search(r"\w+://[^\s'\"]+/(?:cpu|cu\d{2,3}|rocm[\d.]+|xpu)\b", "\n".join(told))
    return found.group() if found else ""


def _have_pip(root: Path) -> None:
    if not any(site.glob("pip-*.dist-info") for site in site_packages(root / ".venv")):
        subprocess.run([str(python_of(root / ".venv")), "-m", "ensurepip"], stdout=_stderr())


@contextlib.contextmanager
def _requirements(lines: list[str]) -> Iterator[str]:
    """A file of these requirements while an installer reads it: hashes only stand in files."""
    handle, name = tempfile.mkstemp(prefix="darkroom-", suffix=".txt")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        yield name
    finally:
        os.unlink(name)


def _installer(root: Path, what: list[str], tool: str) -> None:
    """Runs pip or uv in `root`, its progress visible; Stop with the reason where it fails."""
    python = str(python_of(root / ".venv"))
    command = ([python, "-m", "pip", "install", "--disable-pip-version-check", *what]
               if tool == "pip" else ["uv", "pip", "install", "--python", python, *what])
    environment = {**os.environ, "PIP_USER": "0", "PYTHONUTF8": "1"}
    # pip draws its bar on stdout and complains on stderr: the bar stays a bar (on our stderr, our
    # stdout is for answers), the complaints pass through here. uv draws and complains on stderr.
    catch = tool == "pip" or not _is_terminal(sys.stderr)
    process = subprocess.Popen(command, cwd=str(root), env=environment, stdout=_stderr(),
                               stderr=subprocess.PIPE if catch else None)
    last: collections.deque[str] = collections.deque(maxlen=400)    # as many hashes may be told
    try:
        for raw in process.stderr or ():
            line = raw.decode("utf-8", "replace").rstrip()
            last.append(line)
            print(line, file=sys.stderr, flush=True)
        code = process.wait()
    except KeyboardInterrupt as interrupt:
        if interrupt.args:              # a SIGTERM that reached us alone; Ctrl+C it got too
            process.terminate()
        with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            process.wait(20)
        raise
    finally:
        if process.poll() is None:
            process.kill()
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise _why_failed(root, tool, code, list(last))


def _why_failed(root: Path, tool: str, code: int, last: list[str]) -> Stop:
    key, params = packages.why_failed("\n".join(last))
    if last:
        print("\n".join([say("said_last", tool=tool), *("  " + line for line in last[-12:])]),
              file=sys.stderr)
    return Stop(key, 1, tool=tool, code=code, path=root, **params)


# Words and small things


def say(key: str, **params: object) -> str:
    return texts(language())[key].format(**params)


def tell(key: str, **params: object) -> None:
    print(say(key, **params), file=sys.stderr, flush=True)


def texts(lang: str) -> dict[str, str]:
    """bootstrap.yaml without a YAML library: that comes with the packages."""
    path = Path(__file__).resolve().parent.parent / "core" / "strings" / lang / "bootstrap.yaml"
    lines = (line.split(": ", 1) for line in path.read_text("utf-8").splitlines() if line)
    return {key: json.loads(text) for key, text in lines}


def language() -> str:
    """As core.words.language, which needs a package."""
    wanted = os.environ.get("DARKROOM_LANG") or locale.getlocale()[0] or ""
    return "zh-CN" if wanted.lower().startswith(("zh", "chinese")) else "en"


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


def _is_terminal(stream: object) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _stderr() -> int:
    """A file number for a child's output, also where sys.stderr isn't a real file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


if __name__ == "__main__":              # `python bootstrap.py complete ROOT EXTRA`: see above
    sys.exit(1 if missing(Path(sys.argv[2]), sys.argv[3]) else 0)
