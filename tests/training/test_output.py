"""What files, checkpoints and loaded bases hold, where nothing else would tell a slip."""

from __future__ import annotations

import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from core import families
from core.adapters import from_file, lora
from core.config import TrainConfig
from core.dataset.image_folder import Picture
from core.errors import UserError
from core.families import schedulers
from core.families.loading import ComponentSpec, dtype_of
from core.importers import load_train_config
from core.jobs.events import Event, Note
from core.lora_files import textual_inversion
from core.safetensors_header import read_header, read_scalars
from core.training import checkpoint, preflight
from core.training.output import tag_frequency
from core.training.output_names import Output
from core.weights.precision import Precision
from tests.keys.lab import Lab, started


def test_alpha_and_lengths_stay_exact(lab: Lab) -> None:
    """Rounding these would scale a whole column of the base."""
    trainer = lab.trainer(adapter="dora", lora_alpha=1 / 3)
    found = from_file.tensors(trainer.denoiser, lora.state(trainer.denoiser), torch.float16)
    kinds = {end: {t.dtype for key, t in found.items() if key.endswith(end)}
             for end in ("alpha", "dora_scale", "lora_down.weight", "lora_up.weight")}
    assert kinds == {"alpha": {torch.float32}, "dora_scale": {torch.float32},
                     "lora_down.weight": {torch.float16}, "lora_up.weight": {torch.float16}}


def test_words_of_two_encoders_have_the_communitys_names(tmp_path: Path) -> None:
    path = tmp_path / "ink_emb.safetensors"
    rows = {"text_encoder": torch.ones(1, 4), "text_encoder_2": torch.ones(1, 8)}
    textual_inversion.write(path, textual_inversion.NewWord("ink", rows), torch.float32)
    assert {key: t.shape[1] for key, t in load_file(path).items()} == {"clip_l": 4, "clip_g": 8}


# --- checkpoints ---

def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    """By what it says of its run, of the runs of this name and their numbered successors only;
    the times of folders say nothing."""
    made = {"ink-000300": (5, 1), "ink-000400": (5, 0), "ink-2-000100": (4, 9),
            "ink-000200": (3, 0), "inkwell-000900": (9, 0), "other-000100": (9, 0)}
    for age, (name, (began, starts)) in enumerate(made.items()):
        folder = tmp_path / checkpoint.FOLDER / name
        folder.mkdir(parents=True)
        wanted = name[:-7] if name != "ink-2-000100" else "ink"
        (folder / "state.json").write_text(json.dumps({
            "name": name[:-7], "session": str(began), "started": began, "starts": starts,
            "config": {"output_name": wanted}}))
        os.utime(folder, (1_000_000 + age, 1_000_000 + age))
    found = [path.name for path in checkpoint.find([tmp_path], "ink")]
    assert found == ["ink-000300", "ink-000400", "ink-2-000100", "ink-000200"]


@pytest.mark.parametrize(("changes", "megabytes", "told"), [
    ({"save_steps": 1, "keep_checkpoints": 3}, 4e9, True), ({"save_steps": 1}, 4e-3, False),
    ({"keep_checkpoints": 10**9}, 4e9, False)])
def test_a_disk_with_little_room_is_told(tmp_path: Path, changes: dict[str, Any], megabytes: float,
                                         told: bool) -> None:
    """By what the plan says of checkpoints; without `save_steps` there is a single one."""
    events: list[Event] = []
    config = TrainConfig(output_dir=str(tmp_path / "not" / "there"), **changes)
    planned: Any = SimpleNamespace(disk={"cache": 1e12, "checkpoints": megabytes, "lora": 0.1})
    with Output(Path(config.output_dir), config, events.append) as output:
        preflight.tell_room(planned, config, output)
        preflight.tell_room(None, config, output)
    assert [event.key for event in events if isinstance(event, Note)] == [
        "engine.little_room"] * told


def test_text_encoders_that_cant_learn_are_refused_at_once() -> None:
    with pytest.raises(UserError) as caught:
        preflight.tell_unused(TrainConfig(text_encoder_lr=1e-4), families.get("flux"), None, print)
    assert caught.value.fixes[0].changes == {"text_encoder_lr": 0, "pivotal_tokens": 0}


def test_a_snapshot_is_nobody_elses(lab: Lab) -> None:
    """It is written in a thread while the weights move on."""
    trainer = started(lab.trainer(ema_decay=0.5, text_encoder_lr=1e-3))
    trainer.update(0)
    state = trainer.snapshot(1)
    before = {part: {k: v.clone() for k, v in getattr(state, part).items()}
              for part in ("adapter", "optimizer", "random")}
    trainer.update(1)
    for part, tensors in before.items():
        assert tensors
        assert all(torch.equal(value, getattr(state, part)[key])
                   for key, value in tensors.items()), part
    later = trainer.snapshot(2)
    assert any(not torch.equal(value, later.adapter[key])
               for key, value in state.adapter.items())


def test_a_restored_run_goes_on_to_the_bit(lab: Lab) -> None:
    """With momentum, averages and the text encoder; not from the weights alone."""
    options = {"ema_decay": 0.5, "text_encoder_lr": 1e-3, "lora_dropout": 0.2}
    whole, again = started(lab.trainer(**options)), lab.trainer(**options)
    whole.update(0)
    again.restore(whole.snapshot(1))
    for trainer in (whole, again):
        trainer.update(1)
    first, second = whole.state(), again.state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- headers ---

def test_scalars_of_every_type_are_read(tmp_path: Path) -> None:
    values = {"F64": torch.tensor(1.5, dtype=torch.float64), "F32": torch.tensor(2.5),
              "F16": torch.tensor(3.5).half(), "BF16": torch.tensor(4.5).bfloat16(),
              "I32": torch.tensor(5, dtype=torch.int32), "I64": torch.tensor([6])}
    path = tmp_path / "a.safetensors"
    save_file(values | {"long": torch.zeros(2)}, path)
    assert struct.pack("<f", 4.5)[2:] == values["BF16"].view(torch.int16).numpy().tobytes()
    assert read_scalars(path, read_header(path), [*values, "long"]) == {
        "F64": 1.5, "F32": 2.5, "F16": 3.5, "BF16": 4.5, "I32": 5.0, "I64": 6.0}


@pytest.mark.parametrize(("shape", "size"), [([2], 16), ([2], 4), ([], 8), ([0], 4)])
def test_tensors_fill_their_bytes_exactly(tmp_path: Path, shape: list[int], size: int) -> None:
    """More bytes than numbers are as wrong as fewer; the file's own length is right."""
    path = tmp_path / "a.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert caught.value.code == "lora_file.wrong_size"


def test_a_pickle_is_called_one_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    for content in (path.read_bytes(), pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_header(path)
        assert caught.value.code == "lora_file.pickle"


# --- bases ---

@pytest.mark.parametrize(("weights", "vae", "wide", "wanted"), [
    (torch.float16, torch.float32, True, torch.bfloat16),
    (torch.float16, torch.float32, False, torch.float16),
    (torch.float32, torch.float32, True, torch.float32),
    (torch.bfloat16, torch.bfloat16, True, torch.bfloat16)])
def test_encoders_that_outgrow_fp16_are_kept_in_bf16(
        weights: torch.dtype, vae: torch.dtype, wide: bool, wanted: torch.dtype) -> None:
    numbers = Precision(torch.device("cpu"), weights, weights, vae)
    encoder = ComponentSpec("text_encoder", CLIPTextModel, "text", outgrows_fp16=wide)
    assert dtype_of(encoder, numbers) == wanted
    assert dtype_of(ComponentSpec("vae", AutoencoderKL, "vae"), numbers) == vae


def test_a_loaded_base_rests(lab: Lab) -> None:
    """Frozen, in eval mode: its own dropouts and statistics never move."""
    family, precision, _ = lab.parts()
    parts = family.load(lab.base, precision)
    for model in (parts.denoiser, parts.vae, parts.text["text_encoder"]):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())


def test_samplers_draw_by_what_the_base_is_taken_for(lab: Lab) -> None:
    """`prediction_type` and the base's check change the objective after the scheduler was read."""
    parts = lab.parts()[2]
    for objective in ("epsilon", "v_prediction"):
        taken = replace(parts, objective=objective)
        for name in ("auto", *schedulers.SAMPLERS):
            assert schedulers.create(name, taken).config.prediction_type == objective


def test_flux_learns_at_guidance_one() -> None:
    """The number that dev was told while it was distilled from a guided model."""
    told: dict[str, Any] = {}

    class Denoiser:
        class config:
            guidance_embeds = True

        def __call__(self, **given: Any) -> tuple[torch.Tensor]:
            told.update(given)
            return (given["hidden_states"],)
    cond = {"text": torch.zeros(2, 3, 4), "pooled": torch.zeros(2, 4)}
    noisy = torch.randn(2, 4, 4, 6)
    found = families.get("flux").predict(Denoiser(), noisy, torch.tensor([250.0, 1000.0]), cond)
    assert torch.equal(found, noisy)                        # packed and unpacked
    assert told["guidance"].tolist() == [1.0, 1.0]
    assert told["timestep"].tolist() == [0.25, 1.0]
    assert told["img_ids"].tolist() == [[0, row, column] for row in range(2) for column in range(3)]


def test_the_config_in_a_file_is_the_runs(lab: Lab) -> None:
    run = lab.plain_run
    again = load_train_config(run.file)
    changed = {key: getattr(again, key) for key, value in run.config.model_dump().items()
               if getattr(again, key) != value}
    changed.pop("output_name", None)
    # strangers read the file: of whole paths it has the last name alone
    assert changed == {key: Path(getattr(run.config, key)).name for key in (
        "train_data_dir", "base_model", "output_dir")}


def test_metadata_counts_what_was_learned(lab: Lab) -> None:
    """Steps, epochs, and pictures with their repeats, as kohya's readers show them."""
    plain, other = lab.plain_run.metadata, lab.other_run.metadata
    assert {key: plain[f"ss_{key}"] for key in (
        "steps", "max_train_steps", "epoch", "num_epochs", "num_train_images")} == {
        "steps": "6", "max_train_steps": "6", "epoch": "1", "num_epochs": "1",
        "num_train_images": "6"}
    assert other["ss_num_train_images"] == "15"             # 3 that train, 5 times each
    assert other["ss_num_validation_images"] == "1"
    found = json.loads(other["ss_bucket_info"])["buckets"].values()
    assert sum(bucket["count"] for bucket in found) == 15
    assert (other["ss_epoch"], other["ss_steps"]) == ("0", "4")


def test_tag_frequency_by_folder() -> None:
    def picture(name: str, caption: str) -> Picture:
        return Picture(Path("/x") / name, caption, 10, (1, 1), False)

    assert tag_frequency([
        picture("10_cat/1.png", "sks, Red Cat, sks"), picture("10_cat/2.png", "sks，red cat"),
        picture("1_dog/1.png", "sks"), picture("1_dog/2.png", "")]) == {
        "10_cat": {"sks": 3, "red cat": 2}, "1_dog": {"sks": 1}}
