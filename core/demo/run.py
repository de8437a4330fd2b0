"""`darkroom demo`: trains the demo LoRA on the built-in base, draws the compare sheet, measures.

Measured on subjects that are not among the LoRA's pictures, at weight 0.8 against weight 0:
`style_covered`, the share of the way to the new style, and `content_kept`, the share of the
subjects that the base draws right and that are still recognised.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from core import paths
from core.config import GenerateConfig, TrainConfig
from core.demo.classifier import Judge
from core.importers import load_train_config
from core.inference.generate import PipelineSession, SampleRequest, save_png
from core.inference.grid import draw_sheet
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from core.lora_files.library import DEFAULT_WEIGHT, Lora
from core.training.run import train

# none of them is among the LoRA's 20 pictures
SUBJECTS = ("apple", "house", "cat", "car", "heart", "frog", "rocket", "penguin", "star",
            "strawberry", "tree", "butterfly")
SHOWN = 8                                           # columns of the sheet
WEIGHTS = (0.0, DEFAULT_WEIGHT, 1.0)
TRIGGER = "duskprint style"
STEPS, CFG = 16, 1.5

Emit = Callable[[Event], None]


def demo_config(out: Path) -> TrainConfig:
    return load_train_config(paths.DEMO / "demo.yaml").with_changes(
        output_dir=str(out), train_data_dir=str(paths.DEMO / "pictures"))


def run_demo(out: Path, emit: Emit, control: Control) -> dict[str, Any]:
    """Trains, draws and measures. Returns the summary: files, speed, and the two measures; after a
    stop only that of the training."""
    began = time.time()
    config = demo_config(out)
    trained = train(config, emit, control)
    if trained["state"] != "done":
        return trained
    lora = Path(trained["lora"])
    drawn = draw_subjects(lora, config.seed, emit)
    sheet = save_png(compare_sheet(drawn), out / f"{lora.stem}-compare.png",
                     f"{TRIGGER} at weights {', '.join(map(str, WEIGHTS))}")
    result = {
        "state": "done", "lora": str(lora), "sheet": str(sheet), "steps": trained["steps"],
        "seconds": round(time.time() - began, 1),
        "steps_per_second": round(trained["steps_per_second"], 3), **measure(drawn),
        "memory": trained.get("memory"), "proof": trained["proof"]}
    paths.write_atomic(out / f"{lora.stem}-summary.json",
                       json.dumps(result, indent=1, ensure_ascii=False))
    return result


def draw_subjects(file: Path, seed: int, emit: Emit) -> dict[float, list[Image.Image]]:
    """A picture of every subject at every weight; a subject has the same seed at all weights."""
    studio = PipelineSession(paths.DEMO / "base", GenerateConfig(base=str(paths.DEMO / "base")),
                             emit)
    studio.load()
    drawn: dict[float, list[Image.Image]] = {}
    for weight in WEIGHTS:
        studio.use([Lora(file, weight)])
        drawn[weight] = []
        for i, subject in enumerate(SUBJECTS):
            shot = SampleRequest(prompt(subject), "", seed + i, STEPS, CFG, (64, 64))
            drawn[weight].append(studio.draw(shot))
            emit(Phase(name="draw", done=sum(map(len, drawn.values())),
                       total=len(WEIGHTS) * len(SUBJECTS)))
    return drawn


def prompt(subject: str) -> str:
    return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}, {TRIGGER}"


def compare_sheet(drawn: dict[float, list[Image.Image]]) -> Image.Image:
    """The sheet: a row for each weight, along which the eye runs, a column for each subject."""
    rows: list[tuple[str, Sequence[Image.Image]]] = [
        (f"weight {weight:g}", images[:SHOWN]) for weight, images in drawn.items()]
    return draw_sheet(SUBJECTS[:SHOWN], rows, caption=f'"a ..., {TRIGGER}", one seed a column')


def measure(drawn: dict[float, list[Image.Image]]) -> dict[str, float]:
    """The two measures of the module's docstring, and the share that the base draws right."""
    judge = Judge(paths.DEMO / "judge.safetensors")
    before, after = drawn[0.0], drawn[DEFAULT_WEIGHT]
    covered = 1 - judge.style_distance(after) / judge.style_distance(before)
    # What the base alone draws wrong can't show whether the LoRA keeps content.
    right = [i for i, name in enumerate(judge.name(before)) if name == SUBJECTS[i]]
    names = judge.name(after)
    kept = sum(names[i] == SUBJECTS[i] for i in right) / max(1, len(right))
    return {"style_covered": round(covered, 3), "content_kept": round(kept, 3),
            "base_right": round(len(right) / len(SUBJECTS), 3)}
