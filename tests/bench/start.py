"""Time to the first step, by part, in a fresh process with an empty and with a full cache.

    python -m tests.bench.start
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

CHILD = """
import json, sys, time
began = time.perf_counter()
from core.demo import run as demo
from core.training.run import train
from core.jobs.control import Control
from core.jobs.events import Phase, Step
from pathlib import Path
marks = {"imports": time.perf_counter() - began}
last, control = time.perf_counter(), Control()
def emit(event):
    global last
    now = time.perf_counter()
    name = event.name if isinstance(event, Phase) else "first step" if isinstance(event, Step) else ""
    if isinstance(event, Step):
        marks.setdefault("first step", now - last)
        control.ask("stop")
    elif name:
        marks[state["phase"]] = marks.get(state["phase"], 0) + now - last
        state["phase"] = name
    last = now
state = {"phase": "start"}
train(demo.demo_config(Path(sys.argv[1])), emit, control)
marks["whole"] = time.perf_counter() - began
print(json.dumps(marks))
"""  # noqa: E501


def measure(home: str, out: str) -> dict[str, float]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, out], capture_output=True, text=True,
                          env=os.environ | {"DARKROOM_HOME": home}, check=True)
    marks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"python": time.perf_counter() - began - marks["whole"], **marks}


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        first = measure(home, f"{home}/a")
        second = measure(home, f"{home}/b")
    print("| part | empty cache, s | full cache, s |\n|---|---|---|")
    for part in dict.fromkeys([*first, *second]):
        print(f"| {part} | {first.get(part, 0):.2f} | {second.get(part, 0):.2f} |")


if __name__ == "__main__":
    main()
