"""Installs packages into .venv by uv or pip: locked versions, or those that pyproject.toml allows.

The lock is build/lock/*.txt: every package's version and hashes, for all systems and Pythons
(build/lock.py makes it from uv.lock). Standard library only, and readable by Python 3.8.
"""

from __future__ import annotations

import ast
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
HASHED = ["--require-hashes", "--no-deps"]      # a lock lists all: there is nothing to resolve
SETUPTOOLS = (77,)                              # as pyproject.toml's [build-system]
# The user's settings of pip and uv that would install elsewhere than into .venv, or something else.
# Those that say where packages come from count: mirrors, certificates, constraints.
ELSEWHERE = ("user", "require-hashes", "target", "prefix", "root", "dry-run", "no-deps",
             "no-build-isolation", "python", "platform", "python-version", "implementation", "abi",
             "requirement", "editable", "system-python", "no-build", "break-system-packages")


def install(root: Path, extras: list[str], versions: str, index: str, why: str) -> str:
    """Fills .venv and returns which versions were installed: "locked", "newest", or "ranges" of
    pyproject.toml, where the user's sources lack something of the lock.

    `index`: where torch comes from; "": the user's own sources. `why`: the key of the text that
    tells what is being done. Raises Stop.
    """
    return str(with_one_of(root, functools.partial(_install_with, root, extras, versions, index),
                           why))


def with_one_of(root: Path, action: Callable[[str], Any], why: str = "installing") -> Any:
    """Tries uv, then pip: uv is quick, but the user may have told only pip of a mirror or proxy."""
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
    # An old pip works as well; only it can't continue a download that broke off.
    with contextlib.suppress(Lacking):
        run(root, [*HASHED, "--requirement", LOCK.format("build")], tool)
    if versions == "locked" and not lock_fits(root):
        # Someone has changed pyproject.toml.
        tell("lock_behind")
        versions = "ranges"
    if versions == "locked":
        try:
            for extra in extras or ["base"]:
                run(root, [*HASHED, "--requirement", LOCK.format(extra)], tool)
            install_torch(root, index, tool)
            built = numbers(installed_version(root / ".venv", "setuptools")) >= SETUPTOOLS
            run(root, ["--no-deps", *(["--no-build-isolation"] if built else []), "-e", "."], tool)
            if complete(root, extras):
                return versions
            tell("lock_behind")
        except Lacking as lacking:
            # A folder of wheels for use offline, or a mirror that lags. After uv, pip is tried.
            if tool == "uv" and importlib.util.find_spec("ensurepip"):
                raise
            tell("lock_lacking", package=lacking.params["package"])
        versions = "ranges"
    newer = ["--upgrade"] if versions == "newest" else []
    if index:
        run(root, [*newer, "--index-url", index, *torch_lines(root)], tool)
    if newer and tool == "pip":
        newer += ["--upgrade-strategy", "eager"]
    # A torch for the card must not be replaced by a newer one of another index.
    torch = installed_version(root / ".venv", "torch")
    held = [f"{name}=={version}" for name in ("torch", "torchvision")
            for version in [installed_version(root / ".venv", name)]
            if version and (index or "+" in torch)]
    with requirements(held) as file:
        run(root, [*newer, *(["--constraint", file] if held else []),
                   "-e", f".[{','.join(extras)}]" if extras else "."], tool)
    return versions


def install_torch(root: Path, index: str, tool: str, again: bool = False) -> None:
    """Installs the locked torch. The lock has the hashes of PyPI's builds, so another index or
    build gets the version alone, and pip checks the hash of the index. `again`: reinstalls.
    """
    pinned, here = torch_locked(root), installed_version(root / ".venv", "torch")
    more = ["--force-reinstall", "--no-deps"] if again else []
    if not pinned:
        return
    if not index:
        build = own_torch(root, pinned[0], tool)
        if build:
            tell("torch_build", build=build)
            return run(root, [*more, *pinned], tool)
        # PyPI's build would replace the user's one for ROCm or a CPU.
        if "+" in here and not again:
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
    """'2.14.1+cpu', if the user's own sources have a build of the locked torch besides PyPI's: with
    hashes it would be skipped silently. For uv, only its settings tell."""
    if tool == "uv":
        settings = " ".join(value for name, value in os.environ.items() if name.startswith("UV_"))
        match = re.search(r"(?:^|[/ ])(cpu|cu\d{2,3}|rocm[\d.]+|xpu)(?:[/ ]|$)", settings)
        return match.group(1) if match else ""
    command = [str(python_of(root / ".venv")), "-m", "pip", "index", "versions", "torch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          stdin=subprocess.DEVNULL, env=environment_of(command[0]))
    match = re.search(rf"(?<![\d.]){re.escape(pinned.partition('==')[2])}\+[\w.]+",
                      done.stdout.decode("utf-8", "replace"))
    return match.group() if match else ""


@functools.lru_cache(maxsize=None)     # noqa: UP033 (Python 3.8)
def environment_of(python: str) -> dict[str, str]:
    """The environment in which an installer works on .venv alone. Settings of pip's files that
    lead elsewhere can't be unset: the others are then given as variables, and no file is read."""
    ours = {name: value for name, value in os.environ.items()
            if _setting(name) not in ELSEWHERE}
    ours["PYTHONUTF8"] = "1"
    plain = {name: value for name, value in ours.items()
             if name == "PIP_CONFIG_FILE" or not name.startswith("PIP_")}
    listed = subprocess.run([python, "-m", "pip", "config", "list"], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=plain)
    found = {}
    for line in listed.stdout.decode("utf-8", "replace").splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in ("global", "install") and value[:1] in ("'", '"'):
            found[name] = str(ast.literal_eval(value))
    if not set(found) & set(ELSEWHERE):
        return ours
    given = {"PIP_" + name.upper().replace("-", "_"): value for name, value in found.items()
             if name not in ELSEWHERE}
    return {**given, **ours, "PIP_CONFIG_FILE": os.devnull}


def _setting(variable: str) -> str:
    """'require-hashes' of PIP_REQUIRE_HASHES, or of UV_REQUIRE_HASHES; "": it is of neither."""
    tool, _, name = variable.partition("_")
    return name.lower().replace("_", "-") if tool in ("PIP", "UV") else ""


class Lacking(Stop):
    """The user's package sources don't have a package, which `params` names."""


def run(root: Path, what: list[str], tool: str) -> None:
    """Runs `pip install` or uv's in `root` with visible progress. Raises Stop with the reason."""
    python = str(python_of(root / ".venv"))
    command = ([python, "-m", "pip", "install", "--disable-pip-version-check", *what]
               if tool == "pip" else
               # A UV_DEFAULT_INDEX would win against --index-url.
               ["uv", "pip", "install", "--python", python,
                *("--default-index" if word == "--index-url" else word for word in what)])
    # pip draws its progress bar on stdout, which goes to our stderr (our stdout is for answers);
    # its errors are read here. uv uses stderr for both, so in a terminal it is left alone.
    is_terminal = getattr(sys.stderr, "isatty", lambda: False)()
    catch = tool == "pip" or not is_terminal
    process = subprocess.Popen(command, cwd=str(root), stdout=_stderr(),
                               env=environment_of(python),
                               stderr=subprocess.PIPE if catch else None)
    # pip lists all hashes of a package before its error.
    last: collections.deque[str] = collections.deque(maxlen=400)
    try:
        for raw in process.stderr or ():
            line = raw.decode("utf-8", "replace").rstrip()
            last.append(line)
            print(line, file=sys.stderr, flush=True)
        code = process.wait()
    except KeyboardInterrupt as interrupt:
        # With arguments it is a SIGTERM for us alone; Ctrl+C reaches the child too.
        if interrupt.args:
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
    """The fault that an installer's last lines tell of; prints those lines."""
    key, params = why_failed("\n".join(last))
    if last:
        print("\n".join([tr("said_last", tool=tool), *("  " + line for line in last[-12:])]),
              file=sys.stderr)
    kind = Lacking if key == "failed_lacking" else Stop
    return kind(key, 1, tool=tool, code=code, path=root, **params)


@contextlib.contextmanager
def requirements(lines: list[str]) -> Iterator[str]:
    """A temporary file of these requirements: installers take hashes only from files."""
    handle, name = tempfile.mkstemp(prefix="darkroom-", suffix=".txt")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        yield name
    finally:
        os.unlink(name)


def _stderr() -> int:
    """A file number for a child's output, also where sys.stderr isn't a real file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2
