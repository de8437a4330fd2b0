"""Going on from a checkpoint: which one, under which name, at which sample, and what is different.

The place in the data is counted in samples, so that another batch size, other repeats or another
number of pictures goes on where the run was: of the epoch that was going on, what it has not
learned yet comes first.
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
from core.training.checkpoint import Position, State
from core.training.output_names import Output

if TYPE_CHECKING:
    from core.training.trainer import Trainer

# Keys that may differ between the starts of one run and say nothing about what is learned.
UNTOLD = frozenset({"resume", "output_dir", "output_name", "device"})


def choose(output: Output, config: TrainConfig, emit: Callable[[Event], None]) -> list[Path]:
    """Takes the name that the run goes on under, or a new one where there is nothing to go on
    from. -> the checkpoints to try, newest first."""
    found = _candidates(output, config.resume)
    known = next(filter(None, map(checkpoint.told, found)), None)
    if known is not None:
        output.go_on_as(str(known["name"]), str(known["session"]))
        found = [path for path in found if checkpoint.session_of(path) in (output.session, None)]
    else:
        if config.resume:
            emit(Note(key="engine.nothing_to_resume", params={"folder": str(output.folder)}))
        output.rename()
    return found if known is not None else []


def _candidates(output: Output, wanted: bool | str) -> list[Path]:
    """`wanted`: a checkpoint's folder, a session's number (runs.session_of), or true."""
    if not isinstance(wanted, str):
        return output.checkpoints() if wanted else []
    exactly = Path(wanted).expanduser().absolute()
    if (exactly / checkpoint.STATE).is_file():
        return [exactly]
    if not wanted.isdigit():
        raise UserError("engine.no_such_checkpoint", given=wanted, folder=output.folder)
    return output.checkpoints(wanted)


def restore(found: list[Path], trainer: Trainer, output: Output, base: Mapping[str, str]
            ) -> tuple[Path, Position] | None:
    """Puts back the newest one that can be read. None where none can: the run begins anew.
    `base`: fingerprints of the base's parts; others than the checkpoint's are told."""
    exactly = isinstance(trainer.config.resume, str) and not trainer.config.resume.isdigit()
    for path in found:
        try:
            position, state = checkpoint.load(path)
        except UserError as fault:              # torn by a power cut or a full disk
            if exactly:
                raise
            trainer.emit(Note(key=fault.code, params=fault.params))
            continue
        _put_back(path, position, state, trainer)
        for part in PARTS:
            if position.base.get(part, "") not in ("", base.get(part, "")):
                trainer.emit(Note(key=f"engine.other_{part}", params={}))
        return path, position
    if found:
        trainer.emit(Note(key="engine.nothing_to_resume", params={"folder": str(output.folder)}))
        output.start_anew()
    return None


def _put_back(path: Path, position: Position, state: State, trainer: Trainer) -> None:
    optimizers.check_same(position.config.get("optimizer", "adamw"), trainer.config.optimizer)
    base_loras.refuse_others(trainer.base_loras.told, position.base_loras,
                             position.config.get("base_loras", []))
    fallbacks.apply(trainer, position.lowered)
    try:
        trainer.restore(state)
    except UserError as fault:
        others = "; ".join(differences(position.config, trainer.config))
        if fault.code != "engine.other_adapter" or not others:
            raise
        raise UserError("engine.other_adapter_keys", keys=others) from fault
    place = _place(position, trainer)
    whole = trainer.sampler
    same = position.order == whole.order and position.start is not None
    trainer.begin_at(Place(**position.start) if same and position.start else place)
    trainer.emit(Note(key="engine.resumed", params={
        "step": position.update, "samples": place.samples, "path": str(path)}))
    changed = differences(position.config, trainer.config)
    if changed:
        trainer.emit(Note(key="engine.resumed_otherwise", params={
            "keys": "; ".join(changed), "samples": place.samples,
            "left": max(0, trainer.total - position.update)}))
    known = position.order.split(" ")[0]
    if known != whole.data if known else position.samples not in (0, whole.samples_per_epoch):
        trainer.emit(Note(key="engine.other_pictures", params={
            "here": whole.samples_per_epoch, "there": position.samples}))


def _place(position: Position, trainer: Trainer) -> Place:
    """Versions that counted updates alone: the place is found by going through the batches that
    the checkpoint's own settings make of the pictures."""
    if position.place is not None:
        return Place(**position.place)
    keys = ("batch_size", "gradient_accumulation_steps", "seed")
    own = {key: position.config[key] for key in keys if key in position.config}
    return trainer.new_sampler(trainer.config.with_changes(**own)).place(position.update)


def differences(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """'batch_size: 2 -> 4' for each key that differs; a key that the older version didn't know
    counts as its default."""
    now = config.model_dump(mode="json")
    defaults = TrainConfig().model_dump(mode="json")
    return [f"{key}: {_short(old)} -> {_short(value)}" for key, value in now.items()
            if key not in UNTOLD and (old := before.get(key, defaults[key])) != value]


def _short(value: Any) -> str:
    text = "-" if value in (None, "", [], {}) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
