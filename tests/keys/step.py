"""Rows of the keys about the step: noise, loss, rates, optimizer, text encoders, average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.adapters import lora
from core.families.timestep_sampling import TimestepSampling
from core.objectives import diffusion as objective
from core.objectives.diffusion import Diffusion
from core.objectives.flow import Flow
from tests.keys.lab import Lab, moves, near, of_one, row, shown, started

MANY = range(4000)
WORDS = {"pivotal_tokens": 2, "trigger_word": "red disc"}


def diffusion(lab: Lab, **changes: Any) -> Diffusion:
    found = objective.create(lab.parts()[2], lab.config(**changes))
    assert isinstance(found, Diffusion)
    return found


def flow(lab: Lab, own: TimestepSampling | None = None, **changes: Any) -> Flow:
    parts = replace(lab.parts()[2], flow=own or TimestepSampling(), denoiser=None, vae=None)
    found = objective.create(parts, lab.config(**changes))
    assert isinstance(found, Flow)
    return found


def levels(lab: Lab, own: TimestepSampling | None = None, **changes: Any) -> Tensor:
    """4000 noise levels of a flow, sorted; 0 to 1."""
    times = flow(lab, own, **changes).draw(1, MANY, (1, 1, 1)).timesteps
    return times.double().sort().values / 1000


@row("seed")
def _(lab: Lab) -> None:
    """Same seed: the same start, order and noise; another: none of these."""
    first, same, other = (lab.trainer(seed=seed, batch_size=2) for seed in (1, 1, 2))
    for trainer, alike in ((same, True), (other, False)):
        assert torch.equal(first.parameters[0], trainer.parameters[0]) is alike
        assert ([first.sampler.update(n) for n in range(3)]
                == [trainer.sampler.update(n) for n in range(3)]) is alike
        noise = [shown(one, of_one(1)).draw.noise for one in (first, trainer)]
        assert torch.equal(*noise) is alike
    drawn = [lab.preview(seed=seed, sample_inference_steps=1)["image"].tobytes()
             for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


# --- noise and loss ---

@row("noise_offset")
def _(lab: Lab) -> None:
    """One number a channel and sample, of that deviation: of noise schedules and of flows."""
    for make in (diffusion, flow):
        plain = make(lab).draw(3, range(500), (4, 6, 6))
        moved = make(lab, noise_offset=0.2).draw(3, range(500), (4, 6, 6))
        assert torch.equal(plain.timesteps, moved.timesteps)
        offsets = moved.noise - plain.noise
        torch.testing.assert_close(offsets, offsets[..., :1, :1].expand_as(offsets),
                                   rtol=0, atol=1e-5)
        by_channel = offsets[..., 0, 0]                     # (500, 4)
        assert float(by_channel.std()) == pytest.approx(0.2, rel=0.1)
        assert float(by_channel.std(1).mean()) > 0.1        # a sample's channels differ
        assert float(torch.corrcoef(by_channel.T).fill_diagonal_(0).abs().max()) < 0.25


@row("multires_noise_iterations")
def _(lab: Lab) -> None:
    """Coarse noise: means over 4 x 4 pixels differ more than white noise's quarter."""
    def coarse(count: int) -> float:
        made = diffusion(lab, multires_noise_iterations=count, multires_noise_discount=0.8)
        noise = made.draw(1, range(200), (4, 16, 16)).noise
        assert float(noise.std()) == pytest.approx(1, rel=0.03)
        return float(torch.nn.functional.avg_pool2d(noise, 4).std())
    assert coarse(0) == pytest.approx(0.25, rel=0.05)
    assert 0.27 < coarse(1) < coarse(6)


@row("multires_noise_discount")
def _(lab: Lab) -> None:
    """Each level is that share of the one before. Levels are told apart by a fit: with d = 1 they
    are (white + first) / a and (white + first + second) / b, with others (white + d first) / e
    and (white + d first + d^2 second) / f, where only the deviations a, b, e, f aren't known."""
    def draw(levels: int, discount: float) -> Tensor:
        made = diffusion(lab, multires_noise_iterations=levels, multires_noise_discount=discount)
        return made.draw(1, [7], (4, 32, 32)).noise.double().flatten()

    def fit(found: Tensor, *known: Tensor) -> list[float]:
        return torch.linalg.lstsq(torch.stack(known, 1), found[:, None]).solution[:, 0].tolist()
    white, once, twice = draw(0, 1.0), draw(1, 1.0), draw(2, 1.0)
    for d in (0.3, 0.8):
        of_white, of_once = fit(draw(1, d), white, once)
        a = of_once * (1 - d) / of_white / d
        of_white, of_once, _ = fit(draw(2, d), white, once, twice)
        f = (1 - d) / of_white
        assert of_once * f / a == pytest.approx(d - d**2, rel=1e-3)


def _snr(made: Diffusion) -> Tensor:
    return (made.signal / made.noise_level).square()


def _weights(lab: Lab, **changes: Any) -> Tensor:
    """The loss of each timestep where every error is 1."""
    made = diffusion(lab, **changes)
    ones = torch.ones(made.steps, 1, 1, 1)
    return made.loss(ones, torch.zeros_like(ones), torch.arange(made.steps))


@row("min_snr_gamma")
def _(lab: Lab) -> None:
    snr = _snr(diffusion(lab))
    assert (_weights(lab) == 1).all()
    for gamma in (1.0, 5.0):
        torch.testing.assert_close(_weights(lab, min_snr_gamma=gamma), snr.clamp(max=gamma) / snr,
                                   rtol=1e-3, atol=1e-5)


@row("debiased_estimation")
def _(lab: Lab) -> None:
    torch.testing.assert_close(_weights(lab, debiased_estimation=True),
                               _snr(diffusion(lab)).rsqrt(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        _weights(lab, debiased_estimation=True, min_snr_gamma=5.0),
        _weights(lab, debiased_estimation=True) * _weights(lab, min_snr_gamma=5.0))


def _loss(lab: Lab, error: float, t: int = 0, **changes: Any) -> float:
    made = diffusion(lab, **changes)
    return float(made.loss(torch.full((1, 1, 1, 1), error), torch.zeros(1, 1, 1, 1),
                           torch.tensor([t])))


@row("loss_type")
def _(lab: Lab) -> None:
    """Large errors: squares, or lines; smooth L1 is Huber's over its delta."""
    fixed = {"huber_schedule": "constant", "huber_c": 0.5}
    assert _loss(lab, 4.0) == pytest.approx(16)
    assert _loss(lab, 4.0, loss_type="huber", **fixed) == pytest.approx(0.5 * (8 - 0.5))
    assert _loss(lab, 4.0, loss_type="smooth_l1", **fixed) == pytest.approx(8 - 0.5)
    assert _loss(lab, 0.25, loss_type="huber", **fixed) == pytest.approx(0.0625)


@row("huber_c")
def _(lab: Lab) -> None:
    """Squares below it, a line of slope 2 c above."""
    for c in (0.1, 0.5):
        options = {"loss_type": "huber", "huber_schedule": "constant", "huber_c": c}
        slope = _loss(lab, 3.0, **options) - _loss(lab, 2.0, **options)
        assert slope == pytest.approx(2 * c, rel=1e-4)


@row("huber_schedule")
def _(lab: Lab) -> None:
    """Where errors begin to count less: the same at every timestep, or ever earlier."""
    def slopes(sampler: str) -> list[float]:
        options = {"loss_type": "huber", "huber_schedule": sampler, "huber_c": 0.1}
        return [(_loss(lab, 3.0, t, **options) - _loss(lab, 2.0, t, **options)) / 2
                for t in (0, 500, 999)]
    assert slopes("constant") == pytest.approx([0.1] * 3, rel=1e-3)
    assert slopes("exponential") == pytest.approx([1, 0.1**0.5, 0.1**0.999], rel=1e-3)
    first, middle, last = slopes("snr")
    assert 0.9 < first <= 1
    assert first > middle > last
    assert last == pytest.approx(0.1, abs=0.01)


@row("timestep_sampling")
def _(lab: Lab) -> None:
    """Shares of the noise levels below a tenth and in the middle half."""
    for curve, ends, middle in (("uniform", 0.1, 0.5), ("logit_normal", 0.014, 0.728)):
        found = levels(lab, timestep_sampling=curve)
        assert near(float((found < 0.1).double().mean()), ends, len(MANY)), curve
        assert near(float(((found > 0.25) & (found < 0.75)).double().mean()), middle, len(MANY))
    assert torch.equal(levels(lab, TimestepSampling("uniform")),
                       levels(lab, timestep_sampling="uniform"))


@row("flow_shift")
def _(lab: Lab) -> None:
    """Every level moves to shift s / (1 + (shift - 1) s); 0: the base's own shift stays."""
    plain = levels(lab, TimestepSampling("uniform"))
    torch.testing.assert_close(levels(lab, TimestepSampling("uniform"), flow_shift=3.0),
                               3 * plain / (1 + 2 * plain), rtol=1e-4, atol=1e-5)
    own = TimestepSampling("uniform", shift=2.0)
    torch.testing.assert_close(levels(lab, own), 2 * plain / (1 + plain), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(levels(lab, own, flow_shift=3.0), 3 * plain / (1 + 2 * plain),
                               rtol=1e-4, atol=1e-5)


def _logits(lab: Lab, **changes: Any) -> Tensor:
    found = levels(lab, **changes)
    return (found / (1 - found)).log()


@row("logit_mean")
def _(lab: Lab) -> None:
    """Of logit_normal: every level's logit moves by it. Another curve has none."""
    torch.testing.assert_close(_logits(lab, logit_mean=0.5), _logits(lab) + 0.5,
                               rtol=1e-3, atol=1e-3)
    assert torch.equal(levels(lab, logit_mean=0.5, timestep_sampling="uniform"),
                       levels(lab, timestep_sampling="uniform"))


@row("logit_std")
def _(lab: Lab) -> None:
    torch.testing.assert_close(_logits(lab, logit_std=0.5), _logits(lab) / 2,
                               rtol=1e-3, atol=1e-3)
    assert float(_logits(lab).std()) == pytest.approx(1, rel=0.05)


@row("mode_scale")
def _(lab: Lab) -> None:
    """Of mode: more of it more of the middle half; 0: uniform. Another curve has none."""
    def middle(scale: float) -> float:
        found = levels(lab, timestep_sampling="mode", mode_scale=scale)
        return float(((found > 0.25) & (found < 0.75)).double().mean())
    assert middle(-1.0) < middle(0.0) < middle(1.29) < middle(1.75)
    assert near(middle(0.0), 0.5, len(MANY))
    assert torch.equal(levels(lab, mode_scale=0.5), levels(lab))


# --- rates and the optimizer ---

@row("learning_rate")
def _(lab: Lab) -> None:
    """AdamW's first step is the learning rate."""
    for rate in (1e-3, 1e-4):
        found = moves(started(lab.trainer(learning_rate=rate)))
        assert all(way == pytest.approx(rate, rel=1e-2) for way in found.values())


@row("text_encoder_lr")
def _(lab: Lab) -> None:
    """The encoder's LoRA goes by this rate, the denoiser's by its own; 0: there is none."""
    assert lab.trainer().text is None
    for rate in (2e-4, 5e-3):
        found = moves(started(lab.trainer(text_encoder_lr=rate)))
        assert {name.partition(".")[0] for name in found} > {"text"}
        for name, way in found.items():
            wanted = rate if name.startswith("text.") else 1e-3
            assert way == pytest.approx(wanted, rel=0.05), name


@row("pivotal_lr")
def _(lab: Lab) -> None:
    for rate in (1e-4, 1e-2):
        found = moves(started(lab.trainer(**WORDS, pivotal_lr=rate)))
        assert found.pop("words.text_encoder") == pytest.approx(rate, rel=0.05)
        assert all(way == pytest.approx(1e-3, rel=0.05) for way in found.values())


def _rates(lab: Lab, *updates: int, **changes: Any) -> list[float]:
    trainer = lab.trainer(learning_rate=1.0, max_train_steps=10, **changes)
    found = []
    for number in updates:
        trainer.update(number)
        [rate] = {group["lr"] for group in trainer.optimizer.param_groups}
        found.append(rate)
    return found


@row("lr_scheduler")
def _(lab: Lab) -> None:
    for name, wanted in (("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.1]),
                         ("cosine", [1, 0.5, 0.024471742]), ("polynomial", [1, 0.5, 0.1]),
                         ("warmup_stable_decay", [1, 1, 0.5])):
        assert _rates(lab, 0, 5, 9, lr_scheduler=name) == pytest.approx(wanted), name


@row("lr_warmup_steps")
def _(lab: Lab) -> None:
    assert _rates(lab, 0, 1, 4, 5, lr_warmup_steps=4) == pytest.approx([0.2, 0.4, 1, 1])


@row("lr_cycles")
def _(lab: Lab) -> None:
    for cycles, wanted in ((1, [1, 0.5]), (2, [1, 1])):
        assert _rates(lab, 0, 5, lr_scheduler="cosine_with_restarts",
                      lr_cycles=cycles) == pytest.approx(wanted)


@row("lr_power")
def _(lab: Lab) -> None:
    assert _rates(lab, 5, lr_scheduler="polynomial", lr_power=3.0) == pytest.approx([0.125])


@row("lr_decay_share")
def _(lab: Lab) -> None:
    for share, wanted in ((0.0, [1, 1]), (1.0, [0.5, 0.2])):
        assert _rates(lab, 5, 8, lr_scheduler="warmup_stable_decay",
                      lr_decay_share=share) == pytest.approx(wanted)


@row("optimizer")
def _(lab: Lab) -> None:
    kinds = {name: type(lab.trainer(optimizer=name).optimizer).__name__
             for name in ("adamw", "lion", "prodigy", "came", "adafactor", "schedulefree",
                          "torch.optim.SGD")}
    assert kinds == {"adamw": "AdamW", "lion": "Lion", "prodigy": "Prodigy", "came": "Came",
                     "adafactor": "Adafactor", "schedulefree": "AdamWScheduleFree",
                     "torch.optim.SGD": "SGD"}


@row("optimizer_args")
def _(lab: Lab) -> None:
    """An eps far above the gradient makes AdamW's steps small."""
    found = moves(started(lab.trainer(optimizer_args={"eps": 1e6})))
    assert all(way < 1e-6 for way in found.values())


@row("weight_decay")
def _(lab: Lab) -> None:
    """A stands still while B is zero, but for its decay by rate x weight_decay."""
    for decay in (0.0, 0.5):
        trainer = lab.trainer(weight_decay=decay, learning_rate=0.01)
        named = {n: p for n, p in trainer.denoiser.named_parameters() if "lora_A" in n}
        before = {n: p.detach().clone() for n, p in named.items()}
        trainer.update(0)
        for name, parameter in named.items():
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.01 * decay))


@row("adam_beta1")
def _(lab: Lab) -> None:
    for beta in (0.9, 0.5):
        for mean, _, grad in _moments(lab, adam_beta1=beta):
            torch.testing.assert_close(mean, (1 - beta) * grad, rtol=1e-4, atol=1e-12)


@row("adam_beta2")
def _(lab: Lab) -> None:
    for beta in (0.999, 0.9):
        for _, square, grad in _moments(lab, adam_beta2=beta):
            torch.testing.assert_close(square, (1 - beta) * grad.square(), rtol=1e-3, atol=1e-20)


def _moments(lab: Lab, **changes: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    trainer, grads = started(lab.trainer(**changes)), list[Tensor]()
    _before_step(trainer, grads)
    trainer.update(0)
    for parameter, grad in zip(trainer.parameters, grads, strict=True):
        state = trainer.optimizer.state[parameter]
        yield state["exp_avg"], state["exp_avg_sq"], grad


def _before_step(trainer: Any, grads: list[Tensor]) -> None:
    """Keeps the gradients that the optimizer gets."""
    trainer.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(p.grad.clone() for p in trainer.parameters))


@row("max_grad_norm")
def _(lab: Lab) -> None:
    """The whole gradient's norm where the optimizer takes it, and its direction."""
    norms, found = [], []
    for limit in (0.0, 1e-3, 1e9):
        trainer, grads = started(lab.trainer(max_grad_norm=limit)), list[Tensor]()
        _before_step(trainer, grads)
        trainer.update(0)
        flat = torch.cat([grad.flatten() for grad in grads])
        norms.append(float(flat.norm()))
        found.append(flat / flat.norm())
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[2] == pytest.approx(norms[0], rel=1e-5)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


@row("ema_decay")
def _(lab: Lab) -> None:
    """What is shown and saved: d average + (1 - d) weights, d = min(decay, (1 + n) / (10 + n))."""
    for decay in (0.15, 0.99):
        trainer = lab.trainer(ema_decay=decay)
        average = [p.detach().clone() for p in trainer.parameters]
        started(trainer)
        for n in range(3):
            trainer.update(n)
            share = min(decay, (1 + n) / (10 + n))
            average = [share * a + (1 - share) * p.detach()
                       for a, p in zip(average, trainer.parameters, strict=True)]
        live = [p.detach().clone() for p in trainer.parameters]
        with trainer.averaged():
            assert not torch.equal(trainer.parameters[0], live[0])
            for parameter, wanted in zip(trainer.parameters, average, strict=True):
                torch.testing.assert_close(parameter.detach(), wanted)
        assert torch.equal(trainer.parameters[0], live[0])
    assert lab.trainer().ema is None
    parts = lab.plan(ema_decay=0.99).phase("train").parts
    assert parts["average"] == parts["gradients"]


# --- text encoders ---

@row("text_encoder_rank")
def _(lab: Lab) -> None:
    """At the denoiser's strength alpha / rank, in the network as in the file."""
    for rank, found in ((0, 4), (2, 2)):
        for alpha in (None, 2.0):
            text = lab.trainer(text_encoder_lr=1e-3, text_encoder_rank=rank, lora_alpha=alpha).text
            assert text is not None
            shapes = {value.shape[0] for key, value in text.adapter_state().items()
                      if "lora_A" in key}
            assert shapes == {found}
            scales = {layer.scaling[lora.ADAPTER] for model in text.models.values()
                      for _, layer in lora.layers(model)}
            assert scales == {text.alpha / found} == {1.0 if alpha is None else 0.5}


@row("text_encoder_stop")
def _(lab: Lab) -> None:
    """Moves until then, rests after; the denoiser goes on."""
    trainer = started(lab.trainer(text_encoder_lr=1e-3, text_encoder_stop=1))
    assert any(name.startswith("text.") and way > 0 for name, way in moves(trainer, 0).items())
    text = [p.detach().clone() for p in trainer.text.parameters] if trainer.text else []
    own = [p.detach().clone() for p in trainer.parameters]
    trainer.update(1)
    assert trainer.text is not None
    assert text
    assert all(torch.equal(a, b) for a, b in zip(text, trainer.text.parameters, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(own, trainer.parameters, strict=True))
    never = started(lab.trainer(text_encoder_lr=1e-3))
    never.update(0)
    assert any(name.startswith("text.") and way > 0 for name, way in moves(never, 1).items())


@row("pivotal_tokens")
def _(lab: Lab) -> None:
    assert lab.trainer(trigger_word="red disc").text is None
    for count in (1, 3):
        trainer = lab.trainer(**WORDS | {"pivotal_tokens": count})
        assert trainer.text is not None
        word = trainer.text.word()
        assert word is not None
        assert word.word == "red disc"
        assert word.rows["text_encoder"].shape == (count, 32)


@row("pivotal_init")
def _(lab: Lab) -> None:
    """New words begin as the rows of this text's tokens, in turn."""
    for init, text in (("", "red disc"), ("blue", "blue")):
        trainer = lab.trainer(**WORDS, pivotal_init=init)
        assert trainer.text is not None
        word = trainer.text.word()
        assert word is not None
        tokenizer = trainer.parts.text["tokenizer"]
        table = trainer.text.rows["text_encoder"].table.weight
        ids = (tokenizer(text, add_special_tokens=False).input_ids * 2)[:2]
        assert torch.equal(word.rows["text_encoder"], table[ids])
