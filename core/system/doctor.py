"""What stands between this machine and a training: findings, each with what mends it.

Torch is asked in a process of its own: a broken build may take its process down. Nothing here
raises; what can't be found out is a finding too.
"""

from __future__ import annotations

import json
import locale
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core import i18n, paths
from core.errors import UserError
from core.safetensors_header import PICKLES, read_header
from core.system import gpu, machine, processes
from core.system.gpu import GpuInfo, GpuReport

OLDEST_PYTHON = (3, 11)
TORCH_INDEX = "https://download.pytorch.org/whl/cu130"           # Turing and later
TORCH_INDEX_OLD = "https://download.pytorch.org/whl/cu126"       # Maxwell, Pascal, Volta
LEAST = {"ram": 4, "disk": 10, "disk_now": 1}                    # GB free
LONGEST_PATH = 100                       # chars; Windows stops at 260 and packages nest deep
BUSY_MB = 500                            # of a card, held by another program
FULL = 0.7                               # a share of a card; less is free and nobody says why
HOT_C = 87                               # laptops lower their clocks from about here on
# the first driver of a CUDA generation (NVIDIA, CUDA Compatibility: minor versions)
DRIVERS = {11: "450.80 (Windows: 452.39)", 12: "525.60 (Windows: 528.33)", 13: "580"}
TORCH_PATIENCE_S = 180

Level = Literal["ok", "warning", "error"]
MARKS: dict[Level, str] = {"ok": "[ok]", "warning": "[ !]", "error": "[ x]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """`<subject>.<key>` is its sentence; `<subject>.<key>_mend` says what to do, unless all is
    well."""

    key: str
    level: Level = "ok"
    params: dict[str, Any] = field(default_factory=dict)
    subject: str = "doctor"

    @property
    def text(self) -> str:
        return i18n.tr(f"{self.subject}.{self.key}", self.params)

    @property
    def mend(self) -> str:
        if self.level == "ok":
            return ""
        text = i18n.tr(f"{self.subject}.{self.key}_mend", self.params)
        inside = processes.frozen() and "pip install" in text    # no pip there, and no way to mend
        return i18n.tr("doctor.in_app_mend") if inside else text


def examine(base: Path | None = None) -> list[Finding]:
    """All findings; with `base`, a model folder or file, also whether this machine can load it.

    Never raises: a check that fails itself is a finding, and the others still run.
    """
    report = gpu.report()
    findings: list[Finding] = []
    for check in (python, packages, lambda: cards(report), lambda: graphics(report),
                  lambda: torch(torch_facts(), report), memory, power,
                  lambda: folders([paths.data_dir(), paths.cache_dir()]),
                  lambda: encoding(base), lambda: weights(base)):
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
    if (state := report.state) != "ok":
        yield Finding(state, _level_of(state), {"reason": report.problem}, subject="gpu")
    for card in report.gpus:
        yield Finding("card_mig" if card.mig else "card", params=_facts(card))
        yield from _strain(card)
    if report.gpus and report.lost:
        yield Finding("card_lost", "error", {"numbers": ", ".join(map(str, report.lost))})
    if report.wsl:
        yield Finding("wsl")
    if gpu.order_assumed(report) and (first := gpu.chosen(report)):
        yield Finding("order_assumed", "warning", _facts(first))


def _level_of(state: gpu.State) -> Level:
    """No card is no fault, unless one is built in."""
    if state == "no_library":
        built_in = any(one.vendor == "nvidia" for one in machine.accelerators())
        return "warning" if built_in else "ok"
    return "error" if state in ("mismatch", "no_permission", "broken") else "warning"


def _strain(card: GpuInfo) -> Iterator[Finding]:
    """What takes memory or speed from a card now."""
    facts = _facts(card)
    held = [user for user in card.users
            if user.pid != os.getpid() and (user.used_mb or 0) > BUSY_MB]
    if held:
        yield Finding("card_busy", "warning", facts | {
            "programs": ", ".join(f"{_program(u.pid)} ({u.used_mb:.0f} MB)" for u in held)})
    elif card.free_mb < FULL * card.total_mb:
        yield Finding("card_full", "warning", facts)
    if (card.temperature_c or 0) >= HOT_C:
        yield Finding("card_hot", "warning", facts)
    elif {"thermal", "hw_slowdown"} & set(card.throttled):      # the power cap is usual at work
        yield Finding("card_throttled", "warning", facts)


def graphics(report: GpuReport) -> Iterator[Finding]:
    """Other makers' chips, named as what they are."""
    for one in machine.accelerators():
        if one.vendor != "nvidia":
            yield Finding(f"support_{one.support}", params={"name": one.name}, subject="gpu")


def torch(facts: dict[str, Any], report: GpuReport) -> Iterator[Finding]:
    """Does this torch fit the cards that it sees? `facts` as torch_facts() tells them."""
    if "error" in facts:
        yield Finding("torch_broken", "error", facts | {"python": sys.executable})
        return
    facts = facts | {"python": sys.executable, "index": TORCH_INDEX, "old": TORCH_INDEX_OLD}
    seen = gpu.visible(report)
    unfit = [card for card in seen
             if any(card.capability) and not runs_on(card.capability, facts["archs"])]
    if not seen:
        yield Finding("torch_mps" if facts["mps"] else "torch_cpu", params=facts)
    elif not facts["cuda"] and not facts["hip"]:
        yield Finding("torch_without_cuda", "error",
                      facts | _facts(seen[0]) | {"index": index_for(seen)})
    elif not facts["available"]:
        yield _no_contact(facts, seen[0])
    elif unfit:
        key = "torch_too_new" if unfit[0].capability < (7, 5) else "torch_too_old"
        yield Finding(key, "error", facts | _facts(unfit[0]))
    else:
        yield Finding("torch_cuda", params=facts)
        if _number(facts["cuda"]) > _number(seen[0].cuda_version) > (0, 0):
            yield Finding("driver_minor", params=facts | _facts(seen[0]))


def _no_contact(facts: dict[str, Any], card: GpuInfo) -> Finding:
    """The driver speaks an older generation of CUDA, or the reason is not known."""
    built, spoken = _number(facts["cuda"])[0], _number(card.cuda_version)[0]
    params = facts | _facts(card) | {"needed": DRIVERS.get(built, facts["cuda"])}
    if not 0 < spoken < built:
        return Finding("torch_no_contact", "error", params)
    # torch for the older CUDA has no code for Blackwell
    return Finding("driver_old" if card.capability < (10, 0) else "driver_old_new_card", "error",
                   params)


def _number(version: str) -> tuple[int, int]:
    """'12.4' -> (12, 4); what is no version: (0, 0)"""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


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
    try:
        done = subprocess.run(processes.command("torch-facts"), timeout=TORCH_PATIENCE_S,
                              env=processes.environment(PYTHONWARNINGS="ignore"),
                              stdin=subprocess.DEVNULL, capture_output=True)
        facts: dict[str, Any] = json.loads(done.stdout.decode("utf-8", "replace"))
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except ValueError:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return {"error": said[-1] if said else f"exit code {done.returncode}"}
    return facts


def tell_torch(_: Sequence[str] = ()) -> int:
    """The process of its own, see torch_facts."""
    print(json.dumps(_ask_torch()))
    return 0


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
            "capability": ".".join(map(str, card.capability)), "spoken": card.cuda_version or "?",
            "temperature": "?" if card.temperature_c is None else f"{card.temperature_c:.0f}",
            "reasons": ", ".join(card.throttled), "laptop": card.laptop, "uuid": card.uuid}


def _program(pid: int) -> str:
    import psutil
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return f"pid {pid}"


# --- memory, folders, text ---

def memory() -> Iterator[Finding]:
    total, free = machine.ram()
    facts = {"total": f"{total / 1024:.1f}", "free": f"{free / 1024:.1f}",
             "cores": machine.cores(), "cpu": machine.cpu_name()}
    if free < LEAST["ram"] * 1024:
        yield Finding("memory_low", "warning", facts)
    else:
        yield Finding("memory", params=facts)


def power() -> Iterator[Finding]:
    if machine.on_battery():
        yield Finding("on_battery", "warning")


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
        free = (machine.disk_free(folder) or 0) / 1024
        facts["free"] = f"{free:.1f}"
        if free < LEAST["disk"]:
            yield Finding("disk_low", "error" if free < LEAST["disk_now"] else "warning", facts)
        else:
            yield Finding("folder", params=facts)


def encoding(base: Path | None = None) -> Iterator[Finding]:
    """Paths and texts that other programs' code may stumble over."""
    root = str(paths.ROOT)
    filesystem = sys.getfilesystemencoding()
    if filesystem.lower().replace("-", "") != "utf8":
        yield Finding("encoding", "warning",
                      {"encoding": filesystem, "locale": locale.getlocale()[1] or "?"})
    for path in (root, str(base or "")):
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in path):
            yield Finding("path_broken", "warning", {"path": ascii(path)})
    if os.name == "nt" and len(root) > LONGEST_PATH:
        yield Finding("path_long", "warning", {"path": root, "length": len(root)})


# --- the chosen base ---

def weights(base: Path | None) -> Iterator[Finding]:
    """Whether the base is whole, and RAM and disks have room for it."""
    if base is None:
        return
    shown = {"base": str(base).encode("utf-8", "backslashreplace").decode()}
    if not base.exists():
        yield Finding("base_missing", "error", shown)
        return
    if not (files := weight_files(base)):
        pickled = any(path.suffix in PICKLES for path in base.rglob("*"))
        yield Finding("base_pickled" if pickled else "base_empty", "error", shown)
        return
    try:
        for path in (path for group in files.values() for path in group):
            read_header(path)
    except UserError as fault:
        yield Finding("base_broken", "error", shown | {"reason": str(fault)})
        return
    yield from _room(files, shown)


def weight_files(base: Path) -> dict[str, list[Path]]:
    """Part -> its files, several where it is split. A model folder's parts lie in subfolders."""
    if base.is_file():
        return {base.name: [base]}
    parted = (base / "model_index.json").exists()
    parts: dict[str, list[Path]] = {}
    for path in sorted(base.glob("*/*.safetensors" if parted else "**/*.safetensors")):
        name = re.sub(r"-\d{5}-of-\d{5}(?=\.)", "", path.relative_to(base).as_posix())
        parts.setdefault(name, []).append(path)
    return parts


def _room(files: dict[str, list[Path]], shown: dict[str, Any]) -> Iterator[Finding]:
    sizes = [sum(path.stat().st_size for path in group) / machine.MB for group in files.values()]
    free = machine.ram()[1]
    facts = shown | {"largest": f"{max(sizes) / 1024:.2f}", "size": f"{sum(sizes) / 1024:.2f}",
                     "free": f"{free / 1024:.1f}"}
    fits = max(sizes) < free            # parts are loaded one after the other
    yield Finding("base" if fits else "base_ram", "ok" if fits else "warning", facts)
    for folder in {paths.data_dir(), paths.cache_dir()}:
        room = machine.disk_free(folder)
        if room is not None and room < sum(sizes):
            yield Finding("base_disk", "warning",
                          facts | {"folder": str(folder), "room": f"{room / 1024:.1f}"})

