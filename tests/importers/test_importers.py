"""Other trainers' configs. The fixtures are written for these tests, by the formats' rules."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import i18n, importers
from core.config import TrainConfig
from core.config import other_names as tables
from core.errors import UserError
from core.importers import lines, load_train_config
from core.importers.reader import Left

SCRIPTS = '''\
model_train_type = "sd-lora"
pretrained_model_name_or_path = "./sd-models/model.safetensors"
train_data_dir = "./train/aki"
prior_loss_weight = 1
resolution = "512,768"
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
output_name = "aki"
output_dir = "./output"
save_precision = "fp16"
save_every_n_epochs = 2
max_train_epochs = 12
train_batch_size = 2
gradient_checkpointing = true
unet_lr = 1e-4
text_encoder_lr = 1e-5
learning_rate = 3e-4
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 20
optimizer_type = "AdamW8bit"
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
network_train_unet_only = true
shuffle_caption = true
keep_tokens = 1
seed = 1337
clip_skip = 2
mixed_precision = "bf16"
xformers = true
noise_offset = 0.05
min_snr_gamma = 5
color_aug = false
face_crop_aug_range = "1.0,2.0"
'''
SECTIONS = '''\
# kohya's --config_file: sections are for the eye
[model]
v2 = false
pretrained_model_name_or_path = "base.safetensors"

[additional_network]
network_dim = 8          # alpha is left out: kohya takes 1
network_args = ["conv_dim=4", "conv_alpha=2", "algo=locon", "block_dims=1,2"]

[training]
max_train_steps = 500
learning_rate = 0.0002
lr_warmup_steps = 0.1
optimizer_args = ["weight_decay=0.02", "betas=0.9,0.99", "decouple=True"]
optimizer_type = "Sophia"
'''
DATASET = '''\
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 2

[[datasets]]
resolution = [512, 640]
batch_size = 4

  [[datasets.subsets]]
  image_dir = "./first"
  class_tokens = "ohwx cat"
  num_repeats = 3

  [[datasets.subsets]]
  image_dir = "./second"
'''
GUI = {
    "LoRA_type": "Standard", "pretrained_model_name_or_path": "C:/models/base.safetensors",
    "train_data_dir": "C:/data", "output_dir": "C:/out", "output_name": "gui",
    "max_resolution": "512,512", "learning_rate": 0.0001, "unet_lr": 0.0002,
    "text_encoder_lr": 0, "optimizer": "Lion", "lr_scheduler": "cosine", "lr_warmup": 10,
    "train_batch_size": 1, "epoch": 3, "max_train_epochs": "", "max_train_steps": 1000,
    "network_dim": 16, "network_alpha": 8, "mixed_precision": "fp16", "save_precision": "float",
    "seed": "77", "flip_aug": True, "noise_offset_type": "Original",
    "stop_text_encoder_training": 0,
    "sample_prompts": "a cat --w 512 --n blurry\na dog", "sample_sampler": "euler_a",
    "save_every_n_steps": 100, "adaptive_noise_scale": 0.1}
ONETRAINER = {
    "__version": 10, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15",
    "base_model_name": "runway/model", "output_model_destination": "models/style.safetensors",
    "output_dtype": "FLOAT_16", "train_dtype": "BFLOAT_16", "resolution": "640",
    "concepts": [{"path": "/data/one", "balancing": 2.0, "image": {"enable_random_flip": True},
                  "text": {"enable_tag_shuffling": True, "keep_tags_count": 3}},
                 {"path": "/data/two"}],
    "epochs": 40, "batch_size": 4, "learning_rate": 0.0003,
    "learning_rate_scheduler": "COSINE", "learning_rate_warmup_steps": 200.0,
    "lora_rank": 32, "optimizer": {"optimizer": "ADAMW", "weight_decay": 0.05, "fused": True},
    "gradient_checkpointing": "CPU_OFFLOADED", "layer_offload_fraction": 0.5,
    "unet": {"train": True, "weight_dtype": "NFLOAT_4"}, "text_encoder": {"train": False},
    "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 4.0, "save_every": 50,
    "save_every_unit": "STEP", "dataloader_threads": 2, "prior": {"a": {"b": 1}}}


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i18n, "language", lambda: "en")


def written(tmp_path: Path, content: str | dict[str, Any]) -> Path:
    path = tmp_path / ("a.toml" if isinstance(content, str) else "a.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), "utf-8")
    return path


def left(imported: importers.Imported) -> dict[str, str]:
    return {one.key: one.why for one in imported.left}


def has(**values: Any) -> dict[str, Any]:
    """What of these TrainConfig knows by now."""
    return {key: value for key, value in values.items() if key in TrainConfig.model_fields}


def test_lora_scripts(tmp_path: Path) -> None:
    path = written(tmp_path, SCRIPTS)
    imported = importers.read(path)
    assert imported.kind == "kohya"
    assert imported.values == {
        "base_model": "./sd-models/model.safetensors", "train_data_dir": "./train/aki",
        "max_resolution": "512,768", "min_bucket_side": 256, "max_bucket_side": 1024,
        "output_name": "aki", "output_dir": "./output", "save_precision": "fp16", "epochs": 12,
        "batch_size": 2, "gradient_checkpointing": True, "learning_rate": 1e-4,
        "lr_scheduler": "constant", "lr_warmup_steps": 20, "optimizer": "adamw8bit",
        "lora_rank": 32, "lora_alpha": 16.0, "shuffle_tags": True, "keep_tokens": 1, "seed": 1337,
        "precision": "bf16", "noise_offset": 0.05, "min_snr_gamma": 5.0, "clip_skip": 2,
        "target_modules": "all-linear", **has(adapter="lora", prior_loss_weight=1.0)}
    why = left(imported)
    assert why["save_every_n_epochs"] == "epochs"
    assert why["xformers"] == "by_itself"
    assert why["face_crop_aug_range"] == "unknown"
    assert "color_aug" not in why                     # switched off: nothing is lost
    assert "text_encoder_lr" not in why               # only the UNet is trained
    for one in imported.left:                         # the line is the key's own
        assert SCRIPTS.splitlines()[one.line - 1].startswith(one.key)
    assert imported.assumed == {"target_modules": "all-linear"}
    config = load_train_config(path, {"epochs": "3"})
    assert (config.epochs, config.lora_rank, config.name) == (3, 32, "aki")


@pytest.mark.parametrize(("written_", "taken"), [
    ("150", {"max_tokens": 150}), ("225", {"max_tokens": 225}),
    ("255", {"max_tokens": 225}),                         # lora-scripts', three chunks in kohya
    ("30", {}), ('"x"', {})])
def test_length_of_captions(tmp_path: Path, written_: str, taken: dict[str, int]) -> None:
    imported = importers.read(written(tmp_path, SCRIPTS + f"max_token_length = {written_}\n"))
    found = {key: value for key, value in imported.values.items() if key == "max_tokens"}
    assert found == taken
    assert ("max_token_length" in left(imported)) is (not taken)


def test_kohyas_separators_and_wildcards(tmp_path: Path) -> None:
    imported = importers.read(written(tmp_path, SCRIPTS + (
        'keep_tokens_separator = "|||"\nsecondary_separator = ";;;"\nenable_wildcard = true\n')))
    assert not {"keep_tokens_separator", "secondary_separator"} & {*left(imported)}
    assert imported.values["enable_wildcard"] is True
    other = importers.read(written(tmp_path, SCRIPTS + 'keep_tokens_separator = "#"\n'))
    assert left(other)["keep_tokens_separator"] == "value"


def test_sections_arguments_and_the_other_trainers_defaults(tmp_path: Path) -> None:
    imported = importers.read(written(tmp_path, SECTIONS))
    assert imported.values == {
        "base_model": "base.safetensors", "lora_rank": 8, "lora_alpha": 1, "max_train_steps": 500,
        "learning_rate": 2e-4, "lr_warmup_steps": 50, "weight_decay": 0.02, "adam_beta1": 0.9,
        "target_modules": "all-linear",
        "adam_beta2": 0.99, **has(adapter="lora", conv_rank=4, conv_alpha=2.0,
                                  optimizer_args={"decouple": True})}
    assert imported.assumed == {"network_alpha": 1, "target_modules": "all-linear"}
    why = left(imported)
    assert why["training.optimizer_type"] == "value"
    assert why["additional_network.network_args.block_dims"] == "unknown"
    numbers = {one.key: one.line for one in imported.left}
    assert SECTIONS.splitlines()[numbers["training.optimizer_type"] - 1] == (
        'optimizer_type = "Sophia"')
    assert "kohya" in importers.report_lines(imported)[0]
    assert "network_alpha" in importers.report_lines(imported)[1]


def test_kohyas_datasets(tmp_path: Path) -> None:
    path = written(tmp_path, DATASET)
    imported = importers.read(path)
    assert imported.kind == "kohya dataset"
    assert imported.values == {"shuffle_tags": True, "keep_tokens": 2,
                               "max_resolution": "512,640", "batch_size": 4,
                               "train_data_dir": "./first"}
    assert left(imported) == {
        "general.caption_extension": "by_itself", "datasets.0.subsets.0.class_tokens":
        "class_tokens", "datasets.0.subsets.0.num_repeats": "repeats",
        "datasets.0.subsets.1.image_dir": "second"}
    assert [one.line for one in imported.left] == [3, 12, 13, 16]
    outer = tmp_path / "outer.toml"
    outer.write_text(f'dataset_config = "a.toml"\nnetwork_dim = 4\n{SCRIPTS.splitlines()[12]}')
    both = importers.read(outer)
    assert both.values["train_data_dir"] == "./first"
    assert both.values["epochs"] == 12
    assert {one.file for one in both.left} == {path}


def test_kohya_ss(tmp_path: Path) -> None:
    imported = importers.read(written(tmp_path, GUI))
    assert imported.kind == "kohya_ss"
    assert {key: imported.values[key] for key in (
        "learning_rate", "max_train_steps", "lr_warmup_steps", "seed", "save_precision",
        "sample_prompts", "sample_sampler", "save_steps", "flip", "lora_alpha")} == {
        "learning_rate": 2e-4, "max_train_steps": 1000, "lr_warmup_steps": 100, "seed": 77,
        "save_precision": "fp32", "sample_prompts": ["a cat", "a dog"],
        "sample_sampler": "euler_a", "save_steps": 100, "flip": True, "lora_alpha": 8.0}
    assert "epochs" not in imported.values
    why = left(imported)
    assert why["sample_prompts"] == "prompt_options"
    assert why["adaptive_noise_scale"] == "unknown"
    assert ("optimizer" in why) == ("lion" not in str(TrainConfig.model_fields["optimizer"]))
    text = written(tmp_path, GUI).read_text().splitlines()
    assert all(f'"{one.key}"' in text[one.line - 1] for one in imported.left)


@pytest.mark.parametrize(("files", "weights", "taken"), [
    (["a.safetensors", "b.safetensors"], [0.5], ["a.safetensors:0.5", "b.safetensors:1"]),
    ("a.safetensors b.safetensors", "0.5 0.7", ["a.safetensors:0.5", "b.safetensors:0.7"]),
    ("my loras/a.safetensors\nb.safetensors", "0.5\n0.7",
     ["my loras/a.safetensors:0.5", "b.safetensors:0.7"]),
    ("a.safetensors", 0.5, ["a.safetensors:0.5"]),
    (["a.safetensors"], ["half"], None)])
def test_kohyas_base_weights_and_their_multipliers(
        tmp_path: Path, files: Any, weights: Any, taken: list[str] | None) -> None:
    """One that is no number is left and told, never 0."""
    imported = importers.read(written(tmp_path, GUI | {
        "base_weights": files, "base_weights_multiplier": weights}))
    assert imported.values.get("base_loras") == taken
    assert (left(imported).get("base_weights") == "value") == (taken is None)


def test_onetrainer_counts_layers_from_zero(tmp_path: Path) -> None:
    for skip, taken in ((0, None), (1, 2), ("1", 2), ("last", None)):
        imported = importers.read(written(tmp_path, ONETRAINER | {"text_encoder_layer_skip": skip}))
        assert imported.values.get("clip_skip") == taken


def test_onetrainer(tmp_path: Path) -> None:
    imported = importers.read(written(tmp_path, ONETRAINER))
    assert imported.kind == "OneTrainer"
    assert imported.values == {
        "base_model": "runway/model", "output_dir": "models", "output_name": "style",
        "save_precision": "fp16", "precision": "bf16", "max_resolution": "640,640",
        "train_data_dir": "/data/one", "flip": True, "shuffle_tags": True, "keep_tokens": 3,
        "epochs": 40, "batch_size": 4, "learning_rate": 3e-4, "lr_scheduler": "cosine",
        "lr_warmup_steps": 200, "lora_rank": 32, "lora_alpha": 1.0, "optimizer": "adamw",
        "weight_decay": 0.05, "gradient_checkpointing": True, "offload": 0.5,
        "base_precision": "nf4", "min_snr_gamma": 4.0, "save_steps": 50, "keep_checkpoints": 0,
        "target_modules": "all-linear", "conv_rank": 32, "conv_alpha": 1.0}
    assert imported.assumed == {"lora_alpha": 1.0}
    assert left(imported) == {
        "concepts.0.balancing": "repeats", "concepts.1.path": "second",
        "optimizer.fused": "unknown", "gradient_checkpointing": "unknown",
        "dataloader_threads": "by_itself", "prior": "unknown", "layer_filter_preset": "layers"}


def test_our_own_keys_in_toml_and_json(tmp_path: Path) -> None:
    assert load_train_config(written(tmp_path, "lora_rank = 4\nepochs = 2")).lora_rank == 4
    assert load_train_config(written(tmp_path, {"lora_rank": 5})).lora_rank == 5
    assert left(importers.read(written(tmp_path, {"lora_rank": 0}))) == {"lora_rank": "value"}


def test_what_train_config_learns_is_carried_over_from_then_on(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "ip_noise_gamma = 0.1\nnetwork_dim = 4")
    assert left(importers.read(path)) == {"ip_noise_gamma": "no_key"}

    class Later(TrainConfig):
        ip_noise_gamma: float = 0.0
    monkeypatch.setattr("core.importers.reader.TrainConfig", Later)
    assert importers.read(path).values["ip_noise_gamma"] == 0.1


def test_other_families_are_told(tmp_path: Path) -> None:
    from core import families
    imported = importers.read(written(tmp_path, 'model_train_type = "flux-lora"\nnetwork_dim = 2'))
    assert ("model_train_type" in left(imported)) == ("flux" not in families.SPECS)


def test_the_yaml_is_the_config(tmp_path: Path) -> None:
    imported = importers.read(written(tmp_path, SCRIPTS))
    out = tmp_path / "out.yaml"
    out.write_text(importers.to_yaml(imported), "utf-8")
    assert load_train_config(out) == load_train_config(tmp_path / "a.toml")
    assert "# " in out.read_text()


@pytest.mark.parametrize("language", i18n.LANGUAGES)
def test_every_reason_has_its_sentence(language: str) -> None:
    sources = "".join(path.read_text("utf-8")
                      for path in Path(importers.__file__).parent.glob("*.py"))
    import re
    reasons = set(re.findall(r'leave\([^"]*"(\w+)"', sources)) | {
        "by_itself", "unknown", "value", "no_key"}
    assert len(reasons) > 10
    for why in reasons:
        said = i18n.tr(f"config_import.why_{why}", lang=language)
        assert said != f"config_import.why_{why}"
    assert "{" not in Left(Path("a"), 1, "k", "v" * 100, "value").sentence(language)


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.toml", "a = [1\nb = 2", ["a.toml, line", "TOML"]),
    ("a.json", '{"a": 1,\n"b": }', ["line 2", "JSON"]),
    ("a.json", "[1, 2]", ["holds no settings"]), ("a.json", "{}", ["holds no settings"]),
    ("a.json", "[" * 100_000, ["levels"]), ("a.toml", "a = " + "[" * 100_000, ["a.toml"]),
    ("a.toml", "a = 1\na = 2", ["a.toml"]), ("gone.toml", None, ["gone.toml"])])
def test_what_is_no_config_is_one_sentence(tmp_path: Path, name: str, text: str | None,
                                           said: list[str]) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        importers.read(tmp_path / name)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("data", [
    {"3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20, "cfg": 8, "denoise": 1}}},
    {"job": "extension", "config": {"name": "x", "process": [
        {"type": "sd_trainer", "network": {"type": "lora", "linear": 16}, "device": "cuda"}]}},
    {"--model_type": "lora", "--lora_rank": 16, "--resolution": 512, "--optimizer": "adamw_bf16"},
    'output_dir = "/x"\ndataset = "d.toml"\nepochs = 9\n[model]\ntype = "sdxl"\n'
    '[adapter]\ntype = "lora"\nrank = 32\n'])
def test_other_programs_settings_are_no_kohya(tmp_path: Path, data: dict[str, Any] | str) -> None:
    """ComfyUI, ai-toolkit, SimpleTuner, diffusion-pipe: not kohya's defaults with nothing else."""
    with pytest.raises(UserError) as caught:
        importers.read(written(tmp_path, data))
    assert caught.value.code == "config_import.not_settings"


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
                                                                max_size=3), max_leaves=8)
known = st.sampled_from(sorted({name for c in (
    importers.kohya.Kohya, importers.onetrainer.OneTrainer) for name in (
        *c.table, *c.choices, *c.switches,
        *(n.removeprefix("take_") for n in dir(c) if n.startswith("take_")))}))


@settings(deadline=None, max_examples=300,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(known | st.text(min_size=1, max_size=8), json_value, min_size=1),
       st.sampled_from([None, "training_method", "datasets"]))
def test_any_values_are_carried_over_or_listed(tmp_path: Path, data: dict[str, Any],
                                               kind: str | None) -> None:
    if kind:
        data = {**data, kind: [{"subsets": [data]}] if kind == "datasets" else "LORA"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data, indent=1), "utf-8")
    try:
        imported = importers.read(path)
    except UserError as error:
        # nearly all of its keys are another program's
        if error.code != "config_import.not_settings":
            raise
        return
    TrainConfig.model_validate(imported.values)
    last = len(path.read_text("utf-8").splitlines())
    assert all(1 <= one.line <= last for one in imported.left)
    importers.to_yaml(imported)


@settings(deadline=None, max_examples=200)
@given(json_value)
def test_lines_of_json_are_those_of_the_keys(value: Any) -> None:
    text = json.dumps({"top": value}, indent=1, ensure_ascii=False)
    for keys, number in lines._json_lines(text).items():
        assert json.dumps(keys[-1], ensure_ascii=False) in text.split("\n")[number - 1]


def test_lines_of_toml(tmp_path: Path) -> None:
    text = ('a = 1\n"b c" = 2\n[x.y]\nz = """\nnot = this\n"""\n[[t]]\nu = 1\n[[t]]\nu = 2\n'
            "[t.in]\nv.w = 3\n")
    tomllib.loads(text)
    found = lines._toml_lines(text)
    assert found["a",] == 1
    assert found["b c",] == 2
    assert found["x", "y", "z"] == 4
    assert found["t", "0", "u"] == 8
    assert found["t", "1", "u"] == 10
    assert found["t", "1", "in", "v", "w"] == 12


@pytest.mark.parametrize(("text", "values"), [
    ('timestep_sampling = "sigmoid"\nsigmoid_scale = 1.5\ndiscrete_flow_shift = 3.0\n',
     {"timestep_sampling": "logit_normal", "logit_std": 1.5, "flow_shift": 1.0}),
    ('timestep_sampling = "shift"\ndiscrete_flow_shift = 3.1\nlogit_mean = 0.5\n',
     {"timestep_sampling": "logit_normal", "flow_shift": 3.1}),
    ('timestep_sampling = "uniform"\nsigmoid_scale = 2\n',
     {"timestep_sampling": "uniform", "flow_shift": 1.0}),
    ('timestep_sampling = "flux_shift"\n', {"timestep_sampling": "logit_normal"}),
    ('weighting_scheme = "logit_normal"\nlogit_mean = -0.5\nlogit_std = 0.8\nmode_scale = 1.0\n',
     {"timestep_sampling": "logit_normal", "logit_mean": -0.5, "logit_std": 0.8}),
    ('timestep_sampling = "sigma"\nweighting_scheme = "mode"\nmode_scale = 1.0\n'
     'discrete_flow_shift = 2\n',
     {"timestep_sampling": "mode", "mode_scale": 1.0, "flow_shift": 2.0})])
def test_kohyas_noise_levels(tmp_path: Path, text: str, values: dict[str, Any]) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'network_dim = 4\n{text}', "utf-8")
    found = importers.read(path)
    own = {key: value for key, value in found.values.items()
           if key in ("timestep_sampling", "flow_shift", "logit_mean", "logit_std", "mode_scale")}
    assert own == values
    assert not found.left


@pytest.mark.parametrize(("more", "values", "left"), [
    ({"model_type": "FLUX_DEV_1", "timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.3,
      "noising_weight": 0.5, "timestep_shift": 2.0},
     {"timestep_sampling": "logit_normal", "logit_mean": 0.3, "logit_std": 1.5,
      "flow_shift": 2.0}, []),
    ({"model_type": "FLUX_DEV_1", "timestep_distribution": "UNIFORM",
      "dynamic_timestep_shifting": True}, {"timestep_sampling": "uniform"}, []),
    ({"model_type": "STABLE_DIFFUSION_15", "timestep_distribution": "UNIFORM"}, {}, []),
    ({"model_type": "STABLE_DIFFUSION_15", "timestep_distribution": "COS_MAP"}, {},
     ["timestep_distribution"])])
def test_onetrainers_noise_levels(tmp_path: Path, more: dict[str, Any], values: dict[str, Any],
                                  left: list[str]) -> None:
    found = importers.read(written(tmp_path, {
        "training_method": "LORA", "layer_filter": "attn", **more}))
    assert {key: value for key, value in found.values.items()
            if key.startswith(("timestep", "logit", "flow"))} == values
    assert [one.key for one in found.left] == left


def test_files_beside_the_base(tmp_path: Path) -> None:
    """kohya names each encoder by a key of its own; here they are told by what they hold."""
    path = tmp_path / "flux.toml"
    path.write_text('pretrained_model_name_or_path = "flux.safetensors"\nae = "ae.safetensors"\n'
                    'clip_l = "clip_l.safetensors"\nt5xxl = "t5xxl_fp16.safetensors"\n'
                    'network_module = "networks.lora_flux"\n', "utf-8")
    found = importers.read(path).values
    assert (found["vae"], found["text_encoders"]) == (
        "ae.safetensors", ["clip_l.safetensors", "t5xxl_fp16.safetensors"])
    assert not {"ae", "clip_l", "t5xxl"} & {one.key for one in importers.read(path).left}


# What each key of theirs means, in our words, where the names differ: from sd-scripts' and
# OneTrainer's own help, written down apart from core/config/other_names.py.
MEANINGS = {
    "pretrained_model_name_or_path": "base_model", "resolution": "max_resolution",
    "network_dim": "lora_rank", "factor": "lokr_factor",
    "network_alpha": "lora_alpha", "network_dropout": "lora_dropout", "conv_dim": "conv_rank",
    "loraplus_lr_ratio": "lora_plus_ratio", "loraplus_unet_lr_ratio": "lora_plus_ratio",
    "network_weights": "init_lora_weights", "lora_network_weights": "init_lora_weights",
    "train_batch_size": "batch_size", "lr_scheduler_num_cycles": "lr_cycles",
    "lr_scheduler_power": "lr_power", "save_every_n_steps": "save_steps",
    "sample_every_n_steps": "sample_every", "shuffle_caption": "shuffle_tags",
    "caption_dropout_rate": "caption_dropout", "flip_aug": "flip",
    "debiased_estimation_loss": "debiased_estimation", "alpha_mask": "masked_loss",
    "min_bucket_reso": "min_bucket_side", "max_bucket_reso": "max_bucket_side", "ae": "vae",
    "cache_latents_to_disk": "cache_to_disk", "vae_batch_size": "cache_batch_size",
    "validate_every_n_steps": "validation_steps", "dit": "base_model", "in_json": "metadata_path",
    "sample_steps": "sample_inference_steps", "dropout": "lora_dropout",
    "huber_delta": "huber_c", "denoiser.learning_rate": "learning_rate",
    "base_model_name": "base_model", "dropout_probability": "lora_dropout",
    "lora_model_name": "init_lora_weights", "learning_rate_cycles": "lr_cycles",
    "layer_offload_fraction": "offload", "clip_grad_norm": "max_grad_norm",
    "offset_noise_weight": "noise_offset", "masked_training": "masked_loss",
    "rescale_noise_scheduler_to_zero_terminal_snr": "zero_terminal_snr",
    "optimizer.weight_decay": "weight_decay", "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2", "vae.model_name": "vae",
    "path": "train_data_dir", "image.enable_random_flip": "flip",
    "text.enable_tag_shuffling": "shuffle_tags",
    "text.keep_tags_count": "keep_tokens",
}


@pytest.mark.parametrize("table", [tables.KOHYA, tables.ONETRAINER, tables.ONETRAINER_CONCEPT],
                         ids=["kohya", "onetrainer", "concept"])
def test_every_key_goes_to_what_it_means(table: dict[str, str]) -> None:
    """A key that we call the same is the same; the others are those of MEANINGS."""
    wrong = {theirs: ours for theirs, ours in table.items()
             if ours != (theirs if theirs in TrainConfig.model_fields
                         else MEANINGS.get(theirs, theirs))}
    assert wrong == {}


# --- files beside the YAML ---

NAMES_FILES = {"base_model", "train_data_dir", "metadata_path", "reg_data_dir", "vae",
               "text_encoders", "tokenizer", "init_lora_weights", "base_loras", "resume"}


@pytest.mark.parametrize("key", sorted(NAMES_FILES))
def test_whatever_lies_beside_the_yaml_is_found(tmp_path: Path, key: str) -> None:
    """Alike for every key; what isn't there, is absolute or is no path stays as it is."""
    (tmp_path / "d" / "it").mkdir(parents=True)
    many = isinstance(TrainConfig.model_fields[key].default, list)

    def found(value: str) -> str:
        config = TrainConfig.model_validate({key: [value] if many else value})
        after = getattr(importers.located(config, tmp_path / "d"), key)
        return str(after[0] if many else after)
    assert found("./it") == str(tmp_path / "d" / "it")
    for other in ("./elsewhere", "demo", "shipped", "12345678", str(tmp_path / "nothing")):
        assert found(other) == other
    if key == "base_loras":
        for weight in (":0.5", ":0,8"):             # a comma is refused later, as it was written
            assert found(f"it{weight}") == str(tmp_path / "d" / "it") + weight


def test_no_key_that_names_files_is_forgotten() -> None:
    """What a user reads as a file or folder, but for where the results go."""
    said = {key for key, field in TrainConfig.model_fields.items()
            if re.search(r"\b(files?|folder|LoRAs)\b", field.description or "")}
    assert said - NAMES_FILES <= {"output_dir", "output_name", "save_precision", "save_format",
                                  "metadata"}
