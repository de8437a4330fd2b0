"""Pictures as a job: a row a seed, a column a weight or a checkpoint.

The command line's `generate` and the window's Generate, comparison and sweeps are all this: the
same prompt, LoRAs and seed give the same picture. The base is loaded once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from core import paths
from core.config.draw import SHEET, DrawConfig
from core.errors import UserError
from core.inference import generate
from core.inference.generate import PipelineSession
from core.inference.grid import draw_sheet
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase, Sample
from core.lora_files.library import Lora, Tag, find_lora, parse_lora, refuse_paths, split_prompt

TELL_S = 0.4                                # between two reports of progress
_NUMBERED = re.compile(r"-(\d{6,})$")
# Of A1111 and its extensions: emphasis, alternatives, wildcards, chunk breaks.
_SYNTAX = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|\(\([^()]*\)\)|\[[^\[\]]+\]|\{[^{}]*\|[^{}]*\}"
                     r"|__[\w/*-]+__|\bBREAK\b|\\[()]")


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
    several columns a labelled sheet comes last, told as column -1; where `sheet` asks for one it
    alone is kept."""
    prompt, loras = wanted(config, emit)
    base = paths.DEMO / "base" if config.base == "demo" else Path(config.base).expanduser()
    columns, labels = columns_of(config, loras)
    emit(Phase(name="load"))
    studio = PipelineSession(base, config, emit)
    studio.load()
    studio.read_as(config, loras)
    studio.predict_as(config, loras)
    shot = studio.shot(config, prompt)
    studio.use(columns[0])                  # whose new words are tokens too
    studio.tell_unread(shot)
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
                rows[-1][1].append(picture)
                watch.done = (number * len(columns) + column + 1) * shot.steps
                if not config.sheet:
                    path = generate.save_numbered(picture, Path(config.out),
                                                  studio.describe(one, chosen))
                    emit(Sample(step=column, path=str(path), prompt=prompt, seed=one.seed))
                    files.append(str(path))
    except _Stopped:
        state = "stopped"
    complete = [(f"seed {seed}", row) for seed, row in rows if len(row) == len(columns)]
    if complete and (config.sheet or len(columns) > 1):
        sheet = draw_sheet(labels, complete, caption=prompt)
        path = generate.save_numbered(sheet, Path(config.out), studio.describe(shot, loras),
                                      "sheet-")
        emit(Sample(step=SHEET, path=str(path), prompt=prompt, seed=shot.seed))
        files += [str(path)] if config.sheet else []
    return {"state": state, "files": files}


def wanted(config: DrawConfig, emit: Callable[[Event], None] = lambda event: None
           ) -> tuple[str, list[Lora]]:
    """The prompt without its tags, and each LoRA once: a tag's weight goes before the list's, of
    several tags the last one's. What of a prompt has no effect is told. Raises UserError for a name
    that is not known."""
    prompt, tags = split_prompt(config.prompt)
    refuse_paths(tags)
    given: dict[Path, list[Lora]] = {}
    for tag in [*(Tag(*parse_lora(text)) for text in config.loras), *tags]:
        found = find_lora(config.names.get(tag.name, tag.name), tag.weight)
        given.setdefault(found.path, []).append(replace(found, text=tag.text))
        if tag.unread:
            emit(Note(key="generate.tag_unread", params={"name": tag.name, "part": tag.unread}))
    for path, several in given.items():
        if len(several) > 1:
            emit(Note(key="generate.lora_twice", params={
                "name": path.stem, "tag": several[-1].tag,
                "others": ", ".join(f"{one.weight:g}" for one in several[:-1])}))
    if plain := _SYNTAX.search(f"{prompt}\n{config.negative}"):
        emit(Note(key="generate.plain_syntax", params={"part": plain[0]}))
    return prompt, [several[-1] for several in given.values()]


def columns_of(config: DrawConfig, loras: Sequence[Lora]) -> tuple[list[list[Lora]], list[str]]:
    """The LoRAs of each column, and its label: the first one's weight, or its file, varies.
    Raises UserError where `sheet` can't be read, or there is no LoRA to vary."""
    weights, checkpoints, named = config.weights, config.checkpoints, list(config.labels)
    if config.sheet:
        weights, checkpoints, named = _of_sheet(config.sheet, loras)
    if not loras or not (weights or checkpoints):
        return [list(loras)], named
    first, *others = loras
    # what is compared is the whole LoRA: its weight in the text encoders as well
    varied = [Lora(first.path, weight) for weight in weights] or [
        replace(find_lora(file, first.weight), text=first.text) for file in checkpoints]
    named = named or [f"weight {weight:g}" for weight in weights] or [
        Path(file).stem for file in checkpoints]
    return [[one, *others] for one in varied], [*named, *[""] * len(varied)][:len(varied)]


def _of_sheet(sheet: str, loras: Sequence[Lora]) -> tuple[list[float], list[str], list[str]]:
    """'weights=0,0.8' or 'checkpoints=100,200' -> weights, checkpoint files, labels."""
    axis, _, listed = sheet.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    try:
        if axis == "weights" and values and loras:
            return [float(value) for value in values], [], [f"weight {v}" for v in values]
        if axis == "checkpoints" and values and loras:
            files = [checkpoint_file(loras[0].path, int(value)) for value in values]
            return [], [str(file) for file in files], [f"step {value}" for value in values]
    except ValueError:
        pass
    raise UserError("generate.bad_sheet", sheet=sheet)


def checkpoint_file(final: Path, step: int) -> Path:
    """The LoRA of a training step, beside the final one or in its checkpoints folder."""
    stem = _NUMBERED.sub("", final.stem)
    folder = final.parent if final.parent.name != f"{stem}-{final.stem[-6:]}" else (
        final.parent.parent)
    name = f"{stem}-{step:06d}"
    for path in (folder / "checkpoints" / name / f"{name}.safetensors",
                 folder / name / f"{name}.safetensors", folder / f"{name}.safetensors"):
        if path.is_file():
            return path
    known = sorted(p.name for p in folder.glob(f"**/{stem}-*.safetensors"))
    raise UserError("generate.no_checkpoint", step=step, file=final, known=", ".join(known) or "-")
