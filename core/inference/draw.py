"""Drawing pictures as a job: a row for each seed, a column for each weight or checkpoint.

The command line's `generate` and the window's Generate, comparison and sweeps all call `draw`: the
same prompt, LoRAs and seed give the same picture. The base is loaded once.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from core import paths, prompt_markup
from core.config.draw import SHEET, DrawConfig
from core.errors import UserError
from core.inference import generate
from core.inference.generate import PipelineSession, SampleRequest
from core.inference.grid import draw_sheet
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase, Sample
from core.lora_files import files, library
from core.lora_files.library import Lora, Tag, find_lora, parse_lora, split_prompt

TELL_S = 0.4                                # between two reports of progress
_NUMBERED = re.compile(r"-(\d{6,})$")


class _Stopped(Exception):
    """Ends a picture that is half drawn."""


@dataclass(slots=True)
class _Progress:
    """Counts denoising steps and reports them, with the time left by the pace so far."""

    total: int
    emit: Callable[[Event], None]
    control: Control
    done: int = 0
    started_at: float = field(default_factory=time.monotonic)
    reported_at: float = 0.0

    def step(self) -> None:
        """Called after each denoising step. Raises _Stopped where a stop was asked for."""
        # some samplers call the model more often than they have steps
        self.done = min(self.done + 1, self.total)
        if time.monotonic() - self.reported_at >= TELL_S:
            self.report()
        if self.control.stopping:
            raise _Stopped

    def report(self) -> None:
        now = self.reported_at = time.monotonic()
        left = (now - self.started_at) / self.done * (self.total - self.done) if self.done else 0.0
        self.emit(Phase(name="draw", done=self.done, total=self.total, eta_s=left))


def draw(config: DrawConfig, emit: Callable[[Event], None], control: Control) -> dict[str, Any]:
    """Draws all pictures of a config. -> {"state": "done" or "stopped", "files": [...]}

    Each picture is reported as it comes, as a Sample whose `step` is its column. Several columns
    end with a labelled sheet, whose column is SHEET (-1); with `sheet`, it alone is saved."""
    prompt, negative, loras = texts_and_loras(config, emit)
    base = paths.DEMO / "base" if config.base == "demo" else paths.expanded(config.base)
    columns, labels = columns_of(config, loras)
    session = PipelineSession(base, config, emit)
    session.check(itertools.chain(*columns))
    emit(Phase(name="load"))
    session.load()
    session.read_as(config, loras)
    session.predict_as(config, loras)
    request = replace(session.shot(config, prompt), negative=negative)
    # before the prompt is measured: the new words of a LoRA are tokens, too
    session.use(columns[0])
    session.tell_unread(chosen(request))
    progress = _Progress(config.count * len(columns) * request.steps, emit, control)
    progress.report()
    rows: list[tuple[int, list[Image.Image]]] = []
    drawn: list[str] = []
    state = "done"
    try:
        for number in range(config.count):
            numbered = chosen(replace(request, seed=request.seed + number))
            rows.append((numbered.seed, []))
            for column, column_loras in enumerate(columns):
                session.use(column_loras)
                picture = session.draw(numbered, progress.step)
                rows[-1][1].append(picture)
                progress.done = (number * len(columns) + column + 1) * request.steps
                if not config.sheet:
                    path = generate.save_numbered(picture, Path(config.out),
                                                  session.describe(numbered, column_loras))
                    emit(Sample(step=column, path=str(path), prompt=numbered.prompt,
                                seed=numbered.seed))
                    drawn.append(str(path))
    except _Stopped:
        state = "stopped"
    complete = [(f"seed {seed}", row) for seed, row in rows if len(row) == len(columns)]
    if complete and (config.sheet or len(columns) > 1):
        sheet = draw_sheet(labels, complete, caption=prompt)
        path = generate.save_numbered(sheet, Path(config.out), session.describe(request, loras),
                                      "sheet-")
        emit(Sample(step=SHEET, path=str(path), prompt=prompt, seed=request.seed))
        drawn += [str(path)] if config.sheet else []
    return {"state": state, "files": drawn}


def chosen(request: SampleRequest) -> SampleRequest:
    """With one of each alternative {a|b}, as the seed says."""
    return replace(request, prompt=prompt_markup.choose(request.prompt, request.seed),
                   negative=prompt_markup.choose(request.negative, request.seed))


def texts_and_loras(config: DrawConfig, emit: Callable[[Event], None] = lambda event: None
                    ) -> tuple[str, str, list[Lora]]:
    """The prompt without its <lora:...> tags, the negative prompt, and each LoRA once.

    The weight of a tag precedes that of the list `loras`; of several tags, the last one counts.
    Parts of a prompt that have no effect are reported. Raises UserError for an unknown name or a
    weight that is none."""
    prompt, tags = split_prompt(prompt_markup.cleaned(config.prompt))
    negative, idle = split_prompt(prompt_markup.cleaned(config.negative))
    library.refuse_paths(tags)
    mentions: dict[Path, list[Lora]] = {}
    # the tags come last, and the last mention wins
    for tag in [*(Tag(*parse_lora(text)) for text in config.loras), *tags]:
        library.refuse_weights([tag])
        lora = find_lora(config.names.get(tag.name, tag.name), tag.weight)
        mentions.setdefault(lora.path, []).append(replace(lora, text=tag.text))
        if tag.unread:
            emit(Note(key="generate.tag_unread", params={"name": tag.name, "part": tag.unread}))
    for path, several in mentions.items():
        if len(several) > 1:
            emit(Note(key="generate.lora_twice", params={
                "name": path.stem, "tag": several[-1].tag,
                "others": ", ".join(f"{lora.weight:g}" for lora in several[:-1])}))
    if idle:
        emit(Note(key="generate.tag_in_negative", params={
            "names": ", ".join(tag.name for tag in idle)}))
    loras = [several[-1] for several in mentions.values()]
    texts = [prompt, negative]
    if any("trigger" in prompt_markup.found(text) for text in texts):
        texts = [prompt_markup.placed(text, _trigger_of(loras)) for text in texts]
    for text in texts:
        _tell_markup(text, emit)
    return texts[0], texts[1], loras


def _trigger_of(loras: Sequence[Lora]) -> str:
    """The word for [trigger] in a prompt: the first that a LoRA file tells."""
    return next((word for lora in loras if lora.path.is_file()
                 for word in files.describe(lora.path).facts.trigger_words), "")


def _tell_markup(text: str, emit: Callable[[Event], None]) -> None:
    """Reports what other programs would do with a prompt, and drawing doesn't. Raises UserError for
    an emphasis whose weight is none."""
    try:
        prompt_markup.spans(text)
    except prompt_markup.BadWeight as error:
        raise UserError("generate.bad_weight", part=error, weight=str(error)) from None
    known = prompt_markup.DRAWN | prompt_markup.BY_CLIP
    if parts := prompt_markup.found(text, known):
        emit(Note(key="generate.plain_syntax", params={"parts": ", ".join(parts.values())}))
    if choice := prompt_markup.found(text).get("choice"):
        emit(Note(key="generate.choice", params={"part": choice}))


def columns_of(config: DrawConfig, loras: Sequence[Lora]) -> tuple[list[list[Lora]], list[str]]:
    """The LoRAs of each column, and its label: the weight or the file of the first LoRA varies.

    Raises UserError where `sheet` can't be read, or there is no LoRA to vary."""
    weights, checkpoints, labels = config.weights, config.checkpoints, list(config.labels)
    if config.sheet:
        # the same from the command line: "weights=0,0.8" or "checkpoints=100,200"
        axis, _, listed = config.sheet.partition("=")
        values = [value.strip() for value in listed.split(",") if value.strip()]
        refused = UserError("generate.bad_sheet", sheet=config.sheet)
        if axis not in ("weights", "checkpoints") or not values or not loras:
            raise refused
        weights, checkpoints = [], []
        try:
            if axis == "weights":
                weights = [prompt_markup.number(value) for value in values]
            else:
                checkpoints = [str(checkpoint_file(loras[0].path, int(value))) for value in values]
        except ValueError:
            raise refused from None
        labels = [f"{'weight' if weights else 'step'} {value}" for value in values]
    if not loras or not (weights or checkpoints):
        return [list(loras)], labels
    first, *others = loras
    # the whole LoRA is compared: a weight of its own in the text encoders gives way
    varied = [Lora(first.path, weight) for weight in weights] or [
        replace(find_lora(file, first.weight), text=first.text) for file in checkpoints]
    labels = labels or [f"weight {weight:g}" for weight in weights] or [
        Path(file).stem for file in checkpoints]
    return [[lora, *others] for lora in varied], [*labels, *[""] * len(varied)][:len(varied)]


def checkpoint_file(final: Path, step: int) -> Path:
    """The LoRA of a training step, beside the final one or in its checkpoints folder. Raises
    UserError with the names that are there."""
    stem = _NUMBERED.sub("", final.stem)
    # `final` may itself be a checkpoint, in a folder of its name
    in_checkpoint = final.parent.name == f"{stem}-{final.stem[-6:]}"
    folder = final.parent.parent if in_checkpoint else final.parent
    name = f"{stem}-{step:06d}"
    for path in (folder / "checkpoints" / name / f"{name}.safetensors",
                 folder / name / f"{name}.safetensors", folder / f"{name}.safetensors"):
        if path.is_file():
            return path
    known = sorted(path.name for path in folder.glob(f"**/{stem}-*.safetensors"))
    raise UserError("generate.no_checkpoint", step=step, file=final, known=", ".join(known) or "-")
