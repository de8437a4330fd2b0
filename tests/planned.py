"""For tests of plans: a planner by arithmetic, and a home whose traces last for the session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.config import TrainConfig, size_of
from core.families.detection import Base
from core.memory import advisor, plan
from core.memory.advisor import Shape
from core.memory.plan import Machine, Phase, Plan

KEPT = {"same": 1.0, "int8": 0.5, "fp8": 0.5, "nf4": 0.25}
NOWHERE = Base(Path("nowhere"), "sd15", "0")
SHAPE = Shape(512, 64, 860_000_000, 1640.0)


@dataclass(frozen=True)
class Synthetic:
    """Needs that grow with each setting as a real base's do, in MiB."""

    machine: Machine
    weights: float = 1640.0             # in 16 bits
    picture: float = 1100.0             # activations of one picture at 512 px, 16 bits
    adapter: float = 1.6                # a rank, fp32
    drawing: float = 600.0              # decoding a picture

    def __call__(self, config: TrainConfig) -> Plan:
        width, height = size_of(config.max_resolution) or (512, 512)
        area = width * height / 512 ** 2
        half = plan.numbers_of(config.precision, self.machine, "")["compute"] != "fp32"
        wide = 1 if half else 2
        base = self.weights * wide * KEPT[config.base_precision] * (1 - 0.9 * config.offload)
        kept = 0.25 if config.gradient_checkpointing else 1.0
        states = 0.5 if config.optimizer == "adamw8bit" else 2.0
        train = {"denoiser": base, "adapter": self.adapter * config.lora_rank,
                 "optimizer": self.adapter * config.lora_rank * states,
                 "activations": self.picture * wide * area * config.batch_size * kept}
        drawn = {"denoiser": base, "activations": self.drawing * wide}
        shown = {"preview": {**drawn, "more": 200.0 * wide}} if config.sample_prompts else {}
        phases = {"texts": {"text_encoder": 240.0}, "train": train, "verify": drawn, **shown,
                  "cache": {"vae": 160.0, "activations": 300 * area * config.cache_batch_size}}
        return Plan(
            machine=self.machine, phases=tuple(Phase(n, p) for n, p in phases.items()),
            outside={"context": 450.0}, ram={"process": 2600.0, "waiting": base * config.offload},
            disk={"lora": 10.0}, bucket=(width, height),
            parameters=200_000 * config.lora_rank, base_parameters=SHAPE.parameters)


def card(gb: float, held_mb: float = 700.0, **more: float) -> Machine:
    total = gb * 1024
    return Machine("cuda", f"{gb:g} GB", total, max(0.0, total - held_mb), (8, 6), **more)


def advise(machine: Machine, purpose: str = "style", data: plan.Data | None = None,
           planner: Callable[[TrainConfig], Plan] | None = None) -> advisor.Suggestion:
    return advisor.suggest(machine, NOWHERE, data, purpose, planner or Synthetic(machine), SHAPE)


@pytest.fixture(scope="session")
def lasting_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture
def traces(lasting_home: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real plans, traced once a session: the cache of all tests that ask for this is one."""
    monkeypatch.setenv("DARKROOM_HOME", str(lasting_home))
    return lasting_home
