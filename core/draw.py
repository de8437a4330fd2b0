"""Pictures as a job of the worker: a row a seed, a column a weight or a checkpoint.

The window's Generate, comparison and sweeps are all this; the base is loaded once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from core import generate, paths
from core.config import size_of
from core.control import Control
from core.draw_config import SHEET, DrawConfig
from core.events import Event, Phase, Sample
from core.generate import Shot, Studio
from core.lora_names import Lora, find_lora, parse_lora, refuse_paths, split_prompt
from core.sheet import draw_sheet

TELL_S = 0.4                                # between two reports of progress


class _Stopped(Exception):
    """Ends a picture that is half drawn."""


@dataclass(slots=True)
class _Watch:
    """Progress in denoising steps, with what is left by the pace so far."""

    total: int
    emit: Callable[[Event], None]
    control: Control
    done: int = 0
    begun: float = field(default_factory=time.monotonic)
    told: float = 0.0

    def step(self) -> None:
        """After each denoising step. A stop is heard here."""
        self.done = min(self.done + 1, self.total)      # some samplers call the model more often
        now = time.monotonic()
        if now - self.told >= TELL_S:
            self.tell(now)
        if self.control.stopping:
            raise _Stopped

    def tell(self, now: float) -> None:
        self.told = now
        left = (now - self.begun) / self.done * (self.total - self.done) if self.done else 0.0
        self.emit(Phase(name="draw", done=self.done, total=self.total, eta_s=left))


def draw(config: DrawConfig, emit: Callable[[Event], None], control: Control) -> dict[str, Any]:
    """-> {"state", "files"}; every picture is told as it comes, `step` being its column. With
    several columns a labelled sheet comes last, told as column -1."""
    prompt, loras = wanted(config)
    base = paths.DEMO / "base" if config.base == "demo" else Path(config.base).expanduser()
    emit(Phase(name="load"))
    studio = Studio(base, config, emit)
    studio.load()
    side = studio.parts.native_size
    shot = Shot(prompt, config.negative, config.seed, config.steps, studio.guidance(config),
                size_of(config.size) or (side, side), config.sampler)
    columns = columns_of(config, loras)
    watch = _Watch(config.count * len(columns) * shot.steps, emit, control)
    watch.tell(time.monotonic())
    rows: list[tuple[int, list[Image.Image]]] = []
    files: list[str] = []
    state = "done"
    try:
        for number in range(config.count):
            one = replace(shot, seed=shot.seed + number)
            rows.append((one.seed, []))
            for column, chosen in enumerate(columns):
                studio.use(chosen)
                picture = studio.draw(one, watch.step)
                watch.done = (len(files) + 1) * shot.steps
                path = generate.save_numbered(picture, Path(config.out),
                                              studio.describe(one, chosen))
                emit(Sample(step=column, path=str(path), prompt=prompt, seed=one.seed))
                files.append(str(path))
                rows[-1][1].append(picture)
    except _Stopped:
        state = "stopped"
    complete = [(f"seed {seed}", row) for seed, row in rows if len(row) == len(columns)]
    if len(columns) > 1 and complete:
        sheet = draw_sheet(labels_of(config, len(columns)), complete, caption=prompt)
        path = generate.save_numbered(sheet, Path(config.out), studio.describe(shot, loras),
                                      "sheet-")
        emit(Sample(step=SHEET, path=str(path), prompt=prompt, seed=shot.seed))
    return {"state": state, "files": files}


def wanted(config: DrawConfig) -> tuple[str, list[Lora]]:
    """The prompt without its tags, and each LoRA once: a tag's weight goes before the list's.
    Raises Fault for a name that is not known."""
    prompt, tagged = split_prompt(config.prompt)
    refuse_paths(tagged)
    weights: dict[Path, float] = {}
    for name, weight in [*map(parse_lora, config.loras), *tagged]:
        lora = find_lora(config.names.get(name, name), weight)
        weights[lora.path] = lora.weight
    return prompt, [Lora(path, weight) for path, weight in weights.items()]


def columns_of(config: DrawConfig, loras: Sequence[Lora]) -> list[list[Lora]]:
    """The LoRAs of each column: the first one's weight, or its file, varies."""
    if not loras or not (config.weights or config.checkpoints):
        return [list(loras)]
    first, *others = loras
    varied = [replace(first, weight=weight) for weight in config.weights] or [
        find_lora(file, first.weight) for file in config.checkpoints]
    return [[one, *others] for one in varied]


def labels_of(config: DrawConfig, count: int) -> list[str]:
    named = config.labels or [f"weight {weight:g}" for weight in config.weights] or [
        Path(file).stem for file in config.checkpoints]
    return [*named, *[""] * count][:count]
