"""Memory that runs out and losses that are no numbers: what the run comes to, against one that had
the gentler setting from the start."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config import TrainConfig
from core.errors import UserError
from core.families.detection import Base
from core.jobs.control import Control
from core.jobs.events import Event, Note, Sample, Step
from core.training import checkpoint, fallbacks, previews, progress, recovery
from core.training.memory_guard import MemoryGuard, memory_data
from core.training.recovery import Recovery
from core.training.run import train
from core.training.trainer import Trainer
from tests import tiny
from tests.training.test_trainer import trainer_of

Make = Callable[..., TrainConfig]
Failing = Callable[[Trainer], contextlib.AbstractContextManager[None]]


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    pictures = tiny.pictures(tmp_path / "pictures", count=8)

    def config(name: str = "out", **changes: Any) -> TrainConfig:
        return TrainConfig.model_validate({
            "base_model": str(base), "train_data_dir": str(pictures), "lora_rank": 2,
            "output_dir": str(tmp_path / name), "output_name": "ink", "batch_size": 4,
            "max_train_steps": 3, "save_precision": "fp32", "learning_rate": 1e-3} | changes)
    return config


class Drive:
    """Updates with their rescue, and nothing around them."""

    def __init__(self, config: TrainConfig) -> None:
        self.events: list[Event] = []
        self.trainer = trainer_of(config)
        guard = MemoryGuard(config, Base.of(Path(config.base_model)), torch.device("cpu"),
                            memory_data(self.trainer.examples.items, config), self.events.append)
        self.recovery = Recovery(self.trainer, guard, self.events.append)

    def to_end(self, read: bool = True) -> dict[str, torch.Tensor]:
        done = self.recovery.begin(0)
        while done < self.trainer.total:
            done = self.recovery.update(done)
            if read:
                self.trainer.mean_loss()
                done = self.recovery.look(done)
        return self.state()

    def state(self) -> dict[str, torch.Tensor]:
        state = self.trainer.snapshot(0)
        return state.adapter | state.optimizer

    def notes(self, key: str) -> list[dict[str, Any]]:
        return [e.params for e in self.events if isinstance(e, Note) and e.key == key]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [k for k, v in expected.items() if not torch.equal(v, found[k])] == []


# --- memory: where and when an allocation fails ---

def raise_at(number: int) -> Callable[..., None]:
    """Fails at its call `number`, once."""
    calls = iter(range(10**9))

    def hook(*_: Any) -> None:
        if next(calls) == number:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return hook


def in_forward(call: int, layer: str = "to_v") -> Failing:
    @contextlib.contextmanager
    def failing(trainer: Trainer) -> Iterator[None]:
        module = next(m for n, m in trainer.denoiser.named_modules() if n.endswith(layer))
        handle = module.register_forward_hook(raise_at(call))
        yield
        handle.remove()
    return failing


def in_backward(call: int) -> Failing:
    """After some gradients of the micro-batch were added, before others."""
    @contextlib.contextmanager
    def failing(trainer: Trainer) -> Iterator[None]:
        parameter = trainer.parameters[len(trainer.parameters) // 2]
        handle = parameter.register_post_accumulate_grad_hook(raise_at(call))
        yield
        handle.remove()
    return failing


def in_step(call: int) -> Failing:
    """After half of the weights were changed."""
    @contextlib.contextmanager
    def failing(trainer: Trainer) -> Iterator[None]:
        whole, numbers = trainer.optimizer.step, iter(range(10**9))

        def half() -> None:
            if next(numbers) != call:
                return whole()
            for parameter in trainer.parameters[::2]:
                parameter.grad = None
            whole()
            raise torch.OutOfMemoryError("CUDA out of memory")
        trainer.optimizer.step = half  # type: ignore[method-assign, assignment]
        yield
        trainer.optimizer.step = whole  # type: ignore[method-assign]
    return failing


@pytest.mark.parametrize(("failing", "accumulation"), [
    (in_forward(0), 1), (in_forward(0, "conv_out"), 1), (in_forward(1), 2),
    (in_backward(0), 1), (in_backward(1), 2), (in_step(0), 1), (in_step(2), 1)])
def test_the_update_is_that_of_smaller_micro_batches(
        make: Make, failing: Failing, accumulation: int) -> None:
    """To the bit: what was added before the failure doesn't count twice, nothing is lost."""
    config = make(gradient_accumulation_steps=accumulation, lora_dropout=0.1)
    gentle = Drive(config)
    fallbacks.apply(gentle.trainer, {"batch_size": 2})
    broken = Drive(config)
    with failing(broken.trainer):
        found = broken.to_end(read=False)
    assert_equal(found, gentle.to_end(read=False))
    assert [n["value"] for n in broken.notes("engine.lowered_for_memory")] == [2]
    assert broken.trainer.mean_loss() == gentle.trainer.mean_loss()


def test_fp16s_scaler_survives_a_failure(make: Make) -> None:
    config = make(precision="fp16", max_train_steps=3)
    gentle = Drive(config)
    fallbacks.apply(gentle.trainer, {"batch_size": 2})
    broken = Drive(config)
    with in_step(0)(broken.trainer):
        found = broken.to_end(read=False)
    assert_equal(found, gentle.to_end(read=False))
    assert broken.trainer.scaler.state_dict() == gentle.trainer.scaler.state_dict()


def test_every_way_is_tried_and_the_last_failure_is_a_fault(make: Make) -> None:
    drive = Drive(make())

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")
    drive.trainer.denoiser.conv_out.register_forward_hook(never)
    with pytest.raises(UserError) as caught:
        drive.to_end()
    assert [(n["key"], n["value"]) for n in drive.notes("engine.lowered_for_memory")] == [
        ("batch_size", 2), ("batch_size", 1), ("gradient_checkpointing", True)]
    assert caught.value.code == "engine.out_of_memory"
    fixed = [make().with_changes(**fix.changes) for fix in caught.value.fixes]
    assert [one.base_precision for one in fixed] == ["nf4", "same"]
    assert all(p.grad is None for p in drive.trainer.parameters)


@pytest.mark.parametrize("error", [ZeroDivisionError("1 / 0"),
                                   RuntimeError("mat1 and mat2 shapes cannot be multiplied")])
def test_another_error_is_not_taken_for_memory(make: Make, error: Exception) -> None:
    drive = Drive(make())

    def fails(*_: Any) -> None:
        raise error
    drive.trainer.denoiser.conv_out.register_forward_hook(fails)
    with pytest.raises(type(error)):
        drive.to_end()
    assert not drive.trainer.lowered


def test_a_scale_that_was_found_outlives_a_failure(make: Make) -> None:
    """A scaler that began anew would skip a dozen updates until it fits again."""
    trainer = Drive(make(precision="fp16")).trainer
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {
        "scale": 512.0, "_growth_tracker": 7})
    trainer.accumulate(trainer.sampler.update(0))
    fallbacks.abandon(trainer)
    assert trainer.scaler.state_dict()["scale"] == 512
    assert trainer.scaler.state_dict()["_growth_tracker"] == 7
    assert all(p.grad is None for p in trainer.parameters)


def test_a_failed_update_leaves_no_memory_behind(make: Make) -> None:
    """The error's frames hold the activations: they must be gone before the next try."""
    drive, alive = Drive(make()), []

    class Large:
        pass

    def fail(*_: Any) -> None:
        large = Large()
        alive.append(weakref.ref(large))
        if len(alive) < 3:
            assert not any(ref() for ref in alive[:-1])
            raise torch.OutOfMemoryError("CUDA out of memory")
    drive.trainer.denoiser.conv_out.register_forward_hook(fail)
    drive.to_end()
    assert len(alive) > 3


def test_a_resumed_run_stays_lowered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for two samples at once: the broken run learns it once, and ends as the unbroken."""
    failures: list[int] = []
    whole_losses = Trainer.losses

    def small(self: Trainer, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(latents) > 2:
            failures.append(len(latents))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_losses(self, latents, *rest)
    monkeypatch.setattr(Trainer, "losses", small)
    whole = train(make("whole"), lambda event: None, Control())
    assert failures == [4]
    control, broken = Control(), make("broken")
    stopped = train(broken, lambda e: control.ask("stop") if isinstance(e, Step) else None, control)
    assert 0 < stopped["steps"] < 3
    failures.clear()
    events: list[Event] = []
    resumed = train(broken.with_changes(resume=True), events.append, Control())
    assert failures == []
    assert [e.params["value"] for e in events if isinstance(e, Note)
            and e.key == "engine.stays_lowered"] == [2]
    assert resumed["memory"]["lowered"] == {"batch_size": 2}
    assert_equal(load_file(resumed["lora"]), load_file(whole["lora"]))


# --- previews ---

def failing_previews(monkeypatch: pytest.MonkeyPatch, error: Exception, until: int = 10**9) -> None:
    real, calls = previews.Previewer._one, iter(range(10**9))

    def one(self: Any, *rest: Any) -> str:
        if next(calls) < until:
            torch.manual_seed(1)
            raise error
        return real(self, *rest)
    monkeypatch.setattr(previews.Previewer, "_one", one)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   OSError(28, "No space left on device"), ValueError("odd")])
def test_a_preview_never_ends_a_run(make: Make, monkeypatch: pytest.MonkeyPatch,
                                    error: Exception) -> None:
    plain = train(make("plain", lora_dropout=0.1), lambda event: None, Control())
    failing_previews(monkeypatch, error)
    events: list[Event] = []
    found = train(make("drawn", sample_prompts=["a"], sample_every=2, lora_dropout=0.1),
                  events.append, Control())
    told = [e.params["step"] for e in events if isinstance(e, Note)
            and e.key == "engine.no_preview"]
    assert (found["state"], told, found["samples"]) == ("done", [0, 2, 3], [])
    assert_equal(load_file(found["lora"]), load_file(plain["lora"]))


def test_a_preview_that_does_not_fit_is_drawn_in_tiles(
        make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_previews(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), until=1)
    events: list[Event] = []
    train(make(sample_prompts=["a"], sample_every=2, sample_inference_steps=1, sample_size="64,64"),
          events.append, Control())
    assert [e.step for e in events if isinstance(e, Sample)] == [0, 2, 3]
    assert not [e for e in events if isinstance(e, Note) and e.key == "engine.no_preview"]


# --- numbers that aren't ---

@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_batch_is_skipped_and_named(make: Make, where: str, precision: str) -> None:
    """As if those updates weren't there: weights, moments and step counts."""
    config = make(max_train_steps=8, batch_size=1, precision=precision)
    drive, plain = Drive(config), Drive(config)
    bad = drive.trainer.sampler.update(2)[0].indices[0]
    poisoned = [n for n in range(8) if drive.trainer.sampler.update(n)[0].indices == (bad,)]
    if where == "loss":
        drive.trainer.examples.latents[bad] = torch.full_like(
            drive.trainer.examples.latents[bad], float("nan"))
    else:
        numbers = iter([n for n in range(8)])
        drive.trainer.parameters[3].register_hook(
            lambda grad: grad * (float("inf") if next(numbers) in poisoned else 1.0))
    found = drive.to_end()
    for number in range(8):
        if number not in poisoned:
            plain.trainer.update(number)
    assert_equal(found, plain.state())
    name = drive.trainer.examples.items[bad].picture.path.name
    assert [n["pictures"] for n in drive.notes("engine.skipped")] == [name] * len(poisoned)
    assert not drive.notes("engine.went_back")


def test_fused_kernels_skip_on_the_device() -> None:
    """What the GPU's way counts on: found_inf leaves weights, moments and step counts alone."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer: Any = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    for bad, expected in ((0.0, 1.0), (1.0, 1.0), (0.0, 2.0)):
        parameter.grad = torch.full((3,), float("nan") if bad else 1.0)
        before = parameter.detach().clone()
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(bad)
        optimizer.step()
        assert torch.equal(parameter, before) == bool(bad)
        assert float(optimizer.state[parameter]["step"]) == expected


def diverging(monkeypatch: pytest.MonkeyPatch, most: float) -> None:
    """Losses are no numbers once a weight of the LoRA's B matrices is above `most`."""
    real = Trainer.losses

    def losses(self: Trainer, *rest: Any) -> torch.Tensor:
        largest = max(float(p.detach().abs().max()) for p in self.parameters[1::2])
        return real(self, *rest) * (float("nan") if largest > most else 1.0)
    monkeypatch.setattr(Trainer, "losses", losses)


def test_a_diverging_run_goes_back_and_slower(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's step is about the rate: 12 steps of 1e-2 pass 0.07, 12 of 5e-3 don't."""
    diverging(monkeypatch, 0.07)
    drive = Drive(make(max_train_steps=12, learning_rate=1e-2))
    found = drive.to_end()
    notes = drive.notes("engine.went_back")
    assert [(n["to"], n["key"], n["value"]) for n in notes] == [(0, "learning_rate", 5e-3)]
    assert notes[0]["pictures"]
    slow = Drive(make(max_train_steps=12, learning_rate=5e-3))
    assert_equal(found, slow.to_end())
    assert checkpoint.State(0, {}, {}, {}).lowered == {}
    assert drive.trainer.snapshot(12).lowered == {"learning_rate": 5e-3}


def test_it_returns_to_the_older_of_two_good_states(make: Make, monkeypatch: pytest.MonkeyPatch
                                                    ) -> None:
    """The newer one may hold the trouble's start."""
    diverging(monkeypatch, 0.07)
    monkeypatch.setattr(recovery, "GOOD_EVERY", 2)
    drive = Drive(make(max_train_steps=12, learning_rate=1e-2))
    done, good = drive.recovery.begin(0), [0]
    while not drive.notes("engine.went_back"):
        done = drive.recovery.update(done)
        drive.trainer.mean_loss()
        done = drive.recovery.look(done)
        if done % 2 == 0 and not drive.trainer.skipped and done > good[-1]:
            good.append(done)
        drive.recovery.keep(done)
    assert len(good) > 2
    assert done == drive.notes("engine.went_back")[0]["to"] == good[-2]


def test_fp16_that_overflows_goes_on_in_bf16(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.losses

    def losses(self: Trainer, *rest: Any) -> torch.Tensor:
        half = self.precision.compute == torch.float16
        return real(self, *rest) * (float("inf") if half else 1.0)
    monkeypatch.setattr(Trainer, "losses", losses)
    drive = Drive(make(max_train_steps=24, batch_size=1, precision="fp16"))
    found = drive.to_end()
    assert [(n["to"], n["value"]) for n in drive.notes("engine.went_back")] == [(0, "bf16")]
    assert not drive.trainer.scaler.is_enabled()
    assert all(torch.isfinite(value).all() for value in found.values())
    assert any(value.abs().sum() > 0 for key, value in found.items() if "lora_B" in key)


def test_after_three_returns_it_ends_with_a_fault(make: Make,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, -1.0)
    drive = Drive(make(max_train_steps=30))
    with pytest.raises(UserError) as caught:
        drive.to_end()
    fault = caught.value
    assert fault.code == "engine.not_finite"
    assert [n["value"] for n in drive.notes("engine.went_back")] == [5e-4, 2.5e-4, 1.25e-4]
    assert ".png" in fault.params["pictures"]
    assert [fix.changes for fix in fault.fixes] == [{"learning_rate": 6.25e-5}]
    assert all(torch.isfinite(value).all() for value in drive.state().values())


def test_a_whole_run_goes_back_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress, checkpoints and the final file of a run that went back once."""
    diverging(monkeypatch, 0.07)
    monkeypatch.setattr(progress, "SHOW_EVERY_S", 0.0)
    events: list[Event] = []
    result = train(make(max_train_steps=12, learning_rate=1e-2), events.append, Control())
    steps = [e.step for e in events if isinstance(e, Step)]
    assert steps[-1] == 12
    assert any(b < a for a, b in itertools.pairwise(steps))
    assert result["memory"]["lowered"] == {"learning_rate": 5e-3}
    assert result["proof"]["ok"]
