from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from core.config import TrainConfig
from core.errors import UserError
from core.jobs.events import Event, Note
from core.memory import plan
from core.optim import optimizers
from core.weights import precision_rules


def weights(size: int = 96) -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.randn(size))]


def update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def make(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    config = TrainConfig(learning_rate=1e-2)
    if kind == "adamw":
        return optimizers.create(config, parameters)
    pytest.importorskip("bitsandbytes")
    return optimizers.adamw8bit(parameters,
                                {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.01})


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_resumed_optimizer_goes_on_as_if_never_stopped(kind: str) -> None:
    straight, resumed = weights(), weights()
    first, second = make(kind, straight), make(kind, resumed)
    for seed in range(4):
        update(first, straight, seed)
    for seed in range(2):
        update(second, resumed, seed)
    third = make(kind, resumed)
    optimizers.load_state(third, optimizers.state(second))
    for seed in range(2, 4):
        update(third, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_state_names_what_checkpoints_named_before() -> None:
    parameters = weights()
    optimizer = make("adamw", parameters)
    update(optimizer, parameters, 0)
    found = optimizers.state(optimizer)
    assert set(found) == {f"{i}.{k}" for i in (0, 1) for k in ("step", "exp_avg", "exp_avg_sq")}
    theirs: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    assert all(torch.equal(found[f"{i}.{k}"], v) for i, s in theirs.items() for k, v in s.items())


def test_other_optimizers_state_is_refused() -> None:
    parameters = weights()
    state = {"0.step": torch.tensor(3), "0.state1": torch.zeros(9), "0.state2": torch.zeros(9)}
    with pytest.raises(UserError) as caught:
        optimizers.load_state(make("adamw", parameters), state)
    assert caught.value.code == "precision.other_optimizer"
    assert caught.value.params["there"] == "adamw8bit"
    assert "adamw8bit" in str(caught.value)


def test_without_a_gpu_the_usual_adamw_comes_with_a_note() -> None:
    events: list[Event] = []
    optimizer = optimizers.create(TrainConfig(optimizer="adamw8bit"), weights(), events.append)
    assert type(optimizer) is torch.optim.AdamW
    assert [e.key for e in events if isinstance(e, Note)] == ["precision.no_adamw8bit"]
    optimizers.create(TrainConfig(), weights(), events.append)
    assert len(events) == 1


def test_metadata_names_the_optimizer() -> None:
    assert optimizers.describe(make("adamw", weights())) == (
        "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.999))")


def test_eight_bit_is_planned_only_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(optimizer="adamw8bit")
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: object())
    assert precision_rules.eight_bit(config, "cuda")
    assert not precision_rules.eight_bit(config, "cpu")
    assert not precision_rules.eight_bit(TrainConfig(), "cuda")
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert not precision_rules.eight_bit(config, "cuda")


@pytest.mark.gpu
def test_gpu_runs_the_eight_bit_optimizer() -> None:
    pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(p.data.cuda()) for p in weights()]
    optimizer = optimizers.create(TrainConfig(optimizer="adamw8bit"), parameters)
    assert hasattr(optimizer, "name2qmap")
