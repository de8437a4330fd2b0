"""Every family on a tiny base of its real classes: trains, resumes, saves, reloads, draws; and
what it learns is what its own pipeline and scheduler undo."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from core import families
from core.adapters import lora
from core.config import GenerateConfig, TrainConfig
from core.families import detection, schedulers
from core.families.base import CropInfo, Family, Parts
from core.families.registry import SPECS
from core.inference import generate
from core.jobs.control import Control
from core.lora_files import formats
from core.memory import plan
from core.objectives import diffusion
from core.training import memory_guard, verify
from core.training.run import train
from core.weights import quantization
from core.weights.precision import choose, quantize_and_offload_
from tests import tiny
from tests.tiny import families as tiny_families

FP32 = choose("fp32", "cpu")
SIZE = (32, 32)


@pytest.fixture(scope="module", params=tiny_families.MADE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.base(name, tmp_path_factory.mktemp(name) / "base")


@pytest.fixture(scope="module")
def loaded(name: str, base: Path) -> tuple[Family, Parts]:
    family = families.get(name)
    return family, family.load(base, FP32)


def config(base: Path, folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(tiny.pictures(folder / "pictures", 4)),
        "output_dir": str(folder / "out"), "output_name": "ink", "lora_rank": 2, "lora_alpha": 1,
        "batch_size": 2, "max_train_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
        "save_precision": "fp32", "flip": True, **changes})


def test_trains_resumes_saves_and_draws(name: str, base: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(memory_guard.MemoryGuard, "announce",
                        lambda self: None)     # planned further below
    monkeypatch.setattr(verify, "_STEPS", 2)
    assert families.detect(base) == name
    run = config(base, tmp_path)
    whole = train(run, lambda event: None, Control())
    assert whole["proof"]["ok"], whole["proof"]
    first = load_file(whole["lora"])
    out = tmp_path / "out"
    kept = tmp_path / "whole.safetensors"
    shutil.move(whole["lora"], kept)
    shutil.rmtree(out / "checkpoints" / "ink-000004")
    again = train(run.with_changes(resume=True), lambda event: None, Control())
    second = load_file(again["lora"])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    _diffusers_takes_every_key(name, base, kept, tmp_path)
    _weights_differ(base, kept, tmp_path)


def _diffusers_takes_every_key(name: str, base: Path, path: Path, folder: Path) -> None:
    found = formats.read(path, name)
    assert not found.unknown
    spelled = formats.spell(found, "diffusers")
    save_file({key: value.clone() for key, value in spelled.items()},
              folder / "diffusers.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder, weight_name="diffusers.safetensors", adapter_name="a")
    assert lora.count(pipeline.components.values(), "a") == len(found.layers) > 0
    for format_ in ("kohya", "comfyui"):            # and back, to the bit
        there = formats.from_tensors(formats.spell(found, format_), name)
        assert there.layers.keys() >= found.layers.keys()
        back = formats.spell(there, format_)
        assert all(torch.equal(value, back[key])
                   for key, value in formats.spell(found, format_).items())


def _weights_differ(base: Path, path: Path, folder: Path) -> None:
    studio = generate.PipelineSession(base,
                                      GenerateConfig(base=str(base), precision="fp32",
                                                     device="cpu"),
                                      lambda event: None)
    studio.load()
    shot = generate.SampleRequest("red disc", "blue", 1, 2, 2.0, SIZE)
    pictures = []
    plain = np.asarray(studio.draw(shot), dtype=float)
    for weight in (0.0, 0.8, 1.0):
        studio.use([generate.Lora(path, weight)])
        pictures.append(np.asarray(studio.draw(shot), dtype=float))
    assert np.array_equal(pictures[0], plain)
    assert not np.array_equal(pictures[1], plain)
    assert not np.array_equal(pictures[1], pictures[2])


def test_the_step_computes_what_the_pipeline_does(loaded: tuple[Family, Parts]) -> None:
    """Same embeddings, positions, time and sign: the first step of a picture without guidance."""
    family, parts = loaded
    pipeline = family.pipeline(parts)
    pipeline.scheduler = schedulers.create("auto" if parts.flow else "ddim", parts)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    step = pipeline.scheduler.step

    def watch(output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, *more: Any,
              **options: Any) -> Any:
        seen.append((output, t, sample))
        return step(output, t, sample, *more, **options)
    pipeline.scheduler.step = watch
    with torch.no_grad():
        pipeline(prompt="red disc, flat", width=32, height=64, num_inference_steps=2,
                 generator=torch.Generator().manual_seed(3), output_type="latent",
                 **{parts.guidance: parts.no_guidance_value})
        cond = family.encode_text(parts, ["red disc, flat"])
        cond |= family.size_conditioning(CropInfo((32, 64), (0, 0), (32, 64)))
        for output, t, sample in seen:
            grid = _grid(family, parts, sample, 16, 8)
            found = family.predict(parts.denoiser, grid, t.reshape(1), cond)
            torch.testing.assert_close(found, _grid(family, parts, output, 16, 8),
                                       rtol=1e-3, atol=1e-4)


def _grid(family: Family, parts: Parts, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Latents as the engine has them."""
    from core.families.flux.packed import unpack
    if x.ndim == 3:
        return unpack(x, height // 2, width // 2)
    return x if x.ndim == 4 else x[:, :, 0]


def test_embeddings_given_equal_a_prompt(loaded: tuple[Family, Parts]) -> None:
    """Previews draw from cached embeddings what a prompt draws."""
    family, parts = loaded
    shot = generate.SampleRequest("red disc", "", 5, 2, 3.0, SIZE)
    drawn = [np.asarray(generate.draw(family.pipeline(parts), parts, shot, arguments, FP32))
             for arguments in (
                 {"prompt": "red disc", "negative_prompt": ""},
                 family.prompt_arguments(family.encode_text(parts, ["red disc"]),
                                         family.encode_text(parts, [""])))]
    assert np.abs(drawn[0].astype(float) - drawn[1]).mean() < 0.05


def test_activation_checkpointing_changes_nothing(loaded: tuple[Family, Parts]) -> None:
    """Texts of different lengths in one batch; what is beyond their ends is hidden both times."""
    family, parts = loaded
    cond = family.encode_text(parts, ["red disc, flat", "red"])
    cond |= {k: v.repeat(2, 1) for k,
             v in family.size_conditioning(CropInfo(SIZE, (0, 0), SIZE)).items()}
    size = family.encode_image(parts, torch.zeros(1, 3, 32, 32)).shape[1:]
    found = []
    try:
        for checkpointing in (False, True):
            if checkpointing:
                parts.denoiser.enable_gradient_checkpointing()
            noisy = torch.linspace(-1, 1, 2 * size.numel()).view(2, *size).requires_grad_()
            predicted = family.predict(parts.denoiser, noisy, torch.tensor([100.0, 700.0]), cond)
            predicted.square().sum().backward()
            found.append((predicted, noisy.grad))
    finally:
        parts.denoiser.disable_gradient_checkpointing()
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


class Toy(torch.nn.Module):
    """A denoiser of latents (B, 1, 4, 4) that knows the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16 + 16, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128),
            torch.nn.SiLU(), torch.nn.Linear(128, 16))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = (t.float() / 1000).view(-1, 1) * torch.arange(1, 9) * np.pi / 2
        features = torch.cat([x.flatten(1), angles.sin(), angles.cos()], 1)
        return self.layers(features).view(x.shape)

    def predict(self, denoiser: Any, noisy: torch.Tensor, t: torch.Tensor, cond: Any
                ) -> torch.Tensor:
        return self(noisy, t)


def test_what_is_learned_leads_to_the_data(loaded: tuple[Family, Parts]) -> None:
    """Two latents are learned by the family's objective; pictures that its own scheduler draws
    with what was learned are one or the other."""
    torch.manual_seed(0)
    _, parts = loaded
    toy: Any = Toy()
    learned = diffusion.create(parts, TrainConfig())
    one = torch.linspace(-1.5, 1.5, 16).view(1, 1, 4, 4)
    data = torch.cat([one, one.transpose(2, 3)]).repeat(16, 1, 1, 1)
    optimizer, losses = torch.optim.AdamW(toy.parameters(), lr=3e-3), []
    for n in range(350):
        draw = learned.draw(1, range(32 * n, 32 * n + 32), (1, 4, 4))
        loss = learned.losses(toy, None, data, draw, {}, contextlib.nullcontext).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
    drawn = _drawn(toy, parts)
    nearest = torch.stack([(drawn - x).square().mean((1, 2, 3)) for x in data[:2]]).amin(0)
    assert nearest.median() < 0.15                  # the data's own mean square is 0.85
    assert (drawn - one).square().mean((1, 2, 3)).gt(0.3).any()      # not always the same one
    assert (drawn - one).square().mean((1, 2, 3)).lt(0.3).any()


@torch.no_grad()
def _drawn(toy: Toy, parts: Parts) -> torch.Tensor:
    """16 samples by the family's scheduler, in 25 steps."""
    scheduler = schedulers.create("auto" if parts.flow else "ddim", parts)
    dynamic = scheduler.config.get("use_dynamic_shifting", False)
    scheduler.set_timesteps(25, **({"mu": 0.5} if dynamic else {}))
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(16)), t, x)[0]
    return x


def test_skeletons_have_the_models_shapes(name: str, base: Path, loaded: tuple[Family, Parts]
                                          ) -> None:
    family, parts = loaded
    from core.memory.meta_tensors import META
    made = family.skeleton(base, type(FP32)(META, torch.float32, torch.float32, torch.float32))
    for one, other in ((made.denoiser, parts.denoiser), (made.vae, parts.vae)):
        shapes = {key: value.shape for key, value in one.state_dict().items()}
        assert shapes == {key: value.shape for key, value in other.state_dict().items()}
        assert all(value.is_meta for value in one.parameters())
    assert (made.native_size, made.bucket_step) == (parts.native_size, parts.bucket_step)
    assert made.text.keys() == parts.text.keys()


def test_plans_count_every_phase(name: str, base: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The traces run on the family's own code without weights."""
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    card = plan.Machine("cuda", "a card", 8192, 8000, (8, 6), ram_mb=16000, disk_mb=1e5)
    made = plan.plan_run(TrainConfig(gradient_checkpointing=True, max_resolution="64,64"),
                         detection.Base.of(base), card)
    assert {phase.name for phase in made.phases} >= {"texts", "cache", "train", "verify"}
    assert all(phase.mb > 0 for phase in made.phases)
    assert made.phase("train").parts["activations"] > 0
    parts = families.get(name).load(base, FP32, frozenset({"denoiser"}))
    assert made.base_parameters == sum(p.numel() for p in parts.denoiser.parameters())


def test_a_lora_loads_into_a_base_that_is_kept_in_int8(
        name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "SMALLEST", 64)       # some tiny bases have no larger layers
    family = families.get(name)
    parts = family.load(base, FP32)
    quantize_and_offload_(parts.denoiser, FP32.device, "int8")
    targets = lora.resolve_targets("all-linear", family.spec, parts.denoiser)
    weights = {}
    for path, layer in parts.denoiser.named_modules():
        if path.endswith(tuple(targets)) and hasattr(layer, "in_features"):
            weights |= {f"transformer.{path}.lora_A.weight": torch.ones(1, layer.in_features),
                        f"transformer.{path}.lora_B.weight": torch.ones(layer.out_features, 1)}
    part = SPECS[name].naming[0].name
    save_file({key.replace("transformer.", f"{part}.", 1): value
               for key, value in weights.items()}, tmp_path / "a.safetensors")
    generate.load_adapter(family.pipeline(parts), tmp_path / "a.safetensors", "a", name)
    assert 2 * lora.count([parts.denoiser], "a") == len(weights) > 0


def test_presets_of_targets_exist(loaded: tuple[Family, Parts]) -> None:
    family, parts = loaded
    targets = family.spec.kohya_targets
    assert lora.resolve_targets(
        targets if isinstance(targets, str) else list(targets), family.spec, parts.denoiser)
    counts = [len(lora.resolve_targets(preset, family.spec, parts.denoiser))
              for preset in family.spec.lora_presets]
    assert counts == sorted(counts)


def test_frames_follow_flips_and_cuts() -> None:
    from core.dataset.examples import Example
    from core.dataset.image_folder import Picture
    picture = Picture.__new__(Picture)
    object.__setattr__(picture, "size", (100, 50))
    frame = Example(picture, (32, 32), ("",), (0.0, 0.5)).frame
    assert frame() == CropInfo((100, 50), (0, 0), (32, 32))
    assert frame(True) == CropInfo((100, 50), (32, 0), (32, 32))
    ids = families.get("sdxl").size_conditioning(frame(True))["time_ids"]
    assert ids.tolist() == [[50, 100, 0, 32, 32, 32]]
