"""`base_loras`: part of the base while a run learns; gone from what it saves, draws and proves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core import families, i18n, importers
from core.adapters import base_loras, from_file, lora
from core.config import TrainConfig, parse_train_config
from core.errors import UserError
from core.families import detection
from core.families.base import CropInfo, Family, Parts
from core.families.registry import SPECS
from core.inference import generate
from core.jobs.control import Control
from core.jobs.events import Event, Note, Sample
from core.lora_files import files as lora_file
from core.lora_files import formats
from core.lora_files.library import parse_lora
from core.lora_files.metadata import BASE_LORAS_KEY
from core.memory import plan
from core.training.memory_guard import MemoryGuard
from core.training.run import train
from core.weights.offload import offload_
from core.weights.precision import choose
from core.weights.quantization import quantize_
from tests import tiny
from tests.tiny import families as tiny_families

FP32, BF16 = choose("fp32", "cpu"), choose("bf16", "cpu")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DARKROOM_LANG", "en")
    monkeypatch.setattr(MemoryGuard, "announce", lambda self: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_base(tmp_path_factory.mktemp("base") / "tiny")


# --- names and weights ---

@pytest.mark.parametrize(("text", "name", "weight"), [
    ("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.8", "a.safetensors", 0.8),
    (r"C:\loras\x.safetensors:0.8", r"C:\loras\x.safetensors", 0.8),
    (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
    ("/a b/x:y.safetensors:-1", "/a b/x:y.safetensors", -1.0), ("x:1e-1", "x", 0.1)])
def test_weights_stand_behind_the_last_colon(text: str, name: str, weight: float) -> None:
    assert parse_lora(text, base_loras.WEIGHT) == (name, weight)
    config = parse_train_config(json.dumps({"base_loras": text}), "x")
    assert config.base_loras == [text]


@given(st.text("abc:\\/ .", min_size=1, max_size=12), st.floats(-9, 9))
@settings(max_examples=100, deadline=None)
def test_any_name_keeps_its_weight(name: str, weight: float) -> None:
    assert parse_lora(f"{name}:{weight!r}", 1.0) == (name, weight)


@pytest.mark.parametrize("text", ["", " ", ":", "x:nan", "x:-inf", "x: Infinity"])
def test_no_file_and_no_number_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="file:weight"):
        TrainConfig(base_loras=[text])


# --- what the network computes ---

def made(name: str, family: Family, denoiser: Any, path: Path, format_: str,
         **more: Any) -> Path:
    """A LoRA file that changes much, of random numbers, trained on nothing."""
    config = TrainConfig(lora_rank=3, lora_alpha=2.0, target_modules="all-linear", **more)
    lora.attach(denoiser, config, family.spec)
    torch.manual_seed(4)
    for parameter in lora.trainable(denoiser):
        parameter.data = torch.randn(parameter.shape) * 0.3
    naming = SPECS[name].naming
    found = formats.from_tensors(from_file.tensors(
        denoiser, lora.state(denoiser), torch.float32, naming[0].name), name)
    found.metadata = {"modelspec.architecture": family.spec.architecture}
    if format_ in formats.SINGLE:
        save_file({key: value.contiguous().clone() for key, value
                   in formats.spell(found, format_).items()}, path, found.metadata)
    else:
        formats.save(found, format_, path)
    return path


def predicted(family: Family, parts: Parts) -> torch.Tensor:
    cond = family.encode_text(parts, ["red disc"])
    cond |= family.size_conditioning(CropInfo((32, 32), (0, 0), (32, 32)))
    latents = family.encode_image(parts, torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
    with torch.no_grad():
        return family.predict(parts.denoiser, latents, torch.tensor([400.0]) if parts.flow
                              else torch.tensor([400]), cond)


@pytest.mark.parametrize(("name", "format_", "kept"), [
    ("sdxl", "kohya", "same"), ("sdxl", "kohya", "nf4"), ("flux", "kohya", "same"),
    ("flux", "comfyui", "int8"), ("flux", "kohya", "offload"), ("zimage", "diffusers", "same"),
    ("zimage", "diffusers", "nf4"), ("qwen", "peft", "int8"), ("lumina2", "kohya", "same"),
    ("sana", "diffusers", "offload")])
def test_the_network_computes_what_it_does_with_the_lora_loaded(
        name: str, format_: str, kept: Any, tmp_path: Path) -> None:
    """diffusers' own reader is the reference; then without, to the bit."""
    source, family = tiny_families.base(name, tmp_path / "base"), families.get(name)
    file = made(name, family, family.load(source, FP32).denoiser,
                tmp_path / ("a" if format_ == "peft" else "a.safetensors"), format_)
    found = []
    for _ in range(2):
        parts = family.load(source, FP32)
        if kept == "offload":
            assert offload_(parts.denoiser, 0.6, CPU).blocks
        else:
            quantize_(parts.denoiser, kept)
        found.append(parts)
    plain = predicted(family, found[0])
    generate.load_adapter(family.pipeline(found[0]), file, "a", name)
    lora.use([found[0].denoiser], {"a": 0.7})
    config = TrainConfig(base_loras=[f"{file}:0.7"])
    attached = base_loras.attach(found[1].denoiser, config, name, FP32)
    with_it = predicted(family, found[0])
    assert float((with_it - plain).abs().max()) > 1e-2
    torch.testing.assert_close(predicted(family, found[1]), with_it, rtol=1e-4, atol=2e-5)
    with attached.switched(False):
        assert torch.equal(predicted(family, found[1]), plain)
    assert attached.labels[0].startswith(f"{file.stem}:0.7:")


def test_convolutions_and_several_files_add_up(base: Path, tmp_path: Path) -> None:
    family = families.get("sd15")
    files = [made("sd15", family, family.load(base, FP32).denoiser, tmp_path / f"{n}.safetensors",
                  "kohya", conv_rank=2) for n in "ab"]
    parts, other = family.load(base, FP32), family.load(base, FP32)
    pipeline = family.pipeline(parts)
    for file in files:
        generate.load_adapter(pipeline, file, file.stem, "sd15")
    lora.use([parts.denoiser], {"a": 0.5, "b": -0.25})
    base_loras.attach(other.denoiser, TrainConfig(
        base_loras=[f"{files[0]}:0.5", f"{files[1]}:-0.25"]), "sd15", FP32)
    torch.testing.assert_close(predicted(family, other), predicted(family, parts),
                               rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa", "loha", "lokr", "oft"])
def test_every_adapter_starts_from_the_base_with_them(adapter: Any, base: Path, tmp_path: Path
                                                      ) -> None:
    family = families.get("sd15")
    file = made("sd15", family, family.load(base, FP32).denoiser, tmp_path / "a.safetensors",
                "kohya")
    config = TrainConfig(base_loras=[str(file)], adapter=adapter, lora_rank=2)
    bare, full = family.load(base, FP32), family.load(base, FP32)
    for parts in (bare, full):
        base_loras.attach(parts.denoiser, config, "sd15", FP32)
    lora.attach(full.denoiser, config, family.spec)
    torch.testing.assert_close(predicted(family, full), predicted(family, bare),
                               rtol=1e-3, atol=1e-4)


# --- whole runs ---

def run(base: Path, folder: Path, events: list[Event] | None = None, **changes: Any
        ) -> dict[str, Any]:
    config = TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(tiny.pictures(folder / "pictures", 4)),
        "output_dir": str(folder / "out"), "output_name": "ink", "lora_rank": 2, "batch_size": 2,
        "max_train_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "save_precision": "fp32",
        "device": "cpu", **changes})
    return train(config, (events if events is not None else []).append, Control())


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = families.get("sd15")
    return made("sd15", family, family.load(base, FP32).denoiser,
                tmp_path_factory.mktemp("adapter") / "adapter.safetensors", "kohya")


def picture(events: list[Event], step: int) -> np.ndarray:
    found = next(e for e in events if isinstance(e, Sample) and e.step == step)
    return np.asarray(Image.open(found.path), dtype=float)


def test_a_run_learns_upon_them_and_saves_draws_and_proves_without(
        base: Path, adapter: Path, tmp_path: Path) -> None:
    drawn = {"sample_prompts": ["red disc"], "sample_every": 4, "sample_inference_steps": 2,
             "sample_weight": 1.0}
    events: dict[str, list[Event]] = {"plain": [], "with": [], "shown": []}
    plain = run(base, tmp_path / "plain", events["plain"], **drawn)
    named = {"base_loras": [f"{adapter}:0.9"], **drawn}
    found = run(base, tmp_path / "with", events["with"], **named)
    run(base, tmp_path / "shown", events["shown"], base_loras_in_previews=True, **named)
    assert found["proof"]["ok"], found["proof"]
    here, there = (load_file(one["lora"]) for one in (found, plain))
    assert {k: v.shape for k, v in here.items()} == {k: v.shape for k, v in there.items()}
    assert any(not torch.equal(here[key], there[key]) for key in here)     # another base's gradient
    with safe_open(found["lora"], "pt") as file:
        told = json.loads(file.metadata()[BASE_LORAS_KEY])
    assert told == found["base_loras"]
    assert told[0].startswith("adapter:0.9:")
    assert plain["base_loras"] is None
    assert lora_file.describe(Path(found["lora"])).facts.base_loras == tuple(told)
    assert np.array_equal(picture(events["with"], 0), picture(events["plain"], 0))
    assert not np.array_equal(picture(events["shown"], 0), picture(events["plain"], 0))
    for kind, named_so in (("shown", True), ("with", False)):      # in the picture's own text
        file = next(e for e in events[kind] if isinstance(e, Sample)).path
        assert ("<lora:adapter:0.9>" in Image.open(file).text["parameters"]) == named_so
    notes = [e for e in events["with"] if isinstance(e, Note) and e.key == "base_loras.used"]
    assert "0.9" in i18n.tr(notes[0].key, notes[0].params)


def test_a_resumed_run_equals_an_unbroken_one_and_goes_on_with_the_same(
        base: Path, adapter: Path, tmp_path: Path) -> None:
    named = {"base_loras": [str(adapter)], "precision": "bf16", "base_precision": "int8"}
    whole = load_file(run(base, tmp_path / "whole", **named)["lora"])
    run(base, tmp_path / "half", max_train_steps=2, **named)
    again = run(base, tmp_path / "half", resume=True, **named)
    assert all(torch.equal(value, whole[key]) for key, value in load_file(again["lora"]).items())
    moved = tmp_path / "moved" / adapter.name              # the same file elsewhere is the same
    moved.parent.mkdir()
    moved.write_bytes(adapter.read_bytes())
    run(base, tmp_path / "half", resume=True, max_train_steps=5,
        **{**named, "base_loras": [str(moved)]})
    for other in ([], [f"{adapter}:0.5"], [str(adapter), str(adapter)]):
        with pytest.raises(UserError) as caught:
            run(base, tmp_path / "half", resume=True, max_train_steps=6,
                **{**named, "base_loras": other})
        assert caught.value.code == "base_loras.other_on_resume"
        assert caught.value.fixes[0].changes == {"base_loras": [str(moved)]}


def test_what_does_not_fit_is_refused_and_what_is_left_out_is_told(
        base: Path, adapter: Path, tmp_path: Path) -> None:
    def refused(file: Path, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            run(base, tmp_path / "run", base_loras=[str(file)], **changes)
        assert str(caught.value)
        return caught.value.code
    assert refused(tmp_path / "nowhere.safetensors") == "generate.unknown_lora"
    flux = tmp_path / "flux.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(1, 8),
               "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(24, 1)}, flux)
    assert refused(flux) == "generate.other_family"
    family = families.get("sd15")
    assert refused(made("sd15", family, family.load(base, FP32).denoiser,
                        tmp_path / "loha.safetensors", "kohya", adapter="loha")
                   ) == "base_loras.other_kind"
    assert refused(tiny.tiny_lora(tmp_path / "wide.safetensors", width=96)
                   ) == "base_loras.other_base"
    assert refused(tiny.tiny_lora(tmp_path / "none.safetensors", (
        "down_blocks_7_attentions_0_proj_in",))) == "base_loras.none_fit"
    texts = load_file(adapter) | {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(1, 32),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(32, 1)}
    save_file(texts, both := tmp_path / "both.safetensors",
              {"ss_base_model_version": "sd_v1"})
    events: list[Event] = []
    base_loras.attach(family.load(base, FP32, frozenset({"denoiser"})).denoiser,
                      TrainConfig(base_loras=[str(both)]), "sd15", FP32, events.append)
    assert [(e.key, e.params.get("count")) for e in events if isinstance(e, Note)] == [
        ("base_loras.used", None), ("base_loras.left_out", 1)]


def test_plans_count_them(base: Path, adapter: Path) -> None:
    card = plan.Machine("cuda", "a card", 8192, 8000, (8, 6), ram_mb=16000, disk_mb=1e5)
    plain, more = (plan.plan_run(TrainConfig(base_loras=files), detection.Base.of(base), card)
                   for files in ([], [str(adapter)]))
    weights = sum(t.numel() for t in load_file(adapter).values() if t.ndim > 1)
    for name in ("train", "verify"):
        assert more.phase(name).mb - plain.phase(name).mb == pytest.approx(weights * 2 / 2**20)


@pytest.mark.parametrize(("text", "loras"), [
    ('base_weights = "a.safetensors"\n', ["a.safetensors:1"]),
    ('base_weights = ["a.safetensors", "b"]\nbase_weights_multiplier = [0.5]\n',
     ["a.safetensors:0.5", "b:1"])])
def test_kohyas_base_weights_are_read(tmp_path: Path, text: str, loras: list[str]) -> None:
    (tmp_path / "a.toml").write_text("network_dim = 4\n" + text, "utf-8")
    found = importers.read(tmp_path / "a.toml")
    assert found.values["base_loras"] == loras
    assert not found.left
