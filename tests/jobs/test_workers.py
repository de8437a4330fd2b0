"""The manager with the real engine in its real worker process, on the tiny base."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.config import TrainConfig
from core.jobs.control import Control
from core.jobs.manager import JobManager
from core.training.run import train
from tests import tiny


def until(happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_run_through_pause_save_sample_kill_and_resume(base: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        base_model=str(base), train_data_dir=str(tiny.pictures(tmp_path / "p")), lora_rank=2,
        output_dir=str(tmp_path / "out"), output_name="ink", max_train_steps=400, batch_size=2,
        learning_rate=1e-3, sample_prompts=["red disc"], sample_inference_steps=1)
    with JobManager() as manager:
        first = manager.start(config)
        until(lambda: manager.view(first).step >= 2)
        manager.ask(first, "pause")
        until(lambda: manager.view(first).state == "paused")
        held = manager.view(first).step
        time.sleep(0.5)
        assert manager.view(first).step <= held + 1
        manager.ask(first, "save")
        manager.ask(first, "sample")
        manager.ask(first, "go")
        until(lambda: manager.view(first).checkpoints and len(manager.view(first).samples) >= 2)
        os.kill(manager.view(first).pid, signal.SIGKILL)
        until(lambda: manager.view(first).state == "interrupted")
        second = manager.resume(first)
        view = manager.wait(second, 240)
        assert view.state == "done", view.fault
    assert view.result["proof"]["ok"]
    assert view.step == view.total == 400
    whole = config.with_changes(output_dir=str(tmp_path / "whole"))
    unbroken = load_file(train(whole, lambda event: None, Control())["lora"])
    resumed = load_file(view.result["lora"])
    assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)
