"""A walk over our own config keys and families: what each importer makes of it, or why nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core import importers
from core.config import TrainConfig, other_names
from core.config.flat_yaml import parse_train_config
from core.errors import UserError
from core.families.registry import SPECS
from core.importers.kohya import Dataset, Kohya
from core.importers.onetrainer import OneTrainer

NONE = "there is no such setting"
BASE = "the base itself tells it"
STATE = "another trainer's state can't be resumed"

# Our key -> kohya's entry and OneTrainer's, each as (their keys, our value); or why there is none.
Row = tuple[dict[str, Any], Any] | str
KEYS: dict[str, tuple[Row, Row]] = {
    "train_data_dir": (({"train_data_dir": "a"}, "a"), ({"concepts": [{"path": "a"}]}, "a")),
    "base_model": (({"pretrained_model_name_or_path": "a"}, "a"), ({"base_model_name": "a"}, "a")),
    "output_dir": (({"output_dir": "a"}, "a"),
                   ({"output_model_destination": "a/b.safetensors"}, "a")),
    "output_name": (({"output_name": "b"}, "b"),
                    ({"output_model_destination": "a/b.safetensors"}, "b")),
    "trigger_word": (({"caption_prefix": "ohwx, "}, "ohwx"), NONE),
    "lora_rank": (({"network_dim": 3}, 3), ({"lora_rank": 3}, 3)),
    "batch_size": (({"train_batch_size": 3}, 3), ({"batch_size": 3}, 3)),
    "epochs": (({"max_train_epochs": 3}, 3), ({"epochs": 3}, 3)),
    "learning_rate": (({"unet_lr": 0.3}, 0.3), ({"learning_rate": 0.3}, 0.3)),
    "max_resolution": (({"resolution": "512,768"}, "512,768"), ({"resolution": "640"}, "640,640")),
    "family": (BASE, BASE),
    "vae": (({"vae": "a"}, "a"), ({"vae": {"model_name": "a"}}, "a")),
    "text_encoders": (({"clip_l": "a", "t5xxl": "b"}, ["a", "b"]), NONE),
    "tokenizer": (BASE, BASE),
    "metadata_path": (({"in_json": "a.json"}, "a.json"), NONE),
    "max_train_steps": (({"max_train_steps": 30}, 30), "it counts rounds alone"),
    "lora_alpha": (({"network_alpha": 3}, 3.0), ({"lora_alpha": 3}, 3.0)),
    "lora_dropout": (({"network_dropout": 0.3}, 0.3), ({"dropout_probability": 0.3}, 0.3)),
    "target_modules": (({"network_module": "lycoris.kohya",
                         "network_args": ["preset=attn-only"]}, "attention"),
                       ({"model_type": "QWEN", "layer_filter": "attn,img_mlp,txt_mlp"},
                        "attention+ff")),
    "init_lora_weights": (({"network_weights": "a"}, "a"), ({"lora_model_name": "a"}, "a")),
    "base_loras": (({"base_weights": ["a"], "base_weights_multiplier": [0.5]}, ["a:0.5"]), NONE),
    "adapter": (({"network_module": "networks.loha"}, "loha"), ({"peft_type": "LOHA"}, "loha")),
    "conv_rank": (({"network_args": ["conv_dim=3"]}, 3), NONE),
    "gradient_accumulation_steps": (({"gradient_accumulation_steps": 3}, 3),
                                    ({"gradient_accumulation_steps": 3}, 3)),
    "precision": (({"mixed_precision": "bf16"}, "bf16"), ({"train_dtype": "BFLOAT_16"}, "bf16")),
    "base_precision": (({"fp8_base": True}, "fp8"), ({"unet": {"weight_dtype": "INT_8"}}, "int8")),
    "offload": ("it counts blocks, whose number the file doesn't tell",
                ({"layer_offload_fraction": 0.5}, 0.5)),
    "gradient_checkpointing": (({"gradient_checkpointing": True}, True),
                               ({"gradient_checkpointing": "ON"}, True)),
    "optimizer": (({"optimizer_type": "Prodigy"}, "prodigy"),
                  ({"optimizer": {"optimizer": "CAME"}}, "came")),
    "lr_scheduler": (({"lr_scheduler": "cosine"}, "cosine"),
                     ({"learning_rate_scheduler": "LINEAR"}, "linear")),
    "lr_warmup_steps": (({"lr_warmup_steps": 30}, 30), ({"learning_rate_warmup_steps": 30}, 30)),
    "save_steps": (({"save_every_n_steps": 30}, 30),
                   ({"save_every": 30, "save_every_unit": "STEP"}, 30)),
    "keep_checkpoints": (({"save_every_n_steps": 30, "save_last_n_steps": 60}, 3),
                         ({"save_every": 30, "save_every_unit": "STEP"}, 0)),
    "resume": (STATE, STATE),
    "sample_prompts": (({"sample_prompts": "a cat --w 8 --h 8"}, ["a cat"]),
                       ({"samples": [{"prompt": "a cat"}]}, ["a cat"])),
    "sample_every": (({"sample_every_n_steps": 30}, 30),
                     ({"sample_after": 30, "sample_after_unit": "STEP"}, 30)),
    "caption_dropout": (({"caption_dropout_rate": 0.3}, 0.3), NONE),
    "max_tokens": (({"max_token_length": 150}, 150), NONE),
    "clip_skip": (({"clip_skip": 2}, 2), ({"text_encoder_layer_skip": 1}, 2)),
    "shuffle_tags": (({"shuffle_caption": True}, True),
                     ({"concepts": [{"path": "a", "text": {"enable_tag_shuffling": True}}]}, True)),
    "keep_tokens": (({"keep_tokens": 3}, 3),
                    ({"concepts": [{"path": "a", "text": {"keep_tags_count": 3}}]}, 3)),
    "enable_wildcard": (({"enable_wildcard": True}, True), NONE),
    "flip": (({"flip_aug": True}, True),
             ({"concepts": [{"path": "a", "image": {"enable_random_flip": True}}]}, True)),
    "validation_split": (({"validation_split": 0.25}, 0.25), "it takes folders for it"),
    "seed": (({"seed": 3}, 3), ({"seed": 3}, 3)),
    "min_snr_gamma": (({"min_snr_gamma": 3}, 3.0),
                      ({"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 3}, 3.0)),
    "noise_offset": (({"noise_offset": 0.3}, 0.3), ({"offset_noise_weight": 0.3}, 0.3)),
    "text_encoder_lr": (({"text_encoder_lr": 0.3}, 0.3),
                        ({"text_encoder": {"train": True, "learning_rate": 0.3}}, 0.3)),
    "pivotal_tokens": (NONE, "embeddings of its own, beside the LoRA"),
    "masked_loss": (({"masked_loss": True}, True), ({"masked_training": True}, True)),
    "reg_data_dir": (({"reg_data_dir": "a"}, "a"),
                     ({"concepts": [{"path": "a", "type": "PRIOR_PREDICTION"}]}, "a")),
    "reg_from_base": (NONE, NONE),
    "ema_decay": (NONE, ({"ema": "GPU", "ema_decay": 0.9}, 0.9)),
    "conv_alpha": (({"network_args": ["conv_alpha=3"]}, 3.0), NONE),
    "block_ranks": ("it counts blocks", NONE), "block_rates": ("it counts blocks", NONE),
    "rank_dropout": (({"network_args": ["rank_dropout=0.3"]}, 0.3), NONE),
    "module_dropout": (({"network_args": ["module_dropout=0.3"]}, 0.3), NONE),
    "lora_plus_ratio": (({"network_args": ["loraplus_lr_ratio=3"]}, 3.0), NONE),
    "lokr_factor": (({"network_args": ["factor=3"]}, 3), NONE),
    "optimizer_args": (({"optimizer_args": ["d_coef=2"]}, {"d_coef": 2}), "told one by one"),
    "lr_cycles": (({"lr_scheduler_num_cycles": 3}, 3), ({"learning_rate_cycles": 3}, 3)),
    "lr_power": (({"lr_scheduler_power": 3}, 3.0), NONE),
    "lr_decay_share": (({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 0.3}, 0.3), NONE),
    "prediction_type": (({"v_parameterization": True}, "v_prediction"),
                        ({"force_v_prediction": True}, "v_prediction")),
    "zero_terminal_snr": (({"zero_terminal_snr": True}, True),
                          ({"rescale_noise_scheduler_to_zero_terminal_snr": True}, True)),
    "multires_noise_iterations": (({"multires_noise_iterations": 3}, 3), NONE),
    "multires_noise_discount": (({"multires_noise_discount": 0.5}, 0.5), NONE),
    "loss_type": (({"loss_type": "smooth_l1"}, "smooth_l1"),
                  ({"mse_strength": 0.0, "huber_strength": 1.0}, "huber")),
    "huber_c": (({"loss_type": "huber", "huber_c": 0.3}, 0.3), ({"huber_delta": 0.3}, 0.3)),
    "huber_schedule": (({"loss_type": "huber", "huber_schedule": "constant"}, "constant"),
                       ({"mse_strength": 0.0, "huber_strength": 1.0}, "constant")),
    "debiased_estimation": (({"debiased_estimation_loss": True}, True),
                            ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, True)),
    "unmasked_weight": (NONE, ({"unmasked_weight": 0.3}, 0.3)),
    "reg_share": (NONE, NONE),
    "prior_loss_weight": (({"prior_loss_weight": 0.3}, 0.3), NONE),
    "text_encoder_rank": (NONE, NONE),
    "text_encoder_stop": (NONE, ({"text_encoder": {
        "train": True, "learning_rate": 0.1, "stop_training_after": 30,
        "stop_training_after_unit": "STEP"}}, 30)),
    "pivotal_lr": (NONE, NONE), "pivotal_init": (NONE, NONE), "distilled": (BASE, BASE),
    "timestep_sampling": (({"timestep_sampling": "sigmoid"}, "logit_normal"),
                          ({"model_type": "QWEN", "timestep_distribution": "LOGIT_NORMAL"},
                           "logit_normal")),
    "flow_shift": (({"timestep_sampling": "shift", "discrete_flow_shift": 3}, 3.0),
                   ({"model_type": "QWEN", "timestep_distribution": "UNIFORM",
                     "timestep_shift": 3}, 3.0)),
    "logit_mean": (({"weighting_scheme": "logit_normal", "logit_mean": 0.3}, 0.3),
                   ({"model_type": "QWEN", "timestep_distribution": "LOGIT_NORMAL",
                     "noising_bias": 0.3}, 0.3)),
    "logit_std": (({"timestep_sampling": "sigmoid", "sigmoid_scale": 3}, 3.0),
                  ({"model_type": "QWEN", "timestep_distribution": "LOGIT_NORMAL",
                    "noising_weight": 0.5}, 1.5)),
    "mode_scale": (({"weighting_scheme": "mode", "mode_scale": 1.0}, 1.0), NONE),
    "weight_decay": (({"optimizer_args": ["weight_decay=0.3"]}, 0.3),
                     ({"optimizer": {"weight_decay": 0.3}}, 0.3)),
    "max_grad_norm": (({"max_grad_norm": 0.3}, 0.3), ({"clip_grad_norm": 0.3}, 0.3)),
    "adam_beta1": (({"optimizer_args": ["betas=0.3,0.4"]}, 0.3),
                   ({"optimizer": {"beta1": 0.3}}, 0.3)),
    "adam_beta2": (({"optimizer_args": ["betas=0.3,0.4"]}, 0.4),
                   ({"optimizer": {"beta2": 0.3}}, 0.3)),
    "bucket_no_upscale": (({"bucket_no_upscale": True}, True), NONE),
    "min_bucket_side": (({"min_bucket_reso": 256}, 256), NONE),
    "max_bucket_side": (({"max_bucket_reso": 256}, 256), NONE),
    "crop_about": (NONE, NONE), "alpha_background": (NONE, NONE),
    "cache_batch_size": (({"vae_batch_size": 3}, 3), NONE),
    "cache_to_disk": (({"cache_latents_to_disk": False}, False), NONE),
    "save_precision": (({"save_precision": "bf16"}, "bf16"),
                       ({"output_dtype": "BFLOAT_16"}, "bf16")),
    "save_format": ("kohya's own, which auto is too", "told by the base"),
    "metadata": (NONE, NONE), "init_lora_resize": (NONE, NONE),
    "sample_size": (({"sample_prompts": "a --w 64 --h 32"}, "64,32"),
                    ({"samples": [{"prompt": "a", "width": 64, "height": 32}]}, "64,32")),
    "sample_cfg": (({"sample_prompts": "a --l 3"}, 3.0),
                   ({"samples": [{"prompt": "a", "cfg_scale": 3}]}, 3.0)),
    "sample_inference_steps": (({"sample_prompts": "a --s 30"}, 30),
                               ({"samples": [{"prompt": "a", "diffusion_steps": 30}]}, 30)),
    "sample_sampler": (({"sample_sampler": "k_euler_a"}, "euler_a"), NONE),
    "sample_weight": (NONE, NONE), "base_loras_in_previews": (NONE, NONE),
    "validation_steps": (({"validate_every_n_steps": 30}, 30), (
        {"validation": True, "validate_after": 30, "validate_after_unit": "STEP"}, 30)),
    "device": (NONE, NONE), "picture_processors": (NONE, NONE), "callbacks": (NONE, NONE),
    "task_type": (NONE, NONE)}

# Family -> its network module (kohya, musubi) or lora-scripts' word, and OneTrainer's model type.
FAMILIES = {
    "sd15": ({"model_train_type": "sd-lora"}, "STABLE_DIFFUSION_15"),
    "sd2": ({"v2": True}, "STABLE_DIFFUSION_21_BASE"),
    "sdxl": ({"sdxl": True}, "STABLE_DIFFUSION_XL_10_BASE"),
    "sd3": ({"network_module": "networks.lora_sd3"}, "STABLE_DIFFUSION_35"),
    "flux": ({"network_module": "networks.lora_flux"}, "FLUX_DEV_1"),
    "chroma": ({"network_module": "networks.lora_chroma"}, "CHROMA_1"),
    "zimage": ({"network_module": "networks.lora_zimage"}, "Z_IMAGE"),
    "qwen": ({"network_module": "networks.lora_qwen_image"}, "QWEN"),
    "flux2": ({"network_module": "networks.lora_flux_2"}, "FLUX_2"),
    "krea2": ({"network_module": "networks.lora_krea2"}, "KREA_2"),
    "lumina2": ({"network_module": "networks.lora_lumina"}, "LUMINA_2"),
    "sana": ({"model_train_type": "sana-lora"}, "SANA")}


def imported(tmp_path: Path, data: dict[str, Any]) -> importers.Imported:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data, indent=1), "utf-8")
    return importers.read(path)


def test_every_key_of_ours_has_a_row() -> None:
    assert KEYS.keys() == TrainConfig.model_fields.keys()
    assert FAMILIES.keys() == SPECS.keys()


@pytest.mark.parametrize("key", sorted(KEYS))
def test_each_key_from_each_trainer(tmp_path: Path, key: str) -> None:
    for row, base in zip(KEYS[key], ({"mem_eff_attn": False}, {
            "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15",
            "layer_filter": "attentions"}), strict=True):
        if not isinstance(row, str):
            theirs, value = row
            found = imported(tmp_path, base | theirs)
            assert found.values[key] == value
            assert not found.left


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_from_each_trainer(tmp_path: Path, family: str) -> None:
    kohya, onetrainer = FAMILIES[family]
    assert not imported(tmp_path, {"network_dim": 4} | kohya).left
    assert not imported(tmp_path, {"training_method": "LORA", "model_type": onetrainer,
                               "layer_filter": "attn"}).left


@pytest.mark.parametrize("data", [
    {"network_module": "networks.lora_wan"},
    {"network_module": "networks.lora_framepack"},
    {"model_train_type": "hunyuan-lora", "lowram": False},
    {"training_method": "LORA", "model_type": "WUERSTCHEN_2"},
    {"training_method": "LORA", "model_type": "HUNYUAN_VIDEO"}])
def test_other_families_are_told(tmp_path: Path, data: dict[str, Any]) -> None:
    assert "family" in {one.why for one in imported(tmp_path, data).left}


# --- their names in our YAML ---

def theirs() -> set[str]:
    names = {*other_names.BY_RULE, *other_names.KOHYA_DATASET}
    for reader in (Kohya, Dataset, OneTrainer):
        names |= {*reader.choices, *reader.switches, *(
            name.removeprefix("take_") for name in vars(reader) if name.startswith("take_"))}
    return {name for name in names if "__" not in name and name not in TrainConfig.model_fields}


def test_every_key_that_is_read_has_a_hint() -> None:
    """But for the switches and units of others, and what differs from one kind of model to the
    next."""
    without = {name for name in theirs() if not other_names.ours(name)}
    assert {name for name in without if not name.startswith(("flux1_", "sd3_", "text_encoder_"))
            and not name.endswith("_unit")} == {
        "base_weights_multiplier", "enable_base_weight", "enable_block_weights", "enable_preview",
        "randomly_choice_prompt", "dynamic_timestep_shifting", "keep_tokens_separator",
        "layer_filter_regex", "loss_weight_strength", "lr_warmup", "secondary_separator",
        "mse_strength", "network_args", "network_train_unet_only",
        "noise_offset_type", "num_repeats", "sdxl", "validation"}


@pytest.mark.parametrize(("key", "hint"), [
    ("network_dim", "lora_rank"), ("network_alpha", "lora_alpha"), ("unet_lr", "learning_rate"),
    ("train_batch_size", "batch_size"), ("max_train_epochs", "epochs"), ("dit", "base_model"),
    ("pretrained_model_name_or_path", "base_model"), ("resolution", "max_resolution"),
    ("optimizer_type", "optimizer"), ("network_module", "adapter"), ("conv_dim", "conv_rank"),
    ("mixed_precision", "precision"), ("save_every_n_steps", "save_steps"), ("lr", "learning_rate"),
    ("shuffle_caption", "shuffle_tags"), ("flip_aug", "flip"), ("network_weights",
                                                                "init_lora_weights"),
    ("caption_dropout_rate", "caption_dropout"), ("class_tokens", "trigger_word"),
    ("discrete_flow_shift", "flow_shift"), ("fp8_base", "base_precision"),
    ("base_model_name", "base_model"), ("model_type", "family"), ("image_dir", "train_data_dir"),
    ("save_every_n_epochs", "save_steps"), ("lora_rnak", "lora_rank")])
def test_another_trainers_name_gets_its_hint(key: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train_config(f"epochs: 2\n{key}: 3\n", "a.yaml")
    assert caught.value.params["nearest"] == hint
    assert caught.value.params["line"] == 2
    assert f"`{hint}`" in str(caught.value)


@pytest.mark.parametrize(("key", "code"), [
    ("xformers", "config.unknown_key_by_itself"), ("save_every_n_epochs",
                                                   "config.unknown_key_epochs"),
    ("zzzzzz", "config.unknown_key_plain")])
def test_what_has_no_counterpart_is_told_as_that(key: str, code: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train_config(f"{key}: true\n", "a.yaml")
    assert caught.value.code == code
    assert "{" not in str(caught.value)
