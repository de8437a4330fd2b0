"""The files of a run as the window offers them."""

from __future__ import annotations

import os
from pathlib import Path

from core.jobs.events import Checkpoint
from core.jobs.runs import JobView


def lora_of(view: JobView) -> int | None:
    """The number of a run's final checkpoint, else of its newest; None: it has none."""
    if not view.checkpoints:
        return None
    numbers = range(len(view.checkpoints))
    return max(numbers, key=lambda n: (view.checkpoints[n].final, n))


def folder_of(view: JobView) -> Path:
    """The output folder of a run; before it exists, the folder of the run's record."""
    output = Path(view.output_dir)
    return output if view.output_dir and os.path.isdir(output) else view.folder


def lora_file(point: Checkpoint) -> Path:
    """The LoRA of a checkpoint: the file itself, or the one in its folder."""
    path = Path(point.path)
    return path if path.suffix == ".safetensors" else path / f"{path.name}.safetensors"
