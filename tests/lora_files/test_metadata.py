"""The metadata of LoRA files: what kohya's readers, modelspec's and ours expect to find."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from core import __version__
from core.config import TrainConfig
from core.hashes import data_hash, sha256, short_hash
from core.importers import load_train_config
from core.lora_files.files import describe, read_lora, write_lora
from core.lora_files.metadata import (
    Folder,
    TrainFacts,
    build_metadata,
    facts_of,
    hashes,
    noted,
    shared_yaml,
)
from core.safetensors_header import read_header
from core.serialization import from_yaml

CONFIG = TrainConfig(
    train_data_dir="./图片", base_model="./v1-5.safetensors", output_dir="./output/my_style",
    trigger_word="mystyle, 水墨", lora_rank=8, lora_alpha=4, batch_size=2,
    gradient_accumulation_steps=4, learning_rate=2e-4, lr_warmup_steps=10, min_snr_gamma=5,
    flip=True, seed=7)
TENSORS = {"lora_unet_a.lora_down.weight": torch.arange(6.0).reshape(2, 3),
           "lora_unet_a.lora_up.weight": torch.arange(6.0).reshape(3, 2),
           "lora_unet_a.alpha": torch.tensor(2.0)}


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, kind)
    return file.getvalue()


def make_facts(**changes) -> TrainFacts:
    facts = TrainFacts(
        config=CONFIG, description="ink on paper", thumbnail=picture("WEBP"),
        base_version="sd_v1", architecture="stable-diffusion-v1", implementation="diffusers",
        prediction_type="epsilon", base_name="v1-5.safetensors", base_sha256="ab" * 32,
        base_short_hash="e3b0c442",
        folders={"10_猫": Folder(repeats=10, pictures=3, tags={"mystyle": 3, "cat": 2}),
                 "other": Folder(repeats=1, pictures=2, tags={"mystyle": 2, "a dog": 1})},
        buckets={(512, 512): 30, (448, 576): 2}, aspect_error=0.0125, resolution=(512, 512),
        session_id="123456", started_at=1_760_000_000.5, finished_at=1_760_000_123.75,
        batches_per_epoch=16, planned_epochs=10, planned_steps=40, epoch=5, step=20,
        optimizer="torch.optim.adamw.AdamW(weight_decay=0.01)", mixed_precision="fp16")
    return dataclasses.replace(facts, **changes)


METADATA = build_metadata(make_facts())


# --- what is written ---------------------------------------------------------------------------

@pytest.mark.parametrize(("key", "value"), {
    "ss_output_name": "my_style", "ss_network_module": "networks.lora", "ss_network_dim": "8",
    "ss_network_alpha": "4.0", "ss_network_dropout": "None", "ss_learning_rate": "0.0002",
    "ss_unet_lr": "0.0002", "ss_text_encoder_lr": "0.0", "ss_steps": "20", "ss_epoch": "5",
    "ss_num_epochs": "10", "ss_max_train_steps": "40", "ss_num_batches_per_epoch": "16",
    "ss_num_train_images": "32", "ss_num_reg_images": "0", "ss_batch_size_per_device": "2",
    "ss_gradient_accumulation_steps": "4", "ss_total_batch_size": "8",
    "ss_resolution": "(512, 512)", "ss_flip_aug": "True", "ss_shuffle_caption": "False",
    "ss_enable_bucket": "True", "ss_bucket_no_upscale": "False", "ss_min_bucket_reso": "448",
    "ss_max_bucket_reso": "576", "ss_min_snr_gamma": "5.0", "ss_noise_offset": "None",
    "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_clip_skip": "None",
    "ss_sd_model_name": "v1-5.safetensors", "ss_sd_model_hash": "e3b0c442",
    "ss_new_sd_model_hash": "ab" * 32, "ss_mixed_precision": "fp16", "ss_seed": "7",
    "ss_lr_scheduler": "constant_with_warmup", "ss_lr_warmup_steps": "10",
    "ss_session_id": "123456", "ss_training_started_at": "1760000000.5",
    "ss_training_finished_at": "1760000123.75", "ss_cache_latents": "True",
    "ss_full_fp16": "False", "ss_training_comment": "ink on paper", "ss_max_grad_norm": "1.0",
    "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "diffusers", "modelspec.title": "my_style",
    "modelspec.resolution": "512x512", "modelspec.description": "ink on paper",
    "modelspec.date": "2025-10-09T08:55:23+00:00", "modelspec.prediction_type": "epsilon",
    "modelspec.trigger_phrase": "mystyle, 水墨",
    "modelspec.implementation_version": f"lora-darkroom/{__version__}",
    "darkroom.version": __version__}.items())
def test_value(key, value):
    assert METADATA[key] == value


def test_json_values_have_kohyas_form():
    assert json.loads(METADATA["ss_dataset_dirs"]) == {
        "10_猫": {"n_repeats": 10, "img_count": 3}, "other": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(METADATA["ss_tag_frequency"]) == {
        "10_猫": {"mystyle": 3, "cat": 2}, "other": {"mystyle": 2, "a dog": 1}}
    assert json.loads(METADATA["ss_bucket_info"]) == {
        "buckets": {"0": {"resolution": [512, 512], "count": 30},
                    "1": {"resolution": [448, 576], "count": 2}},
        "mean_img_ar_error": 0.0125}
    assert json.loads(METADATA["ss_reg_dataset_dirs"]) == {}
    assert json.loads(METADATA["ss_network_args"]) == {"target_modules": "attention"}


def test_objectives_are_told_in_kohyas_spelling():
    told = build_metadata(make_facts(
        config=make_facts().config.with_changes(
            zero_terminal_snr=True, multires_noise_iterations=6, loss_type="huber",
            debiased_estimation=True, prior_loss_weight=0.5, text_encoder_lr=5e-5),
        regular={"1_dog": Folder(repeats=1, pictures=4, tags={})}))
    assert {key: told[f"ss_{key}"] for key in (
        "zero_terminal_snr", "multires_noise_iterations", "multires_noise_discount", "loss_type",
        "huber_schedule", "huber_c", "debiased_estimation", "prior_loss_weight",
        "num_reg_images", "reg_dataset_dirs", "text_encoder_lr")} == {
        "zero_terminal_snr": "True", "multires_noise_iterations": "6",
        "multires_noise_discount": "0.3", "loss_type": "huber", "huber_schedule": "snr",
        "huber_c": "0.1", "debiased_estimation": "True", "prior_loss_weight": "0.5",
        "num_reg_images": "4", "reg_dataset_dirs": '{"1_dog": {"n_repeats": 1, "img_count": 4}}',
        "text_encoder_lr": "5e-05"}


def test_all_values_are_strings_and_none_is_empty_or_of_another_trainer():
    assert all(type(v) is str and v for v in METADATA.values())
    assert not [k for k in METADATA if "commit" in k or k.startswith("sshs_")]
    assert {k.split("_")[0].split(".")[0] for k in METADATA} == {"ss", "modelspec", "darkroom"}


# field-notes A.2 less what has no true value here: another trainer's commit, prior loss, huber
# loss, more than one dataset, a VAE of one's own, validation by epochs
KOHYA = """session_id training_started_at training_finished_at output_name learning_rate unet_lr
text_encoder_lr num_train_images num_reg_images num_batches_per_epoch num_epochs epoch steps
gradient_checkpointing gradient_accumulation_steps max_train_steps lr_warmup_steps lr_scheduler
network_module network_dim network_alpha network_dropout network_args mixed_precision full_fp16 v2
base_model_version clip_skip max_token_length cache_latents seed lowram noise_offset
multires_noise_iterations multires_noise_discount adaptive_noise_scale zero_terminal_snr
training_comment optimizer max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs
caption_tag_dropout_rate face_crop_aug_range min_snr_gamma scale_weight_norms ip_noise_gamma
debiased_estimation loss_type fp8_base fp8_base_unet validation_split tag_frequency dataset_dirs
reg_dataset_dirs bucket_info batch_size_per_device total_batch_size resolution color_aug flip_aug
random_crop shuffle_caption enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso
keep_tokens sd_model_name sd_model_hash new_sd_model_hash"""


def test_every_kohya_key_with_a_true_value_is_there():
    assert {f"ss_{name}" for name in KOHYA.split()} <= METADATA.keys()


@pytest.mark.parametrize(("changes", "key", "value"), [
    ({"prediction_type": "v_prediction"}, "ss_base_model_version", "sd_v1_v"),
    ({"prediction_type": "v_prediction"}, "modelspec.prediction_type", "v"),
    ({"prediction_type": "flow", "base_version": "flux1"}, "modelspec.prediction_type", None),
    ({"prediction_type": "flow", "base_version": "flux1"}, "ss_base_model_version", "flux1"),
    ({"base_version": "sd_v2", "prediction_type": "v_prediction"}, "ss_v2", "True"),
    ({"base_sha256": "", "base_short_hash": ""}, "ss_sd_model_hash", None),
    ({"clip_skip": 2}, "ss_clip_skip", "2"), ({"clip_skip": 2}, "modelspec.encoder_layer", "2"),
    ({"thumbnail": b""}, "modelspec.thumbnail", None),
    ({"extra": {"ss_guidance_scale": "1.0"}}, "ss_guidance_scale", "1.0"),
    ({"config": CONFIG.with_changes(noise_offset=0.05)}, "ss_noise_offset", "0.05"),
    ({"config": CONFIG.with_changes(lora_dropout=0.1)}, "ss_network_dropout", "0.1"),
    ({"config": CONFIG.with_changes(lr_scheduler="cosine")}, "ss_lr_scheduler", "cosine")])
def test_what_changes_with_the_facts(changes, key, value):
    assert build_metadata(make_facts(**changes)).get(key) == value


@pytest.mark.parametrize(("adapter", "rank", "alpha", "dim", "told"), [
    ("lora", 8, 4.0, 8, 4.0), ("rslora", 16, 4.0, 16, 16.0), ("pissa", 8, 4.0, 16, 8.0),
    ("dora", 8, None, 8, 8.0)])
def test_dim_and_alpha_are_those_of_the_files_layers(adapter, rank, alpha, dim, told):
    """alpha / dim is the scale that readers multiply with: 4 / sqrt(16) of rsLoRA; PiSSA's layers
    have twice the rank."""
    found = build_metadata(make_facts(config=TrainConfig(
        adapter=adapter, lora_rank=rank, lora_alpha=alpha)))
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == (str(dim), str(told))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_thumbnail_is_a_data_url_of_the_same_bytes(kind):
    url = build_metadata(make_facts(thumbnail=picture(kind)))["modelspec.thumbnail"]
    head, _, content = url.partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    assert base64.b64decode(content, validate=True) == picture(kind)


def test_the_date_is_iso_and_names_its_zone():
    assert datetime.fromisoformat(METADATA["modelspec.date"]).timestamp() == 1_760_000_123


def test_a_file_reproduces_its_config(tmp_path):
    path = tmp_path / "a.safetensors"
    write_lora(path, TENSORS, METADATA)
    assert load_train_config(path) == CONFIG
    own = "lora_rank: 3   # 我的注释\n"
    write_lora(path, TENSORS, build_metadata(make_facts(config_text=own)))
    assert load_train_config(path).lora_rank == 3
    assert read_header(path).metadata["darkroom.config"] == own


# --- hashes ------------------------------------------------------------------------------------

def kohya_style_hashes(folder: Path, tensors, metadata) -> tuple[str, str]:
    """Once more from a real file, by the description alone."""
    path = folder / "independent.safetensors"
    save_file(tensors, path, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    content = path.read_bytes()
    (header,) = re.findall(rb"\A.{8}(\{.*?\}\s*)(?=.{%d}\Z)" % sum(
        t.numel() * t.element_size() for t in tensors.values()), content, re.DOTALL)
    model = hashlib.sha256(content[8 + len(header):]).hexdigest()
    return model, hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("side", [4, 700])               # below and beyond the legacy offset
def test_hashes(tmp_path, side):
    torch.manual_seed(0)
    tensors = {"lora_unet_b.lora_down.weight": torch.randn(side, side),
               "lora_unet_a.lora_up.weight": torch.randn(side, side).half(),
               "lora_unet_a.alpha": torch.tensor(1.0)}
    model, legacy = kohya_style_hashes(tmp_path, tensors, METADATA)
    assert (legacy == hashlib.sha256(b"").hexdigest()[:8]) == (side == 4)
    written = write_lora(tmp_path / "a.safetensors", tensors, METADATA)
    assert written["sshs_model_hash"] == model
    assert written["sshs_legacy_hash"] == legacy
    assert written["modelspec.hash_sha256"] == f"0x{model}"
    assert data_hash(tmp_path / "a.safetensors") == model


def test_the_model_hash_ignores_metadata_and_sees_every_weight():
    plain = hashes(TENSORS, {})["sshs_model_hash"]
    assert hashes(TENSORS, METADATA)["sshs_model_hash"] == plain
    changed = {**TENSORS, "lora_unet_a.alpha": torch.tensor(3.0)}
    assert hashes(changed, METADATA)["sshs_model_hash"] != plain


def test_hashes_of_a_base(tmp_path):
    path = tmp_path / "base.safetensors"
    content = bytes(range(256)) * 5000                   # 1.28 MB
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()
    assert short_hash(path) == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


# --- what is read ------------------------------------------------------------------------------

def test_facts_of_our_own_file(tmp_path):
    write_lora(tmp_path / "a.safetensors", TENSORS, METADATA)
    facts = describe(tmp_path / "a.safetensors").facts
    assert facts.trigger_words == ("mystyle", "水墨")
    assert facts.tags == (("mystyle", 5), ("cat", 2), ("a dog", 1))
    assert (facts.title, facts.description) == ("my_style", "ink on paper")
    assert (facts.family, facts.base_model) == ("sd15", "v1-5.safetensors")
    assert (facts.resolution, facts.pictures) == ("512x512", 32)
    assert (facts.steps, facts.epochs, facts.learning_rate) == (20, 5, 2e-4)
    assert facts.made_by == f"lora-darkroom/{__version__}"
    assert facts.has_config


def test_facts_of_a_file_of_another_trainer():
    facts = facts_of({
        "ss_sd_scripts_commit_hash": "abc", "ss_output_name": "x", "ss_resolution": "(512, 768)",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_training_comment": "None",
        "ss_dataset_dirs": '{"5_sks": {"n_repeats": 5, "img_count": 20}}',
        "ss_tag_frequency": '{"5_sks": {"sks": 20, " solo": 12, "smile": 1}}'})
    assert facts.trigger_words == ("sks",)
    assert facts.tags[1] == ("solo", 12)
    assert (facts.title, facts.description, facts.resolution) == ("x", "", "512x768")
    assert (facts.family, facts.made_by, facts.has_config) == ("sdxl", "sd-scripts", False)


def test_no_metadata_tells_nothing():
    assert facts_of({}) == type(facts_of({}))()


@pytest.mark.parametrize("text", ["", "7", "[]", "{", "[" * 100_000, '{"a": 3}',
                                  '{"a": {"t": "x"}}'])
def test_broken_json_inside_metadata_is_absent(text):
    facts = facts_of({"ss_tag_frequency": text, "ss_dataset_dirs": text, "ss_steps": "many"})
    assert (facts.tags, facts.trigger_words, facts.steps) == ((), (), None)
    assert noted({"lora_adapter_metadata": text}) == {}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
KEYS = ["ss_tag_frequency", "ss_dataset_dirs", "ss_steps", "ss_resolution", "modelspec.title",
        "modelspec.trigger_phrase", "ss_base_model_version", "lora_adapter_metadata",
        "ss_learning_rate", "ss_num_train_images", "darkroom.version"]


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), json_value.map(json.dumps) | text))
def test_no_metadata_can_break_the_reader(metadata):
    facts_of(metadata)
    noted(metadata)


@settings(deadline=None, max_examples=200,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(text, text, max_size=6))
def test_metadata_round_trips(tmp_path, metadata):
    written = write_lora(tmp_path / "a.safetensors", TENSORS, metadata)
    assert read_lora(tmp_path / "a.safetensors")[1] == written
    assert written == metadata | hashes(TENSORS, metadata)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=20), st.text(max_size=20))       # lone surrogates, too: odd file names
def test_any_names_can_be_written(tmp_path_factory, folder, tag):
    folders = {folder: Folder(repeats=1, pictures=1, tags={tag: 1})}
    metadata = build_metadata(make_facts(folders=folders, description=f"t{folder}",
                                         base_name=f"b{tag}"))
    path = tmp_path_factory.getbasetemp() / "names.safetensors"
    write_lora(path, TENSORS, metadata)
    assert describe(path).facts.description.encode()
    assert read_header(path).metadata.items() >= metadata.items()
    assert json.loads(metadata["ss_tag_frequency"]) == {folder: {tag: 1}}


@pytest.mark.parametrize(("key", "value", "shown"), [
    ("train_data_dir", "/x/jane doe/private", "private"),
    ("train_data_dir", "C:\\Users\\jane\\cats\\", "cats"),
    ("train_data_dir", "~/pictures/cats", "cats"), ("train_data_dir", "..\\jane\\cats", "cats"),
    ("base_model", "\\\\server\\jane\\base.safetensors", "base.safetensors"),
    ("base_loras", ["D:/jane/a.safetensors:0.5"], ["a.safetensors:0.5"]),
    ("callbacks", ["/x/jane/own.py:Catch"], ["own.py:Catch"]),
    ("text_encoders", ["/x/jane/clip_l.safetensors", "t5"], ["clip_l.safetensors", "t5"]),
    # what is no whole path stays as it was written
    ("base_model", "someone/stable-diffusion", "someone/stable-diffusion"),
    ("train_data_dir", "./data/cats", "./data/cats"), ("trigger_word", "ohwx", "ohwx")])
def test_strangers_see_no_whole_path(key: str, value: Any, shown: Any) -> None:
    config = TrainConfig.model_validate({key: value})
    assert from_yaml(shared_yaml(config)) == {key: shown}
    full = config.with_changes(metadata="full")
    assert from_yaml(shared_yaml(full)) == {key: value, "metadata": "full"}
