"""The proof at a run's end: a file that isn't what was trained must fail it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.training.output import OutputWriter
from core.training.verify import TOLERANCE
from tests.keys.lab import Lab, Run

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def run_with(lab: Lab, monkeypatch: pytest.MonkeyPatch, change: Change, **more: Any) -> Run:
    """A run whose file is changed between its writing and its proof."""
    plain = OutputWriter.final

    def final(self: OutputWriter, step: int) -> Path:
        path = plain(self, step)
        save_file({k: v.clone() for k, v in change(load_file(path)).items()}, path,
                  {"ss_base_model_version": "sd_v1"})
        return path
    monkeypatch.setattr(OutputWriter, "final", final)
    return lab.run(output_dir=str(lab.folder / "proofs"), learning_rate=0.05,
                   target_modules="attention", **more)


def test_the_file_as_it_was_written_is_proven(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = run_with(lab, monkeypatch, lambda tensors: tensors).result["proof"]
    assert proof["ok"]
    assert proof["matched"] == proof["modules"] > 0
    assert proof["from_memory"] < 0.1 < TOLERANCE < proof["change"]     # fp16's rounding alone


@pytest.mark.parametrize("change", [
    lambda tensors: {k: -v if "lora_up" in k else v for k, v in tensors.items()},
    lambda tensors: {k: v * 0.2 if "lora_up" in k else v for k, v in tensors.items()},
    lambda tensors: {k: v.flip(0) if "lora_down" in k else v for k, v in tensors.items()},
    lambda tensors: {k: v * 4 if "alpha" in k else v for k, v in tensors.items()},
], ids=["opposite", "weaker", "other-rows", "other-alpha"])
def test_another_adapter_than_the_trained_one_fails(
        lab: Lab, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """It loads, fits every layer and changes the picture: only memory tells."""
    run = run_with(lab, monkeypatch, change)
    proof = run.result["proof"]
    assert not proof["ok"]
    assert proof["matched"] == proof["modules"]
    assert proof["change"] > 0
    assert proof["from_memory"] > TOLERANCE
    assert run.notes("engine.proof_failed")
    assert not run.notes("engine.proof")


def test_a_file_that_changes_nothing_fails(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = run_with(lab, monkeypatch, lambda tensors: {
        k: torch.zeros_like(v) if "lora_up" in k else v for k, v in tensors.items()}
    ).result["proof"]
    assert not proof["ok"]
    assert proof["change"] == 0


def test_an_adapter_that_learned_nothing_is_no_proof(lab: Lab) -> None:
    """File and memory agree, on the base's own picture."""
    proof = lab.run(output_dir=str(lab.folder / "nothing"), learning_rate=1e-12,
                    max_train_steps=1).result["proof"]
    assert proof["from_memory"] == proof["change"] == 0
    assert not proof["ok"]


def test_layers_that_the_base_lacks_fail(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of one block are of none: the others are found, those aren't."""
    run = run_with(lab, monkeypatch, lambda tensors: {
        k.replace("mid_block_attentions_0", "mid_block_attentions_7"): v
        for k, v in tensors.items()})
    assert not run.result["proof"]["ok"]


def test_the_average_is_what_is_proven(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = run_with(lab, monkeypatch, lambda tensors: tensors, ema_decay=0.5).result["proof"]
    assert proof["ok"], proof
