from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from core.config import TrainConfig
from core.dataset.sampler import BucketSampler, Regular
from core.errors import UserError
from core.families import schedulers
from core.families.base import Objective, Parts
from core.objectives.diffusion import Diffusion, huber_deltas, split_mask, zero_terminal
from core.objectives.noise import sample_generator
from core.optim import optimizers

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
    ends = Diffusion(parts("v_prediction", rescale_betas_zero_snr=True),
                     TrainConfig(min_snr_gamma=5)).weights
    assert torch.isfinite(ends).all()


def test_zero_terminal_snr_leaves_no_signal() -> None:
    diffusion = Diffusion(parts("v_prediction", rescale_betas_zero_snr=True))
    latents, noise = torch.ones(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    noisy, target = diffusion.noisy_and_target(latents, noise, torch.tensor([999]))
    torch.testing.assert_close(noisy, noise, atol=1e-3, rtol=0)
    torch.testing.assert_close(target, -latents, atol=1e-3, rtol=1e-3)


def test_zero_terminal_is_diffusers_rescaling() -> None:
    """Lin et al., algorithm 1, by diffusers; pictures are drawn with the same schedule."""
    base = parts("v_prediction")
    zero_terminal(base)
    diffusion = Diffusion(base, TrainConfig(zero_terminal_snr=True))
    betas = DDPMScheduler.from_config(SCHEDULE).betas
    expected = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    torch.testing.assert_close(diffusion.signal.square(), expected, atol=1e-6, rtol=1e-5)
    assert diffusion.signal[-1] == 0
    assert diffusion.noise_level[-1] == 1
    drawn_with = schedulers.create("ddim", base)
    torch.testing.assert_close(drawn_with.alphas_cumprod, expected)
    assert drawn_with.config.timestep_spacing == "trailing"
    with pytest.raises(UserError, match="epsilon"):
        zero_terminal(parts("epsilon"))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_debiased_weights_noise_errors_by_the_root_of_snr(kind: Objective) -> None:
    """A v error e is a noise error sqrt(SNR / (SNR + 1)) e: both kinds get one loss."""
    alphas = DDPMScheduler.from_config(SCHEDULE).alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    weights = Diffusion(parts(kind), TrainConfig(debiased_estimation=True)).weights.double()
    in_noise = weights if kind == "epsilon" else weights * (snr + 1) / snr
    torch.testing.assert_close(in_noise, snr.rsqrt(), rtol=1e-5, atol=0)
    both = Diffusion(parts(kind), TrainConfig(debiased_estimation=True, min_snr_gamma=5))
    alone = Diffusion(parts(kind), TrainConfig(min_snr_gamma=5))
    torch.testing.assert_close(both.weights, (alone.weights * weights).float())


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_is_twice_torchs(schedule: str) -> None:
    """At each timestep's own delta; below it, the plain squares."""
    config = TrainConfig.model_validate({"loss_type": "huber", "huber_schedule": schedule})
    predicted, target = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t = torch.tensor([0, 300, 700, 999])
    alphas = DDPMScheduler.from_config(SCHEDULE).alphas_cumprod.double()
    deltas = huber_deltas(alphas, config)
    smooth = config.with_changes(loss_type="smooth_l1")
    for changes, reference in ((config, lambda a, b, d: F.huber_loss(a, b, delta=d)),
                               (smooth, lambda a, b, d: F.smooth_l1_loss(a, b, beta=d))):
        found = Diffusion(parts("epsilon"), changes).loss(predicted, target, t)
        expected = torch.stack([2 * reference(predicted[i], target[i], float(deltas[n]))
                                for i, n in enumerate(t)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    near = target + 1e-3
    torch.testing.assert_close(Diffusion(parts("epsilon"), config).loss(near, target, t),
                               Diffusion(parts("epsilon")).loss(near, target, t))


def test_huber_deltas_run_from_one_to_c() -> None:
    alphas = DDPMScheduler.from_config(SCHEDULE).alphas_cumprod.double()
    for schedule in ("exponential", "snr"):
        deltas = huber_deltas(alphas, TrainConfig.model_validate({"huber_schedule": schedule}))
        assert float(deltas[0]) == pytest.approx(1, abs=0.06)
        assert float(deltas[-1]) == pytest.approx(0.1, abs=0.01)
        assert bool((deltas.diff() < 0).all())
    assert set(huber_deltas(alphas, TrainConfig(huber_schedule="constant")).tolist()) == {0.1}


def test_what_is_masked_teaches_nothing() -> None:
    """Outside weight 0: no gradient at all; 0.5: half of the unmasked one."""
    stacked = torch.randn(2, 5, 8, 8)
    stacked[:, -1] = 0
    stacked[:, -1, :, :4] = 1
    predicted = torch.randn(2, 4, 8, 8, requires_grad=True)
    t, diffusion = torch.tensor([3, 700]), Diffusion(parts("epsilon"))

    def gradient(outside: float | None) -> torch.Tensor:
        target, weights = split_mask(stacked, outside or 0.0)
        losses = diffusion.loss(predicted, target, t, None if outside is None else weights)
        return torch.autograd.grad(losses.sum(), predicted)[0]
    free, none, half = gradient(None), gradient(0.0), gradient(0.5)
    assert (none[..., 4:] == 0).all()
    assert torch.equal(none[..., :4], free[..., :4])
    torch.testing.assert_close(half[..., 4:], free[..., 4:] / 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.floats(0.05, 1),
       st.sampled_from([(4, 8, 8), (4, 64, 40), (16, 3, 9)]))
def test_pyramid_noise_keeps_its_deviation(levels: int, discount: float,
                                           shape: tuple[int, int, int]) -> None:
    config = TrainConfig(multires_noise_iterations=levels, multires_noise_discount=discount)
    noise = Diffusion(parts("epsilon"), config).draw(3, [5, 6], shape).noise
    assert noise.shape == (2, *shape)
    torch.testing.assert_close(noise.std((1, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)


def test_pyramid_noise_is_strong_in_the_large() -> None:
    """Means of 8 x 8 places spread by 1 / 8 in white noise, by far more with coarse levels."""
    config = TrainConfig(multires_noise_iterations=6, multires_noise_discount=0.5)
    draw = Diffusion(parts("epsilon"), config).draw(1, range(40), (4, 32, 32)).noise
    assert float(F.avg_pool2d(draw, 8).std()) > 2 / 8


@pytest.mark.parametrize("changes", [
    {"noise_offset": 0.1}, {"multires_noise_iterations": 4, "multires_noise_discount": 0.6}])
def test_a_sample_draws_the_same_in_any_batch(changes: dict[str, float]) -> None:
    diffusion = Diffusion(parts("epsilon"), TrainConfig.model_validate(changes))
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
    offset = Diffusion(parts("epsilon"), TrainConfig(noise_offset=0.5)).draw(
        1, range(500), (4, 8, 8)).noise
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
    def sampler(**changes: object) -> list[float]:
        config = TrainConfig.model_validate({"learning_rate": 1.0, **changes})
        return [optimizers.rate(config, n, 10) for n in range(10)]
    assert sampler() == [1.0] * 10
    assert sampler(lr_scheduler="linear") == pytest.approx([1 - n / 10 for n in range(10)])
    cosine = sampler(lr_scheduler="cosine")
    assert cosine[0] == 1
    assert cosine[5] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    warm = sampler(lr_warmup_steps=4)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.sampled_from([(64, 64), (64, 96), (96, 64)]), min_size=1, max_size=12),
       repeats=st.integers(1, 3), batch=st.integers(1, 5), accumulation=st.integers(1, 4),
       seed=st.integers(0, 1000))
def test_a_course_shows_every_picture_once_per_repeat(
        sizes: list[tuple[int, int]], repeats: int, batch: int, accumulation: int,
        seed: int) -> None:
    indices = [10 + i for i in range(len(sizes))]
    sampler = BucketSampler(indices, sizes, [repeats] * len(sizes), batch, accumulation, seed)
    for epoch in range(2):
        updates = [sampler.update(epoch * sampler.updates_per_epoch + n)
                   for n in range(sampler.updates_per_epoch)]
        batches = [b for update in updates for b in update]
        assert sorted(i for b in batches for i in b.indices) == sorted(indices * repeats)
        numbers = [n for b in batches for n in b.numbers]
        start = epoch * len(indices) * repeats
        assert numbers == list(range(start, start + len(indices) * repeats))
        assert all(len({sizes[i - 10] for i in b.indices}) == 1 for b in batches)
        assert all(1 <= len(u) <= accumulation for u in updates)


@settings(max_examples=60, deadline=None)
@given(plain=st.lists(st.sampled_from([(64, 64), (64, 96)]), min_size=2, max_size=12),
       regular=st.lists(st.sampled_from([(64, 64), (64, 96), (96, 64)]), min_size=1, max_size=9),
       batch=st.integers(1, 5), share=st.sampled_from([0.2, 0.5, 0.75]))
def test_regularisation_pictures_take_their_share_in_turn(
        plain: list[tuple[int, int]], regular: list[tuple[int, int]], batch: int,
        share: float) -> None:
    indices = list(range(len(plain)))
    more = list(range(len(plain), len(plain) + len(regular)))
    held = Regular(more, regular, len(plain), share, 3)
    sampler = BucketSampler(indices, plain, [1] * len(plain), batch, 1, 3, held)
    wanted = max(1, round(len(plain) * share / (1 - share)))
    seen: list[int] = []
    for epoch in range(8):
        batches = [b for n in range(sampler.updates_per_epoch)
                   for b in sampler.update(epoch * sampler.updates_per_epoch + n)]
        assert all(len({(plain + regular)[i] for i in b.indices}) == 1 for b in batches)
        samples = [i for b in batches for i in b.indices]
        assert sorted(i for i in samples if i < len(plain)) == indices
        assert len(samples) - len(plain) == wanted == held.each_epoch
        assert [n for b in batches for n in b.numbers] == list(
            range(epoch * len(samples), (epoch + 1) * len(samples)))
        seen += [i for i in samples if i >= len(plain)]
    for bucket, taken in held.taken.items():        # in turn: none twice before all were
        counts = [seen.count(i) for i in held.members[bucket]]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == 8 * taken


def test_each_batch_holds_its_share() -> None:
    square = [(64, 64)] * 20
    held = Regular(range(20, 40), square, 20, 0.25, 1)
    sampler = BucketSampler(range(20), square, [1] * 20, 4, 1, 1, held)
    counts = [sum(i >= 20 for i in b.indices) for n in range(sampler.updates_per_epoch)
              for b in sampler.update(n)]
    assert set(counts) <= {1, 2}
    assert sum(counts) == held.each_epoch == 7
