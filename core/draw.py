"""Pictures as a job of the worker: one seed a row, one weight of the first LoRA a column.

The window's Generate, compare and sweep are all this; the base is loaded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from core import generate, paths
from core.config import size_of
from core.control import Control
from core.draw_config import DrawConfig
from core.events import Event, Phase, Sample
from core.generate import Lora, Shot, Studio


def draw(config: DrawConfig, emit: Callable[[Event], None], control: Control) -> dict[str, Any]:
    """-> {"state", "files"}; every picture is told as it comes, `step` being its weight's place
    in `weights`. A stop ends it between two pictures."""
    prompt, tagged = generate.split_prompt(config.prompt)
    loras = [generate.find_lora(name, weight)
             for name, weight in [*tagged, *map(generate.parse_lora, config.loras)]]
    base = paths.DEMO / "base" if config.base == "demo" else Path(config.base).expanduser()
    emit(Phase(name="load"))
    studio = Studio(base, config, emit)
    studio.load()
    side = studio.parts.native_size
    shot = Shot(prompt, config.negative, config.seed, config.steps, config.cfg,
                size_of(config.size) or (side, side), config.sampler)
    columns = _columns(config, loras)
    files: list[str] = []
    for row in range(config.count):
        one = replace(shot, seed=shot.seed + row)
        for column, chosen in enumerate(columns):
            if control.stopping:
                return {"state": "stopped", "files": files}
            emit(Phase(name="draw", done=len(files), total=config.count * len(columns)))
            studio.use(chosen)
            path = generate.save_numbered(studio.draw(one), Path(config.out),
                                          studio.describe(one, chosen))
            emit(Sample(step=column, path=str(path), prompt=prompt, seed=one.seed))
            files.append(str(path))
    return {"state": "done", "files": files}


def _columns(config: DrawConfig, loras: list[Lora]) -> list[list[Lora]]:
    if not config.weights or not loras:
        return [loras]
    first, *others = loras
    return [[replace(first, weight=weight), *others] for weight in config.weights]
