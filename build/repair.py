"""Finds what is broken in an environment: half installed packages, changed files, a torch that
doesn't fit the card. bootstrap.py mends it.

Standard library only, and readable by Python 3.8. Format of RECORD: PyPA, "Recording installed
projects".
"""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from environment import TORCH_CUDA_OLD, numbers, plain, site_packages, torch_index

TORCH_WHEELS = "https://download.pytorch.org/whl/"      # + cpu, cu126, ...: a version's local part
# Installers' last lines, and the key of the sentence for them; groups are its parameters. Retries
# that succeeded are in those lines too, so faults that show the network works come before it.
NETWORK = (r"connection (broken|refused|reset|error)|failed to establish|getaddrinfo|"
           r"name resolution|name or service|timed? ?out|proxyerror|SSLError|"
           r"network is unreachable|dns error|error sending request|"
           r"IncompleteRead|Wheel '.*' .* is invalid")
LACKING = r"no matching distribution found for (?P<package>\S+)"
FAILURES = (
    ("failed_disk", r"no space left|disk full|not enough space|Errno 28\b"),
    ("failed_rights", r"permission denied|access is denied|Errno 13\b|WinError 5\b"),
    ("failed_hash", r"DO NOT MATCH THE HASHES.*?\n\s+(?P<package>\S+)(?: from (?P<file>\S+))?"),
    ("failed_hash", r"hash mismatch for `(?P<package>[^`]+)`"),
    ("failed_lacking", rf"from versions: (?!none)[^)]*\).*{LACKING}"),
    ("failed_lacking", r"cannot install (?P<package>\S+)[^\n]* because these package versions"),
    ("failed_lacking", r"there is no version of (?P<package>\S+)"),
    ("failed_network", NETWORK),
    ("failed_lacking", LACKING),
)


class Broken(NamedTuple):
    """A package that is not as it was installed."""

    name: str
    version: str
    info: Path                          # its .dist-info
    why: str                            # half | record | double | file
    file: str = ""                      # the first one that is missing or changed


def broken(venv: Path) -> list[Broken]:
    """Reads every file of every package: up to a minute for the 6 GB of a CUDA torch."""
    packages = []
    for site in site_packages(venv):
        infos = sorted(site.glob("*.dist-info"))
        names = [plain(_named(info)[0]) for info in infos]
        for info in infos:
            name, version = _named(info)
            # Two versions of one package: an update was interrupted.
            twice = names.count(plain(name)) > 1
            why, file = ("double", "") if twice else _state(site, info)
            if why:
                packages.append(Broken(name, version, info, why, file))
    return packages


def count(venv: Path) -> int:
    return sum(1 for site in site_packages(venv) for _ in site.glob("*.dist-info"))


def _named(info: Path) -> tuple[str, str]:
    name, _, version = info.name[:-len(".dist-info")].partition("-")
    return name, version


def _state(site: Path, info: Path) -> tuple[str, str]:
    """(why it is broken, file); ("", ""): it is whole."""
    # Installers write it last.
    if not (info / "INSTALLER").exists():
        return "half", ""
    try:
        with open(info / "RECORD", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error):
        return "record", ""
    if not rows or any(len(row) != 3 for row in rows):
        return "record", ""
    return next((("file", row[0]) for row in rows if _changed(site, row)), ("", ""))


def _changed(site: Path, row: list[str]) -> bool:
    """Whether a file differs from its row in RECORD; a file without a hash there may change."""
    path, digest, size = row
    algorithm, _, expected = digest.partition("=")
    if not expected or algorithm not in hashlib.algorithms_guaranteed:
        return False
    try:
        # The size first: most changes show there, without reading the file.
        if size.isdigit() and (site / path).stat().st_size != int(size):
            return True
        digester = hashlib.new(algorithm)
        with open(site / path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digester.update(block)
    except (OSError, ValueError):
        return True
    return base64.urlsafe_b64encode(digester.digest()).rstrip(b"=").decode() != expected


def leftovers(venv: Path) -> Iterator[Path]:
    """Packages that a killed pip had renamed before their removal: "~umpy" was numpy."""
    for site in site_packages(venv):
        yield from site.glob("~*")


def unfit_torch(venv: Path, cards: list[tuple[float, float]]) -> bool:
    """Whether the installed torch can't use the cards."""
    text = "".join(path.read_text("utf-8", "replace") for site in site_packages(venv)
                   for path in site.glob("torch/version.py"))
    # A torch for AMD's ROCm was chosen by the user.
    if not cards or not text or re.search(r"^hip\b[^=\n]*= *'", text, re.MULTILINE):
        return False
    match = re.search(r"^cuda\b[^=\n]*= *'([\d.]+)'", text, re.MULTILINE)
    built = numbers(match.group(1)) if match else ()
    if torch_index(cards) == TORCH_CUDA_OLD:
        return not built or built >= (13,)
    newest = max(capability for capability, _ in cards)
    # Blackwell needs CUDA 12.8.
    return not built or (newest >= 10 and built < (12, 8))


def torch_source(version: str) -> str:
    """The index of a torch with a local version ("2.9.1+cu126"); "": the user's own."""
    local = version.partition("+")[2]
    return TORCH_WHEELS + local if re.match(r"^(cpu|cu\d+|xpu|rocm[\d.]+)$", local) else ""


def clear_away(venv: Path, broken: list[Broken]) -> None:
    """Removes what an installer would stumble over. Files of packages stay until their replacement.
    """
    for path in leftovers(venv):
        shutil.rmtree(str(path), ignore_errors=True)
        if path.exists():
            path.unlink()
    for package in broken:
        # Without a sound RECORD a package can't be uninstalled.
        if package.why != "file":
            shutil.rmtree(str(package.info), ignore_errors=True)


def why_failed(output: str) -> tuple[str, dict[str, str]]:
    """The key of the sentence for an installer's last lines, and its `package` and `file`."""
    for key, pattern in FAILURES:
        match = re.search(pattern, output, re.IGNORECASE | re.DOTALL)
        if match:
            named = {name: value for name, value in match.groupdict().items() if value}
            package = named.get("package", "?").rstrip(",")
            return key, {"package": package, "file": unquote(named.get("file", package))}
    return "failed", {}
