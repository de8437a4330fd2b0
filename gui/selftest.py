"""`darkroom selftest`: shows that this installation is whole, on the ways that users take.

Families and captioners are imported, the demo LoRA is trained and resumed in a worker, its file
verified, a picture captioned, the window fetched. Runs lie in a temporary folder; the user's
folders are only tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import captioner
from captioner.config import CaptionConfig
from core import __version__, families, paths
from core.config import TrainConfig
from core.importers import load_train_config
from core.jobs import journal
from core.jobs.events import Step
from core.jobs.manager import JobManager
from core.jobs.runs import JobView
from core.lora_files import export
from core.system import doctor, gpu, processes
from gui.state.plan_client import Planning

# Updates; as many again after the resume.
STEPS = 3
# Seconds for a job, on a slow disk.
PATIENCE_S = 600.0
Facts = dict[str, Any]


@dataclass(slots=True)
class Bench:
    """What the parts share: a data folder, the jobs, and the LoRA that was trained."""

    home: Path
    jobs: JobManager
    lora: Path = field(default_factory=Path)


def run(tell: Callable[[Facts], None]) -> Facts:
    """-> {"ok", "version", "frozen", "seconds", "parts": [{"part", "ok", "seconds", ...}]}; `tell`
    hears each part as it ends. Never raises: what fails is a part that is not ok."""
    started = time.perf_counter()
    parts: list[Facts] = []

    def carry_out(part: Callable[..., Facts], *arguments: Any) -> None:
        began = time.perf_counter()
        try:
            facts = {"ok": True, **part(*arguments)}
        except Exception as error:
            facts = {"ok": False, "error": f"{type(error).__name__}: {error}",
                     "details": traceback.format_exc()}
        seconds = round(time.perf_counter() - began, 2)
        parts.append({"part": part.__name__, "seconds": seconds, **facts})
        tell(parts[-1])

    carry_out(folders)
    with _temporary_home() as home, JobManager() as jobs:
        bench = Bench(home, jobs)
        for part in (card, torch, modules, plan, train, verify, convert, caption, window):
            carry_out(part, bench)
    return {"ok": all(part["ok"] for part in parts), "version": __version__,
            "frozen": processes.frozen(), "system": platform.platform(),
            "seconds": round(time.perf_counter() - started, 1), "parts": parts}


@contextlib.contextmanager
def _temporary_home() -> Iterator[Path]:
    """A temporary data folder. Windows can't delete files that are still open: they are left."""
    before, where = os.environ.get("DARKROOM_HOME"), os.getcwd()
    with tempfile.TemporaryDirectory(prefix="darkroom-", ignore_cleanup_errors=True) as home:
        os.environ["DARKROOM_HOME"] = home
        paths.cache_dir().mkdir()
        try:
            yield Path(home)
        finally:
            os.chdir(where)
            os.environ.pop("DARKROOM_HOME")
            if before is not None:
                os.environ["DARKROOM_HOME"] = before


# --- the parts ---

def folders() -> Facts:
    """The user's own folders for data, caches and logs can be written."""
    needed = [paths.data_dir(), paths.cache_dir(), paths.log_dir()]
    locked = [finding.text for finding in doctor.folders(needed) if finding.key == "folder_locked"]
    if locked:
        raise OSError("; ".join(locked))
    return {"folders": [str(folder) for folder in needed]}


def card(_: Bench) -> Facts:
    """What NVML tells. No card and no library are fine; the report says so."""
    report = gpu.report()
    return {"nvml": report.state, "cards": [card.name for card in report.gpus]}


def torch(_: Bench) -> Facts:
    """torch can be imported, in a process of its own as doctor does it."""
    facts = doctor.torch_facts()
    return {**facts, "ok": "error" not in facts}


def modules(_: Bench) -> Facts:
    """All families and captioners can be imported."""
    for name in families.SPECS:
        families.get(name)
    for name in captioner.REGISTRY:
        captioner.get(name)
    return {"families": list(families.SPECS), "captioners": list(captioner.REGISTRY)}


def plan(bench: Bench) -> Facts:
    """The window's child process answers with a plan."""
    with contextlib.closing(Planning()) as planning:
        planning.ask({"config": _config(bench).model_dump(mode="json"), "purpose": "style",
                      "language": "en"})
        answer = planning.wait(PATIENCE_S).answer
    if "plan" not in answer:
        raise RuntimeError(f"no plan: {answer}")
    return {"needs_mb": answer["plan"]["needs_mb"]}


def train(bench: Bench) -> Facts:
    """A worker trains the demo LoRA, and resumes it."""
    config = _config(bench)
    first = _done(bench, config)
    again = _done(bench, config.with_changes(max_train_steps=2 * STEPS, resume=True))
    steps = [event.step for event in journal.read(again.folder) if isinstance(event, Step)]
    if again.step != 2 * STEPS or min(steps) <= STEPS:
        raise RuntimeError(f"not resumed: steps {steps}")
    if not (again.folder / journal.LOG).stat().st_size:
        raise RuntimeError("the worker wrote no log")
    bench.lora = Path(again.result["lora"])
    return {"steps": again.step, "resumed_at": first.step, "proof": again.result["proof"]}


def verify(bench: Bench) -> Facts:
    """The LoRA changes what the base draws, by our own command in a child process: the window
    must not import torch."""
    done = subprocess.run(
        processes.command("lora", "verify", str(bench.lora), "--base", str(paths.DEMO / "base"),
                          "--json"),
        env=processes.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        encoding="utf-8", errors="replace", timeout=PATIENCE_S)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    proof: Facts = json.loads(done.stdout)
    return proof


def convert(bench: Bench) -> Facts:
    """The LoRA is converted for another program, by our own command in a child process."""
    copy = export.convert_to(bench.lora, "diffusers", bench.home / "export", "en")
    return {"bytes": copy.stat().st_size}


def caption(bench: Bench) -> Facts:
    """The demo's captioner writes a caption."""
    folder = bench.home / "pictures"
    folder.mkdir()
    picture = shutil.copy(sorted((paths.DEMO / "pictures").glob("*.png"))[0], folder)
    _done(bench, CaptionConfig(folder=str(folder)), "caption")
    return {"caption": Path(picture).with_suffix(".txt").read_text("utf-8")}


def window(bench: Bench) -> Facts:
    """The server sends its page, and the first script that the page asks for."""
    # Gradio takes seconds to import: the parts before this one needn't wait for it.
    from gui.window import pages
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                         urllib.request.HTTPCookieProcessor(CookieJar()))
    with contextlib.closing(pages().serve(jobs=bench.jobs, warm=False)) as served:
        with opener.open(served.url, timeout=60) as answer:
            page, address = answer.read().decode(), answer.url
        script = re.search(r'src="([^"]*/assets/[^"]+\.js)"', page)
        if "LoRA Darkroom" not in page or script is None:
            raise RuntimeError(f"not our page: {page[:200]}")
        with opener.open(urljoin(address, script[1]), timeout=60) as answer:
            return {"page_bytes": len(page), "asset_bytes": len(answer.read())}


def _config(bench: Bench) -> TrainConfig:
    return load_train_config(paths.DEMO / "demo.yaml").with_changes(
        output_dir=str(bench.home / "out"), train_data_dir=str(paths.DEMO / "pictures"),
        max_train_steps=STEPS, batch_size=2, lr_warmup_steps=1, sample_every=0)


def _done(bench: Bench, config: Any, job: str = "train") -> JobView:
    view = bench.jobs.wait(bench.jobs.start(config, job=job), PATIENCE_S)
    if view.state != "done":
        fault = view.fault
        raise RuntimeError(f"{job}: {view.state}, {fault and (fault.code, fault.params)}\n"
                           f"{fault.details if fault else ''}")
    return view
