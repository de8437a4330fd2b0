"""What the project asks the Inference tab to draw: LoRAs with their weights, base, prompt, numbers;
and the job that it makes. Pure: a snapshot in, values out.

`choices` is everywhere the list that `lora_choices` returns.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core import families, paths, plugins, prompt_markup
from core.config import COMPANIONS
from core.config.draw import SHEET, DrawConfig
from core.config.flat_yaml import first_problem
from core.errors import UserError
from core.jobs.runs import JobView
from core.lora_files import library
from core.lora_files.library import DEFAULT_WEIGHT
from gui.state.app_state import Snapshot, pictures_folder
from gui.state.inference_files import InferenceFiles
from gui.state.run_files import lora_file, lora_of

# Where nobody names another.
SEED = 42
# Weights that are drawn side by side.
SWEEP = (0.0, 0.4, 0.8, 1.0)
# LoRAs of runs in the list of what can be added.
MOST_LORAS = 60
MOST_ADDED = 8
# Limits of a weight.
LEAST, MOST = -1.0, 2.0
# Keys of a config that say what a base is.
TAKEN_FOR = ("family", "prediction_type", "distilled")


@dataclass(frozen=True, slots=True)
class Added:
    """A LoRA that is drawn with."""

    file: str
    weight: float = DEFAULT_WEIGHT

    @property
    def name(self) -> str:
        return Path(self.file).stem


@dataclass(frozen=True, slots=True)
class Choice:
    """A LoRA that can be added."""

    file: str
    # The run that made it; None: a file of another origin.
    run: JobView | None = None
    step: int = 0
    # final | best | ""
    kind: str = ""

    @property
    def name(self) -> str:
        return Path(self.file).stem


# --- what there is ---

def lora_choices(snap: Snapshot, files: InferenceFiles) -> list[Choice]:
    """The newest run's best file first, then its checkpoints, then older; then other files."""
    checkpoints = {str(lora_file(point)) for view in snap.runs for point in view.checkpoints}
    return list(_of_runs(snap)) + [
        Choice(str(path)) for path in files.loras(snap.settings.output_folder)
        if str(path) not in checkpoints]


def _of_runs(snap: Snapshot) -> Iterator[Choice]:
    seen: set[str] = set()
    for view in snap.runs:
        first = lora_of(view)
        if view.job != "train" or first is None:
            continue
        newest = view.checkpoints[first]
        # The last step is saved twice: as a checkpoint and as the final file.
        others = [point for point in reversed(view.checkpoints) if point.step != newest.step]
        for point in [newest, *others]:
            file = lora_file(point)
            if str(file) not in seen and os.path.isfile(file):
                seen.add(str(file))
                yield Choice(str(file), view, point.step,
                             "final" if point.final else "best" if point.best else "")
        if len(seen) >= MOST_LORAS:
            return


def newest(choices: list[Choice]) -> str:
    """The id of the run whose LoRA stands first; '' where none of a run is there."""
    return choices[0].run.id if choices and choices[0].run else ""


def names(choices: list[Choice]) -> dict[str, str]:
    """What <lora:name> may call, as core/lora_files/library.py reads it: the first of a name
    counts."""
    known: dict[str, str] = {}
    for choice in choices:
        if not set(choice.name) & set(":<>"):
            known.setdefault(choice.name, choice.file)
    return known


def used(snap: Snapshot) -> dict[str, str]:
    """LoRAs of earlier drawings that are still there, by name: those added by path among them."""
    files = dict.fromkeys(library.parse_lora(text)[0] for view in snap.runs
                          if view.job == "generate" for text in view.config.get("loras") or ())
    return {Path(file).stem: file for file in files if os.path.isfile(file)}


def checkpoints(snap: Snapshot, file: str) -> list[Choice]:
    """All files of the run that made a LoRA, and of those it went on from; by step."""
    choices = list(_of_runs(snap))
    view, by_step = run_of(file, choices), dict[int, Choice]()
    # A run that went on from another has its steps only; limited, since records may be damaged
    # and name each other.
    for _ in range(20):
        if view is not None:
            for choice in choices:
                if choice.run is not None and choice.run.id == view.id:
                    by_step.setdefault(choice.step, choice)
            view = snap.run(view.resumed_from)
    return [by_step[step] for step in sorted(by_step)]


# --- what is wanted ---

def added(snap: Snapshot, choices: list[Choice]) -> list[Added]:
    """The user's own list, until a newer LoRA is ready: then that one, at 0.8."""
    saved = snap.project.inference
    if saved.get("lora") != (newest(choices) or "-"):
        return [Added(choices[0].file)] if newest(choices) else []
    entries, loras = saved.get("loras"), list[Added]()
    # The project's file may have been edited by hand.
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"file": str(file), "weight": float() | int() as weight} if (
                    file and LEAST <= weight <= MOST):
                loras.append(Added(file, float(weight)))
    return loras


def own_list(loras: list[Added], choices: list[Choice]) -> dict[str, Any]:
    """The list as the project keeps it, with the run that was the newest then: see `added`."""
    return {"lora": newest(choices) or "-", "loras": [asdict(lora) for lora in loras]}


def run_of(file: str, choices: list[Choice]) -> JobView | None:
    """The run that made a LoRA; None: it is of another origin."""
    return next((choice.run for choice in choices if choice.file == file), None)


def _first_run(loras: list[Added], choices: list[Choice]) -> JobView | None:
    """The run that made the first of the added LoRAs."""
    return run_of(loras[0].file, choices) if loras else None


def base_of(snap: Snapshot, choices: list[Choice]) -> str:
    """The user's choice, else the base that the first LoRA was trained on, else the project's."""
    run = _first_run(added(snap, choices), choices)
    return (str(snap.project.inference.get("base") or "")
            or str((run.config if run else {}).get("base_model") or "")
            or snap.config.base_model or "demo")


def bases(snap: Snapshot, choices: list[Choice]) -> list[str]:
    """What can be drawn with: the base as it stands, the project's, the demo's, those of runs."""
    used = [base_of(snap, choices), snap.config.base_model, "demo",
            *(str(view.config.get("base_model", "")) for view in snap.runs)]
    return list(filter(None, dict.fromkeys(used)))


def folder_of(base: str) -> Path:
    """The path of a base as the project names it."""
    return paths.DEMO / "base" if base == "demo" else paths.expanded(base)


def triggers(loras: list[Added], choices: list[Choice], files: InferenceFiles) -> list[str]:
    """Words that call the added LoRAs: the runs' own, else what the files tell."""
    words: list[str] = []
    for lora in loras:
        if run := run_of(lora.file, choices):
            words.append(str(run.config.get("trigger_word") or ""))
        elif info := files.info(Path(lora.file)):
            words += info.facts.trigger_words[:4]
    return list(filter(None, dict.fromkeys(words)))


def typed(snap: Snapshot, choices: list[Choice]) -> dict[str, Any]:
    """What the inputs show: what was typed, else a prompt that shows the LoRA, and numbers that
    its base likes."""
    run = _first_run(added(snap, choices), choices)
    config: Mapping[str, Any] = run.config if run else snap.project.edits
    prompts, trigger = config.get("sample_prompts") or [], str(config.get("trigger_word") or "")
    demo = folder_of(base_of(snap, choices)) == paths.DEMO / "base"
    # None: the base's own number. The demo has none of its own.
    defaults = {"prompt": prompts[0] if prompts else trigger, "negative": "", "seed": SEED,
                "steps": 16 if demo else None, "cfg": 1.5 if demo else None, "size": "",
                "sampler": "auto", "clip_skip": None, "count": 1, "same_seed": True}
    # The project's file may have been edited by hand: a number field takes numbers only.
    kinds = dict.fromkeys(("steps", "cfg", "clip_skip"), float | int | None)
    kept = {key: value for key, value in snap.project.inference.items() if key in defaults
            and isinstance(value, kinds.get(key, type(defaults[key])))
            and not (isinstance(value, float) and not isfinite(value))}
    return defaults | kept


# --- the job ---

def job(snap: Snapshot, files: InferenceFiles, kind: str, values: Mapping[str, Any],
        device: str = "auto") -> tuple[DrawConfig, str]:
    """-> the job and its name. `kind`: draw | compare | sweep | checkpoints. Raises UserError
    where there is no LoRA to compare, a file is gone, or a setting can't be used."""
    choices = lora_choices(snap, files)
    loras, base = added(snap, choices), base_of(snap, choices)
    if kind != "draw" and not loras:
        raise UserError("gui.no_lora")
    for lora in loras:
        if not os.path.isfile(lora.file):
            raise UserError("tab_inference.lora_gone", file=lora.file)
    prompt = str(values.get("prompt") or "")
    data = {"base": base, "prompt": prompt, "negative": values.get("negative") or "",
            "loras": [f"{lora.file}:{lora.weight:g}" for lora in loras],
            "size": values.get("size") or "", "sampler": values.get("sampler") or "auto",
            "device": device, "out": str(pictures_folder() / snap.project.name)}
    if kind == "compare":
        data["weights"] = [0.0, loras[0].weight or DEFAULT_WEIGHT]
    elif kind == "sweep":
        data["weights"] = list(SWEEP)
    elif kind == "checkpoints":
        points = checkpoints(snap, loras[0].file)
        if len(points) < 2:
            raise UserError("tab_inference.one_checkpoint")
        data |= {"checkpoints": [point.file for point in points],
                 "labels": [f"step {point.step}" for point in points]}
    data["names"] = _files_of_tags(prompt, names(choices))
    data |= {key: values[key] for key in ("seed", "steps", "cfg", "count", "clip_skip")
             if values.get(key) is not None}
    return _checked(data | _companions(snap, base)), loras[0].name if loras else snap.project.name


def _companions(snap: Snapshot, base: str) -> dict[str, Any]:
    """The files that the project names for this base and what it takes it for, else those of its
    last run."""
    # Newest first. A training names its base `base_model`, a drawing `base`.
    configs = [snap.config.model_dump(), *(view.config for view in snap.runs)]
    config = next((config for config in configs
                   if base == config.get("base_model", config.get("base"))), {})
    return {key: config[key] for key in (*COMPANIONS, *TAKEN_FOR) if config.get(key)}


def kind_of(snap: Snapshot, choices: list[Choice]) -> str:
    """The family that LoRAs of the base must be of; empty: a family of the user's own, which takes
    any."""
    base = base_of(snap, choices)
    family = str(_companions(snap, base).get("family", "auto"))
    if family == "auto":
        return families.detect(folder_of(base))
    return "" if plugins.is_named(family) else family


def again(view: JobView, changes: Mapping[str, Any]) -> DrawConfig:
    """The config of a drawing with the changes of a fault's fix. Raises UserError."""
    return _checked(dict(view.config) | dict(changes))


def _files_of_tags(prompt: str, known: Mapping[str, str]) -> dict[str, str]:
    """The files of the prompt's <lora:name> tags. Raises UserError for a name that nothing has."""
    tags = library.split_prompt(prompt_markup.cleaned(prompt))[1]
    library.refuse_paths(tags)
    library.refuse_weights(tags)
    for tag in tags:
        # Names that the page doesn't know may still be files of the library.
        with contextlib.suppress(UserError):
            if tag.name in known or library.find_lora(tag.name, DEFAULT_WEIGHT):
                continue
        raise library.unknown(tag.name, known)
    return {tag.name: known[tag.name] for tag in tags if tag.name in known}


def _checked(data: dict[str, Any]) -> DrawConfig:
    try:
        return DrawConfig.model_validate(data)
    except ValidationError as error:
        key, _ = first_problem(error)
        raise UserError(f"tab_inference.bad_{key}" if key in (
            "seed", "steps", "cfg", "size", "count", "clip_skip") else "tab_inference.bad_value",
            value=data.get(key), key=key) from None


def total_of(view: JobView) -> int:
    """Pictures that a drawing makes, sheets aside."""
    config = _config_of(view)
    columns = max(len(config.weights), len(config.checkpoints), 1)
    return config.count * (columns if config.loras else 1)


def _config_of(view: JobView) -> DrawConfig:
    try:
        return DrawConfig.model_validate(view.config)
    except ValidationError:
        # the record of an older version, or a damaged one
        return DrawConfig(base="")


# --- and back from a picture ---

def loras_of(view: JobView, number: int) -> list[Added]:
    """The LoRAs of one picture; the first as the picture's column has it."""
    # The step of a drawn picture is its column in the comparison.
    config, column = _config_of(view), view.samples[number].step
    loras = [Added(*library.parse_lora(text)) for text in config.loras]
    weights, points = config.weights, config.checkpoints
    if loras and column != SHEET:
        if column < len(weights):
            loras[0] = Added(loras[0].file, weights[column])
        elif column < len(points):
            loras[0] = Added(points[column], loras[0].weight)
    return loras


def settings_of(view: JobView, number: int) -> dict[str, Any]:
    """One picture's settings as the project keeps them, but for its LoRAs."""
    known = ("prompt", "negative", "steps", "cfg", "size", "sampler", "clip_skip", "base")
    return {key: view.config[key] for key in known if key in view.config} | {
        "seed": view.samples[number].seed, "count": 1, "same_seed": True}
