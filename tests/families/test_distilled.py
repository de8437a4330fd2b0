"""Distilled bases are told by what their makers leave, and drawn with as they want it; whatever
the user says goes before that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from core import families, i18n
from core.config import GenerateConfig, TrainConfig, parse_train_config
from core.config.draw import DrawConfig
from core.families import detection, distilled, schedulers
from core.families.distilled import Distilled, drawing
from core.families.spec import Found
from core.inference import generate
from core.inference.draw import draw
from core.jobs.control import Control
from core.jobs.events import Event, Note, Sample
from core.memory import plan
from core.training import preflight
from core.training.memory_guard import MemoryGuard
from core.training.run import train
from core.weights.precision import choose
from tests import tiny
from tests.tiny import families as tiny_families

FP32 = choose("fp32", "cpu")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DARKROOM_LANG", "en")
    monkeypatch.setattr(MemoryGuard, "announce", lambda self: None)


@pytest.mark.parametrize(("name", "family", "steps"), [
    ("z_image_turbo_bf16", "zimage", 8), ("z_image_bf16", "zimage", 0),
    ("Z-Image-De-Turbo", "zimage", 0), ("krea2_turbo_fp8", "krea2", 8), ("krea2_raw", "krea2", 0),
    ("sdxl_lightning_4step", "sdxl", 4), ("Hyper-SDXL-8steps", "sdxl", 8),
    ("dreamshaperXL_turboDPMSDE", "sdxl", 8), ("sd_xl_turbo_1.0_fp16", "sdxl", 8),
    ("sdxlturbo", "sdxl", 8), ("juggernautXL_v9Lightning", "sdxl", 8),
    ("realcartoonXL_dmd2", "sdxl", 8), ("sd_xl_base_1.0", "sdxl", 0),
    ("hyperRealism_v3", "sdxl", 0), ("hyper_realistic_xl", "sdxl", 0),
    ("turbochargedXL", "sdxl", 0),
    ("lcmixer", "sd15", 0), ("LCM_Dreamshaper_v7", "sd15", 8), ("nightlightningbolt", "sd15", 0),
    ("myblend4b", "sdxl", 0), ("ink_400steps", "sdxl", 0), ("sd3.5_large_turbo", "sd3", 4),
    ("flux-2-klein-4b-fp8", "flux2", 4), ("FLUX.2-klein-9B", "flux2", 4),
    ("flux-2-klein-base-4b", "flux2", 0), ("flux-2-klein-4b-base", "flux2", 0),
    ("my-klein-mix", "flux2", 0), ("Chroma1-HD-Flash", "chroma", 8), ("flash_xl", "sdxl", 0),
    ("qwen_image_distill_full_bf16", "qwen", 8), ("flux-dev-de-distill", "flux", 0)])
def test_names_tell(name: str, family: str, steps: int) -> None:
    """By whole words; the steps that a name says are taken."""
    found = distilled.of(Path("models") / name, found=Found(family, family))
    assert (found.steps if found else 0) == steps
    assert found is None or found.sign == name


def test_a_name_in_a_hubs_cache_and_a_title_tell(tmp_path: Path) -> None:
    cached = tmp_path / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / "0a1b2c"
    cached.mkdir(parents=True)
    assert distilled.of(cached, found=Found("zimage", "zimage")) is not None
    for title, steps in (("SDXL Lightning 4step", 4), ("SDXL", 0)):
        save_file({"a": torch.ones(1)}, path := tmp_path / "x.safetensors",
                  {"modelspec.title": title})
        found = distilled.of(path, found=Found("sdxl", "sdxl"))
        assert (found.steps if found else 0) == steps


def test_schnell_and_dev(tmp_path: Path) -> None:
    """Schnell by its shapes, unless somebody undid it; dev's own guidance is no CFG and stays."""
    assert distilled.of(Path("x"), found=Found("flux_schnell", "flux")) == Distilled(
        "Flux.1 schnell", 4)
    assert distilled.of(Path("OpenFlux1"), found=Found("flux_schnell", "flux")) is None
    assert distilled.of(Path("flux1-dev"), found=Found("flux_dev", "flux")) is None
    dev = distilled.of(Path("flux1-dev-hyper-8step"), found=Found("flux_dev", "flux"))
    assert dev == Distilled("flux1-dev-hyper-8step", 8, guided=True)
    assert drawing(None, None, 3.5, 25, dev) == (3.5, 8)


@pytest.mark.parametrize(("cfg", "steps", "few", "expected"), [
    (None, None, None, (7.0, 25)), (None, None, Distilled("turbo", 8), (1.0, 8)),
    (4.0, None, Distilled("turbo", 8), (4.0, 8)), (None, 20, Distilled("turbo", 8), (1.0, 20)),
    (0.0, 1, Distilled("turbo", 8), (0.0, 1)), (2.0, 3, None, (2.0, 3))])
def test_what_the_user_says_goes_first(cfg: float | None, steps: int | None,
                                       few: Distilled | None, expected: tuple[float, int]) -> None:
    assert drawing(cfg, steps, 7.0, 25, few) == expected


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_folders_tell(tmp_path: Path) -> None:
    """Z-Image's by the scheduler, klein's and Krea 2's by the index; the config overrules."""
    image = tiny_families.base("zimage", tmp_path / "image")
    assert distilled.of(image) is None
    changed(image, "scheduler/scheduler_config.json", shift=3.0)
    assert distilled.of(image) == Distilled("scheduler_config.json, shift 3", 8)
    for file in (image / "transformer").glob("*.safetensors"):
        file.unlink()
    assert distilled.of(image) is None      # configs alone, from which the app plans
    klein = tiny_families.base("flux2", tmp_path / "klein")
    assert distilled.of(klein) is None
    assert distilled.of(klein, "true") == Distilled("distilled: true", 4)
    changed(klein, "model_index.json", is_distilled=True)
    assert distilled.of(klein) == Distilled("model_index.json, is_distilled", 4)
    assert distilled.of(klein, "false") is None
    loaded = families.get("flux2").load(klein, FP32, frozenset())
    assert loaded.distilled == distilled.of(klein)


@pytest.mark.parametrize("value", ["true", "false", "auto"])
def test_yaml_says_it_plainly(value: str) -> None:
    assert parse_train_config(f"distilled: {value}", "x").distilled == value


def test_a_guidance_of_the_users_reaches_a_distilled_klein(tmp_path: Path) -> None:
    """Its own pipeline would leave it out."""
    klein, family = tiny_families.base("flux2", tmp_path / "klein"), families.get("flux2")
    changed(klein, "model_index.json", is_distilled=True)
    parts = family.load(klein, FP32)
    arguments = generate.read_prompt(family, parts, FP32, "red disc")
    drawn = [np.asarray(generate.draw(
        family.pipeline(parts), parts, generate.SampleRequest("", "", 1, 2, cfg, (32, 32)),
        dict(arguments), FP32)) for cfg in (1.0, 4.0)]
    assert not np.array_equal(*drawn)


def test_few_steps_begin_at_noise_alone(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "tiny")
    shutil.copytree(base, turbo := tmp_path / "tiny-turbo")
    family = families.get("sd15")
    first = []
    for source in (base, turbo):
        scheduler = schedulers.create("euler", family.load(source, FP32, frozenset()))
        scheduler.set_timesteps(4)
        first.append(float(scheduler.timesteps[0]))
    assert first[0] < first[1] == 999


def parameters(events: list[Event]) -> list[str]:
    return [Image.open(e.path).info["parameters"] for e in events if isinstance(e, Sample)]


def test_previews_and_notes_of_a_run(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "ink_lightning_4step")
    common = {"base_model": str(base), "output_dir": str(tmp_path / "out"), "lora_rank": 1,
              "train_data_dir": str(tiny.pictures(tmp_path / "pictures", 2)), "device": "cpu",
              "max_train_steps": 1, "sample_prompts": ["red disc"], "sample_every": 5}
    for changes, drawn, note in (
            ({}, "Steps: 4, CFG scale: 1,", "distilled.trained"),
            ({"sample_cfg": 3.0, "sample_inference_steps": 2}, "Steps: 2, CFG scale: 3,",
             "distilled.trained"),
            ({"distilled": "false", "sample_inference_steps": 2}, "Steps: 2, CFG scale: 7,", ""),
            ({"base_loras": [str(tiny.tiny_lora(tmp_path / "a.safetensors"))]},
             "Steps: 4, CFG scale: 1,", "distilled.with_base_loras")):
        events: list[Event] = []
        train(TrainConfig.model_validate(common | changes), events.append, Control())
        assert drawn in parameters(events)[0]
        notes = [e for e in events if isinstance(e, Note) and e.key.startswith("distilled.")]
        assert [one.key for one in notes] == ([note] if note else [])
        assert all("ink_lightning_4step" in i18n.tr(one.key, one.params) for one in notes)


def test_pictures_drawn_on_demand(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "ink-turbo")
    for changes, drawn, notes in (
            ({}, "Steps: 8, Sampler: DDIM, CFG scale: 1,", ["distilled.drawn"]),
            ({"steps": 2}, "Steps: 2, Sampler: DDIM, CFG scale: 1,", ["distilled.drawn"]),
            ({"distilled": "false", "steps": 2}, "Steps: 2, Sampler: DDIM, CFG scale: 7,", []),
            ({"steps": 2, "cfg": 5.0}, "Steps: 2, Sampler: DDIM, CFG scale: 5,", [])):
        events: list[Event] = []
        draw(DrawConfig(base=str(base), prompt="red disc", out=str(tmp_path / "out"),
                        device="cpu", **changes), events.append, Control())
        assert drawn in parameters(events)[0]
        assert [e.key for e in events if isinstance(e, Note)] == notes


def test_plans_count_pictures_without_guidance(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "tiny")
    shutil.copytree(base, turbo := tmp_path / "tiny-turbo")
    card = plan.Machine("cuda", "a card", 8192, 8000, (8, 6), ram_mb=16000, disk_mb=1e5)
    plain, few, guided = (
        plan.plan_run(TrainConfig(sample_prompts=["x"], **changes), detection.Base.of(source), card
                      ).phase("preview").mb
        for source, changes in ((base, {}), (turbo, {}), (turbo, {"sample_cfg": 4.0})))
    assert few < plain == guided


@pytest.mark.parametrize(("name", "shift"), [("z_image_turbo_bf16", 3.0), ("z_image_bf16", 6.0)])
def test_a_turbo_file_draws_with_turbos_shift(tmp_path: Path, name: str, shift: float) -> None:
    """As its makers' folder does; both learn alike."""
    folder = tiny_families.base("zimage", tmp_path / "folder")
    weights = next((folder / "transformer").glob("*.safetensors"))
    shutil.copyfile(weights, file := tmp_path / f"{name}.safetensors")
    parts = families.get("zimage").load(file, FP32, frozenset())
    assert schedulers.create("auto", parts).config.shift == shift
    assert (parts.distilled is not None) == (shift == 3.0)
    wanted = "false" if shift == 3.0 else "true"            # the key settles what a name can't
    preflight.tell_distilled(TrainConfig(distilled=wanted), parts, lambda event: None)
    assert schedulers.create("auto", parts).config.shift == 9.0 - shift
    studio = generate.PipelineSession(file, GenerateConfig(base=str(file), distilled=wanted),
                                      lambda event: None)
    studio.parts = studio.family.load(file, FP32, frozenset())
    studio.take_distilled()
    assert studio.parts.scheduler["shift"] == 9.0 - shift
    assert parts.flow == families.get("zimage").load(folder, FP32, frozenset()).flow
