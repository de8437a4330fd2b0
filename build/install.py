"""Installs packages into .venv, by uv or pip: the locked versions, or those that pyproject.toml
allows.

The lock is build/lock/*.txt: every package's version and hashes, for all systems and Pythons
(build/lock.py makes it from uv.lock). Standard library only, and readable by Python 3.8.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from environment import (
    complete,
    installed_version,
    lock_fits,
    numbers,
    parsed,
    python_of,
    torch_lines,
    torch_locked,
    within,
)
from messages import Stop, tell, tr
from repair import torch_source, why_failed

LOCK = "build/lock/{}.txt"
HASHED = ["--require-hashes", "--no-deps"]      # a lock names everything: nothing is resolved
SETUPTOOLS = (77,)                              # as pyproject.toml's [build-system]
# A user's settings of pip that lead elsewhere than into .venv; empty is unset for pip.
ELSEWHERE = {"PIP_USER": "0", "PIP_REQUIRE_HASHES": "", "PIP_TARGET": "", "PIP_PREFIX": "",
             "PIP_ROOT": "", "PIP_DRY_RUN": "", "PIP_NO_DEPS": "", "PIP_NO_BUILD_ISOLATION": ""}


def install(root: Path, extras: list[str], versions: str, index: str, why: str) -> str:
    """Fills .venv, and returns which versions came: "locked", "newest", or "ranges" of
    pyproject.toml, where the user's sources lack something of the lock.

    `index`: where torch comes from; "": the user's own sources. `why`: the text that says what
    goes on. Raises Stop.
    """
    return str(with_one_of(root, functools.partial(_install_with, root, extras, versions, index),
                           why))


def with_one_of(root: Path, action: Callable[[str], Any], why: str = "installing") -> Any:
    """uv is quick, but pip may know a mirror or proxy that uv wasn't told of."""
    for tool in ["uv", "pip"] if shutil.which("uv") else ["pip"]:
        tell(why, tool=tool)
        try:
            if tool == "pip" and not installed_version(root / ".venv", "pip"):
                subprocess.run([str(python_of(root / ".venv")), "-m", "ensurepip"],
                               stdout=_stderr())
            return action(tool)
        except Stop:
            if tool == "pip" or not importlib.util.find_spec("ensurepip"):
                raise
            tell("uv_failed")


def _install_with(root: Path, extras: list[str], versions: str, index: str, tool: str) -> str:
    with contextlib.suppress(Lacking):      # an old pip does as well, but can't go on within a
        run(root, [*HASHED, "--requirement", LOCK.format("build")], tool)       # download
    if versions == "locked" and not lock_fits(root):
        tell("lock_behind")                 # someone changed pyproject.toml
        versions = "ranges"
    if versions == "locked":
        try:
            _install_locked(root, extras, index, tool)
            if complete(root, extras):
                return versions
            tell("lock_behind")
        except Lacking as lacking:          # an offline folder of another day, a mirror that lags
            if tool == "uv" and importlib.util.find_spec("ensurepip"):
                raise                       # pip may have it
            tell("lock_lacking", package=lacking.params["package"])
        versions = "ranges"
    newer = ["--upgrade"] if versions == "newest" else []
    if index:
        run(root, [*newer, "--index-url", index, *torch_lines(root)], tool)
    if newer and tool == "pip":
        newer += ["--upgrade-strategy", "eager"]
    # a card's own torch is not to be exchanged for a newer one of another index
    here = installed_version(root / ".venv", "torch")
    held = [f"{name}=={version}" for name in ("torch", "torchvision")
            for version in [installed_version(root / ".venv", name)]
            if version and (index or "+" in here)]
    with requirements(held) as file:
        run(root, [*newer, *(["--constraint", file] if held else []),
                   "-e", f".[{','.join(extras)}]" if extras else "."], tool)
    return versions


def _install_locked(root: Path, extras: list[str], index: str, tool: str) -> None:
    for extra in extras or ["base"]:
        run(root, [*HASHED, "--requirement", LOCK.format(extra)], tool)
    install_torch(root, index, tool)
    built = numbers(installed_version(root / ".venv", "setuptools")) >= SETUPTOOLS
    run(root, ["--no-deps", *(["--no-build-isolation"] if built else []), "-e", "."], tool)


def install_torch(root: Path, index: str, tool: str, again: bool = False) -> None:
    """The locked torch, or of another index or build its version alone, since PyPI's hashes are not
    theirs: pip compares with the hash that the index tells. `again`: also where it seems installed.
    """
    pinned, here = torch_locked(root), installed_version(root / ".venv", "torch")
    more = ["--force-reinstall", "--no-deps"] if again else []
    if not pinned:
        return
    if not index:
        own = own_torch(root, pinned[0], tool)
        if own:
            tell("torch_build", build=own)
            return run(root, [*more, *pinned], tool)
        if "+" in here and not again:       # PyPI's would take the place of ROCm's or a CPU's
            index = torch_source(here)
            if not index and within(here, parsed(torch_lines(root)[0])[1]):
                return tell("torch_kept", version=here)
    if not index:
        return run(root, [*more, *HASHED, "--requirement", LOCK.format("torch")], tool)
    tell("torch_from", index=index)
    try:
        run(root, [*more, "--index-url", index, *pinned], tool)
    except Lacking:
        tell("torch_lacking", index=index, versions=" ".join(pinned))
        try:
            run(root, [*more, "--index-url", index, *torch_lines(root)], tool)
        except Lacking:
            raise Stop("torch_nowhere", index=index) from None


def own_torch(root: Path, pinned: str, tool: str) -> str:
    """The build of the locked torch that the user's own sources hold beside PyPI's, '2.14.1+cpu':
    with hashes it would be passed over in silence. uv can't be asked, only its settings."""
    if tool == "uv":
        places = " ".join(value for name, value in os.environ.items() if name.startswith("UV_"))
        found = re.search(r"(?:^|[/ ])(cpu|cu\d{2,3}|rocm[\d.]+|xpu)(?:[/ ]|$)", places)
        return found.group(1) if found else ""
    command = [str(python_of(root / ".venv")), "-m", "pip", "index", "versions", "torch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONUTF8": "1"})
    found = re.search(rf"(?<![\d.]){re.escape(pinned.partition('==')[2])}\+[\w.]+",
                      done.stdout.decode("utf-8", "replace"))
    return found.group() if found else ""


class Lacking(Stop):
    """The user's package sources don't have what was asked for; `params` names the package."""


def run(root: Path, what: list[str], tool: str) -> None:
    """Runs `pip install` or uv's in `root`, its progress visible; Stop with the reason where it
    fails."""
    python = str(python_of(root / ".venv"))
    command = ([python, "-m", "pip", "install", "--disable-pip-version-check", *what]
               if tool == "pip" else
               # --index-url would lose against a UV_DEFAULT_INDEX
               ["uv", "pip", "install", "--python", python,
                *("--default-index" if word == "--index-url" else word for word in what)])
    # pip draws its bar on stdout and complains on stderr: the bar stays a bar (on our stderr, our
    # stdout is for answers), the complaints pass through here. uv draws and complains on stderr.
    catch = tool == "pip" or not _is_terminal(sys.stderr)
    process = subprocess.Popen(command, cwd=str(root), stdout=_stderr(),
                               env={**os.environ, **ELSEWHERE, "PYTHONUTF8": "1"},
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
        raise failure(root, tool, code, list(last))


def failure(root: Path, tool: str, code: int, last: list[str]) -> Stop:
    """The sentence for an installer's last words, which are printed too."""
    key, params = why_failed("\n".join(last))
    if last:
        print("\n".join([tr("said_last", tool=tool), *("  " + line for line in last[-12:])]),
              file=sys.stderr)
    kind = Lacking if key == "failed_lacking" else Stop
    return kind(key, 1, tool=tool, code=code, path=root, **params)


@contextlib.contextmanager
def requirements(lines: list[str]) -> Iterator[str]:
    """A file of these requirements while an installer reads it: hashes only stand in files."""
    handle, name = tempfile.mkstemp(prefix="darkroom-", suffix=".txt")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        yield name
    finally:
        os.unlink(name)


def _is_terminal(stream: object) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _stderr() -> int:
    """A file number for a child's output, also where sys.stderr isn't a real file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2
