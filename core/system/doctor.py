"""What may keep this machine from training: findings, each with what mends it.

Torch is loaded in a process of its own: a broken build may take its process down. Nothing here
raises; what can't be found out is a finding too.
"""

from __future__ import annotations

import contextlib
import itertools
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
# characters; Windows stops at 260, and packages nest deep
LONGEST_PATH = 100
BUSY_MB = 500                            # of a card, held by another program
# share of a card that should be free where no program is known to hold it
FULL = 0.7
# laptops lower their clocks from about here on
HOT_C = 87
# the first driver of each generation of CUDA (NVIDIA, CUDA Compatibility: minor versions)
DRIVERS = {11: "450.80 (Windows: 452.39)", 12: "525.60 (Windows: 528.33)", 13: "580"}
TORCH_PATIENCE_S = 180

Level = Literal["ok", "warning", "error"]
MARKS: dict[Level, str] = {"ok": "[ok]", "warning": "[ !]", "error": "[ x]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about this machine. Its sentence is `<subject>.<key>`; unless the level is ok,
    `<subject>.<key>_mend` says what to do."""

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
        # a frozen app has no pip: another download mends it
        needs_pip = processes.frozen() and "pip install" in text
        return i18n.tr("doctor.in_app_mend") if needs_pip else text


def examine(base: Path | None = None) -> list[Finding]:
    """All findings. With `base`, a model folder or file: also whether this machine can load it.

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
    """The finding as text for a terminal."""
    return [f"{MARKS[finding.level]} {finding.text}",
            *([f"     -> {finding.mend}"] if finding.mend else [])]


def as_dict(finding: Finding) -> dict[str, Any]:
    return {"key": finding.key, "level": finding.level, "text": finding.text,
            "mend": finding.mend, "params": finding.params}


# --- Python and packages ---

def python() -> Iterator[Finding]:
    facts = {"version": platform.python_version(), "path": sys.executable,
             "system": platform.platform(terse=True), "bits": 64 if sys.maxsize > 2**32 else 32,
             "oldest": ".".join(map(str, OLDEST_PYTHON))}
    fit = sys.version_info >= OLDEST_PYTHON and facts["bits"] == 64
    yield Finding("python", params=facts) if fit else Finding("python_unfit", "error", facts)


def packages() -> Iterator[Finding]:
    """The version of every requirement, and those that are missing or outside their bounds."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement
    installed, unfit = [], []
    for requirement in map(Requirement, requirements()):
        # such as those for another system
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            number = version(requirement.name)
        except PackageNotFoundError:
            unfit.append(str(requirement))
            continue
        installed.append(f"{requirement.name} {number}")
        if not requirement.specifier.contains(number, prereleases=True):
            unfit.append(str(requirement))
    if installed:
        yield Finding("packages", params={"list": ", ".join(installed)})
    if unfit:
        yield Finding("packages_unfit", "error", {
            "list": ", ".join(unfit), "python": sys.executable,
            "wanted": " ".join(f'"{requirement}"' for requirement in unfit)})


def requirements() -> list[str]:
    """The packages that we need: from pyproject.toml in a checkout, else from our installed one."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, requires
    pyproject = paths.ROOT / "pyproject.toml"
    if pyproject.exists():
        listed = tomllib.loads(pyproject.read_text("utf-8"))["project"]["dependencies"]
        return [str(line) for line in listed]
    try:
        return requires("lora-darkroom") or []
    except PackageNotFoundError:
        # a built app carries its packages inside
        return []


# --- cards and torch ---

def cards(report: GpuReport) -> Iterator[Finding]:
    if (state := report.state) != "ok":
        level: Level = "error" if state in ("mismatch", "no_permission", "broken") else "warning"
        # That there is no NVIDIA card is no fault, unless one is built in.
        if state == "no_library" and not any(
                chip.vendor == "nvidia" for chip in machine.accelerators()):
            level = "ok"
        yield Finding(state, level, {"reason": report.problem}, subject="gpu")
    for card in report.gpus:
        facts = _facts(card)
        yield Finding("card_mig" if card.mig else "card", params=facts)
        held = [user for user in card.users
                if user.pid != os.getpid() and (user.used_mb or 0) > BUSY_MB]
        if held:
            yield Finding("card_busy", "warning", facts | {"programs": ", ".join(
                f"{_program(user.pid)} ({user.used_mb:.0f} MB)" for user in held)})
        elif card.free_mb < FULL * card.total_mb:
            yield Finding("card_full", "warning", facts)
        if (card.temperature_c or 0) >= HOT_C:
            yield Finding("card_hot", "warning", facts)
        # not for the power cap, which is usual at work
        elif {"thermal", "hw_slowdown"} & set(card.throttled):
            yield Finding("card_throttled", "warning", facts)
    if report.gpus and report.lost:
        yield Finding("card_lost", "error", {"numbers": ", ".join(map(str, report.lost))})
    if report.wsl:
        yield Finding("wsl")
    if gpu.order_assumed(report) and (first := gpu.chosen(report)):
        yield Finding("order_assumed", "warning", _facts(first))


def graphics(report: GpuReport) -> Iterator[Finding]:
    """Other makers' chips, and whether torch can train on them."""
    for chip in machine.accelerators():
        if chip.vendor != "nvidia":
            yield Finding(f"support_{chip.support}", params={"name": chip.name}, subject="gpu")


def torch(facts: dict[str, Any], report: GpuReport) -> Iterator[Finding]:
    """Whether this torch fits the cards that it sees. `facts` are those of torch_facts()."""
    if "error" in facts:
        yield Finding("torch_broken", "error", facts | {"python": sys.executable})
        return
    facts = facts | {"python": sys.executable, "index": TORCH_INDEX, "old": TORCH_INDEX_OLD}
    visible = gpu.visible(report)
    if not visible:
        yield Finding("torch_mps" if facts["mps"] else "torch_cpu", params=facts)
        return
    card, built = visible[0], _version(facts["cuda"])
    about, supported = facts | _facts(card), _version(card.cuda_version)
    unfit = [card for card in visible
             if any(card.capability) and not runs_on(card.capability, facts["archs"])]
    if not facts["cuda"] and not facts["hip"]:
        yield Finding("torch_without_cuda", "error", about | {"index": index_for(visible)})
    elif not facts["available"]:
        # A driver older than torch's generation of CUDA. Torch for the older CUDA has no code for
        # Blackwell, whose owners need the new driver.
        key = ("torch_no_contact" if not 0 < supported[0] < built[0] else "driver_old"
               if card.capability < (10, 0) else "driver_old_new_card")
        needed = DRIVERS.get(built[0], facts["cuda"])
        yield Finding(key, "error", about | {"needed": needed})
    elif unfit:
        key = "torch_too_new" if unfit[0].capability < (7, 5) else "torch_too_old"
        yield Finding(key, "error", facts | _facts(unfit[0]))
    else:
        yield Finding("torch_cuda", params=facts)
        # works within a generation of CUDA, but may lack what is newer than the driver
        if built > supported > (0, 0):
            yield Finding("driver_minor", params=about)


def _version(text: str) -> tuple[int, int]:
    """'12.4' -> (12, 4); what is no version: (0, 0)"""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether a card can run a torch that was built for `archs`. Code for sm_XY runs on cards of
    the same major version from X.Y on, compute_XY (PTX) on all later ones."""
    for arch in archs:
        # sm_90a: code for exactly that card
        match = re.fullmatch(r"(sm|compute)_(\d+)[af]*", arch)
        built_for = divmod(int(match[2]), 10) if match else (99, 0)
        same_major = built_for[0] == capability[0]
        if built_for <= capability and (same_major or arch.startswith("compute")):
            return True
    # a torch that doesn't tell: the first kernel will
    return not archs


def index_for(cards: Iterable[GpuInfo]) -> str:
    """pip's index with a torch for these cards."""
    old = any((0, 0) < card.capability < (7, 5) for card in cards)
    return TORCH_INDEX_OLD if old else TORCH_INDEX


def torch_facts() -> dict[str, Any]:
    """What the installed torch can do: version, cuda, hip, available, archs, mps; or `error`."""
    try:
        done = subprocess.run(processes.command("torch-facts"), timeout=TORCH_PATIENCE_S,
                              env=processes.environment(PYTHONWARNINGS="ignore"),
                              stdin=subprocess.DEVNULL, capture_output=True)
        facts: dict[str, Any] = json.loads(done.stdout.decode("utf-8", "replace"))
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except ValueError:
        stderr = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return {"error": stderr[-1] if stderr else f"exit code {done.returncode}"}
    return facts


def tell_torch(_: Sequence[str] = ()) -> int:
    """The process that torch_facts starts: prints the facts as JSON."""
    facts: dict[str, Any]
    try:
        import torch
        facts = {"version": torch.__version__, "cuda": torch.version.cuda or "",
                 "hip": getattr(torch.version, "hip", None) or "",
                 "available": torch.cuda.is_available(), "archs": torch.cuda.get_arch_list(),
                 "mps": torch.backends.mps.is_available()}
    except Exception as error:
        facts = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(facts))
    return 0


def _facts(card: GpuInfo) -> dict[str, Any]:
    return {"card": card.name, "total": _gb(card.total_mb), "free": _gb(card.free_mb),
            "driver": card.driver, "spoken": card.cuda_version or "?",
            "capability": ".".join(map(str, card.capability)),
            "temperature": "?" if card.temperature_c is None else f"{card.temperature_c:.0f}",
            "reasons": ", ".join(card.throttled), "laptop": card.laptop, "uuid": card.uuid}


def _gb(mb: float) -> str:
    return f"{mb / 1024:.1f}"


def _program(pid: int) -> str:
    import psutil
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).name())
    return f"pid {pid}"


# --- memory, folders, text ---

def memory() -> Iterator[Finding]:
    total, free = machine.ram()
    facts = {"total": _gb(total), "free": _gb(free), "cores": machine.cores(),
             "cpu": machine.cpu_name()}
    yield (Finding("memory_low", "warning", facts) if free < LEAST["ram"] * 1024
           else Finding("memory", params=facts))


def power() -> Iterator[Finding]:
    if machine.on_battery():
        yield Finding("on_battery", "warning")


def folders(checked: Sequence[Path]) -> Iterator[Finding]:
    """Whether these folders can be written, and their disks have room."""
    for folder in checked:
        facts: dict[str, Any] = {"folder": str(folder)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as error:
            yield Finding("folder_locked", "error", facts | {"reason": str(error)})
            continue
        free = machine.disk_free(folder) or 0
        facts["free"] = _gb(free)
        if free < LEAST["disk"] * 1024:
            level: Level = "error" if free < LEAST["disk_now"] * 1024 else "warning"
            yield Finding("disk_low", level, facts)
        else:
            yield Finding("folder", params=facts)


def encoding(base: Path | None = None) -> Iterator[Finding]:
    """Paths and encodings on which other people's code may fail."""
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
    # a name that is no valid text must not fail in the sentence
    shown = {"base": str(base).encode("utf-8", "backslashreplace").decode()}
    if not base.exists():
        yield Finding("base_missing", "error", shown)
        return
    if not (files := weight_files(base)):
        pickled = any(path.suffix in PICKLES for path in base.rglob("*"))
        yield Finding("base_pickled" if pickled else "base_empty", "error", shown)
        return
    try:
        for path in itertools.chain(*files.values()):
            read_header(path)
    except UserError as fault:
        yield Finding("base_broken", "error", shown | {"reason": str(fault)})
        return
    sizes = [sum(path.stat().st_size for path in group) / machine.MB for group in files.values()]
    free = machine.ram()[1]
    facts = shown | {"largest": f"{max(sizes) / 1024:.2f}", "size": f"{sum(sizes) / 1024:.2f}",
                     "free": _gb(free)}
    # parts are loaded one after the other
    fits = max(sizes) < free
    yield Finding("base" if fits else "base_ram", "ok" if fits else "warning", facts)
    for folder in {paths.data_dir(), paths.cache_dir()}:
        room = machine.disk_free(folder)
        if room is not None and room < sum(sizes):
            yield Finding("base_disk", "warning",
                          facts | {"folder": str(folder), "room": _gb(room)})


def weight_files(base: Path) -> dict[str, list[Path]]:
    """The files of each part of a model, several where a part is split."""
    if base.is_file():
        return {base.name: [base]}
    # diffusers' layout: parts lie in subfolders, and a file beside them is a copy of all
    is_diffusers = (base / "model_index.json").exists()
    parts: dict[str, list[Path]] = {}
    for path in sorted(base.glob("*/*.safetensors" if is_diffusers else "**/*.safetensors")):
        # model-00001-of-00003.safetensors
        name = re.sub(r"-\d{5}-of-\d{5}(?=\.)", "", path.relative_to(base).as_posix())
        parts.setdefault(name, []).append(path)
    return parts

