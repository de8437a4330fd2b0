"""Resumes from a checkpoint: which one, under which name, at which sample, and what is different.

The place in the data is counted in samples, so that with another batch size, other repeats or
another number of pictures the run goes on where it was: what its epoch has not learned yet comes
first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.adapters import base_loras
from core.config import TrainConfig
from core.dataset.sampler import Place
from core.errors import UserError
from core.families.base import PARTS
from core.jobs.events import Event, Note
from core.optim import optimizers
from core.training import checkpoint, fallbacks
from core.training.checkpoint import Position
from core.training.output_names import Output

if TYPE_CHECKING:
    from core.training.trainer import Trainer

# Keys that may differ between the starts of one run without any effect on what is learned.
UNTOLD = frozenset({"resume", "output_dir", "output_name", "device"})


def choose(output: Output, config: TrainConfig, emit: Callable[[Event], None]) -> list[Path]:
    """Takes the name that the run goes on under, or a new one where there is nothing to go on
    from. Returns the checkpoints to try, newest first. Raises UserError where `config.resume`
    names none."""
    # `resume` is true, a checkpoint's folder, or a session's number (core/jobs/runs.py).
    resume = config.resume
    if not isinstance(resume, str):
        checkpoints = output.checkpoints() if resume else []
    elif ((exactly := Path(resume).expanduser().absolute()) / checkpoint.STATE).is_file():
        checkpoints = [exactly]
    elif resume.isdigit():
        checkpoints = output.checkpoints(resume)
    else:
        raise UserError("engine.no_such_checkpoint", given=resume, folder=output.folder)

    newest = next(filter(None, map(checkpoint.position_of, checkpoints)), None)
    if newest is not None:
        output.go_on_as(str(newest["name"]), str(newest["session"]))
        return [path for path in checkpoints
                if checkpoint.session_of(path) in (output.session, None)]
    if resume:
        emit(Note(key="engine.nothing_to_resume", params={"folder": str(output.folder)}))
    output.rename()
    return []


def restore(checkpoints: list[Path], trainer: Trainer, output: Output, base: Mapping[str, str]
            ) -> tuple[Path, Position] | None:
    """Restores the newest of these that can be read; None where none can and the run begins anew.
    `base`: fingerprints of the base's parts, which should be the checkpoint's. Raises UserError
    where the checkpoint is of another adapter, optimizer or other LoRAs of the base."""
    exactly = isinstance(trainer.config.resume, str) and not trainer.config.resume.isdigit()
    for path in checkpoints:
        try:
            position, state = checkpoint.load(path)
            break
        except UserError as fault:
            # Torn by a power cut or a full disk. An older one will do, unless just this was asked.
            if exactly:
                raise
            trainer.emit(Note(key=fault.code, params=fault.params))
    else:
        if checkpoints:
            trainer.emit(Note(key="engine.nothing_to_resume", params={
                "folder": str(output.folder)}))
            output.start_anew()
        return None

    optimizers.check_same(position.config.get("optimizer", "adamw"), trainer.config.optimizer)
    base_loras.refuse_others(trainer.base_loras.labels, position.base_loras,
                             position.config.get("base_loras", []))
    fallbacks.apply(trainer, position.lowered)
    changed = differences(position.config, trainer.config)
    try:
        trainer.restore(state)
    except UserError as fault:
        if fault.code != "engine.other_adapter" or not changed:
            raise
        raise UserError("engine.other_adapter_keys", keys="; ".join(changed)) from fault

    if position.place is not None:
        place = Place(**position.place)
    else:
        # Of versions that counted updates alone: the place is found by going through the batches
        # that the checkpoint's own settings make of the pictures.
        keys = ("batch_size", "gradient_accumulation_steps", "seed")
        settings = {key: position.config[key] for key in keys if key in position.config}
        place = trainer.new_sampler(trainer.config.with_changes(**settings)).place(position.update)
    # With the same order of the same pictures it is as if the run had never stopped.
    whole = trainer.sampler
    same = position.order == whole.order
    trainer.begin_at(Place(**position.start) if same and position.start is not None else place)

    trainer.emit(Note(key="engine.resumed", params={
        "step": position.update, "samples": place.samples, "path": str(path)}))
    if changed:
        trainer.emit(Note(key="engine.resumed_otherwise", params={
            "keys": "; ".join(changed), "samples": place.samples,
            "left": max(0, trainer.total - position.update)}))
    known = position.order.split(" ")[0]
    if known != whole.data if known else position.samples not in (0, whole.samples_per_epoch):
        trainer.emit(Note(key="engine.other_pictures", params={
            "here": whole.samples_per_epoch, "there": position.samples}))
    for part in PARTS:
        if position.base.get(part, "") not in ("", base.get(part, "")):
            trainer.emit(Note(key=f"engine.other_{part}"))
    return path, position


def differences(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """'batch_size: 2 -> 4' for each key that differs; a key that an older version didn't know
    counts as its default."""
    now = config.model_dump(mode="json")
    defaults = TrainConfig().model_dump(mode="json")
    return [f"{key}: {_short(old)} -> {_short(value)}" for key, value in now.items()
            if key not in UNTOLD and (old := before.get(key, defaults[key])) != value]


def _short(value: Any) -> str:
    text = "-" if value in (None, "", [], {}) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
