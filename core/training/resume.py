"""Resumes from a checkpoint: which one, under which name, at which sample, and what is different.

The place in the data is counted in samples, so that with another batch size, other repeats or
another number of pictures the run goes on where it was: what its epoch has not learned yet comes
first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from core import paths
from core.adapters import base_loras
from core.config import TrainConfig
from core.dataset.sampler import Place
from core.errors import Fix, UserError
from core.jobs.events import Event, Note
from core.optim import optimizers
from core.training import checkpoint, fallbacks
from core.training.checkpoint import Position
from core.training.output_names import Output

if TYPE_CHECKING:
    from core.training.trainer import Trainer

Changes = dict[str, tuple[Any, Any]]        # config key -> in the checkpoint, here
NOTICEABLE = 0.1                            # of the full learning rate: a jump worth a note
# Keys that decide which tensors there are and what they mean: others make another LoRA.
REFUSED = ("adapter", "lora_rank", "lora_alpha", "target_modules", "conv_rank", "conv_alpha",
           "block_ranks", "lokr_factor", "text_encoder_lr", "text_encoder_rank", "pivotal_tokens",
           "prediction_type")
# Keys that may differ between the starts of one run without any effect on what is learned.
FREE = frozenset({"resume", "output_dir", "output_name", "device", "save_steps", "keep_checkpoints",
                  "save_format", "save_precision", "validation_steps", "cache_to_disk",
                  "cache_batch_size", "callbacks", "base_loras_in_previews", "metadata"})


def choose(output: Output, config: TrainConfig, emit: Callable[[Event], None]) -> list[Path]:
    """Takes the name that the run goes on under, or a new one where there is nothing to go on
    from. Returns the checkpoints to try, newest first. Raises UserError where `config.resume`
    names none."""
    # `resume` is true, a checkpoint's folder, or a session's number (core/jobs/runs.py).
    resume = config.resume
    if not isinstance(resume, str):
        checkpoints = output.checkpoints() if resume else []
    elif resume.isdigit():
        checkpoints = output.checkpoints(resume)
    else:
        given = paths.expanded(resume).absolute()
        # a file of a checkpoint stands for its folder
        checkpoints = [path for path in (given, given.parent)
                       if (path / checkpoint.STATE).is_file()][:1]
        if not checkpoints:
            raise UserError("engine.no_such_checkpoint", given=resume, folder=output.folder)
        if not checkpoint.position_of(checkpoints[0]):
            raise UserError("engine.bad_checkpoint", path=checkpoints[0], reason=checkpoint.STATE)

    # Of several runs that wanted this name the newest one that these settings fit.
    readable = list(filter(None, map(checkpoint.position_of, checkpoints)))
    fitting = (one for one in readable if not _refused(one, config, ""))
    if newest := next(fitting, readable[0] if readable else None):
        name, session = str(newest["name"]), str(newest["session"])
        own = [path for path in checkpoints if checkpoint.session_of(path) == session]
        # Those of this name that can't be read are tried in their turn, and told.
        torn = [path for path in checkpoints if checkpoint.session_of(path) is None
                and checkpoint.is_called(path, name)]
        output.go_on_as(name, session)
        return checkpoint.newest_first(own, torn)
    if resume:
        emit(Note(key="engine.nothing_to_resume", params={"folder": str(output.folder)}))
    output.rename()
    return []


def check(checkpoints: list[Path], config: TrainConfig, objective: str, base: Mapping[str, str]
          ) -> None:
    """Raises UserError, before anything is encoded, where what these hold means something else
    now: another size or kind of adapter, another objective, another base."""
    path = next(filter(checkpoint.position_of, checkpoints), None)
    if path is None:
        return
    position = checkpoint.position_of(path)
    # the folder may have been renamed
    lora = path / f"{position['name']}-{position['update']:06d}.safetensors"
    if refused := _refused(position, config, objective):
        there = {key: old for key, (old, _) in refused.items()}
        raise UserError("engine.other_adapter_keys", lora=lora, keys=_listed(refused), fixes=[
            Fix("fixes.as_in_checkpoint", there | {"resume": config.resume})])
    parts = position.get("base")
    denoiser = parts.get("denoiser", "") if isinstance(parts, dict) else ""
    if denoiser not in ("", base.get("denoiser", "")):
        raise UserError("engine.other_denoiser", lora=lora)
    optimizers.check_same(_config_of(position)["optimizer"], config.optimizer)


def _refused(position: Mapping[str, Any], config: TrainConfig, objective: str) -> Changes:
    """The keys that make the checkpoint's weights mean something else. `objective`: what the base
    predicts now; empty: not known yet."""
    def meaning(values: Mapping[str, Any], objective: str) -> list[Any]:
        rank, conv = values["lora_rank"], values["conv_rank"]
        texts = bool(values["text_encoder_lr"])
        return [values["adapter"], rank, (values["lora_alpha"] or rank) / rank,
                values["target_modules"], conv, conv and (values["conv_alpha"] or conv) / conv,
                values["block_ranks"], values["adapter"] == "lokr" and values["lokr_factor"],
                texts, texts and (values["text_encoder_rank"] or rank), values["pivotal_tokens"],
                objective]
    there = objective and (position.get("objective") or objective)
    before, now = _config_of(position), config.model_dump(mode="json")
    different = [key for key, old, new in zip(
        REFUSED, meaning(before, there), meaning(now, objective), strict=True) if old != new]
    # `auto` says less than what it stands for
    before["prediction_type"], now["prediction_type"] = there, objective
    return {key: (before[key], now[key]) for key in different if before[key] != now[key]}


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

    base_loras.refuse_others(trainer.base_loras.labels, position.base_loras,
                             position.config.get("base_loras", []))
    fallbacks.apply(trainer, position.lowered)
    changed = _listed(_differences(asdict(position), trainer.config))
    trainer.restore(state)

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
            "keys": changed, "samples": place.samples,
            "left": max(0, trainer.total - position.update)}))
    known = position.order.split(" ")[0]
    if known != whole.data if known else position.samples not in (0, whole.samples_per_epoch):
        trainer.emit(Note(key="engine.other_pictures", params={
            "here": whole.samples_per_epoch, "there": position.samples}))
    for part in ("vae", "text"):
        if position.base.get(part, "") not in ("", base.get(part, "")):
            trainer.emit(Note(key=f"engine.other_{part}"))
    # A schedule is stretched over the whole run: another length moves the rate.
    rate = trainer.planned_rate(position.update)
    share = rate / trainer.config.learning_rate
    if (position.rate is not None and position.update < trainer.total and abs(
            share - position.rate / _config_of(asdict(position))["learning_rate"]) > NOTICEABLE):
        trainer.emit(Note(key="engine.rate_jumps", params={
            "there": f"{position.rate:.3g}", "here": f"{rate:.3g}",
            "scheduler": trainer.config.lr_scheduler}))
    return path, position


def _differences(position: Mapping[str, Any], config: TrainConfig) -> Changes:
    """The keys that differ and have an effect on what is learned."""
    before, now = _config_of(position), config.model_dump(mode="json")
    return {key: (before[key], value) for key, value in now.items() if before[key] != value
            and key not in FREE and not key.startswith("sample_")}


def _config_of(position: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config; a key that an older version didn't know counts as its default."""
    there = position.get("config")
    known = {key: value for key, value in (there if isinstance(there, dict) else {}).items()
             if key in TrainConfig.model_fields}
    with contextlib.suppress(ValidationError):          # damaged
        return TrainConfig.model_validate(known).model_dump(mode="json")
    return TrainConfig().model_dump(mode="json")


def _listed(changes: Changes) -> str:
    """'batch_size: 2 -> 4; seed: 1 -> 2'"""
    return "; ".join(f"{key}: {_short(old)} -> {_short(new)}"
                     for key, (old, new) in changes.items())


def _short(value: Any) -> str:
    text = "-" if value in (None, "", [], {}) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
