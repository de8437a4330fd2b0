"""Folders, switches, encodings and paths of other trainers' configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core import importers
from core.config.flat_yaml import parse_train_config
from core.errors import UserError

OT = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "lora_rank": 4,
      "lora_alpha": 4, "epochs": 2, "layer_filter": "attn"}


def imported(tmp_path: Path, data: Any, name: str = "a") -> importers.Imported:
    path = tmp_path / f"{name}.{'toml' if isinstance(data, str) else 'json'}"
    path.write_text(data if isinstance(data, str) else json.dumps(data, indent=1), "utf-8")
    return importers.read(path)


def told(found: importers.Imported) -> list[tuple[str, str]]:
    return [(one.key, one.why) for one in found.left]


# --- OneTrainer ---

CONCEPTS = [
    ([{"path": "old", "enabled": False}, {"path": "new"}], {"train_data_dir": "new"}, []),
    ([{"path": "v", "type": "VALIDATION"}, {"path": "new", "type": "STANDARD"}],
     {"train_data_dir": "new"}, [("concepts.0.path", "validation")]),
    ([{"path": "v", "validation_concept": True}, {"path": "new"}],
     {"train_data_dir": "new"}, [("concepts.0.path", "validation")]),
    ([{"path": "p", "type": "PRIOR_PREDICTION"}, {"path": "new"}],
     {"reg_data_dir": "p", "train_data_dir": "new"}, []),
    ([{"path": "a", "balancing": 3.0}, {"path": "b", "balancing": 2.0},
      {"path": "c", "enabled": False, "balancing": 5.0}],
     {"train_data_dir": "a"}, [("concepts.0.balancing", "repeats"), ("concepts.1.path", "second")]),
    ([{"path": "a", "enabled": False}], {}, []),
    ([{"path": "a", "text": {"prompt_source": "filename"}, "image": {"enable_crop_jitter": True}}],
     {"train_data_dir": "a"}, [("concepts.0.text.prompt_source", "class_tokens")])]


@pytest.mark.parametrize(("concepts", "values", "left"), CONCEPTS)
def test_concepts_are_read_by_their_switches(tmp_path: Path, concepts: list[dict[str, Any]],
                                             values: dict[str, str],
                                             left: list[tuple[str, str]]) -> None:
    """The same inside of a config, in the file that it names, and in that file alone."""
    inside = imported(tmp_path, OT | {"concepts": concepts})
    file = tmp_path / "training_concepts" / "concepts.json"
    file.parent.mkdir()
    file.write_text(json.dumps(concepts, indent=1), "utf-8")
    beside = imported(tmp_path, OT | {"concept_file_name": "training_concepts/concepts.json"})
    (tmp_path / "training_presets").mkdir()
    above = imported(tmp_path / "training_presets",
                     OT | {"concept_file_name": "training_concepts\\concepts.json"})
    for found in (inside, beside, above, importers.read(file)):
        folders = {key: value for key, value in found.values.items() if key.endswith("_dir")}
        assert folders == values
        assert told(found) == left
    assert {one.file for one in beside.left} <= {file}


def test_a_concept_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    found = imported(tmp_path, OT | {"concept_file_name": "gone.json",
                                     "sample_definition_file_name": "gone.json"})
    assert told(found) == [("concept_file_name", "concepts"),
                           ("sample_definition_file_name", "file")]


def test_samples_are_previews(tmp_path: Path) -> None:
    samples = [{"prompt": "a cat", "enabled": True, "width": 64, "height": 96},
               {"prompt": "a dog", "width": 64, "height": 96, "cfg_scale": 3.0},
               {"prompt": "off", "enabled": False}]
    (tmp_path / "s.json").write_text(json.dumps(samples), "utf-8")
    for more in ({"samples": samples}, {"sample_definition_file_name": "s.json"}):
        found = imported(tmp_path, OT | more)
        assert found.values["sample_prompts"] == ["a cat", "a dog"]
        assert found.values["sample_size"] == "64,96"
        # differs from one to the other
        assert "sample_cfg" not in found.values
        assert [why for _, why in told(found)] == ["prompt_options"]


@pytest.mark.parametrize(("more", "values"), [
    ({"text_encoder": {"train": False, "learning_rate": 1e-5}}, {}),
    ({"text_encoder": {"train": True}, "learning_rate": 2e-4}, {"text_encoder_lr": 2e-4}),
    ({"text_encoder": {"train": False}, "text_encoder_2": {"train": True, "learning_rate": 3e-5}},
     {"text_encoder_lr": 3e-5}),
    # a saved config has every part, of which its model has some
    ({"model_type": "FLUX_DEV_1", "unet": {"train": True, "weight_dtype": "INT_8"},
      "prior": {"train": True, "weight_dtype": "FLOAT_8"},
      "transformer": {"train": True, "weight_dtype": "NFLOAT_4"}}, {"base_precision": "nf4"}),
    ({"model_type": "FLUX_DEV_1", "prior": {"train": True, "weight_dtype": "FLOAT_8"}},
     {"base_precision": "fp8"}),
    ({"unet": {"train": True, "weight_dtype": "INT_8"},
      "transformer": {"train": True, "weight_dtype": "NFLOAT_4"}}, {"base_precision": "int8"}),
    ({"weight_dtype": "NFLOAT_4", "unet": {"train": True, "weight_dtype": "NONE"}},
     {"base_precision": "nf4"})])
def test_parts_of_models_count_where_they_train(tmp_path: Path, more: dict[str, Any],
                                                values: dict[str, Any]) -> None:
    found = imported(tmp_path, OT | more)
    assert {key: value for key, value in found.values.items()
            if key in ("text_encoder_lr", "base_precision")} == values
    assert not found.left


# --- kohya and its window ---

GUI = {"network_dim": 8, "network_alpha": 4, "epoch": 2, "learning_rate": 1e-4}


@pytest.mark.parametrize(("more", "values"), [
    ({"LoRA_type": "Standard", "conv_dim": 1, "conv_alpha": 1, "factor": 4}, {"adapter": "lora"}),
    ({"LoRA_type": "Kohya LoCon", "conv_dim": 2, "conv_alpha": 1},
     {"adapter": "lora", "conv_rank": 2, "conv_alpha": 1.0}),
    ({"LoRA_type": "LyCORIS/LoKr", "factor": 4, "conv_dim": 2, "LyCORIS_preset": "attn-mlp"},
     {"adapter": "lokr", "lokr_factor": 4, "target_modules": "all-linear"}),
    ({"LoRA_type": "LyCORIS/LoHa", "factor": 4, "LyCORIS_preset": "attn-only"},
     {"adapter": "loha", "target_modules": "attention"}),
    ({"LoRA_type": "Standard", "noise_offset_type": "Original", "noise_offset": 0.05,
      "multires_noise_iterations": 6}, {"adapter": "lora", "noise_offset": 0.05}),
    ({"LoRA_type": "Standard", "noise_offset_type": "Multires", "noise_offset": 0.05,
      "multires_noise_iterations": 6}, {"adapter": "lora", "multires_noise_iterations": 6}),
    ({"LoRA_type": "Standard", "flux1_checkbox": False, "ae": "ae", "flux1_clip_l": "c",
      "discrete_flow_shift": 3, "timestep_sampling": "sigmoid"}, {"adapter": "lora"}),
    ({"LoRA_type": "Flux1", "flux1_checkbox": True, "ae": "ae", "flux1_clip_l": "c",
      "timestep_sampling": "sigmoid"}, {"adapter": "lora", "vae": "ae", "text_encoders": ["c"],
                                        "timestep_sampling": "logit_normal", "flow_shift": 1.0}),
    ({"LoRA_type": "Standard", "loss_type": "l2", "huber_c": 0.5, "huber_schedule": "constant"},
     {"adapter": "lora", "loss_type": "l2"})])
def test_keys_of_kohyas_window_act_with_their_switch(tmp_path: Path, more: dict[str, Any],
                                                     values: dict[str, Any]) -> None:
    found = imported(tmp_path, GUI | more)
    own = {key: value for key, value in found.values.items()
           if key in values or key not in ("lora_rank", "lora_alpha", "epochs", "learning_rate",
                                           "target_modules")}
    assert own == values
    assert not found.left


@pytest.mark.parametrize(("more", "warm_up"), [
    ({"lr_warmup": 10, "lr_warmup_steps": 0}, 160), ({"lr_warmup": 10, "lr_warmup_steps": 7}, 7),
    ({"lr_warmup": 0, "lr_warmup_steps": 0}, 0)])
def test_kohyas_window_counts_the_warm_up_in_percent(tmp_path: Path, more: dict[str, int],
                                                     warm_up: int) -> None:
    found = imported(tmp_path, GUI | {"max_train_steps": 1600} | more)
    assert found.values["lr_warmup_steps"] == warm_up


@pytest.mark.parametrize("data", [
    GUI | {"loraplus_lr_ratio": 0, "vae_batch_size": 0, "sample_every_n_epochs": 0,
           "save_last_n_epochs": "0", "max_timestep": 1000, "caption_separator": ", "},
    OT | {"huber_strength": 0.0, "huber_delta": 1.0, "loss_scaler": "NONE", "vb_loss_strength": 1.0,
          "vae": {"model_name": "", "train": True, "weight_dtype": "FLOAT_32"},
          "embedding": {"placeholder": "<embedding>"}}])
def test_what_is_off_or_changes_nothing_is_no_loss(tmp_path: Path, data: dict[str, Any]) -> None:
    found = imported(tmp_path, data)
    assert not found.left
    assert not {"lora_plus_ratio", "cache_batch_size", "huber_c"} & {*found.values}


def test_what_is_on_in_concepts_and_samples_is_told(tmp_path: Path) -> None:
    found = imported(tmp_path, OT | {
        "learning_rate": 1e-4, "unet": {"train": True, "learning_rate": 5e-5},
        "concepts": [{"path": "p", "loss_weight": 0.5, "text": {"enable_tag_shuffling": True},
                      "image": {"enable_random_flip": True, "enable_random_rotate": True,
                                "enable_random_hue": False}}],
        "samples": [{"prompt": "a cat", "negative_prompt": "bad"}]})
    assert (found.values["flip"], found.values["shuffle_tags"]) == (True, True)
    assert found.values["learning_rate"] == 5e-5    # a part's own comes before that of all
    assert dict(told(found)) == {
        "concepts.0.loss_weight": "unknown", "concepts.0.image.enable_random_rotate": "unknown",
        "samples": "prompt_options"}


LS = {"network_dim": 8, "network_alpha": 4, "max_train_epochs": 2, "unet_lr": 1e-4}


@pytest.mark.parametrize(("more", "values"), [
    ({"network_module": "lycoris.kohya", "lycoris_algo": "lokr", "lokr_factor": 4, "conv_dim": 4,
      "conv_alpha": 1, "network_args_custom": ["preset=attn-mlp"]},
     {"adapter": "lokr", "lokr_factor": 4, "target_modules": "all-linear"}),
    ({"network_module": "networks.lora", "lycoris_algo": "lokr", "lokr_factor": 4},
     {"adapter": "lora"}),
    ({"enable_base_weight": False, "base_weights": "a.safetensors"}, {}),
    ({"enable_base_weight": True, "base_weights": "a.safetensors", "base_weights_multiplier": 0.5},
     {"base_loras": ["a.safetensors:0.5"]}),
    ({"enable_preview": False, "positive_prompts": "a cat", "sample_width": 512,
      "sample_every_n_epochs": 2}, {}),
    ({"enable_preview": True, "positive_prompts": "a cat", "sample_width": 512,
      "sample_height": 768, "sample_cfg": 7, "sample_steps": 24, "sample_sampler": "euler_a"},
     {"sample_prompts": ["a cat"], "sample_size": "512,768", "sample_cfg": 7.0,
      "sample_inference_steps": 24, "sample_sampler": "euler_a"}),
    ({"optimizer_type": "Prodigy", "optimizer_args_custom": ["d_coef=2", "weight_decay=0.1"]},
     {"optimizer": "prodigy", "optimizer_args": {"d_coef": 2}, "weight_decay": 0.1})])
def test_the_page_of_lora_scripts(tmp_path: Path, more: dict[str, Any],
                                  values: dict[str, Any]) -> None:
    found = imported(tmp_path, LS | more)
    assert {key: value for key, value in found.values.items() if key in values or key not in (
        "lora_rank", "lora_alpha", "epochs", "learning_rate", "target_modules")} == values
    assert not found.left


@pytest.mark.parametrize(("data", "adapter", "left"), [
    ({"network_module": "lycoris.kohya", "network_args": "dora_wd=True algo=locon conv_dim=1"},
     "dora", []),
    ({"network_module": "lycoris.kohya", "network_args": "dora_wd=True algo=loha conv_dim=1"},
     "loha", [("network_args.dora_wd", "value")]),
    ({"LoRA_type": "LyCORIS/LoCon", "dora_wd": True}, "dora", []),
    ({"LoRA_type": "LyCORIS/LoKr", "dora_wd": True}, "lokr", [("dora_wd", "value")]),
    (OT | {"peft_type": "LORA", "lora_decompose": True}, "dora", []),
    (OT | {"peft_type": "LOHA", "lora_decompose": True}, "loha", [])])
def test_dora_belongs_to_plain_loras(tmp_path: Path, data: dict[str, Any], adapter: str,
                                     left: list[tuple[str, str]]) -> None:
    """It never takes the place of LoHa or LoKr in silence."""
    found = imported(tmp_path, (data if "training_method" in data else GUI | data))
    assert found.values["adapter"] == adapter
    assert told(found) == left


def test_a_yaml_is_told_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("job: extension\nconfig:\n  name: x\n", "utf-8")
    with pytest.raises(UserError, match="needs no import"):
        importers.read(tmp_path / "a.yaml")


@pytest.mark.parametrize("kind", ["Kohya DyLoRA", "LyCORIS/GLoRA", "LyCORIS/iA3", "LoRA-FA"])
def test_kinds_that_are_not_trained_here_are_told(tmp_path: Path, kind: str) -> None:
    assert told(imported(tmp_path, GUI | {"LoRA_type": kind})) == [("LoRA_type", "value")]


@pytest.mark.parametrize(("module", "left"), [
    ("networks.lora", []), ("networks.lora_fa", [("network_module", "value")]),
    ("networks.dylora", [("network_module", "value")]), ("networks.lora_flux", []),
    ("networks.lora_wan", [("network_module", "family")])])
def test_network_modules(tmp_path: Path, module: str, left: list[tuple[str, str]]) -> None:
    assert told(imported(tmp_path, GUI | {"network_module": module})) == left


def test_lycoris_trains_convolutions_unless_told_otherwise(tmp_path: Path) -> None:
    text = 'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_alpha = 4\n'
    found = imported(tmp_path, text + 'network_args = ["algo=loha"]\n')
    assert {key: found.values[key] for key in (
        "adapter", "conv_rank", "conv_alpha", "target_modules")} == {
        "adapter": "loha", "conv_rank": 8, "conv_alpha": 4.0, "target_modules": "all-linear"}
    assert found.assumed["conv_dim"] == 8
    found = imported(tmp_path, text + 'network_args = ["algo=lokr", "preset=attn-mlp"]\n')
    assert "conv_rank" not in found.values
    # an algorithm of LyCORIS is nothing to kohya's own module
    found = imported(tmp_path, text.replace("lycoris.kohya", "networks.lora")
                     + 'network_args = ["algo=loha", "conv_dim=2"]\n')
    assert (found.values["adapter"], found.values["conv_rank"]) == ("lora", 2)


DOUBLE = "norm1_context.linear"


@pytest.mark.parametrize(("data", "targets"), [
    ({}, "all-linear"), ({"LoRA_type": "Standard"}, "all-linear"),
    ({"network_module": "networks.lora", "model_train_type": "sdxl-lora"}, "all-linear"),
    ({"network_module": "networks.lora_flux"}, [DOUBLE, "norm.linear", "proj_mlp", "to_add_out"]),
    ({"network_module": "networks.lora_flux", "model_type": "chroma"}, "all-linear"),
    ({"LoRA_type": "Flux1", "flux1_checkbox": True}, [DOUBLE, "norm.linear"]),
    ({"LoRA_type": "Standard", "sd3_checkbox": True}, [DOUBLE, "add_q_proj"]),
    ({"network_module": "networks.lora_qwen_image"}, "attention+ff"),
    ({"network_module": "networks.lora_zimage"}, "attention+ff"),
    ({"network_module": "networks.lora_lumina"}, "all-linear"),
    ({"network_module": "networks.oft"}, "attention"),
    ({"network_module": "networks.oft", "network_args": ["enable_all_linear=True"]}, "all-linear"),
    ({"network_module": "lycoris.kohya", "network_args": ["preset=full-lin"]}, "all-linear"),
    ({"LoRA_type": "LyCORIS/LoHa", "LyCORIS_preset": "attn-only"}, "attention")])
def test_a_network_trains_all_layers_of_the_blocks(tmp_path: Path, data: dict[str, Any],
                                                   targets: str | list[str]) -> None:
    found = imported(tmp_path, GUI | data)
    if isinstance(targets, str):
        assert found.values["target_modules"] == targets
    else:
        assert {*targets} < {*found.values["target_modules"]}
        assert "context_embedder" not in found.values["target_modules"]
    assert ("target_modules" in found.assumed) == (data.get("LyCORIS_preset") != "attn-only")


@pytest.mark.parametrize(("more", "values", "left"), [
    ({"layer_filter": ""}, {"target_modules": "all-linear", "conv_rank": 4, "conv_alpha": 4.0},
     "layers"),
    ({"layer_filter": "", "layer_filter_preset": "full", "model_type": "FLUX_DEV_1"},
     {"target_modules": "all-linear"}, "layers"),
    ({"layer_filter": "attentions", "layer_filter_preset": "attn-mlp",
      "layer_filter_regex": False}, {"target_modules": "all-linear"}, ""),
    ({"layer_filter": "", "layer_filter_preset": "attn-mlp"}, {"target_modules": "all-linear"}, ""),
    ({"layer_filter": "attn"}, {"target_modules": "attention"}, ""),
    ({"layer_filter": "attn,ff.net", "model_type": "FLUX_DEV_1"},
     {"target_modules": "attention+ff"}, ""),
    ({"layer_filter": "^(?=.*attention)(?!.*refiner).*,^(?=.*feed_forward)(?!.*refiner).*",
      "layer_filter_regex": True, "model_type": "Z_IMAGE"}, {"target_modules": "attention+ff"}, ""),
    ({"layer_filter": "transformer_block", "model_type": "QWEN"},
     {"target_modules": "all-linear"}, ""),
    ({"layer_filter": "down_blocks.1", "layer_filter_preset": "custom"}, {}, "value")])
def test_onetrainers_layer_filter(tmp_path: Path, more: dict[str, Any], values: dict[str, Any],
                                  left: str) -> None:
    """Without one it trains every layer, which is told."""
    found = imported(tmp_path, OT | more)
    assert {key: value for key, value in found.values.items()
            if key in ("target_modules", "conv_rank", "conv_alpha")} == values
    assert [why for _, why in told(found)] == [left] * bool(left)


DATASETS = [
    ('[[datasets]]\nimage_directory = "p"\nnum_repeats = 4\n', {"train_data_dir": "p"},
     [("datasets.0.num_repeats", "repeats")]),
    ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "r"\nis_reg = true\n'
     '[[datasets.subsets]]\nimage_dir = "p"\nflip_aug = true\n',
     {"train_data_dir": "p", "reg_data_dir": "r", "flip": True}, []),
    ('[[datasets]]\nresolution = 768\n[[datasets.subsets]]\nimage_dir = "p"\n'
     '[general]\nresolution = 512\nkeep_tokens = 2\n',
     {"train_data_dir": "p", "max_resolution": "768,768", "keep_tokens": 2}, []),
    ('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "p"\n'
     '[[datasets]]\nresolution = 1024\n[[datasets.subsets]]\nimage_dir = "q"\nnum_repeats = 2\n',
     {"train_data_dir": "p", "max_resolution": "512,512"},
     [("datasets.1.subsets.0.image_dir", "second"),
      ("datasets.1.subsets.0.num_repeats", "repeats")]),
    ('[[datasets]]\nvideo_directory = "v"\n', {}, [("datasets.0.video_directory", "unknown")]),
    ('[[datasets]]\nimage_jsonl_file = "gone.jsonl"\n', {"metadata_path": "gone.jsonl"},
     [("datasets.0.image_jsonl_file", "jsonl")])]


@pytest.mark.parametrize(("text", "values", "left"), DATASETS)
def test_dataset_files(tmp_path: Path, text: str, values: dict[str, Any],
                       left: list[tuple[str, str]]) -> None:
    found = imported(tmp_path, text)
    assert found.values == values
    assert told(found) == left


@pytest.mark.parametrize("folder", ["/data/pics", "C:\\data\\pics"])
def test_musubis_jsonl_names_the_folder(tmp_path: Path, folder: str) -> None:
    mark = "\\" if "\\" in folder else "/"
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"image_path": f"{folder}{mark}{n}.png", "caption": "x"}) + "\n"
        for n in range(3)), "utf-8")
    found = imported(tmp_path, '[[datasets]]\nimage_jsonl_file = "a.jsonl"\n')
    assert found.values == {"metadata_path": "a.jsonl",
                            "train_data_dir": folder.replace("\\", "/")}


# --- encodings and backslashes ---

@pytest.mark.parametrize("encoding", ["gbk", "utf-8", "utf-8-sig", "utf-16"])
def test_a_toml_and_its_prompts_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.txt").write_bytes("一只猫坐在窗台上\na dog\n".encode(encoding))
    (tmp_path / "a.toml").write_bytes(
        'output_name = "猫猫的照片"\nnetwork_dim = 4\nsample_prompts = "p.txt"\n'.encode(encoding))
    found = importers.read(tmp_path / "a.toml").values
    assert found["output_name"] == "猫猫的照片"
    assert found["sample_prompts"] == ["一只猫坐在窗台上", "a dog"]


@pytest.mark.parametrize("path", [r"C:\pics\cat", r"C:\new", r"D:\train", r".\pics", r"..\x",
                                  r"data\pics"])
@pytest.mark.parametrize("suffix", ["toml", "json", "yaml"])
def test_backslashes_in_double_quotes_are_told_with_the_mend(tmp_path: Path, path: str,
                                                             suffix: str) -> None:
    """Of "C:\\new" TOML makes C:, a line break and ew, without a word. The mend works."""
    def text(quoted: str) -> str:
        return {"toml": f"network_dim = 4\ntrain_data_dir = {quoted}\n",
                "json": f'{{"network_dim": 4,\n"train_data_dir": {quoted}}}\n',
                "yaml": f"lora_rank: 4\ntrain_data_dir: {quoted}\n"}[suffix]
    file = tmp_path / f"a.{suffix}"
    file.write_text(text(f'"{path}"'), "utf-8")
    with pytest.raises(UserError) as caught:
        importers.load_train_config(file)
    assert caught.value.code == "config.backslashes"
    assert caught.value.params["line"] == 2
    plain = path.replace("\\", "/")
    for mended in (f'"{plain}"', *([f"'{path}'"] if suffix != "json" else [])):
        file.write_text(text(mended), "utf-8")
        found = importers.load_train_config(file).train_data_dir
        assert found.replace("\\", "/") == plain


@pytest.mark.parametrize(("name", "text"), [
    ("a.json", '{"x": "a \\"b\\" c", }'), ("a.toml", 'x = "a \\"b\\" c" 3'),
    ("a.yaml", 'x: "a \\"b\\" c" 3')])
def test_other_faults_of_a_line_are_not_laid_on_its_backslashes(tmp_path: Path, name: str,
                                                                text: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(UserError) as caught:
        importers.load_train_config(tmp_path / name)
    assert caught.value.code in ("config_import.bad_text", "config.bad_yaml")


def test_a_line_break_in_a_path_is_told(tmp_path: Path) -> None:
    """Of "data\\new": no drive letter tells that it is a path."""
    assert told(imported(tmp_path, 'train_data_dir = "data\\new"\nnetwork_dim = 4\n')) == [
        ("train_data_dir", "backslashes")]
    with pytest.raises(UserError, match="line breaks"):
        parse_train_config('train_data_dir: "data\\new"\n', "a.yaml")
    # elsewhere it is meant
    found = imported(tmp_path, 'sample_prompts = "a cat\\na dog"\nnetwork_dim = 4\n')
    assert found.values["sample_prompts"] == ["a cat", "a dog"]
    parse_train_config('# "C:\\new"\ntrigger_word: "C:\\\\new"\n', "a.yaml")
