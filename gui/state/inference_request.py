"""What the project asks the Inference tab to draw: LoRAs with their weights, base, prompt, numbers;
and the job that it makes. Pure: a snapshot in, values out."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core import families, paths, plugins
from core.config import COMPANIONS
from core.config.draw import SHEET, DrawConfig
from core.errors import UserError
from core.jobs.runs import JobView
from core.lora_files import library
from core.lora_files.library import DEFAULT_WEIGHT
from gui.state.app_state import Snapshot, pictures_folder
from gui.state.inference_files import InferenceFiles
from gui.state.run_files import lora_file, lora_of

SWEEP = (0.0, 0.4, 0.8, 1.0)
MOST_LORAS = 60                         # of runs, in the list of what can be added
MOST_ADDED = 8
LEAST, MOST = -1.0, 2.0                 # of a weight
TAKEN_FOR = ("family", "prediction_type", "distilled")     # keys that say what a base is
TYPED = ("prompt", "negative", "seed", "steps", "cfg", "size", "sampler", "clip_skip", "count",
         "same_seed")


@dataclass(frozen=True, slots=True)
class Added:
    file: str
    weight: float = DEFAULT_WEIGHT

    @property
    def name(self) -> str:
        return Path(self.file).stem


@dataclass(frozen=True, slots=True)
class Choice:
    """A LoRA that can be added."""

    file: str
    run: JobView | None = None          # that made it; None: it lies on the disk
    step: int = 0
    kind: str = ""                      # final | best | ""

    @property
    def name(self) -> str:
        return Path(self.file).stem


# --- what there is ---

def choices(snap: Snapshot, desk: InferenceFiles) -> list[Choice]:
    """The newest run's best file first, then its checkpoints, then older; then other files."""
    made = list(_of_runs(snap))
    seen = {str(lora_file(point)) for view in snap.runs for point in view.checkpoints}
    return made + [Choice(str(path)) for path in desk.files(snap.settings.output_folder)
                   if str(path) not in seen]


def _of_runs(snap: Snapshot) -> Iterator[Choice]:
    seen: set[str] = set()
    for view in (view for view in snap.runs if view.job == "train"):
        first = lora_of(view)
        rest = [n for n in reversed(range(len(view.checkpoints))) if n != first]
        final = view.checkpoints[first].step if first is not None else -1
        for number in [] if first is None else [first, *rest]:
            point = view.checkpoints[number]
            file = lora_file(point)
            twice = number != first and point.step == final     # the last one is saved as both
            if str(file) not in seen and not twice and file.is_file():
                seen.add(str(file))
                yield Choice(str(file), view, point.step,
                             "final" if point.final else "best" if point.best else "")
        if len(seen) >= MOST_LORAS:
            return


def newest(found: list[Choice]) -> str:
    """The run whose LoRA is ready; '' where there is none."""
    return found[0].run.id if found and found[0].run else ""


def names(found: list[Choice]) -> dict[str, str]:
    """What <lora:name> may call, as core/lora_files/library.py reads it: the first of a name
    counts."""
    known: dict[str, str] = {}
    for choice in found:
        if not set(choice.name) & set(":<>"):
            known.setdefault(choice.name, choice.file)
    return known


def used(snap: Snapshot) -> dict[str, str]:
    """LoRAs of earlier drawings that are still there, by name: those added by path among them."""
    files = dict.fromkeys(library.parse_lora(text)[0] for view in snap.runs
                          if view.job == "generate" for text in view.config.get("loras") or ())
    return {Path(file).stem: file for file in files if Path(file).is_file()}


def checkpoints(snap: Snapshot, file: str) -> list[Choice]:
    """All files of the run that made a LoRA, and of those it went on from; by step."""
    found = list(_of_runs(snap))
    view = next((one.run for one in found if one.file == file), None)
    by_step: dict[int, Choice] = {}
    for _ in range(20):
        if view is None:
            break
        for choice in found:
            if choice.run is not None and choice.run.id == view.id:
                by_step.setdefault(choice.step, choice)
        view = snap.run(view.resumed_from) if view.resumed_from else None
    return [by_step[step] for step in sorted(by_step)]


# --- what is wanted ---

def added(snap: Snapshot, found: list[Choice]) -> list[Added]:
    """The user's own list, until a newer LoRA is ready: then that one, at 0.8."""
    kept = snap.project.inference
    if kept.get("lora") == (newest(found) or "-"):
        return list(_read(kept.get("loras")))
    return [Added(found[0].file)] if newest(found) else []


def _read(kept: Any) -> Iterator[Added]:
    for entry in kept if isinstance(kept, list) else ():
        match entry:
            case {"file": str(file), "weight": float() | int() as weight} if (
                    file and LEAST <= weight <= MOST):
                yield Added(file, float(weight))


def own_list(loras: list[Added], found: list[Choice]) -> dict[str, Any]:
    """As the project keeps it."""
    return {"lora": newest(found) or "-", "loras": [asdict(one) for one in loras]}


def run_of(file: str, found: list[Choice]) -> JobView | None:
    return next((one.run for one in found if one.file == file), None)


def base_of(snap: Snapshot, found: list[Choice]) -> str:
    """The user's choice, else the base that the first LoRA was trained on, else the project's."""
    loras = added(snap, found)
    run = run_of(loras[0].file, found) if loras else None
    own = str(snap.project.inference.get("base") or "")
    return own or str((run.config if run else {}).get("base_model") or "") or (
        snap.config.base_model) or "demo"


def bases(snap: Snapshot, found: list[Choice]) -> list[str]:
    used = [base_of(snap, found), snap.config.base_model, "demo",
            *(str(view.config.get("base_model", "")) for view in snap.runs)]
    return [one for one in dict.fromkeys(used) if one]


def folder_of(base: str) -> Path:
    return paths.DEMO / "base" if base == "demo" else Path(base).expanduser()


def triggers(snap: Snapshot, loras: list[Added], found: list[Choice],
             desk: InferenceFiles) -> list[str]:
    """Words that call the added LoRAs: the runs' own, else what the files tell."""
    words: list[str] = []
    for one in loras:
        run = run_of(one.file, found)
        told = desk.info(Path(one.file)) if run is None else None
        own = str(run.config.get("trigger_word") or "") if run else ""
        words += [own] if own else list(told.facts.trigger_words[:4]) if told else []
    return list(dict.fromkeys(word for word in words if word))


def typed(snap: Snapshot, found: list[Choice]) -> dict[str, Any]:
    """What the inputs show: what was typed, else a prompt that shows the LoRA, and numbers that
    its base likes."""
    loras = added(snap, found)
    run = run_of(loras[0].file, found) if loras else None
    config: Mapping[str, Any] = run.config if run else snap.project.edits
    prompts, trigger = config.get("sample_prompts") or [], str(config.get("trigger_word") or "")
    demo = folder_of(base_of(snap, found)) == paths.DEMO / "base"
    usual = {"prompt": prompts[0] if prompts else trigger, "negative": "", "seed": 42,
             "steps": 16 if demo else None, "cfg": 1.5 if demo else None, "size": "",
             "sampler": "auto", "clip_skip": None, "count": 1, "same_seed": True}
    return {key: snap.project.inference.get(key, usual[key]) for key in TYPED}


def new_seed() -> int:
    return random.randrange(2**31)


# --- the job ---

def job(snap: Snapshot, desk: InferenceFiles, kind: str, values: Mapping[str, Any],
        device: str = "auto"
        ) -> tuple[DrawConfig, str]:
    """-> the job and its name. `kind`: draw | compare | sweep | checkpoints. Raises UserError."""
    found = choices(snap, desk)
    loras, base = added(snap, found), base_of(snap, found)
    if kind != "draw" and not loras:
        raise UserError("gui.no_lora")
    for one in loras:
        if not Path(one.file).is_file():
            raise UserError("tab_inference.lora_gone", file=one.file)
    columns: dict[str, Any] = {}
    if kind == "compare":
        columns = {"weights": [0.0, loras[0].weight or DEFAULT_WEIGHT]}
    elif kind == "sweep":
        columns = {"weights": list(SWEEP)}
    elif kind == "checkpoints":
        points = checkpoints(snap, loras[0].file)
        if len(points) < 2:
            raise UserError("tab_inference.one_checkpoint")
        columns = {"checkpoints": [one.file for one in points],
                   "labels": [f"step {one.step}" for one in points]}
    prompt = str(values.get("prompt") or "")
    data = {"base": base, "prompt": prompt, "negative": values.get("negative") or "",
            "loras": [f"{one.file}:{one.weight:g}" for one in loras], **columns,
            "names": _called(prompt, names(found)), "size": values.get("size") or "",
            "sampler": values.get("sampler") or "auto", "device": device,
            "out": str(pictures_folder() / snap.project.name)}
    data |= {key: values[key] for key in ("seed", "steps", "cfg", "count", "clip_skip")
             if values.get(key) is not None}
    return _checked(data | _companions(snap, base)), loras[0].name if loras else snap.project.name


def _companions(snap: Snapshot, base: str) -> dict[str, Any]:
    """The files that the project names for this base and what it takes it for, else those of its
    last run."""
    configs = [snap.config.model_dump(), *(view.config for view in snap.runs)]  # newest first
    own = next((one for one in configs if base == one.get("base_model", one.get("base"))), {})
    return {key: own[key] for key in (*COMPANIONS, *TAKEN_FOR) if own.get(key)}


def kind_of(snap: Snapshot, found: list[Choice]) -> str:
    """The family that LoRAs of the base must be of; empty: one of the user's own takes any."""
    base = base_of(snap, found)
    family = str(_companions(snap, base).get("family", "auto"))
    if plugins.is_named(family):
        return ""
    return families.detect(folder_of(base)) if family == "auto" else family


def again(view: JobView, changes: Mapping[str, Any]) -> DrawConfig:
    """The same drawing with the changes of a fault's fix."""
    return _checked(dict(view.config) | dict(changes))


def _called(prompt: str, known: Mapping[str, str]) -> dict[str, str]:
    """The files of the prompt's tags. Raises UserError for a name that nothing has."""
    tagged = library.split_prompt(prompt)[1]
    library.refuse_paths(tagged)
    names = [tag.name for tag in tagged]
    for name in names:
        with contextlib.suppress(UserError):
            if name in known or library.find_lora(name, DEFAULT_WEIGHT):
                continue
        raise library.unknown(name, known)
    return {name: known[name] for name in names if name in known}


def _checked(data: dict[str, Any]) -> DrawConfig:
    try:
        return DrawConfig.model_validate(data)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        raise UserError(f"tab_inference.bad_{key}" if key in (
            "seed", "steps", "cfg", "size", "count", "clip_skip") else "tab_inference.bad_value",
            value=data.get(key), key=key) from None


def total_of(view: JobView) -> int:
    """Pictures that a drawing makes, sheets aside."""
    config = view.config
    columns = max(len(config.get("weights") or ()), len(config.get("checkpoints") or ()), 1)
    return int(config.get("count") or 1) * (columns if config.get("loras") else 1)


# --- and back from a picture ---

def loras_of(view: JobView, number: int) -> list[Added]:
    """Those of one picture; the first as its column has it."""
    config, column = view.config, view.samples[number].step
    parsed = [library.parse_lora(text) for text in config.get("loras") or []]
    loras = [Added(file, weight) for file, weight in parsed]
    weights, points = config.get("weights") or [], config.get("checkpoints") or []
    if loras and column != SHEET:
        if column < len(weights):
            loras[0] = Added(loras[0].file, float(weights[column]))
        elif column < len(points):
            loras[0] = Added(str(points[column]), loras[0].weight)
    return loras


def settings_of(view: JobView, number: int) -> dict[str, Any]:
    """One picture's settings as the project keeps them, but for its LoRAs."""
    known = ("prompt", "negative", "steps", "cfg", "size", "sampler", "clip_skip", "base")
    return {key: view.config[key] for key in known if key in view.config} | {
        "seed": view.samples[number].seed, "count": 1, "same_seed": True}
