"""Notes before a run starts: keys that have no effect on this base, what a distilled base means,
what of the settings can't act with these pictures in so many updates."""

from __future__ import annotations

from collections.abc import Callable

from core.config import TrainConfig
from core.dataset.examples import Examples
from core.dataset.text_embeddings import reading_of, unused_of
from core.errors import Fix, UserError
from core.families import distilled
from core.families.base import Family, Parts
from core.families.timestep_sampling import TimestepSampling
from core.jobs.events import Event, Note
from core.memory import course
from core.memory.plan import Plan
from core.objectives.flow import without_effect
from core.system.machine import disk_free
from core.training.output_names import Output

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
    those of other text encoders. Raises UserError for text encoders that can't learn."""
    if config.trains_text and not family.spec.text_targets:
        raise UserError("engine.no_text_training", family=family.spec.title, fixes=[
            Fix("fixes.no_text_training", {"text_encoder_lr": 0, "pivotal_tokens": 0})])
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


def tell_course(config: TrainConfig, examples: Examples, emit: Emit) -> None:
    """Says what of the settings can't act with these pictures in a run of this length."""
    chosen = [examples.items[i].picture for i in examples.trained()]
    for reason in course.remarks(config, [picture.repeats for picture in chosen],
                                 [picture.caption for picture in chosen],
                                 len(examples.held_out)):
        emit(Note(key=reason.key, params=dict(reason.params)))


def tell_room(planned: Plan | None, config: TrainConfig, output: Output) -> None:
    """Says so where the output folder's disk has less room than the run will write there."""
    if planned is None:
        return
    states = planned.disk["checkpoints"]        # without save_steps there is one, at the end
    if not config.save_steps:
        states /= config.keep_checkpoints + 1 if config.keep_checkpoints else 10
    needs = states + planned.disk["lora"]
    free = disk_free(output.folder)
    if free is not None and free < needs:
        output.emit(Note(key="engine.little_room", params={
            "folder": str(output.folder), "free": f"{free:.1f}", "needs": f"{needs:.1f}",
            "spare": str(output.spare)}))
