"""What is broken in an environment: packages that are half there, files that were changed, a torch
that doesn't fit the card. bootstrap.py mends it.

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
# What installers say last, and the sentence it stands for; groups are the sentence's words. A
# retry that helped is told as well, so that network comes after what can only be said without it.
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
    """A package that isn't as it was installed."""

    name: str
    version: str
    info: Path                          # its .dist-info
    why: str                            # half | record | double | file
    file: str = ""                      # the first one that is missing or changed


def broken(venv: Path) -> list[Broken]:
    """Reads every file of every package: seconds to a minute for the 6 GB of a CUDA torch."""
    found = []
    for site in site_packages(venv):
        infos = sorted(site.glob("*.dist-info"))
        names = [plain(_named(info)[0]) for info in infos]
        for info in infos:
            name, version = _named(info)
            twice = names.count(plain(name)) > 1
            why, file = ("double", "") if twice else _state(site, info)
            if why:
                found.append(Broken(name, version, info, why, file))
    return found


def count(venv: Path) -> int:
    return sum(1 for site in site_packages(venv) for _ in site.glob("*.dist-info"))


def _named(info: Path) -> tuple[str, str]:
    name, _, version = info.name[:-len(".dist-info")].partition("-")
    return name, version


def _state(site: Path, info: Path) -> tuple[str, str]:
    """(why it is broken, file); ("", ""): it is whole."""
    if not (info / "INSTALLER").exists():       # installers write it last
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
    """Whether a file differs from its row in RECORD; what has no hash there may change."""
    path, digest, size = row
    algorithm, _, wanted = digest.partition("=")
    if not wanted or algorithm not in hashlib.algorithms_guaranteed:
        return False
    try:
        if size.isdigit() and (site / path).stat().st_size != int(size):
            return True
        sum_ = hashlib.new(algorithm)
        with open(site / path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                sum_.update(block)
    except (OSError, ValueError):
        return True
    return base64.urlsafe_b64encode(sum_.digest()).rstrip(b"=").decode() != wanted


def leftovers(venv: Path) -> Iterator[Path]:
    """What a killed pip had moved aside: "~umpy" was numpy."""
    for site in site_packages(venv):
        yield from site.glob("~*")


def unfit_torch(venv: Path, cards: list[tuple[float, float]]) -> bool:
    """Whether the torch that is there can't use the cards that are there."""
    text = "".join(path.read_text("utf-8", "replace") for site in site_packages(venv)
                   for path in site.glob("torch/version.py"))
    if not cards or not text or re.search(r"^hip\b[^=\n]*= *'", text, re.MULTILINE):
        return False
    found = re.search(r"^cuda\b[^=\n]*= *'([\d.]+)'", text, re.MULTILINE)
    built = numbers(found.group(1)) if found else ()
    if torch_index(cards) == TORCH_CUDA_OLD:
        return not built or built >= (13,)
    newest = max(capability for capability, _ in cards)
    return not built or (newest >= 10 and built < (12, 8))      # Blackwell


def torch_source(version: str) -> str:
    """The index of a torch with a local version ("2.9.1+cu126"); "": the user's own."""
    local = version.partition("+")[2]
    return TORCH_WHEELS + local if re.match(r"^(cpu|cu\d+|xpu|rocm[\d.]+)$", local) else ""


def clear_away(venv: Path, found: list[Broken]) -> None:
    """What stands in an installer's way. Files of packages stay until they are replaced."""
    for path in leftovers(venv):
        shutil.rmtree(str(path), ignore_errors=True)
        if path.exists():
            path.unlink()
    for one in found:
        if one.why != "file":           # without a sound RECORD none can be uninstalled
            shutil.rmtree(str(one.info), ignore_errors=True)


def why_failed(said: str) -> tuple[str, dict[str, str]]:
    """The sentence for an installer's last words: its key, and `package` and `file` if it told."""
    for key, signs in FAILURES:
        found = re.search(signs, said, re.IGNORECASE | re.DOTALL)
        if found:
            told = {name: value for name, value in found.groupdict().items() if value}
            package = told.get("package", "?").rstrip(",")
            return key, {"package": package, "file": unquote(told.get("file", package))}
    return "failed", {}
