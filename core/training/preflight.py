"""Notes before a run starts: keys that have no effect on this base, what a distilled base means,
too few or too many updates for the pictures."""

from __future__ import annotations

from collections.abc import Callable

from core.config import TrainConfig
from core.dataset.examples import Examples
from core.dataset.text_embeddings import reading_of, unused_of
from core.families import distilled
from core.families.base import Family, Parts
from core.families.timestep_sampling import TimestepSampling
from core.jobs.events import Event, Note
from core.memory import advisor
from core.objectives.flow import without_effect

NOT_FOR_FLOWS = ("min_snr_gamma", "debiased_estimation", "zero_terminal_snr", "loss_type",
                 "multires_noise_iterations", "prediction_type")
Emit = Callable[[Event], None]


def tell_distilled(config: TrainConfig, parts: Parts, emit: Emit) -> None:
    """Says what a distilled base means for a training. `distilled` in the config overrules what the
    base itself says."""
    if config.distilled != "auto":
        parts.take_as(distilled.of(parts.source, config.distilled))
    if distillation := parts.distilled:
        emit(Note(key="distilled.with_base_loras" if config.base_loras else "distilled.trained",
                  params={"sign": distillation.sign, "steps": distillation.steps}))


def tell_unused(config: TrainConfig, family: Family, flow: TimestepSampling | None,
                emit: Emit) -> None:
    """Names the keys that have an effect on noise schedules and none on a flow, or the reverse, and
    those of other text encoders."""
    keys = [key for key in NOT_FOR_FLOWS if flow is not None
            and getattr(config, key) != TrainConfig.model_fields[key].default]
    if keys:
        emit(Note(key="engine.not_for_flows", params={"keys": ", ".join(keys)}))
    if keys := without_effect(config, flow):
        emit(Note(key="engine.not_for_curve" if flow else "engine.only_for_flows",
                  params={"keys": ", ".join(keys)}))
    if unused := unused_of(family, reading_of(config)):
        emit(Note(key="engine.not_for_family", params={
            "keys": ", ".join(unused), "family": family.spec.title}))


def tell_length(config: TrainConfig, examples: Examples, emit: Emit) -> None:
    """Says so where the run is far too short or too long for its pictures."""
    repeats = [examples.items[i].picture.repeats for i in examples.trained()]
    if reason := advisor.length(config, repeats):
        emit(Note(key=reason.key, params=dict(reason.params)))
