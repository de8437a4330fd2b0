"""The text encoder's LoRA, new words, and a run with everything switched on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from core.adapters import lora
from core.config import GenerateConfig, TrainConfig
from core.errors import UserError
from core.inference import generate
from core.inference.generate import Lora, PipelineSession, SampleRequest
from core.jobs.events import Note
from core.lora_files import textual_inversion
from core.lora_files.files import describe
from core.training import verify
from core.training.trainer import Trainer
from tests import tiny
from tests.training.test_trainer import run, trainer_of

Make = Callable[..., TrainConfig]
TEXT = {"text_encoder_lr": 1e-3, "text_encoder_rank": 2, "pivotal_tokens": 2,
        "trigger_word": "duskprint style", "pivotal_lr": 1e-2}
ALL = TEXT | {
    "zero_terminal_snr": True, "multires_noise_iterations": 4, "loss_type": "huber",
    "debiased_estimation": True, "masked_loss": True, "unmasked_weight": 0.1, "reg_from_base": 2,
    "reg_share": 0.3, "prior_loss_weight": 0.7, "ema_decay": 0.6, "text_encoder_stop": 3,
    "flip": True, "lora_dropout": 0.1, "caption_dropout": 0.2, "noise_offset": 0.05,
    "sample_inference_steps": 2, "sample_cfg": 1.0, "max_train_steps": 5}


@pytest.fixture(scope="module")
def v_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_base(tmp_path_factory.mktemp("v") / "tiny", "v_prediction")


@pytest.fixture
def make(v_base: Path, tmp_path: Path) -> Make:
    pictures = tiny.pictures(tmp_path / "pictures", count=4)
    half = Image.new("L", (48, 48), 0)
    half.paste(255, (0, 0, 24, 48))
    half.save(pictures / "000.mask.png")

    def config(**changes: Any) -> TrainConfig:
        values = {"base_model": str(v_base), "train_data_dir": str(pictures), "lora_rank": 4,
                  "output_dir": str(tmp_path / "out"), "output_name": "ink", "batch_size": 2,
                  "max_train_steps": 2, "learning_rate": 1e-3} | changes
        return TrainConfig.model_validate(values)
    return config


def test_resume_with_everything_on_equals_an_unbroken_run(make: Make, tmp_path: Path) -> None:
    """To the bit, from a checkpoint before and one after the text encoder's end."""
    whole, events = run(make(**ALL, save_steps=2, keep_checkpoints=0))
    assert whole["proof"]["ok"], whole["proof"]
    assert {n.key for n in events if isinstance(n, Note)} >= {
        "engine.masks", "engine.found_regular", "engine.proof"}
    expected = [load_file(path) for path in (whole["lora"],
                                             textual_inversion.beside(Path(whole["lora"])))]
    for step in (2, 4):
        out = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / f"out/checkpoints/ink-{step:06d}",
                        out / f"checkpoints/ink-{step:06d}")
        resumed, _ = run(make(**ALL, output_dir=str(out), resume=True))
        found = [load_file(path) for path in (resumed["lora"],
                                              textual_inversion.beside(Path(resumed["lora"])))]
        for first, second in zip(expected, found, strict=True):
            assert first.keys() == second.keys()
            assert all(torch.equal(first[k], second[k]) for k in first)


def test_files_are_kohyas_and_draw_what_was_learned(make: Make, v_base: Path,
                                                    tmp_path: Path) -> None:
    result, _ = run(make(**TEXT, target_modules=["to_q"], save_precision="fp32"))
    path = Path(result["lora"])
    keys = load_file(path).keys()
    texts = {k.split(".")[0] for k in keys if k.startswith("lora_te_")}
    assert len(texts) == 2 * 6              # layers, and linears of each
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in texts
    assert describe(path).format == "kohya"
    assert describe(path).ranks == (2, 4)
    assert describe(path).scales == (1.0,)
    words = load_file(textual_inversion.beside(path))
    assert words["emb_params"].shape == (2, 32)
    assert verify.verify(path, GenerateConfig(base=str(v_base)), lambda event: None)["ok"]
    studio = PipelineSession(v_base, GenerateConfig(base=str(v_base)), lambda event: None)
    studio.load()

    def drawn(prompt: str, weight: float) -> np.ndarray:
        studio.use([Lora(path, weight)])
        return np.asarray(studio.draw(SampleRequest(prompt, "", 1, 2, 1.0, (32, 32))), np.int16)
    base_own = drawn("duskprint style disc", 0.0)
    called = drawn("duskprint style disc", 1.0)
    textual_inversion.beside(path).unlink()
    notes: list[Note] = []
    without = PipelineSession(v_base, GenerateConfig(base=str(v_base)),
                              notes.append)  # type: ignore[arg-type]
    without.load()
    without.use([Lora(path, 1.0)])
    lost = np.asarray(without.draw(SampleRequest("duskprint style disc", "", 1, 2, 1.0, (32, 32))))
    assert (called != lost).any()
    assert [n.key for n in notes] == ["generate.words_missing"]
    assert (drawn("duskprint style disc", 0.0) == base_own).all()


def test_plain_diffusers_reads_the_encoders_lora(make: Make, v_base: Path) -> None:
    """With whatever peft and transformers are here: the file's own products are what it adds."""
    result, _ = run(make(text_encoder_lr=1e-3, text_encoder_rank=2, target_modules=["to_q"],
                         save_precision="fp32"))
    assert result["proof"]["ok"], result["proof"]
    path = Path(result["lora"])
    wanted = {key.removesuffix(".lora_down.weight"): tensor
              for key, tensor in load_file(path).items() if key.endswith(".lora_down.weight")}
    pipeline = StableDiffusionPipeline.from_pretrained(v_base, safety_checker=None)
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="theirs")
    loaded = {f"{prefix}{name.removeprefix('text_model.').replace('.', '_')}": layer
              for prefix, model in (("lora_te_text_model_", pipeline.text_encoder),
                                    ("lora_unet_", pipeline.unet))
              for name, layer in model.named_modules() if "theirs" in getattr(layer, "lora_A", {})}
    assert loaded.keys() == wanted.keys()
    assert len([name for name in loaded if name.startswith("lora_te_")]) == 2 * 6
    file = load_file(path)
    for name, layer in loaded.items():
        down, up = file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"]
        added = up.flatten(1) @ down.flatten(1) * (file[f"{name}.alpha"] / len(down))
        assert added.any()
        torch.testing.assert_close(layer.get_delta_weight("theirs").flatten(1), added)


def test_gradient_reaches_the_encoder_until_its_end(make: Make) -> None:
    trainer = trainer_of(make(**TEXT, text_encoder_stop=2, max_train_steps=4))
    assert trainer.text is not None
    first = [p.detach().clone() for p in trainer.text.parameters]
    trainer.update(0)
    trainer.update(1)
    moved = [not torch.equal(a, b) for a, b in zip(first, trainer.text.parameters, strict=True)]
    assert moved.count(True) > len(moved) / 2
    assert moved[-1]                        # the new words
    live = trainer.cond(["duskprint style, disc"])["text"].detach()
    kept = [p.detach().clone() for p in trainer.text.parameters]
    trainer.update(2)
    assert not trainer.text.live
    assert trainer.parts.text == {}
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.text.parameters, strict=True))
    caption = trainer.examples.items[0].captions[0]
    assert trainer.cond([caption])["text"].shape == live.shape


def test_rates_of_their_own_follow_the_schedule(make: Make) -> None:
    trainer = trainer_of(make(**TEXT, lr_scheduler="linear", max_train_steps=4))
    trainer.update(1)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([1e-3 * 0.75, 1e-3 * 0.75, 1e-2 * 0.75])
    assert trainer.optimizer.param_groups[2]["weight_decay"] == 0


def test_encoding_in_the_step_equals_the_cache(make: Make) -> None:
    """An untrained LoRA and words that begin as the trigger's own tokens change nothing."""
    cached = trainer_of(make(trigger_word="red disc"))
    live = trainer_of(make(**TEXT | {"trigger_word": "red disc"}))
    batches = cached.sampler.update(0)

    def gradient(trainer: Trainer) -> torch.Tensor:
        trainer.accumulate(batches)
        return torch.cat([p.grad.flatten() for p in lora.trainable(trainer.denoiser)
                          if p.grad is not None])
    torch.testing.assert_close(gradient(live), gradient(cached), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_in_fp32(make: Make, precision: str) -> None:
    trainer = trainer_of(make(**TEXT, precision=precision))
    assert trainer.text is not None
    assert {p.dtype for p in trainer.text.parameters} == {torch.float32}
    before = [p.detach().clone() for p in trainer.text.parameters]
    for n in range(2):
        trainer.update(n)
    assert all(torch.isfinite(p).all() for p in trainer.text.parameters)
    assert not torch.equal(before[-1], trainer.text.parameters[-1])


def test_words_need_a_trigger(make: Make) -> None:
    with pytest.raises(UserError, match="trigger_word"):
        trainer_of(make(pivotal_tokens=1))


def test_bundled_words_are_read(make: Make, v_base: Path, tmp_path: Path) -> None:
    """A1111's and OneTrainer's form, which diffusers refuses, draws what the file beside does."""
    result, _ = run(make(**TEXT, max_train_steps=1))
    beside, path = Path(result["lora"]), tmp_path / "other.safetensors"
    rows = load_file(textual_inversion.beside(beside))["emb_params"]
    save_file(load_file(beside) | {
        "bundle_emb.duskprint style.string_to_param.*": rows.clone()}, path)
    [word] = textual_inversion.read(path)
    assert word.word == "duskprint style"
    assert torch.equal(word.rows[""], rows)
    studio = PipelineSession(v_base, GenerateConfig(base=str(v_base)), lambda event: None)
    studio.load()
    drawn = []
    for file in (beside, path):
        studio.use([Lora(file, 1.0)])
        shot = SampleRequest("a disc, duskprint style", "", 1, 2, 1.0, (32, 32))
        drawn.append(np.asarray(studio.draw(shot)))
    assert (drawn[0] == drawn[1]).all()


def test_words_lie_beside_a_folder_too(v_base: Path, tmp_path: Path) -> None:
    """PEFT's form of a LoRA is a folder: no file whose header could be read."""
    folder = tmp_path / "ink"
    folder.mkdir()
    rows = torch.randn(2, 32)
    studio = PipelineSession(v_base, GenerateConfig(base=str(v_base)), lambda event: None)
    studio.load()
    assert generate.load_words(studio.parts, folder, studio.emit) == {}
    textual_inversion.write(textual_inversion.beside(folder), textual_inversion.NewWord(
        "ink", {"text_encoder": rows}), torch.float32)
    found = generate.load_words(studio.parts, folder, studio.emit)
    assert found == {"ink": "<|word-49408|> <|word-49409|>"}
    held = studio.parts.text["text_encoder"].get_input_embeddings()
    assert torch.equal(held(torch.tensor([49408, 49409])), rows)


def test_rows_of_another_base_are_refused(v_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "ink.safetensors"
    textual_inversion.write(textual_inversion.beside(path), textual_inversion.NewWord(
        "ink", {"text_encoder": torch.zeros(1, 768)}), torch.float16)
    tiny_text = PipelineSession(v_base, GenerateConfig(base=str(v_base)), lambda event: None)
    tiny_text.load()
    save_file({"x.alpha": torch.tensor(1.0)}, path)
    with pytest.raises(UserError, match="768"):
        generate.load_words(tiny_text.parts, path)
