"""SIGKILL at random moments, caching and saving included: the resumed run ends as an unbroken one.

Real processes, killed for real; `tests/warm.py` only spares their imports.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config import TrainConfig, dump_yaml
from core.jobs import runs
from core.training import checkpoint
from tests import tiny
from tests.warm import Warm

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

RUN = """
import sys
from pathlib import Path
from core.jobs import worker
from core.jobs.control import Control
sys.exit(worker.run_job("train", None, Path(sys.argv[1]), Control()).state != "done")
"""


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm


class Rig:
    """Runs of one config, each into folders of its own; the cache is emptied before each."""

    def __init__(self, warm: Warm, base: Path, folder: Path, home: Path, **changes: Any) -> None:
        self.warm, self.folder, self.home = warm, folder, home
        self.config = TrainConfig.model_validate({
            "base_model": str(base), "train_data_dir": str(tiny.pictures(folder / "p", 8)),
            "lora_rank": 2, "output_name": "ink", "batch_size": 2, "max_train_steps": 10,
            "learning_rate": 1e-3, "lr_scheduler": "cosine", "save_steps": 1, "flip": True,
            "keep_checkpoints": 2, "lora_dropout": 0.1, "caption_dropout": 0.2,
            "validation_split": 0.1, "validation_steps": 5, "save_precision": "fp32",
            "sample_prompts": ["red disc"], "sample_every": 6, "sample_inference_steps": 1,
            "cache_batch_size": 3} | changes)

    def output(self, name: str) -> Path:
        return self.folder / name

    def fresh(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        home = self.home / name
        (home / "cache").mkdir(parents=True)
        (home / "cache" / "plans").symlink_to(self.home / "cache" / "plans")
        monkeypatch.setenv("DARKROOM_HOME", str(home))

    def go(self, name: str, after: float | None = None) -> bool:
        """One process; killed `after` seconds. -> whether the run came to its end"""
        config = self.config.with_changes(output_dir=str(self.output(name)), resume=True)
        run = runs.create_run("train", dump_yaml(config), "ink")
        child = self.warm.start(RUN, str(run))
        if after is not None:
            time.sleep(after)
            child.kill()
        code = child.wait()
        assert code in (0, -9), runs.log_tail(run.name) or runs.load_run(run.name).fault
        return code == 0

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """The final LoRA, and the state that it was written from: weights, moments, generators."""
        last = checkpoint.find([self.output(name)], "ink")[0]
        return load_file(self.output(name) / "ink.safetensors") | load_file(
            last / "state.safetensors")


def kill_and_compare(rig: Rig, monkeypatch: pytest.MonkeyPatch, kills: int, seed: int) -> None:
    print(f"seed {seed}")                   # a failure can be done again
    dice, done, number = random.Random(seed), 0, 0
    rig.fresh(monkeypatch, "warm-up")       # plans are traced once
    rig.go("warm-up")
    rig.fresh(monkeypatch, "whole")
    began = time.perf_counter()
    assert rig.go("whole")
    length = time.perf_counter() - began
    expected = rig.state("whole")
    while done < kills:
        number += 1
        name = f"broken-{number}"
        rig.fresh(monkeypatch, name)
        moments = []
        while done < kills:
            moments.append(round(dice.uniform(0.0, length), 3))
            if rig.go(name, moments[-1]):
                break
            done += 1
        else:
            assert rig.go(name)
        found = rig.state(name)
        assert found.keys() == expected.keys()
        unequal = [key for key, value in expected.items() if not torch.equal(value, found[key])]
        assert not unequal, (seed, moments, unequal[:5])
        left = {path.name for path in (rig.output(name) / "checkpoints").iterdir()}
        assert left >= {"ink-000009", "ink-000010"}, moments
        assert not [one for one in left if one.startswith(".")], moments
    print(f"{done} kills in {number} runs of {length:.2f} s")


@pytest.mark.thorough
def test_twenty_kills_cost_nothing(warm: Warm, base: Path, tmp_path: Path, own_home: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_compare(Rig(warm, base, tmp_path, own_home), monkeypatch, 20, 20_260_119)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fifty_kills_cost_nothing(precision: str, warm: Warm, base: Path, tmp_path: Path,
                                  own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(warm, base, tmp_path, own_home, precision=precision)
    kill_and_compare(rig, monkeypatch, 50, random.randrange(10**9))


# What a checkpoint has to hold beside the weights of a plain run.
VARIANTS: dict[str, dict[str, Any]] = {
    "ema": {"ema_decay": 0.9, "shuffle_tags": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_warmup_steps": 3},
    "schedulefree": {"optimizer": "schedulefree", "lr_scheduler": "constant", "sample_every": 3},
    "dora": {"adapter": "dora", "gradient_accumulation_steps": 2},
    "text": {"text_encoder_lr": 1e-4, "trigger_word": "inkring", "pivotal_tokens": 1},
    "reg": {"reg_data_dir": "p", "ema_decay": 0.9},
    "bf16": {"precision": "bf16", "gradient_checkpointing": True},
    "adafactor": {"optimizer": "adafactor", "loss_type": "huber", "multires_noise_iterations": 4},
    "came": {"optimizer": "came", "adapter": "pissa", "text_encoder_lr": 1e-4,
             "text_encoder_stop": 5, "lr_scheduler": "cosine_with_restarts", "lr_cycles": 2},
    "schedulefree text": {"optimizer": "schedulefree", "lr_scheduler": "constant",
                          "ema_decay": 0.9, "text_encoder_lr": 1e-4},
    "lokr": {"adapter": "lokr", "lora_dropout": 0.0, "optimizer": "lion", "learning_rate": 1e-4},
    "adamw8bit": {"optimizer": "adamw8bit", "reg_from_base": 2, "trigger_word": "inkring"},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kills_cost_no_variant_anything(variant: str, warm: Warm, base: Path, tmp_path: Path,
                                        own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = dict(VARIANTS[variant])
    if "reg_data_dir" in changes:
        changes["reg_data_dir"] = str(tiny.pictures(tmp_path / "reg", 4))
    kill_and_compare(Rig(warm, base, tmp_path, own_home, **changes), monkeypatch, 6, 20_261_130)
