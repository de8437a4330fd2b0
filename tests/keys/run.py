"""Rows of the keys about files, previews and what only a whole run shows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from core import paths
from core.config import TrainConfig
from core.dataset.examples import Encoder
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Checkpoint, Phase, Sample, Step
from core.training import checkpoint
from tests import tiny
from tests.keys.lab import Lab, row


def steps(events: list[Any], kind: type) -> list[int]:
    return [e.step for e in events if isinstance(e, kind)]


# --- the base and the machine ---

@row("base_model")
def _(lab: Lab) -> None:
    for run in (lab.plain_run, lab.other_run):
        assert run.metadata["ss_sd_model_name"] == Path(run.config.base_model).name
    assert lab.plain_run.config.base_model != lab.other_run.config.base_model


@row("family")
def _(lab: Lab) -> None:
    """Another family than the base is of is refused; its own is what auto finds."""
    assert lab.plain_run.config.family == "auto"
    assert lab.plain_run.metadata["ss_base_model_version"] == "sd_v1"
    with pytest.raises(UserError):
        lab.run(family="sdxl")


@row("device")
def _(lab: Lab) -> None:
    assert {seen["device"] for seen in lab.other_run.caught} == {"cpu"}
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    missing = next(name for name, found in there.items() if not found)
    with pytest.raises(UserError) as caught:
        lab.run(device=missing)
    assert caught.value.code == "engine.no_device"


@row("precision")
def _(lab: Lab) -> None:
    assert lab.plain_run.metadata["ss_mixed_precision"] == "no"
    assert lab.other_run.metadata["ss_mixed_precision"] == "bf16"
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        trainer = lab.trainer(precision=name)
        assert {p.dtype for p in trainer.denoiser.parameters() if not p.requires_grad} == {dtype}
        assert {p.dtype for p in trainer.parameters} == {torch.float32}


@row("prediction_type")
def _(lab: Lab) -> None:
    assert {seen["objective"] for seen in lab.other_run.caught} == {"v_prediction"}
    assert lab.trainer().parts.objective == "epsilon"
    assert lab.other_run.metadata["modelspec.prediction_type"] == "v"


@row("zero_terminal_snr")
def _(lab: Lab) -> None:
    assert float(lab.other_run.caught[0]["signal"][-1]) == pytest.approx(0, abs=1e-6)
    assert float(lab.trainer().diffusion.signal[-1]) > 0.05
    with pytest.raises(UserError) as caught:        # noise alone can't be told from noise
        lab.run(zero_terminal_snr=True)
    assert caught.value.code == "engine.zero_snr_epsilon"


@row("task_type")
def _(lab: Lab) -> None:
    """One task is known; another is refused, not ignored."""
    assert TrainConfig(task_type="text-to-image").task_type == "text-to-image"
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"task_type": "text-to-video"})


@row("callbacks")
def _(lab: Lab) -> None:
    assert [seen["done"] for seen in lab.other_run.caught] == [1, 2, 3, 4]
    assert lab.plain_run.caught == []


@row("cache_batch_size")
def _(lab: Lab) -> None:
    """Pictures that the VAE gets at once."""
    family, precision, _ = lab.parts()
    found = lab.found()
    for size, wanted in ((1, [1] * 6), (4, [4, 2])):
        seen: list[int] = []

        class Counting(type(family)):       # type: ignore[misc]
            def encode_image(self, parts: Any, pixels: Any, seen: list[int] = seen) -> Any:
                seen.append(len(pixels))
                return super().encode_image(parts, pixels)
        config = lab.config(cache_batch_size=size, cache_to_disk=False)
        Encoder(Counting(), lab.base, precision, config, lambda event: None, Control()).fill(found)
        assert seen == wanted


@row("cache_to_disk")
def _(lab: Lab) -> None:
    def kept() -> int:
        return len(list(paths.cache_dir().glob("vae/**/*.safetensors")))
    lab.examples(cache_to_disk=False)
    assert kept() == 0
    lab.examples()
    assert kept() == 6


# --- files ---

@row("output_dir")
def _(lab: Lab) -> None:
    for run in (lab.plain_run, lab.other_run):
        assert run.file.is_relative_to(run.config.output_dir)


@row("output_name")
def _(lab: Lab) -> None:
    assert lab.plain_run.result["name"] == "plain"          # the folder's
    assert lab.other_run.result["name"] == "blue"
    assert "blue" in lab.other_run.file.relative_to(lab.other_run.config.output_dir).as_posix()


@row("save_precision")
def _(lab: Lab) -> None:
    for run, dtype in ((lab.plain_run, torch.float16), (lab.other_run, torch.bfloat16)):
        assert {t.dtype for k, t in run.tensors.items() if "alpha" not in k} == {dtype}


@row("save_format")
def _(lab: Lab) -> None:
    assert all(key.startswith("lora_unet_") for key in lab.plain_run.tensors)
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight"))
               for key in lab.other_run.tensors)


@row("metadata")
def _(lab: Lab) -> None:
    """What strangers see: of paths the last name alone, and no training picture, unless asked."""
    full = lab.run(metadata="full", max_train_steps=1, output_dir=str(lab.folder / "full"))
    folder = str(Path(full.config.train_data_dir).parent)
    assert folder in full.metadata["darkroom.config"]
    assert "modelspec.thumbnail" in full.metadata
    assert not any(folder in value for value in lab.plain_run.metadata.values())
    assert f"train_data_dir: {Path(full.config.train_data_dir).name}\n" in (
        lab.plain_run.metadata["darkroom.config"])
    assert "modelspec.thumbnail" not in lab.plain_run.metadata


@row("save_steps")
def _(lab: Lab) -> None:
    assert [e.step for e in lab.other_run.events
            if isinstance(e, Checkpoint) and not e.final] == [2, 4]
    assert [e.step for e in lab.plain_run.events
            if isinstance(e, Checkpoint) and not e.final] == [6]


@row("keep_checkpoints")
def _(lab: Lab) -> None:
    """The newest one, and the one with the best validation."""
    run = lab.other_run
    kept = set(checkpoint.steps_of(Path(run.config.output_dir), "blue"))
    assert kept == {4} | ({run.result["best"]["step"]} & {2})
    many = lab.folder / "many"
    for keep, left in ((2, [3, 4]), (0, [1, 2, 3, 4])):
        for step in range(1, 5):
            own = many / checkpoint.FOLDER / f"a-{step:06d}"
            own.mkdir(parents=True, exist_ok=True)
            (own / checkpoint.STATE).write_text('{"name": "a", "session": "1"}')
        checkpoint.prune(many, "a", "1", keep, set())
        assert sorted(checkpoint.steps_of(many, "a")) == left


@row("resume")
def _(lab: Lab) -> None:
    """Goes on from the newest checkpoint; without the key it starts again."""
    copied = lab.folder / "goes-on"
    shutil.copytree(lab.plain_run.config.output_dir, copied)
    again = lab.run(output_dir=str(copied), output_name="plain", max_train_steps=8, resume=True,
                    sample_prompts=["x"], sample_inference_steps=1, sample_every=100)
    assert steps(again.events, Sample) == [8]               # none of the untrained adapter again
    for run, done in ((again, 6), (lab.plain_run, 0)):
        phase = next(e for e in run.events if isinstance(e, Phase) and e.name == "train")
        assert phase.done == done
    assert again.result["steps"] == 8


@row("validation_steps")
def _(lab: Lab) -> None:
    """Every third step, and at the end."""
    shown = [e.step for e in lab.other_run.events
             if isinstance(e, Step) and e.validation is not None]
    assert shown == [3, 4]


# --- previews ---

@row("sample_prompts")
def _(lab: Lab) -> None:
    told = [e.prompt for e in lab.other_run.events if isinstance(e, Sample)]
    assert told[:2] == ["a red disc", "a blue disc"]
    assert steps(lab.plain_run.events, Sample) == []


@row("sample_every")
def _(lab: Lab) -> None:
    assert steps(lab.other_run.events, Sample) == [0, 0, 3, 3, 4, 4]


@row("sample_size")
def _(lab: Lab) -> None:
    sample = next(e for e in lab.other_run.events if isinstance(e, Sample))
    assert Image.open(sample.path).size == (40, 48)
    assert lab.preview(sample_inference_steps=1)["image"].size == (32, 32)


@row("sample_inference_steps")
def _(lab: Lab) -> None:
    for count in (2, 5):
        drawn = lab.preview(sample_inference_steps=count)
        assert drawn["calls"] == count
        assert f"Steps: {count}," in drawn["told"]


@row("distilled")
def _(lab: Lab) -> None:
    """The base in a few steps without guidance, unless the user says otherwise."""
    run = lab.run(distilled=True, max_train_steps=1, sample_prompts=["red disc"], sample_every=1,
                  output_dir=str(lab.folder / "distilled"))
    told = [Image.open(e.path).info["parameters"] for e in run.events if isinstance(e, Sample)]
    assert all("Steps: 8, CFG scale: 1," in one for one in told)
    assert run.notes("distilled.trained")
    assert not lab.plain_run.notes("distilled.trained")
    plain, few = (lab.plan(sample_prompts=["x"], distilled=kind).phase("preview").mb
                  for kind in ("false", "true"))
    assert few < plain


@row("sample_cfg")
def _(lab: Lab) -> None:
    """No guidance draws one picture at a time, guidance two; more of it is another picture."""
    pictures = []
    for cfg, at_once in ((1.0, 1), (3.0, 2), (9.0, 2)):
        drawn = lab.preview(sample_cfg=cfg, sample_inference_steps=2)
        assert drawn["batch"] == at_once
        assert f"CFG scale: {cfg:g}," in drawn["told"]
        pictures.append(np.asarray(drawn["image"]))
    assert (pictures[1] != pictures[2]).any()
    assert "CFG scale: 7," in lab.preview(sample_inference_steps=1)["told"]     # the family's
    assert lab.plan(sample_prompts=["x"], sample_cfg=1.0).phase("preview").mb < (
        lab.plan(sample_prompts=["x"]).phase("preview").mb)


@row("base_loras_in_previews")
def _(lab: Lab) -> None:
    file = tiny.tiny_lora(lab.folder / "beneath.safetensors")
    with_, without, plain = (np.asarray(lab.preview(sample_inference_steps=2, **changes)["image"])
                             for changes in ({"base_loras": [str(file)],
                                              "base_loras_in_previews": True},
                                             {"base_loras": [str(file)]}, {}))
    assert (without == plain).all()
    assert (with_ != plain).any()


@row("sample_sampler")
def _(lab: Lab) -> None:
    drawn = [np.asarray(lab.preview(sample_sampler=name, sample_inference_steps=3)["image"])
             for name in ("auto", "euler", "euler_a")]
    assert (drawn[1] != drawn[2]).any()
    assert (drawn[0] != drawn[2]).any()


@row("sample_weight")
def _(lab: Lab) -> None:
    """The adapter's strength while the preview is drawn: alpha / rank times the weight."""
    for weight in (0.0, 0.5):
        drawn = lab.preview(sample_weight=weight, lora_alpha=8.0, sample_inference_steps=1)
        assert drawn["scales"] == {2 * weight}
