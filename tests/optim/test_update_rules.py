"""Optimizers and schedules against references: papers in numpy, or their authors' packages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from core.config import OPTIMIZERS, TrainConfig
from core.errors import UserError
from core.jobs.events import Event, Note
from core.optim import optimizers

OWN = [name for name in OPTIMIZERS if name != "adamw8bit"] + ["torch.optim.NAdam",
                                                              "torch.optim.Adagrad"]


def weights(zero: bool = True) -> list[nn.Parameter]:
    """An A, a B that starts at zero, a bias, a convolution's kernel."""
    torch.manual_seed(1)
    found = [torch.randn(6, 8), torch.zeros(8, 6) if zero else torch.randn(8, 6),
             torch.randn(5), torch.randn(4, 3, 3, 3)]
    return [nn.Parameter(w) for w in found]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=generator) for w in weights()]


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    for parameter, grad in zip(parameters, gradients(seed), strict=True):
        parameter.grad = grad
    optimizer.step()


def make(name: str, parameters: list[Any], **changes: Any) -> torch.optim.Optimizer:
    return optimizers.create(TrainConfig.model_validate(
        {"optimizer": name, "learning_rate": 1e-2} | changes), parameters)


def against(optimizer: torch.optim.Optimizer, ours: list[nn.Parameter],
            reference: Callable[[list[np.ndarray], int], None], tolerance: float = 2e-6) -> None:
    theirs = [p.detach().numpy().astype(np.float64) for p in ours]
    for seed in range(6):
        step(optimizer, ours, seed)
        reference(theirs, seed)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.detach().numpy(), b, rtol=tolerance * 5, atol=tolerance)


# --- the rules ---

def test_lion_is_its_ten_lines() -> None:
    means = [np.zeros(w.shape) for w in weights()]

    def lion(values: list[np.ndarray], seed: int) -> None:
        for value, mean, grad in zip(values, means, gradients(seed), strict=True):
            g = grad.double().numpy()
            value *= 1 - 1e-2 * 0.1
            value -= 1e-2 * np.sign(0.9 * mean + 0.1 * g)
            mean *= 0.99
            mean += 0.01 * g

    ours = weights()
    against(make("lion", ours, weight_decay=0.1), ours, lion)


def test_came_is_the_papers_algorithm() -> None:
    kept: dict[tuple[int, str], Any] = {}

    def mean_of(key: tuple[int, str], value: Any, beta: float) -> Any:
        kept[key] = beta * kept.get(key, 0.0) + (1 - beta) * value
        return kept[key]

    def root(n: int, name: str, squares: np.ndarray, beta: float) -> np.ndarray:
        if squares.ndim < 2:
            return 1 / np.sqrt(mean_of((n, name), squares, beta))
        rows = mean_of((n, f"{name} rows"), squares.mean(-1), beta)
        columns = mean_of((n, f"{name} columns"), squares.mean(-2), beta)
        whole = (rows[..., :, None] * columns[..., None, :]) / rows.mean(-1)[..., None, None]
        return 1 / np.sqrt(whole)

    def came(values: list[np.ndarray], seed: int) -> None:
        for n, (value, grad) in enumerate(zip(values, gradients(seed), strict=True)):
            g = grad.double().numpy()
            update = g * root(n, "v", g * g + 1e-30, 0.999)
            update /= max(1.0, np.sqrt((update ** 2).mean()))
            mean = mean_of((n, "m"), update, 0.9)
            if g.ndim >= 2:
                mean = mean * root(n, "u", (update - mean) ** 2 + 1e-16, 0.9999)
            value *= 1 - 1e-2 * 0.1
            value -= 1e-2 * mean

    ours = weights()
    against(make("came", ours, weight_decay=0.1), ours, came, 2e-5)


@pytest.mark.parametrize("more", [{}, {"use_bias_correction": True}, {"safeguard_warmup": True},
                                  {"d_coef": 2.0, "growth_rate": 1.02}, {"beta3": 0.9}])
def test_prodigy_is_its_authors_package(more: dict[str, Any]) -> None:
    theirs_module = pytest.importorskip("prodigyopt")
    ours, theirs = ([nn.Parameter(w.detach().double()) for w in weights(zero=False)]
                    for _ in range(2))
    rule = make("prodigy", ours, learning_rate=1.0, weight_decay=0.01,
                optimizer_args=more | {"d0": 1e-4})
    reference = theirs_module.Prodigy(theirs, lr=1.0, weight_decay=0.01, d0=1e-4, **more)
    sizes = []
    for n in range(12):
        for own in (ours, theirs):
            for parameter in own:           # towards zero: the way is long, d grows
                parameter.grad = parameter.detach().clone() + 0.1
        rule.step()
        reference.step()
        sizes.append(float(rule.state[ours[0]]["d"]))
        assert sizes[-1] == pytest.approx(reference.param_groups[0]["d"], rel=1e-8), n
    assert sizes[-1] > sizes[0] * (1.1 if "growth_rate" in more else 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_prodigy_wants_a_rate_of_one() -> None:
    events: list[Event] = []
    optimizers.create(TrainConfig(optimizer="prodigy", learning_rate=1e-4), weights(),
                      events.append)
    optimizers.create(TrainConfig(optimizer="prodigy", learning_rate=1.0), weights(), events.append)
    assert [e.key for e in events if isinstance(e, Note)] == ["engine.prodigy_rate"]


def test_schedule_free_is_the_papers_averaging() -> None:
    """Algorithm 1 of arXiv 2405.15682 with AdamW's scaling, written out: z steps, x is the mean of
    all z, y between the two is where gradients are taken."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 5))
    rule = make("schedulefree", [parameter], weight_decay=0.0)
    y = parameter.detach().numpy().astype(np.float64)
    x, z, square = y.copy(), y.copy(), np.zeros(5)
    for k in range(1, 8):
        g = 2 * y + 0.3
        parameter.grad = 2 * parameter.detach() + 0.3
        rule.step()
        square = 0.999 * square + 0.001 * g * g
        z = z - 1e-2 * g / (np.sqrt(square / (1 - 0.999 ** k)) + 1e-8)
        x = (1 - 1 / k) * x + z / k
        y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(parameter.detach().numpy(), y, rtol=1e-4, atol=1e-6)
        before = parameter.detach().clone()
        with optimizers.averaged(rule):
            np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=1e-4, atol=1e-6)
        assert torch.equal(parameter, before)           # to the bit


def test_adafactor_takes_the_runs_own_rate() -> None:
    """A B that starts at zero moves at once, and twice the rate is twice the way."""
    ways = []
    for rate in (1e-3, 2e-3):
        ours = weights()
        rule = make("adafactor", ours, weight_decay=0.0)
        optimizers.set_rate(rule, rate)
        step(rule, ours, 0)
        ways.append(ours[1].detach().clone())
    assert ways[0].abs().max() > 5e-4
    torch.testing.assert_close(ways[1], 2 * ways[0])


def test_rates_go_to_groups_by_their_factor() -> None:
    """LoRA+: with Lion's steps of one size the factor is the ratio of the ways."""
    a, b = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3, 3))
    rule = make("lion", [{"params": [a], "factor": 1.0}, {"params": [b], "factor": 16.0}])
    optimizers.set_rate(rule, 1e-3)
    a.grad = b.grad = torch.ones(3, 3)
    rule.step()
    torch.testing.assert_close(b / a, torch.full((3, 3), 16.0))


@pytest.mark.parametrize("name", OWN)
def test_every_rule_finds_the_bottom_of_a_bowl(name: str) -> None:
    parameter = nn.Parameter(torch.full((6, 6), 2.0))
    rule = make(name, [parameter], weight_decay=0.0, learning_rate=1.0 if name == "prodigy" else (
        0.5 if "Adagrad" in name else 0.05))
    for _ in range(300):
        rule.zero_grad()
        (parameter - 0.5).square().sum().backward()
        rule.step()
    with optimizers.averaged(rule):
        assert (parameter - 0.5).abs().max() < 0.15, name


# --- state ---

@pytest.mark.parametrize("name", OWN)
def test_state_comes_back_to_the_bit(name: str) -> None:
    """Through flat tensors, as a checkpoint keeps them; the weights are looked at in between."""
    straight, resumed = weights(), weights()
    first, second = make(name, straight), make(name, resumed)
    for seed in range(5):
        step(first, straight, seed)
    for seed in range(3):
        step(second, resumed, seed)
        with optimizers.averaged(second):
            pass
    again = [nn.Parameter(p.detach().clone()) for p in resumed]
    third = make(name, again)
    kept = optimizers.state(second)
    assert all(isinstance(v, Tensor) for v in kept.values())
    optimizers.load_state(third, kept)
    assert optimizers.state(third).keys() == kept.keys()
    assert all(torch.equal(v, kept[k]) for k, v in optimizers.state(third).items())
    for seed in range(3, 5):
        step(third, again, seed)
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True)), name


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("adamw8bit",)])
def test_no_rule_asks_the_device_for_numbers(name: str) -> None:
    """On meta tensors there are none: what runs there never waits for a GPU."""
    meta = [nn.Parameter(p.detach().to("meta")) for p in weights()]
    config = TrainConfig(optimizer=name, learning_rate=1.0)
    if name == "adamw":
        pytest.skip("torch's fused AdamW, planned by arithmetic")
    rule = optimizers.create(config, meta)
    for _ in range(2):
        for parameter in meta:
            parameter.grad = torch.empty_like(parameter)
        rule.step()
    assert any(rule.state[p] for p in meta)


# --- names and arguments ---

@pytest.mark.parametrize(("changes", "code"), [
    ({"optimizer": "torch.optim.Nope"}, "engine.no_optimizer"),
    ({"optimizer": "no_such_package.Thing"}, "engine.no_optimizer"),
    ({"optimizer": "torch.nn.Linear"}, "engine.no_optimizer"),
    ({"optimizer": "lion", "optimizer_args": {"betaz": [1, 2]}}, "engine.optimizer_args"),
])
def test_what_is_no_optimizer_is_told(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**{"name": changes.pop("optimizer"), "parameters": weights(), **changes})
    assert caught.value.code == code
    assert "{" not in str(caught.value)


def test_the_configs_keys_reach_what_takes_them() -> None:
    group = make("torch.optim.RMSprop", weights(), weight_decay=0.2,
                 optimizer_args={"alpha": 0.5}).param_groups[0]
    assert (group["weight_decay"], group["alpha"]) == (0.2, 0.5)
    assert make("lion", weights()).param_groups[0]["betas"] == (0.9, 0.99)      # Lion's own
    assert make("lion", weights(), adam_beta1=0.8).param_groups[0]["betas"] == (0.8, 0.999)
    assert make("adamw", weights()).param_groups[0]["betas"] == (0.9, 0.999)
    assert make("came", weights(), optimizer_args={"betas": [0.8, 0.9, 0.99]}).param_groups[0][
        "betas"] == (0.8, 0.9, 0.99)
    assert "Lion" in optimizers.describe(make("lion", weights()))
    assert "Adafactor(weight_decay=0.01)" in optimizers.describe(make("adafactor", weights()))


# --- schedules ---

def sampler(total: int = 100, **changes: Any) -> list[float]:
    config = TrainConfig.model_validate({"learning_rate": 1.0} | changes)
    return [optimizers.rate(config, n, total) for n in range(total)]


def test_restarts_are_cosines_one_after_the_other() -> None:
    found = sampler(lr_scheduler="cosine_with_restarts", lr_cycles=4)
    one = [0.5 * (1 + math.cos(math.pi * n / 25)) for n in range(25)]
    assert found == pytest.approx(one * 4)
    assert sampler(lr_scheduler="cosine_with_restarts") == pytest.approx(
        sampler(lr_scheduler="cosine"))


def test_polynomial_falls_by_its_power() -> None:
    assert sampler(lr_scheduler="polynomial") == pytest.approx(sampler(lr_scheduler="linear"))
    assert sampler(lr_scheduler="polynomial", lr_power=2)[50] == pytest.approx(0.25)


def test_stable_then_decay() -> None:
    found = sampler(lr_scheduler="warmup_stable_decay", lr_warmup_steps=10, lr_decay_share=0.5)
    assert found[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert found[10:55] == [1.0] * 45
    assert found[55:] == pytest.approx([(100 - n) / 45 for n in range(55, 100)])
    assert sampler(lr_scheduler="warmup_stable_decay", lr_decay_share=0) == [1.0] * 100


@given(st.sampled_from(["constant", "linear", "cosine", "cosine_with_restarts", "polynomial",
                        "warmup_stable_decay"]),
       st.integers(0, 50), st.integers(1, 200), st.integers(1, 7), st.floats(0.1, 5),
       st.floats(0, 1))
def test_every_rate_is_between_nothing_and_the_full_rate(
        name: str, warmup: int, total: int, cycles: int, power: float, share: float) -> None:
    found = sampler(total, lr_scheduler=name, lr_warmup_steps=warmup, lr_cycles=cycles,
                    lr_power=power, lr_decay_share=share)
    assert all(0 <= rate <= 1 for rate in found)
    if warmup < total:
        assert found[warmup] == 1.0
