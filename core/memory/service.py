"""The planning process: one JSON question a line on stdin, one JSON answer a line on stdout.

A question: {"config": {TrainConfig}, "purpose", "language", "suggest": bool}. Its answer: {"plan",
"verdict", "lacking", "nearest", "suggestion", "pictures", "updates", "remarks" (sentences
of core/memory/course.py), "not_counted" (config keys that name code, which a plan never runs)}, as
far as each is known; "remedies" alone where the question has a
"symptom" (core/memory/troubleshooting.py); {"fault": {"code", "params"}} where it can't be
answered. {"sizes": base} asks for a base's native side and step alone.

Torch is imported here, and only where a trace isn't on disk yet (core.memory.plan.ask), so that
the window need not import it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from core import families, plugins
from core.config import TrainConfig
from core.errors import UserError
from core.families.detection import Base
from core.memory import advisor, course, plan, plan_inputs, relief, troubleshooting
from core.system import processes

LONGEST_S = 300.0                       # until a base's sizes are known, on a slow disk
FRESH_S = 20.0                          # a folder's headers are read again after that

# The folder asked about last, and when it was read: the window asks again at every change.
_pictures: dict[tuple[str, str, str], tuple[float, plan_inputs.Pictures]] = {}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question. Never raises: a fault is an answer, too."""
    try:
        if "sizes" in question:
            return {"sizes": plan.sizes(Base.of(Path(question["sizes"]), question["family"]))}
        return _answer(question)
    except UserError as fault:
        return {"fault": {"code": fault.code, "params": {
            key: value if isinstance(value, (int, float)) else str(value)
            for key, value in fault.params.items()}}}
    except Exception as error:          # the window must not lose its planner
        reason = f"{type(error).__name__}: {error}"
        return {"fault": {"code": "gui.plan_failed", "params": {"reason": reason[:300]}}}


def sizes_beside(base: Base) -> dict[str, float]:
    """plan.sizes for the window's process: a process of its own imports torch, once for a base.
    Raises UserError where the base can't be read."""
    if (known := plan.known_sizes(base)) is not None:
        return known
    question = json.dumps({"sizes": str(base.source), "family": base.family})
    done = subprocess.run(
        processes.command("plan-service"), input=f"{question}\n", env=processes.environment(),
        capture_output=True, encoding="utf-8", timeout=LONGEST_S, check=False,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
    reply = json.loads(done.stdout or "{}")
    if fault := reply.get("fault"):
        raise UserError(fault["code"], **fault["params"])
    sizes: dict[str, float] = reply["sizes"]
    return sizes


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    config, code = plan_inputs.without_code(TrainConfig.model_validate(question["config"]))
    base = plan_inputs.base_of(config.base_model or next(iter(families.SPECS)), config.family)
    machine = plan_inputs.machine_here(config.device)
    reply: dict[str, Any] = {"not_counted": code} if code else {}
    pictures = None
    if config.train_data_dir:
        try:
            key = (config.train_data_dir, config.metadata_path, config.reg_data_dir)
            when, pictures = _pictures.get(key, (0.0, None))
            if pictures is None or time.monotonic() - when > FRESH_S:
                pictures = plan_inputs.pictures_of(config)
                _pictures.clear()
                _pictures[key] = (time.monotonic(), pictures)
            reply["pictures"] = len(pictures.sizes)
        except UserError as fault:
            pictures = None
            reply["pictures_fault"] = {"code": fault.code, "params": {
                key: str(value) for key, value in fault.params.items()}}
    planner = plan_inputs.BatchPlanner(base, machine, pictures)
    planned = planner(config)
    verdict = planned.verdict()
    reply |= {"plan": plan.as_dict(planned), "verdict": verdict,
              "lacking": advisor.lacking(planned)}
    if pictures:
        reply["updates"] = course.updates(config, pictures.repeats)
        reply["remarks"] = [asdict(reason) for reason in course.remarks(
            config, pictures.repeats, pictures.captions)]
    if verdict != "fits":
        nearest = advisor.nearest_fit(config, base, machine, planner)
        reply["nearest"] = nearest and {"changes": nearest[0],
                                        "needs_mb": round(nearest[1].needs_mb, 1)}
    if symptom := question.get("symptom"):
        shape = advisor.Shape.of(base, machine)
        can = relief.capabilities(machine, shape.weights_mb, shape.family)
        facts = troubleshooting.Facts(planner, can, shape.native, shape.step,
                                      question.get("updates", 0), question.get("best_step", 0))
        return {"remedies": [asdict(advice) for advice in troubleshooting.answer(
            symptom, config, planned, facts)]}
    if question.get("suggest"):
        suggestion = advisor.suggest(machine, base, planner.data(config), question["purpose"],
                                     planner)
        reply["suggestion"] = advisor.as_dict(suggestion, question.get("language"))
    return reply


def main(_: Sequence[str] = ()) -> int:
    """Answers questions until stdin closes or the window is gone."""
    window = psutil.Process().parent()

    def end_with_window() -> None:
        # A window that was killed can end nobody, and a suggestion may take minutes.
        while window is not None and os.getppid() == window.pid and window.is_running():
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=end_with_window, daemon=True).start()
    # What libraries print must not get between the answers.
    output = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        try:
            question = json.loads(line)
        except ValueError:
            continue
        with plugins.asleep():
            reply = answer(question)
        output.write(json.dumps(reply, ensure_ascii=True, default=str) + "\n")
        output.flush()
    return 0
