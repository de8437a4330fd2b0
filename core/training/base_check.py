"""Checks whether a base predicts what it is taken for, by its errors on the run's own pictures.

A network that guesses the mean of its target has an error as large as the target's variance. A base
that is read correctly stays far below that; one whose target, VAE or text encoder is mistaken
comes near it or above. Nothing else in a run shows this: the loss falls either way.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core import paths
from core.adapters import lora
from core.errors import Fix, UserError
from core.failures import ran_out
from core.families.detection import identify
from core.jobs.events import Note
from core.objectives import diffusion as objective
from core.objectives.diffusion import Diffusion
from core.safetensors_header import read_header
from core.weights.precision import autocast, free_memory

if TYPE_CHECKING:
    from core.training.trainer import Trainer

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)      # of the noise schedule: one forward pass at each
WORSE_THAN_THE_MEAN, NEAR_THE_MEAN = 1.0, 0.8
# The other prediction fits if its error is at most this share of the first one's, and this large.
CLEARLY, WELL = 0.5, 0.7
_SEED = 20_241_130                      # of the noise, the same in every run
OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}


def check(trainer: Trainer) -> dict[str, Any] | None:
    """Measures the base with the LoRA off, by at most five forward passes of one picture each,
    emits the result as a note and returns it for the summary: `error` and, of a noise schedule,
    `other_error`, both as shares of the target's variance (1: as bad as guessing the mean),
    `verdict` (fits | near | wrong | new: to the base that ships) and `prediction`.

    A single file that doesn't say whether it predicts noise or v, and clearly fits the other one,
    is taken for that from here on, unless the config says `prediction_type`. None where memory
    doesn't suffice or no prediction was finite: the run's own steps deal with both.
    """
    try:
        errors = measure(trainer)
    except (RuntimeError, MemoryError) as reason:
        if not ran_out(reason):
            raise
        free_memory()
        return None
    if not errors:
        return None
    kind = trainer.diffusion.kind
    other: Any = OTHER.get(kind, "")
    fits_other = (errors.get(other, 9.0) <= CLEARLY * errors[kind] and errors[other] <= WELL)
    if fits_other and _is_unsaid(trainer):
        _tell(trainer, "taken_for_other", errors, kind)
        if trainer.config.reg_from_base:    # its pictures are there, drawn by the wrong one
            raise UserError("base_check.regular_of_other", prediction=kind, other=other, fixes=[
                Fix("fixes.predicts", {"prediction_type": other}, {"prediction": other})])
        # Training, previews and the LoRA's metadata follow.
        parts = trainer.parts
        parts.objective = other
        parts.scheduler["prediction_type"] = other
        trainer.diffusion = objective.create(parts, trainer.config, trainer.precision.device)
        kind, other, fits_other = other, kind, False
    error, config = errors[kind], trainer.config
    # What the base that ships predicts is known, as long as nothing of it is exchanged; most
    # pictures are beyond the few that it learned from.
    built_in = (trainer.parts.source == paths.DEMO / "base"
                and config.prediction_type in ("auto", "v_prediction")
                and not (config.vae or config.text_encoders or config.tokenizer))
    verdict = ("fits" if error <= NEAR_THE_MEAN and not fits_other else "new" if built_in
               else "wrong" if error > WORSE_THAN_THE_MEAN or fits_other else "near")
    helps = errors.get(other, WORSE_THAN_THE_MEAN) < WORSE_THAN_THE_MEAN
    key = verdict if verdict != "wrong" else "predicts_other" if fits_other else (
        "wrong" if helps else "wrong_parts")
    _tell(trainer, key, errors, kind)
    return {"error": round(error, 3), "verdict": verdict, "prediction": kind,
            **({"other_error": round(errors[other], 3)} if other else {})}


def measure(trainer: Trainer) -> dict[str, float]:
    """By what the base may predict: the mean squared error over the variance of that target around
    the mean of each channel. Passes that weren't finite don't count."""
    models = trainer.trained_models().values()
    trained = trainer.examples.trained()
    measured: dict[str, list[Tensor]] = {}
    trainer.set_training(False)
    for model in models:
        lora.set_weight(model, 0.0)
    try:
        with torch.no_grad():
            # Pictures spread over the folder, each at a noise level of its own.
            for n, share in enumerate(SHARES):
                index = trained[n * len(trained) // len(SHARES)]
                for kind, pair in _errors(trainer, index, share).items():
                    if torch.isfinite(pair).all():
                        measured.setdefault(kind, []).append(pair)
    finally:
        for model in models:
            lora.set_weight(model, 1.0)
        trainer.set_training(True)
    sums = {kind: torch.stack(pairs).sum(0) for kind, pairs in measured.items()}
    return {kind: float(error / variance) for kind, (error, variance) in sums.items()}


def _errors(trainer: Trainer, index: int, share: float) -> dict[str, Tensor]:
    """(error, variance) of one picture, (2,) fp32, by what the base may predict."""
    device, diffusion = trainer.precision.device, trainer.diffusion
    latents, _, cond = trainer.plain_sample(index)
    latents = latents.to(device)
    draw = diffusion.draw_fixed(_SEED, [index], latents.shape[1:], share).to(device)
    noisy, target = diffusion.noisy_and_target(latents, draw.noise, draw.timesteps)
    with autocast(trainer.precision):
        predicted = trainer.family.predict(trainer.denoiser, noisy, draw.timesteps, cond).float()
    targets = {str(diffusion.kind): target}
    if isinstance(diffusion, Diffusion):
        other: Any = copy.copy(diffusion)
        other.kind = OTHER[diffusion.kind]
        targets[other.kind] = other.noisy_and_target(latents, draw.noise, draw.timesteps)[1]
    return {kind: torch.stack([(predicted - target).square().mean(),
                               target.var((2, 3), correction=0).mean()])
            for kind, target in targets.items()}


def _is_unsaid(trainer: Trainer) -> bool:
    """Whether neither the config nor the base says what it predicts; folders always do."""
    source = trainer.parts.source
    if trainer.config.prediction_type != "auto" or not source.is_file():
        return False
    metadata = read_header(source).metadata
    return not (identify(source).v_prediction or "modelspec.prediction_type" in metadata
                or metadata.get("modelspec.architecture") == "stable-diffusion-v2-512")


def _tell(trainer: Trainer, key: str, errors: dict[str, float], kind: str) -> None:
    other = OTHER.get(kind, "")
    trainer.emit(Note(key=f"base_check.{key}", params={
        "error": f"{errors[kind]:.2f}", "prediction": kind, "other": other,
        "other_error": f"{errors.get(other, float('nan')):.2f}"}))
