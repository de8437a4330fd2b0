"""What stands between this machine and a training: findings, each with what mends it.

Torch is asked in a process of its own: a broken build may take its process down. Nothing here
raises; what can't be found out is a finding too.
"""

from __future__ import annotations

import json
import locale
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core import gpu, paths, words
from core.gpu import GpuInfo, GpuReport

GB = 2**30
OLDEST_PYTHON = (3, 11)
TORCH_INDEX = "https://download.pytorch.org/whl/cu130"           # Turing and later
TORCH_INDEX_OLD = "https://download.pytorch.org/whl/cu126"       # Maxwell, Pascal, Volta
LEAST = {"ram": 4, "disk": 10, "disk_now": 1}                    # GB free
LONGEST_PATH = 100                       # chars; Windows stops at 260 and packages nest deep
BUSY_MB = 500                            # of a card, held by another program
TORCH_PATIENCE_S = 180

Level = Literal["ok", "warning", "error"]
MARKS: dict[Level, str] = {"ok": "[ok]", "warning": "[ !]", "error": "[ x]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`doctor.<key>` is its sentence; `doctor.<key>_mend` says what to do, unless all is well."""

    key: str
    level: Level = "ok"
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return words.say(f"doctor.{self.key}", self.params)

    @property
    def mend(self) -> str:
        return "" if self.level == "ok" else words.say(f"doctor.{self.key}_mend", self.params)


def examine() -> list[Finding]:
    """All findings. A check that fails itself is a finding, and the others still run."""
    report = gpu.report()
    findings: list[Finding] = []
    for check in (python, packages, lambda: cards(report), lambda: torch(torch_facts(), report),
                  memory, lambda: folders([paths.data_dir(), paths.cache_dir()]), encoding):
        try:
            findings += check()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            findings.append(Finding("unknown", "warning", {"reason": reason}))
    return findings


def lines(finding: Finding) -> list[str]:
    shown = [f"{MARKS[finding.level]} {finding.text}"]
    return [*shown, f"     -> {finding.mend}"] if finding.mend else shown


def as_dict(finding: Finding) -> dict[str, Any]:
    return {"key": finding.key, "level": finding.level, "text": finding.text,
            "mend": finding.mend, "params": finding.params}


# --- Python and packages ---

def python() -> Iterator[Finding]:
    facts = {"version": platform.python_version(), "path": sys.executable,
             "system": platform.platform(terse=True), "bits": 64 if sys.maxsize > 2**32 else 32,
             "oldest": ".".join(map(str, OLDEST_PYTHON))}
    fit = sys.version_info >= OLDEST_PYTHON and facts["bits"] == 64
    yield Finding("python" if fit else "python_unfit", "ok" if fit else "error", facts)


def packages() -> Iterator[Finding]:
    """Every requirement with its version; those that are missing or outside their bounds."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement
    found, unfit = [], []
    for requirement in map(Requirement, requirements()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            has = version(requirement.name)
        except PackageNotFoundError:
            unfit.append(str(requirement))
            continue
        found.append(f"{requirement.name} {has}")
        if not requirement.specifier.contains(has, prereleases=True):
            unfit.append(str(requirement))
    if found:
        yield Finding("packages", params={"list": ", ".join(found)})
    if unfit:
        yield Finding("packages_unfit", "error",
                      {"list": ", ".join(unfit), "python": sys.executable,
                       "wanted": " ".join(f'"{one}"' for one in unfit)})


def requirements() -> list[str]:
    """From pyproject.toml in a checkout, else from what was installed."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, requires
    pyproject = paths.ROOT / "pyproject.toml"
    if pyproject.exists():
        listed = tomllib.loads(pyproject.read_text("utf-8"))["project"]["dependencies"]
        return [str(line) for line in listed]
    try:
        return requires("lora-darkroom") or []
    except PackageNotFoundError:
        return []                       # a built app carries its packages inside


# --- cards and torch ---

def cards(report: GpuReport) -> Iterator[Finding]:
    if not report.gpus:
        yield Finding("no_card", params={"reason": report.problem or "0"})
    for card in report.gpus:
        facts = _facts(card)
        yield Finding("card", params=facts)
        held = [user for user in card.users
                if user.pid != os.getpid() and (user.used_mb or 0) > BUSY_MB]
        if held:
            yield Finding("card_busy", "warning", facts | {
                "programs": ", ".join(f"{_program(u.pid)} ({u.used_mb:.0f} MB)" for u in held)})


def torch(facts: dict[str, Any], report: GpuReport) -> Iterator[Finding]:
    """Does this torch fit the cards? `facts` as torch_facts() tells them."""
    if "error" in facts:
        yield Finding("torch_broken", "error", facts | {"python": sys.executable})
        return
    facts = facts | {"python": sys.executable, "index": TORCH_INDEX, "old": TORCH_INDEX_OLD}
    unfit = [card for card in report.gpus
             if any(card.capability) and not runs_on(card.capability, facts["archs"])]
    if not report.gpus:
        yield Finding("torch_mps" if facts["mps"] else "torch_cpu", params=facts)
    elif not facts["cuda"] and not facts["hip"]:
        yield Finding("torch_without_cuda", "error",
                      facts | _facts(report.gpus[0]) | {"index": index_for(report.gpus)})
    elif not facts["available"]:
        yield Finding("torch_no_contact", "error", facts | _facts(report.gpus[0]))
    elif unfit:
        key = "torch_too_new" if unfit[0].capability < (7, 5) else "torch_too_old"
        yield Finding(key, "error", facts | _facts(unfit[0]))
    else:
        yield Finding("torch_cuda", params=facts)


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """sm_XY code runs on cards of the same major version from X.Y on; compute_XY (PTX) on all
    later ones."""
    major, minor = capability
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")    # sm_90a: code for exactly that card
        if not digits.isdigit():
            continue
        have = divmod(int(digits), 10)
        if kind == "sm" and have[0] == major and have[1] <= minor:
            return True
        if kind == "compute" and have <= (major, minor):
            return True
    return not archs                    # it doesn't tell: the first kernel will


def index_for(cards: Iterable[GpuInfo]) -> str:
    old = any((0, 0) < card.capability < (7, 5) for card in cards)
    return TORCH_INDEX_OLD if old else TORCH_INDEX


def torch_facts() -> dict[str, Any]:
    """version, cuda, hip, available, archs, mps; or error, with the reason."""
    if getattr(sys, "frozen", False):
        return _ask_torch()
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-m", "core.doctor"],
                              env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=TORCH_PATIENCE_S)
        facts: dict[str, Any] = json.loads(done.stdout.decode("utf-8", "replace"))
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except ValueError:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return {"error": said[-1] if said else f"exit code {done.returncode}"}
    return facts


def _ask_torch() -> dict[str, Any]:
    try:
        import torch
        available = torch.cuda.is_available()
        return {"version": torch.__version__, "cuda": torch.version.cuda or "",
                "hip": getattr(torch.version, "hip", None) or "", "available": available,
                "archs": torch.cuda.get_arch_list(),
                "mps": torch.backends.mps.is_available()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _facts(card: GpuInfo) -> dict[str, Any]:
    return {"card": card.name, "total": f"{card.total_mb / 1024:.1f}",
            "free": f"{card.free_mb / 1024:.1f}", "driver": card.driver,
            "capability": ".".join(map(str, card.capability))}


def _program(pid: int) -> str:
    import psutil
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return f"pid {pid}"


# --- memory, folders, text ---

def memory() -> Iterator[Finding]:
    import psutil
    ram = psutil.virtual_memory()
    facts = {"total": f"{ram.total / GB:.1f}", "free": f"{ram.available / GB:.1f}",
             "cores": os.cpu_count() or 1}
    if ram.available < LEAST["ram"] * GB:
        yield Finding("memory_low", "warning", facts)
    else:
        yield Finding("memory", params=facts)


def folders(wanted: Sequence[Path]) -> Iterator[Finding]:
    """Can be written, and the disk has room."""
    for folder in wanted:
        facts: dict[str, Any] = {"folder": str(folder)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as error:
            yield Finding("folder_locked", "error", facts | {"reason": str(error)})
            continue
        free = shutil.disk_usage(folder).free
        facts["free"] = f"{free / GB:.1f}"
        if free < LEAST["disk"] * GB:
            yield Finding("disk_low", "error" if free < LEAST["disk_now"] * GB else "warning",
                          facts)
        else:
            yield Finding("folder", params=facts)


def encoding() -> Iterator[Finding]:
    """Paths and texts that other programs' code may stumble over."""
    root = str(paths.ROOT)
    filesystem = sys.getfilesystemencoding()
    if filesystem.lower().replace("-", "") != "utf8":
        yield Finding("encoding", "warning",
                      {"encoding": filesystem, "locale": locale.getlocale()[1] or "?"})
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in root):
        yield Finding("path_broken", "warning", {"path": ascii(root)})
    if os.name == "nt" and len(root) > LONGEST_PATH:
        yield Finding("path_long", "warning", {"path": root, "length": len(root)})


if __name__ == "__main__":              # the process of its own, see torch_facts
    print(json.dumps(_ask_torch()))
