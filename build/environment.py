"""Facts about Python environments and cards, for bootstrap.py.

Standard library only, and readable by Python 3.8.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OLDEST = (3, 11)
STAMP = "darkroom.json"                 # in .venv: its state, see write_stamp
# PyPI's torch is CPU-only on Windows, and its CUDA 13 leaves out cards before Turing and
# drivers before 580 on every system.
TORCH_CUDA = "https://download.pytorch.org/whl/cu130"
TORCH_CUDA_OLD = "https://download.pytorch.org/whl/cu126"


# Environments


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_current(root: Path, extra: str = "", versions: str = "") -> bool:
    """Whether .venv is finished, by its stamp: for this pyproject.toml, lock, extra, versions."""
    stamp = read_stamp(root)
    return (stamp.get("state") == "ready" and stamp.get("wanted") == fingerprint(root)
            and (not extra or extra in stamp.get("extras", []))
            and versions in ("", stamp.get("versions")))


def read_stamp(root: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((root / ".venv" / STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(root: Path, stamp: dict[str, Any]) -> None:
    """`stamp`: state (making, made, installing, ready), python, extras, versions, torch_index, and
    wanted: the fingerprint that .venv was made from, by default the present one."""
    path = root / ".venv" / STAMP
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"wanted": fingerprint(root), **stamp,
                                     "root": os.path.realpath(root)}, indent=1), "utf-8")
    # As a whole: a start that is killed must not leave half a stamp.
    os.replace(temporary, path)


def complete(root: Path, extras: Iterable[str] = ()) -> bool:
    """Whether .venv has what pyproject.toml requires, checked by its own interpreter."""
    check = [str(python_of(root / ".venv")), str(Path(__file__)), str(root), *filter(None, extras)]
    return subprocess.run(check, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL).returncode == 0


def missing(root: Path, *extras: str) -> list[str]:
    """Requirements of pyproject.toml that this interpreter lacks or has in a wrong version."""
    if sys.version_info < OLDEST:
        return [f"python>={dotted(OLDEST)}"]
    # Here, as Python 3.8 has no tomllib.
    import tomllib
    from importlib.metadata import PackageNotFoundError, version
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(project.get("dependencies", []))
    for extra in extras:
        lines += project.get("optional-dependencies", {}).get(extra, [])
    lacking = []
    for line in lines:
        name, limits = parsed(line)
        try:
            if not within(version(name), limits):
                lacking.append(line)
        except PackageNotFoundError:
            lacking.append(line)
    return lacking


def parsed(requirement: str) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    """'torch[x]>=2.7,<3 ; marker' -> ('torch', [('>=', (2, 7)), ('<', (3,))])"""
    name = re.match(r"[\w.-]+", requirement)
    limits = re.findall(r"(>=|<=|==|!=|<|>|~=)\s*([\d.]+)", requirement.split(";")[0])
    return (name.group() if name else requirement), [(op, numbers(n)) for op, n in limits]


def within(version: str, limits: list[tuple[str, tuple[int, ...]]]) -> bool:
    """Whether a version is within lower and upper bounds; the installer checks the rest."""
    release = numbers(version)
    return all({">=": release >= bound, ">": release > bound, "<": release < bound,
                "<=": release <= bound, "==": release == bound, "!=": release != bound,
                "~=": release >= bound}[op] for op, bound in limits)


def numbers(version: str) -> tuple[int, ...]:
    """'2.10.0+cu130' -> (2, 10): the release without zeros at its end."""
    release = re.match(r"\d+(\.\d+)*?(?=(\.0+)*(?![.\d]))", version)
    return tuple(map(int, release.group().split("."))) if release else ()


def version_of(python: Path) -> str:
    """'3.11', or '' for an interpreter that doesn't run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([str(python), "-I", "-c", code], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=60,
                              check=True).stdout.decode().strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def drop_half_installed(venv: Path) -> None:
    """Makes installers install these again: they write INSTALLER last."""
    for info in (info for site in site_packages(venv) for info in site.glob("*.dist-info")):
        if not (info / "INSTALLER").exists():
            shutil.rmtree(str(info), ignore_errors=True)


def site_packages(venv: Path) -> list[Path]:
    return [*venv.glob("lib/python*/site-packages"), *venv.glob("Lib/site-packages")]


def fingerprint(root: Path) -> str:
    """A hash of what an environment is made from: pyproject.toml and the lock. Line ends, which
    git may change, don't count."""
    files = [root / "pyproject.toml", *sorted((root / "build" / "lock").glob("*.txt"))]
    content = b"".join(file.read_bytes().replace(b"\r\n", b"\n") for file in files)
    return hashlib.sha256(content).hexdigest()


def asked_for(root: Path) -> str:
    """A hash of all requirements in pyproject.toml, without comments; a lock names the one that it
    was made for. Read as text: an old Python outside .venv has no tomllib."""
    text = (root / "pyproject.toml").read_text("utf-8")
    tables = re.findall(r"^dependencies = \[.*?^\]|"
                        r"^\[(?:project\.optional-dependencies|dependency-groups)\]$.*?(?=^\[|\Z)",
                        text, re.MULTILINE | re.DOTALL)
    words = re.sub(r"#.*|\s", "", "".join(tables))
    return hashlib.sha256(words.encode("utf-8")).hexdigest()


def lock_fits(root: Path) -> bool:
    return asked_for(root) in (root / "build" / "lock" / "base.txt").read_text("utf-8")


def plain(name: str) -> str:
    """One spelling of a package's name (PyPA, "Names and normalization")."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(root: Path, name: str, version: str) -> str:
    """The lock's requirement of this version with its hashes; "": the lock has another version."""
    for file in sorted((root / "build" / "lock").glob("*.txt")):
        for requirement in re.split(r"\n(?=\S)", file.read_text("utf-8").strip()):
            if re.match(rf"{re.escape(plain(name))}=={re.escape(version)}[\s;]", requirement):
                return requirement
    return ""


def installed_version(venv: Path, name: str) -> str:
    """'2.14.1+cu126' for 'torch', from the name of its folder; "": it is not installed."""
    return next((info.name[len(name) + 1:-len(".dist-info")] for site in site_packages(venv)
                 for info in site.glob(f"{name}-[0-9]*.dist-info")), "")


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def same(one: str, other: Path) -> bool:
    return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))


# Which torch


def torch_index(cards: list[tuple[float, float]], system: str = os.name) -> str:
    """The index to install torch from, before the other packages; '': the user's own sources.

    `cards`: (compute capability, driver) each; capability 0 where it is unknown.
    """
    chosen = os.environ.get("DARKROOM_TORCH_INDEX")
    if chosen is not None:
        return chosen
    if not cards or sys.platform == "darwin":
        return ""
    # Turing is 7.5. The builds for old drivers can't use Blackwell (10).
    if any(0 < capability < 7.5 or (0 < driver < 580 and capability < 10)
           for capability, driver in cards):
        return TORCH_CUDA_OLD
    return TORCH_CUDA if system == "nt" else ""


def nvidia_cards() -> list[tuple[float, float]]:
    """(compute capability, driver) of each NVIDIA card; (0, 0) where only the driver is seen."""
    cards = []
    command = shutil.which("nvidia-smi")
    if command:
        query = [command, "--query-gpu=compute_cap,driver_version", "--format=csv,noheader"]
        try:
            output = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    stdin=subprocess.DEVNULL, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            output = b""
        cards = [(float(capability), float(driver)) for capability, driver in re.findall(
            r"^\s*(\d+\.\d+)\s*,\s*(\d+\.\d+)", output.decode("utf-8", "replace"), re.MULTILINE)]
    # Old drivers have no nvidia-smi on the PATH.
    system32 = Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32"
    if not cards and os.name == "nt" and (system32 / "nvcuda.dll").exists():
        return [(0.0, 0.0)]
    return cards


def torch_locked(root: Path) -> list[str]:
    """'torch==2.14.1', 'torchvision==0.29.1', without the hashes, which are of PyPI's builds."""
    return re.findall(r"^((?:torch|torchvision)==[^\s;]+)",
                      (root / "build" / "lock" / "torch.txt").read_text("utf-8"), re.MULTILINE)


def torch_lines(root: Path) -> list[str]:
    return re.findall(r'^\s*"((?:torch|torchvision)\b[^"]*)"',
                      (root / "pyproject.toml").read_text("utf-8"), re.MULTILINE)


if __name__ == "__main__":              # `python environment.py ROOT EXTRA ...`: see complete
    sys.exit(1 if missing(Path(sys.argv[1]), *sys.argv[2:]) else 0)
