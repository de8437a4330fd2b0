"""Which noise levels a flow learns, against closed formulas and diffusers' scheduler; that a
network is told the level that its input has; that pictures become latents as pipelines undo it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import Timesteps
from hypothesis import given, settings
from hypothesis import strategies as st

from core import families
from core.config import TrainConfig
from core.families.base import Cond, CropInfo, Family, Parts
from core.families.flux.packed import pack
from core.families.timestep_sampling import (
    FLUX_LINE,
    STEPS,
    Curve,
    by_share,
    by_share_and_step,
    shifted,
)
from core.families.timestep_sampling import TimestepSampling as Sampling
from core.jobs.control import Control
from core.objectives import diffusion
from core.objectives.flow import Flow, sampling_of, without_effect
from core.training.memory_guard import MemoryGuard
from core.training.run import train
from core.weights.precision import autocast, choose
from tests import tiny
from tests.tiny import families as tiny_families

FP32, BF16 = choose("fp32", "cpu"), choose("bf16", "cpu")
FLOWS = tuple(name for name in tiny_families.MADE if name not in ("sd2", "sdxl"))
DRAWS = 4000
# A share of so many draws is within four and a half deviations of what it should be.
OFF = 4.5 * math.sqrt(0.25 / DRAWS)
# What the makers or the trainers take: shift, or mu at the fewest and the most tokens.
LEARNED: dict[str, Any] = {
    "sd3": 3.0, "flux": (256, 0.5, 4096, 1.15), "chroma": 1.0, "zimage": 2.0,
    "qwen": (256, 0.5, 8192, 0.9), "flux2": (256, 0.5, 4096, 1.15),
    "krea2": (256, 0.5, 6400, 1.15), "lumina2": (256, 0.5, 4096, 1.15), "sana": 3.0}


@pytest.fixture(scope="module")
def bases() -> dict[str, Path]:
    """Made once for all tests, when first asked for."""
    return {}


@pytest.fixture(params=tiny_families.MADE)
def any_family(request: pytest.FixtureRequest, bases: dict[str, Path],
               tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return _base(request.param, bases, tmp_path_factory)


@pytest.fixture(params=FLOWS)
def flow_family(request: pytest.FixtureRequest, bases: dict[str, Path],
                tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return _base(request.param, bases, tmp_path_factory)


def _base(name: str, bases: dict[str, Path], folders: pytest.TempPathFactory) -> tuple[str, Path]:
    if name not in bases:
        bases[name] = tiny_families.base(name, folders.mktemp(name) / "base")
    return name, bases[name]


# --- curves ---

def quantile(own: Sampling, q: float) -> float:
    """Of the levels before the shift, by formula."""
    match own.curve:
        case "uniform":
            return q
        case "logit_normal":
            logit = own.logit_mean + own.logit_std * NormalDist().inv_cdf(q)
            return 1 / (1 + math.exp(-logit))
        case "mode":                        # 2403.03206, eq. 20, which falls in u
            u = 1 - q
            return 1 - u - own.mode_scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)
        case "parabola":
            def below(s: float) -> float:
                return 2 * s - own.bend * ((s - 0.5) ** 3 + 0.125) / 3
            low, high = 0.0, 1.0
            for _ in range(50):
                middle = (low + high) / 2
                low, high = ((middle, high) if below(middle) < q * below(1) else (low, middle))
            return low


def levels(own: Sampling, side: int = 8) -> np.ndarray:
    """What a run draws for latents of this side."""
    return Flow(own).draw(3, range(DRAWS), (1, side, side)).timesteps.numpy() / STEPS


def assert_distributed(own: Sampling) -> None:
    drawn, shift = levels(own), own.shift_at(8, 8)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.mean(drawn < shifted(quantile(own, q), shift)) == pytest.approx(q, abs=OFF)


@pytest.mark.parametrize("own", [
    Sampling("uniform"), Sampling("uniform", shift=3.0), Sampling(), Sampling(shift=0.5),
    Sampling(logit_mean=-0.7, logit_std=0.4), Sampling(logit_mean=1.0, logit_std=2.0, shift=2.0),
    Sampling("mode"), Sampling("mode", mode_scale=-1.0), Sampling("mode", mode_scale=1.75),
    Sampling("parabola"), Sampling("parabola", bend=4.0), Sampling(line=FLUX_LINE)])
def test_levels_are_distributed_as_the_curves_formula_says(own: Sampling) -> None:
    assert_distributed(own)


@pytest.mark.parametrize("curve", ["auto", "uniform", "logit_normal", "mode"])
def test_every_family_draws_every_curve_by_that_curves_own_parameters(
        flow_family: tuple[str, Path], curve: Any) -> None:
    """Chroma's parabola once lent its 7.7 to the others: 69 % of the draws lay at the ends."""
    name, base = flow_family
    own = families.get(name).load(base, FP32, frozenset()).flow
    assert own is not None
    learned = sampling_of(own, TrainConfig(timestep_sampling=curve))
    expected: Curve = ("parabola" if name == "chroma" else "logit_normal") if (
        curve == "auto") else curve
    assert learned.curve == expected
    plain = Sampling(expected, line=own.line, shift=own.shift, patch=own.patch,
                     model_times=own.model_times)
    assert learned == plain
    assert_distributed(learned)


def test_mean_and_deviation_of_the_logit_are_the_users() -> None:
    config = TrainConfig(logit_mean=-0.5, logit_std=0.6, flow_shift=2.0)
    assert_distributed(own := sampling_of(Sampling(shift=3.0), config))
    assert (own.logit_mean, own.logit_std, own.shift) == (-0.5, 0.6, 2.0)
    assert sampling_of(Sampling(), TrainConfig(mode_scale=0.3, timestep_sampling="mode")
                       ).mode_scale == 0.3


def test_keys_that_change_nothing_are_named() -> None:
    def unused(own: Sampling | None, **changes: Any) -> list[str]:
        return without_effect(TrainConfig.model_validate(changes), own)
    assert not unused(Sampling(), logit_mean=1.0, flow_shift=2.0)
    assert unused(Sampling("parabola"), logit_mean=1.0) == ["logit_mean"]
    assert unused(Sampling(), timestep_sampling="uniform", logit_std=0.5, mode_scale=1.0) == [
        "logit_std", "mode_scale"]
    assert not unused(Sampling("parabola"), timestep_sampling="mode", mode_scale=1.0)
    assert unused(None, timestep_sampling="uniform", flow_shift=2.0) == [
        "timestep_sampling", "flow_shift"]
    assert not unused(None)


# --- families ---

def test_families_learn_by_their_own_rule_whatever_the_sampler_draws_with(
        flow_family: tuple[str, Path], tmp_path: Path) -> None:
    name, base = flow_family
    own = families.get(name).load(base, FP32, frozenset()).flow
    assert own is not None
    wanted = LEARNED[name]
    for side in (8, 64, 128, 256):          # latent pixels; 512 to 2048 px with an f8 VAE
        shift = wanted
        if isinstance(wanted, tuple):
            few, low, many, high = wanted
            shift = math.exp(low + (high - low) * ((side // 2) ** 2 - few) / (many - few))
        assert own.shift_at(side, side) == pytest.approx(shift)
    if name == "sana":                      # which learns each size as it draws it
        return
    copied = tmp_path / "copy"
    copied.mkdir()
    for part in base.iterdir():
        if part.name != "scheduler":
            shutil.copytree(part, copied / part.name) if part.is_dir() else shutil.copy(
                part, copied)
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    (copied / "scheduler").mkdir()
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        config | {"shift": 9.0, "base_shift": 2.0, "max_shift": 2.5}), "utf-8")
    assert families.get(name).load(copied, FP32, frozenset()).flow == own


@pytest.mark.parametrize(("name", "half", "quarter"), [
    ("flux2", 0.13, 0.01), ("zimage", 0.24, 0.04), ("flux", 0.13, 0.01), ("sd3", 0.14, 0.01),
    ("qwen", 0.24, 0.04), ("krea2", 0.18, 0.02)])
def test_enough_is_learned_at_low_noise(name: str, half: float, quarter: float,
                                        bases: dict[str, Path],
                                        tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shares of the draws below levels 0.5 and 0.25 at 1024 px, beside what trainers draw; once
    2.2 % (klein) and 3.8 % (Z-Image) lay below a half."""
    own = families.get(name).load(_base(name, bases, tmp_path_factory)[1], FP32,
                                  frozenset()).flow
    assert own is not None
    drawn = levels(own, 128)
    assert np.mean(drawn < 0.5) == pytest.approx(half, abs=0.03)
    assert np.mean(drawn < 0.25) == pytest.approx(quarter, abs=0.01)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 160)])
def test_shifts_are_those_of_diffusers_scheduler(flow_family: tuple[str, Path],
                                                 size: tuple[int, int]) -> None:
    """Its sigmas, which it shifts by mu as pipelines reckon it or by a fixed factor, are our
    levels shifted."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    name, base = flow_family
    own = families.get(name).load(base, FP32, frozenset()).flow
    assert own is not None
    plain = np.linspace(1.0, 0.1, 10)
    if own.line is None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=own.shift)
        scheduler.set_timesteps(sigmas=plain)
    else:
        (few, low), (many, high) = own.line
        mu = calculate_shift((size[0] // 2) * (size[1] // 2), few, many, low, high)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=plain, mu=mu)
    ours = [shifted(s, own.shift_at(*size)) for s in plain]
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), ours, rtol=1e-5)


# --- what the network is told ---

class Watched:
    """A family that keeps what its denoiser gets."""

    def __init__(self, family: Family) -> None:
        self.family, self.noisy = family, torch.empty(0)

    def predict(self, denoiser: Any, noisy: torch.Tensor, t: torch.Tensor, cond: Cond
                ) -> torch.Tensor:
        self.noisy = noisy
        return self.family.predict(denoiser, noisy, t, cond)


def read_times(name: str, denoiser: Any) -> list[torch.Tensor]:
    """Filled with the times (0 to 1000) from which the denoiser makes its embedding."""
    seen: list[torch.Tensor] = []
    backwards, thousandths = name in ("zimage", "lumina2"), name in ("lumina2", "krea2")

    def hear(module: Any, inputs: Any, *_: Any) -> None:
        t = inputs[0].double() * getattr(module, "scale", 1) * (1000 if thousandths else 1)
        seen.append(1000 - t if backwards else t)
    found = [m for m in denoiser.modules() if isinstance(m, Timesteps)
             or type(m).__name__ in ("Krea2TimestepEmbedding", "TimestepEmbedder")]
    found[0].register_forward_pre_hook(hear)
    return seen


def latents_and_texts(family: Family, parts: Parts) -> tuple[torch.Tensor, Cond]:
    pictures = torch.zeros(8, 3, 64, 64)
    cond = {key: value.repeat(8, *[1] * (value.ndim - 1)) for key, value in family.encode_text(
        parts, ["red disc"]).items()}
    cond |= {key: value.repeat(8, 1) for key, value in family.size_conditioning(
        CropInfo((64, 64), (0, 0), (64, 64))).items()}
    return torch.zeros_like(family.encode_image(parts, pictures)), cond


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_network_is_told_the_level_that_its_input_has(flow_family: tuple[str, Path],
                                                          precision: Any) -> None:
    """In bf16 some networks round the time; with black latents the input's level is its share of
    the noise. Once told 372 for 371.2 (Flux), 992 for 993.7."""
    name, base = flow_family
    family = families.get(name)
    parts = family.load(base, precision)
    learned = diffusion.create(parts, TrainConfig(), "cpu", precision.compute)
    latents, cond = latents_and_texts(family, family.load(base, FP32))
    cond = {key: value.to(precision.compute) if value.is_floating_point() else value
            for key, value in cond.items()}
    watched: Any = Watched(family)
    seen = read_times(name, parts.denoiser)
    draws = [learned.draw(1, range(8 * n, 8 * n + 8), latents.shape[1:]) for n in range(4)]
    draws += [learned.draw_fixed(2, range(8), latents.shape[1:], share)
              for share in (0.1, 0.3, 0.5, 0.7, 0.9, 0.9937)]
    for draw in draws:
        seen.clear()
        with torch.no_grad():
            learned.losses(watched, parts.denoiser, latents.float(), draw, cond,
                           lambda: autocast(precision))
        level = (watched.noisy.double() / draw.noise.double()).flatten(1).median(1).values
        # fp32 holds a time to 6e-5, a few operations before the embedding
        torch.testing.assert_close(seen[0], 1000 * level, rtol=0, atol=3e-4)


@pytest.mark.parametrize("told", [by_share, by_share_and_step])
@pytest.mark.parametrize("numbers", [torch.bfloat16, torch.float16])
def test_drawn_times_are_told_as_they_are_and_near_what_the_curve_wants(told: Any, numbers: Any
                                                                       ) -> None:
    fine = Flow(Sampling("uniform")).draw(1, range(DRAWS), (1, 2, 2)).timesteps
    held = Flow(Sampling("uniform", model_times=told), numbers=numbers).draw(
        1, range(DRAWS), (1, 2, 2)).timesteps
    assert torch.equal(told(held, numbers), held)
    step = 2 ** -8 if numbers == torch.bfloat16 else 2 ** -11       # half a unit, at the worst
    assert float(((held - fine) / fine).abs().max()) <= 2.1 * step
    assert len(held.unique()) > 300
    exact = Flow(Sampling("uniform", model_times=told)).draw(1, range(DRAWS), (1, 2, 2)).timesteps
    assert torch.equal(exact, fine)         # fp32: as ever


@given(st.floats(0.1, 1000), st.sampled_from([by_share, by_share_and_step]),
       st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=300, deadline=None)
def test_any_time_settles(t: float, told: Any, numbers: Any) -> None:
    held = Flow(Sampling(model_times=told), numbers=numbers).draw_fixed(
        1, [1], (1, 2, 2), t / STEPS).timesteps
    assert torch.equal(told(held, numbers), held)
    assert float(held) == pytest.approx(t, rel=0.01)


# --- latents ---

def test_pictures_become_the_latents_that_the_pipeline_decodes(any_family: tuple[str, Path]
                                                               ) -> None:
    name, base = any_family
    assert_decoded(families.get(name), base)


def test_pictures_become_the_latents_that_the_pipeline_decodes_sd15(tmp_path: Path) -> None:
    assert_decoded(families.get("sd15"), tiny.tiny_base(tmp_path / "base"))


def assert_decoded(family: Family, base: Path) -> None:
    """A sampler that returns our latents: the pipeline draws what the VAE alone makes of the
    picture there and back. With latents a tenth too large it draws something else."""
    parts = family.load(base, FP32)
    torch.manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), (64, 64)) * 2 - 1
    latents = family.encode_image(parts, pixels)
    back = (round_trip(parts.vae, pixels) / 2 + 0.5).clamp(0, 1)
    drawn = [decoded(family, parts, latents * scale) for scale in (1.0, 1.1)]
    assert float((drawn[0] - back).abs().max()) < 1e-4
    assert float((drawn[1] - back).abs().mean()) > 5e-4


@torch.no_grad()
def round_trip(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    is_video_vae = "temperal_downsample" in vae.config
    found = vae.encode(pixels.unsqueeze(2) if is_video_vae else pixels)
    latents = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
    back: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return back[:, :, 0] if is_video_vae else back


@torch.no_grad()
def decoded(family: Family, parts: Parts, latents: torch.Tensor) -> torch.Tensor:
    pipeline = family.pipeline(parts)

    def ours(output: torch.Tensor, t: Any, sample: torch.Tensor, *_: Any, **__: Any) -> Any:
        if sample.ndim == 3:
            return (pack(latents),)
        return (latents.unsqueeze(2) if sample.ndim == 5 else latents,)
    pipeline.scheduler.step = ours
    drawn: torch.Tensor = pipeline(
        prompt="red disc", width=64, height=64, num_inference_steps=1, output_type="pt",
        **{parts.guidance: parts.no_guidance_value}).images
    return drawn


def test_a_run_draws_by_its_config_and_names_what_has_no_effect(
        bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(MemoryGuard, "announce", lambda self: None)
    drawn: list[torch.Tensor] = []
    draw = Flow.draw

    def kept(self: Flow, *args: Any) -> Any:
        drawn.append((found := draw(self, *args)).timesteps)
        return found
    monkeypatch.setattr(Flow, "draw", kept)
    notes: list[Any] = []
    train(TrainConfig(
        base_model=str(_base("qwen", bases, tmp_path_factory)[1]), precision="bf16", device="cpu",
        train_data_dir=str(tiny.pictures(tmp_path / "pictures", 4)), lora_rank=1, batch_size=4,
        output_dir=str(tmp_path / "out"), max_train_steps=4, timestep_sampling="mode",
        flow_shift=30.0, logit_std=0.5), notes.append, Control())
    times = torch.cat(drawn)
    assert torch.equal(by_share(times, torch.bfloat16), times)
    assert float(times.median()) > 930      # of the unshifted ones: 500
    told = next(note for note in notes if getattr(note, "key", "") == "engine.not_for_curve")
    assert told.params == {"keys": "logit_std"}
