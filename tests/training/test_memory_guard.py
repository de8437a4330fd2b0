"""A run that is lowered while it goes makes the same updates, and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config import TrainConfig
from core.families.detection import Base
from core.jobs.control import Control
from core.jobs.events import Event, Note, Planned, Step
from core.memory.monitor import NvmlReader, Reading, Watch
from core.training import fallbacks, memory_guard
from core.training.run import train
from tests import nvml_stub, tiny

Make = Callable[..., TrainConfig]


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    pictures = tiny.pictures(tmp_path / "pictures", count=8)

    def config(name: str, **changes: Any) -> TrainConfig:
        return TrainConfig.model_validate({
            "base_model": str(base), "train_data_dir": str(pictures), "lora_rank": 4,
            "output_dir": str(tmp_path / name), "output_name": "ink", "batch_size": 4,
            "max_train_steps": 6, "save_precision": "fp32"} | changes)
    return config


class Crowd:
    """A memory of which others take nearly all once the run has made three steps."""

    total = 24_000.0

    def __init__(self) -> None:
        self.others = 1000.0

    def read(self) -> Reading:
        ours = 500.0
        return Reading(free_mb=self.total - self.others - ours, ours_mb=ours,
                       others_mb=self.others, total_mb=self.total)

    def close(self) -> None:
        pass


def run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, crowded_at: int = 0
        ) -> tuple[dict[str, Any], list[Event]]:
    crowd, events = Crowd(), list[Event]()
    monkeypatch.setattr(memory_guard.MemoryGuard, "_reader", lambda self: crowd)
    monkeypatch.setattr(memory_guard.MemoryGuard, "between_steps",
                        polled(memory_guard.MemoryGuard.between_steps))
    monkeypatch.setattr(memory_guard, "here", lambda kind: memory_guard.Machine(
        "cpu", "CPU", crowd.total, crowd.total - crowd.others))

    def emit(event: Event) -> None:
        events.append(event)
        if crowded_at and isinstance(event, Step) and event.step >= crowded_at:
            crowd.others = 22_900.0
    result = train(config, emit, Control())
    monkeypatch.undo()
    return result, events


def polled(ask: Callable[..., None]) -> Callable[..., None]:
    """The watching thread looks once a second; here it looks after every step."""
    def between(self: memory_guard.MemoryGuard, trainer: Any, step_s: float) -> None:
        assert self.watch
        self.watch.poll()
        ask(self, trainer, step_s)
    return between


def test_a_crowded_machine_lowers_the_run_not_the_result(
        make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(make("plain"), monkeypatch)
    lowered, events = run(make("lowered"), monkeypatch, crowded_at=1)
    notes = [e for e in events if isinstance(e, Note) and e.key == "engine.lowered_for_others"]
    assert notes
    assert notes[0].params["key"] == "batch_size"
    assert notes[0].params["value"] == 2
    assert lowered["memory"]["lowered"]["batch_size"] <= 2
    assert lowered["steps"] == plain["steps"] == 6
    before, after = load_file(plain["lora"]), load_file(lowered["lora"])
    assert before.keys() == after.keys()
    for key, value in before.items():       # sums in another order: rounding, nothing else
        assert torch.allclose(value, after[key], rtol=1e-3, atol=1e-6), key


def test_planned_and_real_stand_in_events_and_summary(
        make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    result, events = run(make("told"), monkeypatch)
    planned = [e for e in events if isinstance(e, Planned)]
    assert len(planned) == 1
    assert planned[0].plan["needs_mb"] == pytest.approx(result["memory"]["planned_mb"], rel=1e-6)
    assert result["memory"]["real_mb"] > 100
    assert {e.free_mb for e in events if isinstance(e, Step)} == {22_500.0}
    assert result["memory"]["lowered"] == {}


def test_every_step_of_lowering(make: Make) -> None:
    from tests.training.test_trainer import trainer_of
    trainer = trainer_of(make("steps"))
    assert [fallbacks.lower(trainer) for _ in range(4)] == [
        {"batch_size": 2}, {"batch_size": 1}, {"gradient_checkpointing": True}, None]


def test_micro_batches_add_up_to_the_same_gradient(make: Make) -> None:
    from tests.training.test_trainer import gradient, trainer_of
    whole = trainer_of(make("whole"))
    parts = trainer_of(make("parts"))
    fallbacks.lower(parts)
    batches = whole.sampler.update(0)
    assert torch.allclose(gradient(whole, batches), gradient(parts, batches),
                          rtol=1e-4, atol=1e-7)


def test_a_base_without_a_plan_still_trains(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise NotImplementedError("aten::odd has no meta kernel")
    monkeypatch.setattr(memory_guard.plan, "plan_run", broken)
    events: list[Event] = []
    result = train(make("odd", max_train_steps=1), events.append, Control())
    assert result["proof"]["ok"]
    assert "memory" not in result
    assert any(isinstance(e, Note) and e.key == "engine.no_plan" for e in events)


def test_memory_that_spills_into_ram_lowers_the_run(make: Make) -> None:
    """A full card by NVML and steps six times slower: Windows says no more than that."""
    from tests.training.test_trainer import trainer_of
    events: list[Event] = []
    config, card = make("spill"), nvml_stub.Card.of(8)
    trainer = trainer_of(config)
    sentinel = memory_guard.MemoryGuard(config, Base.of(Path(config.base_model)),
                                        torch.device("cpu"),
                                        memory_guard.memory_data(trainer.examples.items, config),
                                        events.append)

    def steps(*seconds: float) -> list[int]:
        for one in seconds:
            sentinel.between_steps(trainer, one)
        return [e.params["value"] for e in events
                if isinstance(e, Note) and e.key == "engine.lowered_for_spill"]
    with nvml_stub.loaded([card]):
        sentinel.watch = Watch(NvmlReader(0, held=lambda: 7000.0), 100.0, 10.0, events.append,
                               spills=True)
        sentinel.watch.poll()
        assert steps(*[1.0] * 9, *[6.0] * 9) == []          # slow alone is no sign
    with nvml_stub.loaded([replace(card, free_mb=90)]):
        sentinel.watch = Watch(NvmlReader(0, held=lambda: 7000.0), 100.0, 10.0, events.append,
                               spills=True)
        sentinel.watch.poll()
        assert steps(*[1.0] * 9) == []                      # nor is full alone
        assert steps(*[6.0] * 5) == [2]
        assert trainer.micro_batch == 2
        assert steps(*[1.2] * 9) == [2]                     # it helped
        assert steps(*[6.0] * 5) == [2, 1]
    assert [e.key for e in events if isinstance(e, Note)].count("watch.spilling") == 2


def test_a_run_that_holds_more_than_planned_says_so(make: Make, monkeypatch: pytest.MonkeyPatch
                                                    ) -> None:
    from core.cli import progress
    from core.memory import plan
    # this process holds what tests before left: the plan is to have room for that
    monkeypatch.setitem(plan.PROCESS_MB, "cpu", 8000.0)
    result, events = run(make("fits"), monkeypatch)
    assert result["memory"]["more_than_planned"] is False
    assert not [e for e in events if isinstance(e, Note) and e.key == "engine.more_than_planned"]
    monkeypatch.setitem(plan.PROCESS_MB, "cpu", 1.0)        # a plan that forgets the process
    result, events = run(make("more"), monkeypatch)
    memory = result["memory"]
    assert memory["more_than_planned"] is True
    (note,) = [e for e in events if isinstance(e, Note) and e.key == "engine.more_than_planned"]
    assert note.params["held"] == round(memory["real_mb"]) > note.params["planned"]
    assert "plan of this run was too low" in "\n".join(progress.summary(result))


@pytest.mark.thorough
def test_planned_and_held_are_of_one_kind_on_the_cpu(make: Make) -> None:
    """Without other tests' leftovers: a run in a process of its own holds what was planned, its
    private bytes compared with them, within what allocators keep."""
    import json
    import subprocess
    import sys

    from core.config import dump_yaml
    made = make("alone")
    code = ("import json, sys; from core.config import parse_train_config\n"
            "from core.training.run import train; from core.jobs.control import Control\n"
            "config = parse_train_config(sys.stdin.read(), 'x.yaml')\n"
            "print(json.dumps(train(config, lambda event: None, Control())['memory']))")
    done = subprocess.run([sys.executable, "-c", code], input=dump_yaml(made), text=True,
                          capture_output=True, check=True)
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["more_than_planned"] is False
    assert 0.6 < memory["real_mb"] / memory["planned_mb"] < 1.08
