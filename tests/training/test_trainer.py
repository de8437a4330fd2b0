from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core import families
from core.adapters import lora
from core.config import TrainConfig
from core.dataset.examples import Encoder, find
from core.dataset.sampler import Batch
from core.errors import UserError
from core.importers import load_train_config
from core.jobs.control import Control
from core.jobs.events import Checkpoint, Event, Note, Sample, Step
from core.training import checkpoint
from core.training.run import train
from core.training.trainer import Trainer
from core.weights.precision import choose
from tests import tiny

Make = Callable[..., TrainConfig]


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    pictures = tiny.pictures(tmp_path / "pictures")

    def config(**changes: Any) -> TrainConfig:
        values = {"base_model": str(base), "train_data_dir": str(pictures), "lora_rank": 4,
                  "output_dir": str(tmp_path / "out"), "output_name": "ink", "batch_size": 2,
                  "max_train_steps": 4, "learning_rate": 1e-3} | changes
        return TrainConfig.model_validate(values)
    return config


def run(config: TrainConfig, control: Control | None = None) -> tuple[dict[str, Any], list[Event]]:
    events: list[Event] = []
    return train(config, events.append, control or Control()), events


def trainer_of(config: TrainConfig) -> Trainer:
    family, precision = families.get("sd15"), choose(config.precision, "cpu")
    source = Path(config.base_model)
    parts = family.load(source, precision)
    control, emit = Control(), lambda event: None
    examples = find(config, Path(config.train_data_dir), None, parts.native_size,
                    parts.bucket_step, emit)
    Encoder(family, source, precision, config, emit, control).fill(examples)
    return Trainer(config, family, parts, precision, examples, emit, control)


def gradient(trainer: Trainer, batches: list[Batch]) -> torch.Tensor:
    trainer.accumulate(batches)
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


def test_run_leaves_a_proven_file(make: Make, tmp_path: Path) -> None:
    result, events = run(make(save_steps=2, validation_split=0.2))
    assert result["state"] == "done"
    assert result["proof"]["ok"], result["proof"]
    assert result["proof"]["matched"] == result["proof"]["modules"] > 0
    assert Path(result["lora"]) == tmp_path / "out" / "ink.safetensors"
    assert result["best"]["step"] in (2, 4)
    steps = [e for e in events if isinstance(e, Step)]
    assert steps[-1].step == steps[-1].total == 4
    assert [e.step for e in events if isinstance(e, Checkpoint) and not e.final] == [2, 4]


def test_equal_seeds_give_equal_files(make: Make, tmp_path: Path) -> None:
    files = [run(make(output_dir=str(tmp_path / name), flip=True, caption_dropout=0.3,
                      shuffle_tags=True, lora_dropout=0.1))[0]["lora"] for name in "ab"]
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = load_file(run(make(output_dir=str(tmp_path / "c"), seed=43))[0]["lora"])
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_accumulation_equals_one_batch(make: Make) -> None:
    """Batch 4 and 1 x 4 see the same samples and noise: one gradient. Tolerance: fp32 sums in
    another order."""
    whole = trainer_of(make(batch_size=4))
    batch = next(b for n in range(2) for b in whole.sampler.update(n) if len(b.indices) == 4)
    parts = [Batch((i,), (n,)) for i, n in zip(batch.indices, batch.numbers, strict=True)]
    expected, found = gradient(whole, [batch]), gradient(trainer_of(make(batch_size=4)), parts)
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))


def test_checkpointing_changes_memory_not_the_gradient(make: Make) -> None:
    plain, saving = trainer_of(make()), trainer_of(make(gradient_checkpointing=True))
    batches = plain.sampler.update(0)
    torch.testing.assert_close(gradient(saving, batches), gradient(plain, batches),
                               rtol=1e-5, atol=1e-8)


def test_resume_equals_an_unbroken_run(make: Make, tmp_path: Path) -> None:
    whole, _ = run(make(output_dir=str(tmp_path / "whole"), max_train_steps=6, lora_dropout=0.1,
                        lr_scheduler="cosine"))
    control = Control()
    broken = make(output_dir=str(tmp_path / "broken"), max_train_steps=6, lora_dropout=0.1,
                  lr_scheduler="cosine")
    seen: list[Event] = []

    def stop_at_three(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Step) and event.step >= 1:
            control.ask("stop")
    stopped = train(broken, stop_at_three, control)
    assert stopped["state"] == "stopped"
    assert 0 < stopped["steps"] < 6
    resumed, events = run(broken.with_changes(resume=True))
    assert any(isinstance(e, Note) and e.key == "engine.resumed" for e in events)
    first, second = load_file(whole["lora"]), load_file(resumed["lora"])
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_file_that_is_there_is_kept(make: Make, tmp_path: Path) -> None:
    first, _ = run(make())
    content = Path(first["lora"]).read_bytes()
    second, _ = run(make(seed=5))
    assert Path(second["lora"]).name == "ink-2.safetensors"
    assert Path(first["lora"]).read_bytes() == content


def test_only_the_newest_checkpoints_and_the_best_are_kept(make: Make, tmp_path: Path) -> None:
    run(make(save_steps=1, max_train_steps=6, keep_checkpoints=2, validation_split=0.2,
             learning_rate=1e-6))
    kept = checkpoint.steps_of(tmp_path / "out", "ink")
    best = json.loads((tmp_path / "out/checkpoints/ink-000006/state.json").read_text())
    assert sorted(kept) == sorted({5, 6, best["best_step"]})


def test_previews_are_comparable_and_leave_training_alone(make: Make, tmp_path: Path) -> None:
    plain, _ = run(make(output_dir=str(tmp_path / "plain")))
    drawn, events = run(make(output_dir=str(tmp_path / "drawn"), sample_prompts=["red disc"],
                             sample_every=2, sample_inference_steps=2))
    samples = [e for e in events if isinstance(e, Sample)]
    assert [s.step for s in samples] == [0, 2, 4]
    assert len({s.seed for s in samples}) == 1
    a, b = load_file(plain["lora"]), load_file(drawn["lora"])
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_validation_is_the_same_whenever_it_is_asked(make: Make) -> None:
    trainer = trainer_of(make(validation_split=0.3))
    first = trainer.validate()
    assert first == trainer.validate()
    assert first is not None
    trainer.update(0)
    assert trainer.validate() != first


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_fp32_adapters(make: Make, precision: str) -> None:
    trainer = trainer_of(make(precision=precision))
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    frozen = next(p for p in trainer.denoiser.parameters() if not p.requires_grad)
    assert frozen.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    before = [p.detach().clone() for p in trainer.parameters]
    for n in range(3):
        trainer.update(n)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
    exact = trainer_of(make())
    batches = exact.sampler.update(0)
    half = trainer_of(make(precision=precision))
    found, expected = gradient(half, batches) / half.scaler.get_scale(), gradient(exact, batches)
    # 8 (bf16) or 11 (fp16) bits through a dozen layers: directions agree, last digits don't
    assert torch.cosine_similarity(found, expected, 0) > 0.98


def test_loss_falls_on_one_picture(make: Make, tmp_path: Path) -> None:
    one = tiny.pictures(tmp_path / "one", count=1)
    trainer = trainer_of(make(train_data_dir=str(one), learning_rate=1e-2, max_train_steps=60,
                              validation_split=0.0, target_modules="all-linear"))
    trainer.examples.held_out = frozenset({0})
    before = trainer.validate()
    for n in range(60):
        trainer.update(n)
    after = trainer.validate()
    assert before is not None
    assert after is not None
    assert after < before * 0.995


def test_described_configs_train_unchanged(base: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tiny.pictures(tmp_path / "data" / "cyber_ink", captions=False)
    (data / "metadata.csv").write_text("".join(
        f"{p.name},cyber ink number {i}\n" for i, p in enumerate(sorted(data.glob("*.png")))))
    text = f"""
train_data_dir: "./data/cyber_ink"
base_model: "{base}"
lora_rank: 8
target_modules: ["q_proj", "v_proj"]
batch_size: 2
gradient_accumulation_steps: 4
precision: fp16
max_resolution: "512,512"
learning_rate: 1e-4
output_dir: "./output/cyber_ink_lora"
"""
    (tmp_path / "cyber.yaml").write_text(text)
    config = load_train_config(tmp_path / "cyber.yaml", {"epochs": "2", "max_resolution": "32,32"})
    assert config.learning_rate == 1e-4
    result, _ = run(config)
    keys = load_file(result["lora"]).keys()
    assert {k.split(".")[0].rsplit("_", 2)[-1] for k in keys} == {"q", "v"}
    assert Path(result["lora"]).name == "cyber_ink_lora.safetensors"


def test_the_file_reproduces_the_run(make: Make, tmp_path: Path) -> None:
    result, _ = run(make(lr_scheduler="cosine", min_snr_gamma=5, noise_offset=0.05,
                         metadata="full"))
    config = load_train_config(Path(result["lora"]), {"output_dir": str(tmp_path / "again")})
    again, _ = run(config)
    first, second = load_file(result["lora"]), load_file(again["lora"])
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_targets_by_preset_alias_and_name() -> None:
    unet, spec = tiny.tiny_unet(), families.get("sd15").spec
    assert lora.resolve_targets(["q_proj", "v_proj"], spec, unet) == ["to_q", "to_v"]
    assert "ff.net.2" in lora.resolve_targets("attention+ff", spec, unet)
    with pytest.raises(UserError, match="to_q"):
        lora.resolve_targets(["to_qq"], spec, unet)


@pytest.mark.parametrize(("changes", "code"), [
    ({"base_model": "/nowhere/model.safetensors"}, "families.missing"),
    ({"base_model": ""}, "engine.key_missing"),
    ({"train_data_dir": "/nowhere"}, "dataset.folder_missing"),
    ({"device": "mps"}, "engine.no_device"),
    ({"family": "sd51"}, "families.unknown"),
])
def test_bad_input_is_one_sentence(make: Make, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(UserError) as caught:
        run(make(**changes))
    assert caught.value.code == code
    assert "{" not in str(caught.value)
    assert "\n" not in str(caught.value)
