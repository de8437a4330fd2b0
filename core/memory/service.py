"""The planning child: one JSON question a line on stdin, one JSON answer a line on stdout.

Torch is imported only where a trace isn't on disk yet (core.memory.plan.ask), never by the asker.
Question: {"config": {TrainConfig}, "purpose", "language", "suggest": bool}. Answer: {"plan",
"verdict", "lacking", "nearest", "suggestion", "pictures", "updates", "length" (what to tr of too
few or too many updates)} as far as each is known,
"remedies" where a "symptom" (core/memory/troubleshooting.py) is asked about;
or {"fault": {"code", "params"}}. {"sizes": base} asks for a base's native side and step alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import psutil

from core import families
from core.config import TrainConfig
from core.errors import UserError
from core.families.detection import Base
from core.memory import advisor, plan, plan_inputs, relief, troubleshooting
from core.memory.plan import Data
from core.system import processes

LONGEST_S = 300.0                       # until a base's sizes are known, on a slow disk
FRESH_S = 20.0                          # a folder's headers are read again after that

_seen: dict[tuple[str, str, str], tuple[float, plan_inputs.Pictures]] = {}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Never raises: a fault is an answer too."""
    try:
        return _answer(question)
    except UserError as fault:
        return {"fault": {"code": fault.code, "params": {
            key: value if isinstance(value, (int, float)) else str(value)
            for key, value in fault.params.items()}}}
    except Exception as error:          # the window must not lose its planner
        reason = f"{type(error).__name__}: {error}"
        return {"fault": {"code": "gui.plan_failed", "params": {"reason": reason[:300]}}}


def sizes_beside(base: Base) -> dict[str, float]:
    """plan.sizes for the window's process: torch comes into another one, once for each base."""
    if (known := plan.known_sizes(base)) is not None:
        return known
    question = json.dumps({"sizes": str(base.source), "family": base.family}) + "\n"
    done = subprocess.run(
        processes.command("plan-service"), input=question, env=processes.environment(),
        capture_output=True, encoding="utf-8", timeout=LONGEST_S, check=False,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
    found = json.loads(done.stdout or "{}")
    if fault := found.get("fault"):
        raise UserError(fault["code"], **fault["params"])
    sizes: dict[str, float] = found["sizes"]
    return sizes


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    if "sizes" in question:
        return {"sizes": plan.sizes(Base.of(Path(question["sizes"]), question["family"]))}
    config = TrainConfig.model_validate(question["config"])
    base = plan_inputs.base_of(config.base_model or next(iter(families.SPECS)), config.family)
    machine = plan_inputs.machine_here(config.device)
    found: dict[str, Any] = {}
    pictures = None
    if config.train_data_dir:
        try:
            pictures = _pictures(config)
            found["pictures"] = len(pictures.sizes)
        except UserError as fault:
            found["pictures_fault"] = {"code": fault.code, "params": {
                key: str(value) for key, value in fault.params.items()}}
    planner = plan_inputs.BatchPlanner(base, machine, pictures)
    planned = planner(config)
    verdict = relief.verdict(planned)
    found |= {"plan": plan.as_dict(planned), "verdict": verdict,
              "lacking": advisor.lacking(planned)}
    if pictures:
        found["updates"] = updates(config, pictures)
        if told := advisor.length(config, pictures.repeats):
            found["length"] = {"key": told.key, "params": dict(told.params)}
    if verdict != "fits":
        nearest = advisor.nearest_fit(config, base, machine, planner.data(config), planner)
        found["nearest"] = nearest and {"changes": nearest[0],
                                        "needs_mb": round(nearest[1].needs_mb, 1)}
    if symptom := question.get("symptom"):
        return {"remedies": _remedies(symptom, config, planned, planner, question)}
    if question.get("suggest"):
        found["suggestion"] = _suggestion(question, base, planner, config)
    return found


def _pictures(config: TrainConfig) -> plan_inputs.Pictures:
    key = (config.train_data_dir, config.metadata_path, config.reg_data_dir)
    when, found = _seen.get(key, (0.0, None))
    if found is None or time.monotonic() - when > FRESH_S:
        found = plan_inputs.pictures_of(config)
        _seen.clear()
        _seen[key] = (time.monotonic(), found)
    return found


def updates(config: TrainConfig, pictures: plan_inputs.Pictures) -> int:
    """Optimizer steps of the run, up to buckets that don't fill their last batch."""
    if config.max_train_steps:
        return config.max_train_steps
    samples = sum(pictures.repeats)
    if config.regularized:
        samples += round(samples * config.reg_share / (1 - config.reg_share))
    batches = ceil(samples / config.batch_size)
    return config.epochs * ceil(batches / config.gradient_accumulation_steps)


def _remedies(symptom: str, config: TrainConfig, planned: plan.Plan,
              planner: plan_inputs.BatchPlanner,
              question: dict[str, Any]) -> list[dict[str, Any]]:
    """Gentlest first; those without changes are advice to follow by hand."""
    shape = advisor.Shape.of(planner.base, planner.machine)
    can = relief.capabilities(planner.machine, shape.weights_mb, shape.family)
    facts = troubleshooting.Facts(planner, can, shape.native, shape.step,
                                  question.get("updates", 0),
                                  question.get("best_step", 0))
    return [{"key": one.key, "params": dict(one.params), "changes": dict(one.changes),
             "saves_mb": one.saves_mb}
            for one in troubleshooting.answer(symptom, config, planned, facts)]


def _suggestion(question: dict[str, Any], base: Base, planner: plan_inputs.BatchPlanner,
                config: TrainConfig) -> dict[str, Any]:
    data: Data | None = planner.data(config)
    found = advisor.suggest(planner.machine, base, data, question["purpose"], planner)
    lang = question.get("language")
    return {"fits": found.fits, "values": dict(found.values), "needs_mb": found.needs_mb,
            "reasons": {key: reason.text(lang) for key, reason in found.reasons.items()},
            "notes": [note.text(lang) for note in found.notes]}


def main(_: Sequence[str] = ()) -> int:
    threading.Thread(target=_leave_with, args=[psutil.Process().parent()], daemon=True).start()
    output = sys.stdout
    sys.stdout = sys.stderr             # what libraries print must not get between the answers
    for line in sys.stdin:
        try:
            question = json.loads(line)
        except ValueError:
            continue
        output.write(json.dumps(answer(question), ensure_ascii=True, default=str) + "\n")
        output.flush()
    return 0


def _leave_with(window: psutil.Process | None) -> None:
    """A window that was killed can end nobody, and a suggestion takes minutes on a slow machine."""
    while window is not None and os.getppid() == window.pid and window.is_running():
        time.sleep(1)
    os._exit(0)
