from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from core import optim
from core.config import TrainConfig
from core.course import Course
from core.families.base import Objective, Parts
from core.objective import Diffusion, sample_generator

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000}


def parts(kind: Objective, **more: object) -> Parts:
    return Parts(Path(), SCHEDULE | {"prediction_type": kind} | more, kind, 512, 64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_the_reference(kind: Objective) -> None:
    """diffusers' own scheduler is the reference; fp32 rounding of the schedule's roots."""
    diffusion, reference = Diffusion(parts(kind)), DDPMScheduler.from_config(SCHEDULE)
    latents, noise = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    t = torch.tensor([0, 10, 500, 998, 999])
    noisy, target = diffusion.noisy_and_target(latents, noise, t)
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, t), atol=2e-6, rtol=1e-5)
    expected = noise if kind == "epsilon" else reference.get_velocity(latents, noise, t)
    torch.testing.assert_close(target, expected, atol=2e-6, rtol=1e-5)


def test_min_snr_weights_follow_the_paper() -> None:
    alphas = DDPMScheduler.from_config(SCHEDULE).alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    epsilon = Diffusion(parts("epsilon"), TrainConfig(min_snr_gamma=5)).weights
    torch.testing.assert_close(epsilon, (snr.clamp(max=5) / snr).float())
    velocity = Diffusion(parts("v_prediction"), TrainConfig(min_snr_gamma=5)).weights
    torch.testing.assert_close(velocity, (snr.clamp(max=5) / (snr + 1)).float())
    assert epsilon[999] == 1          # noisy steps count fully, clean ones less
    assert epsilon[0] < 0.01
    ends = Diffusion(parts("v_prediction", rescale_betas_zero_snr=True), TrainConfig(min_snr_gamma=5)).weights
    assert torch.isfinite(ends).all()


def test_zero_terminal_snr_leaves_no_signal() -> None:
    diffusion = Diffusion(parts("v_prediction", rescale_betas_zero_snr=True))
    latents, noise = torch.ones(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    noisy, target = diffusion.noisy_and_target(latents, noise, torch.tensor([999]))
    torch.testing.assert_close(noisy, noise, atol=1e-3, rtol=0)
    torch.testing.assert_close(target, -latents, atol=1e-3, rtol=1e-3)


def test_a_sample_draws_the_same_in_any_batch() -> None:
    diffusion = Diffusion(parts("epsilon"), TrainConfig(noise_offset=0.1))
    together = diffusion.draw(7, [3, 4, 5], (4, 2, 2))
    for i, number in enumerate([3, 4, 5]):
        alone = diffusion.draw(7, [number], (4, 2, 2))
        assert torch.equal(alone.noise[0], together.noise[i])
        assert alone.timesteps[0] == together.timesteps[i]
    other = diffusion.draw(8, [3], (4, 2, 2))
    assert not torch.equal(other.noise[0], together.noise[0])


def test_noise_is_standard_and_timesteps_are_uniform() -> None:
    draw = Diffusion(parts("epsilon")).draw(1, range(4000), (4, 2, 2))
    assert abs(float(draw.noise.mean())) < 0.02
    assert abs(float(draw.noise.std()) - 1) < 0.02
    counts = torch.histc(draw.timesteps.float(), 10, 0, 1000)
    assert float(counts.min()) > 320          # of 400 expected; five standard deviations


def test_noise_offset_shifts_whole_channels() -> None:
    plain = Diffusion(parts("epsilon")).draw(1, range(500), (4, 8, 8)).noise
    offset = Diffusion(parts("epsilon"), TrainConfig(noise_offset=0.5)).draw(1, range(500), (4, 8, 8)).noise
    assert float(plain.mean((2, 3)).std()) == pytest.approx(1 / 8, rel=0.1)
    expected = (1 / 64 + 0.25) ** 0.5
    assert float(offset.mean((2, 3)).std()) == pytest.approx(expected, rel=0.1)


@given(st.integers(0, 2**62), st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_neighbouring_samples_are_unrelated(seed: int, number: int) -> None:
    a, b, c = (torch.randn(64, generator=sample_generator(s, n))
               for s, n in ((seed, number), (seed, number + 1), (seed + 1, number)))
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


def test_schedules() -> None:
    def course(**changes: object) -> list[float]:
        config = TrainConfig.model_validate({"learning_rate": 1.0, **changes})
        return [optim.rate(config, n, 10) for n in range(10)]
    assert course() == [1.0] * 10
    assert course(lr_scheduler="linear") == pytest.approx([1 - n / 10 for n in range(10)])
    cosine = course(lr_scheduler="cosine")
    assert cosine[0] == 1
    assert cosine[5] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    warm = course(lr_warmup_steps=4)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.sampled_from([(64, 64), (64, 96), (96, 64)]), min_size=1, max_size=12),
       repeats=st.integers(1, 3), batch=st.integers(1, 5), accumulation=st.integers(1, 4),
       seed=st.integers(0, 1000))
def test_a_course_shows_every_picture_once_per_repeat(
        sizes: list[tuple[int, int]], repeats: int, batch: int, accumulation: int,
        seed: int) -> None:
    indices = [10 + i for i in range(len(sizes))]
    course = Course(indices, sizes, [repeats] * len(sizes), batch, accumulation, seed)
    for epoch in range(2):
        updates = [course.update(epoch * course.updates_per_epoch + n)
                   for n in range(course.updates_per_epoch)]
        batches = [b for update in updates for b in update]
        assert sorted(i for b in batches for i in b.indices) == sorted(indices * repeats)
        numbers = [n for b in batches for n in b.numbers]
        start = epoch * len(indices) * repeats
        assert numbers == list(range(start, start + len(indices) * repeats))
        assert all(len({sizes[i - 10] for i in b.indices}) == 1 for b in batches)
        assert all(1 <= len(u) <= accumulation for u in updates)
