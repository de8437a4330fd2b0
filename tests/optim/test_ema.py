from __future__ import annotations

from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from core.config import TrainConfig
from core.jobs.control import Control
from core.optim.ema import Ema
from core.training.run import train
from tests import tiny


def walk(parameters: list[nn.Parameter], n: int) -> None:
    for k, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * n + k)
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator)


def make() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(5))]


def test_average_is_the_closed_formula_and_diffusers() -> None:
    """sum over n of (1 - d_n) w_n times the product of all later d, d_n = min(d, (1+n)/(10+n))."""
    parameters = make()
    start = [p.detach().double() for p in parameters]
    ema, reference = Ema(parameters, 0.8), EMAModel(parameters, decay=0.8)
    seen = []
    for n in range(60):
        walk(parameters, n)
        ema.update(n)
        if n:
            reference.optimization_step = n
            reference.step(parameters)
        else:                               # its own first step only copies
            reference.shadow_params = [a.clone() for a in ema.averages]
        seen.append([p.detach().double() for p in parameters])
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(60)]
    for k in range(2):
        expected, weight = torch.zeros_like(start[k]), 1.0
        for n in reversed(range(60)):
            expected += weight * (1 - decays[n]) * seen[n][k]
            weight *= decays[n]
        expected += weight * start[k]
        torch.testing.assert_close(ema.averages[k].double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ema.averages[k], reference.shadow_params[k], rtol=1e-5,
                                   atol=1e-5)


def test_applied_swaps_and_gives_back() -> None:
    parameters = make()
    ema = Ema(parameters, 0.9)
    walk(parameters, 1)
    raw = [p.data for p in parameters]
    averages = list(ema.averages)
    with ema.applied():
        assert all(p.data_ptr() == a.data_ptr()
                   for p, a in zip(parameters, averages, strict=True))
    assert all(p.data_ptr() == r.data_ptr() for p, r in zip(parameters, raw, strict=True))


def test_state_goes_round_and_an_old_checkpoint_begins_at_its_weights() -> None:
    parameters = make()
    ema = Ema(parameters, 0.9)
    walk(parameters, 1)
    ema.update(5)
    again = Ema(parameters, 0.9)
    again.load_state(ema.state())
    assert all(torch.equal(a, b) for a, b in zip(ema.averages, again.averages, strict=True))
    again.load_state({})
    assert all(torch.equal(a, p) for a, p in zip(again.averages, parameters, strict=True))
    assert all(a.data_ptr() != p.data_ptr()
               for a, p in zip(again.averages, parameters, strict=True))


def test_a_run_saves_its_average(base: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(tiny.pictures(tmp_path / "p", 2)),
        "output_dir": str(tmp_path / "out"), "output_name": "ink", "lora_rank": 2,
        "max_train_steps": 3, "learning_rate": 1e-2, "ema_decay": 0.5, "save_precision": "fp32"})
    result = train(config, lambda event: None, Control())
    assert result["proof"]["ok"]            # the proof compares pictures of the average
    saved = load_file(result["lora"])
    state = load_file(tmp_path / "out/checkpoints/ink-000003/state.safetensors")
    kept = [state[f"adapter.ema.{n}"] for n in range(len(saved) * 2 // 3)]
    raw = [v for k, v in state.items() if ".lora_" in k]
    files = sorted(float(v.sum()) for k, v in saved.items() if ".lora_" in k)
    assert files == sorted(float(v.sum()) for v in kept)
    assert files != sorted(float(v.sum()) for v in raw)


def test_what_settles_takes_its_average_for_good() -> None:
    parameters = make()
    ema = Ema(parameters, 0.9)
    walk(parameters, 1)
    other = parameters[1].detach().clone()
    ema.settle(parameters[:1])
    assert torch.equal(parameters[0], torch.zeros(3, 2))
    assert torch.equal(parameters[1], other)
    ema.update(7)
    assert torch.equal(ema.averages[0], parameters[0])
