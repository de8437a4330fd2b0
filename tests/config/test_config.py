from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core import i18n
from core.config import TrainConfig, dump_yaml, parse_train_config, resolve, size_of
from core.errors import UserError
from core.importers import load_train_config

FIRST = '''
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
batch_size: 4
epochs: 10
learning_rate: 2e-4
output_dir: "./output/my_style_lora"
save_steps: 100
'''
SECOND = '''
train_data_dir: "./data/cyber_ink"
base_model: "./models/v1-5-pruned.safetensors"
lora_rank: 8
target_modules: ["q_proj", "v_proj"]
batch_size: 2
gradient_accumulation_steps: 4
precision: fp16
max_resolution: "512,512"
learning_rate: 1e-4
output_dir: "./output/cyber_ink_lora"
'''


def test_described_configs_are_read() -> None:
    first, second = parse_train_config(FIRST, "a.yaml"), parse_train_config(SECOND, "b.yaml")
    assert yaml.safe_load("a: 2e-4") == {"a": "2e-4"}          # the trap
    assert (first.learning_rate, first.save_steps, first.name) == (2e-4, 100, "my_style_lora")
    assert second.target_modules == ["q_proj", "v_proj"]
    assert (second.gradient_accumulation_steps, second.precision) == (4, "fp16")
    assert size_of(second.max_resolution) == (512, 512)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1.e-4", ".1e-3", "0.0001", "1.0e-04"])
def test_every_spelling_of_a_rate(text: str) -> None:
    assert parse_train_config(f"learning_rate: {text}", "x").learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(("text", "said"), [
    ("lora_rnak: 8", ["x.yaml, line 1", "lora_rank"]),
    ("\n\nlearning_rat: 1", ["line 3", "learning_rate"]),
    ("epochs: ten", ["line 1", "epochs"]),
    ("lora_rank: 8\nlora_rank: 16", ["line 2", "first in line 1"]),
    ("a: [1", ["x.yaml", "line"]),
    ("- a\n- b", ["holds no settings"]),
    ("a: &x 1\nb: *x", ["aliases"]),
    ("max_resolution: 5", ["width,height"]),
    ("lora_rank: 0", ["lora_rank"]),
    ("qqqqqq: 1", ["unknown key"]),
    ("learning_rate: !!python/object:os.system x", ["line 1"]),
])
def test_faults_say_where(text: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_train_config(text, "x.yaml")
    for part in said:
        assert part in str(caught.value)
    chinese = i18n.tr(caught.value.code, caught.value.params, "zh-CN")
    assert chinese != str(caught.value)
    assert "{" not in chinese


def test_a_yaml_bomb_is_refused_at_once() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n"
        for i in range(12))
    with pytest.raises(UserError, match="aliases"):
        parse_train_config(bomb, "bomb.yaml")


def test_set_beats_the_file_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FIRST)
    config = load_train_config(path, {"learning_rate": "3e-5", "sample_prompts": "[a, b]"})
    assert (config.learning_rate, config.sample_prompts) == (3e-5, ["a", "b"])
    with pytest.raises(UserError, match="--set"):
        load_train_config(path, {"epochs": "many"})
    with pytest.raises(UserError, match="There is no config file"):
        load_train_config(tmp_path / "none.yaml")


def test_byte_order_mark_and_chinese(tmp_path: Path) -> None:
    path = tmp_path / "配置.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "gb18030"):
        path.write_bytes("output_name: 水墨\n".encode(encoding))
        assert load_train_config(path).name == "水墨", encoding
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="can't be read"):
        load_train_config(path)


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 1024), rate=st.floats(1e-8, 1, allow_subnormal=False),
       name=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
       targets=st.lists(st.sampled_from(["to_q", "to_v", "ff.net.2"]), min_size=1),
       flip=st.booleans())
def test_saved_config_reads_back_equal(rank: int, rate: float, name: str, targets: list[str],
                                       flip: bool) -> None:
    config = TrainConfig(lora_rank=rank, learning_rate=rate, trigger_word=name,
                         target_modules=targets, flip=flip)
    assert parse_train_config(dump_yaml(config), "saved") == config


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_in_one_sentence(text: str) -> None:
    fault = None
    try:
        parse_train_config(text, "any.yaml")
    except UserError as error:
        fault = error
    assert fault is None or str(fault)


def test_sizes_in_every_spelling() -> None:
    for value in ("512,768", "512x768", "512×768", [512, 768], " 512 , 768 "):
        assert TrainConfig(max_resolution=value).max_resolution == "512,768"  # type: ignore[arg-type]
    assert TrainConfig(max_resolution=512).max_resolution == "512,512"        # type: ignore[arg-type]


def test_paths_are_looked_up_beside_the_config_first(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    near, here = tmp_path / "near", tmp_path / "here"
    (near / "a").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    assert resolve("a", near) == near / "a"
    assert resolve("b", near) == here / "b"
    assert resolve(str(near), here) == near


@pytest.mark.parametrize(("line", "says"), [
    ("lora_rank: 0", "不能小于 1"), ("batch_size: many", "应为整数"),
    ("precision: fp7", "'bf16' 之一"),
    ("optimizer: adamm", "最接近的是 `adamw`"), ("trigger_word: 3", "请加引号"),
    ("block_ranks: {mid: 4000}", "mid 应为 0 到 1024")])
def test_what_is_wrong_with_a_value_is_told_in_the_users_language(line: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train_config(f"base_model: demo\n{line}\n", "x.yaml")
    assert says in i18n.tr(caught.value.code, caught.value.params, "zh-CN")
    assert "expected" in str(caught.value) or "at least" in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [
    ("true", True), ("'no'", False), ("off", False), ("''", False), ("1", True), ("0", False),
    ("1234567890", "1234567890"), ("out/checkpoints/a-000100", "out/checkpoints/a-000100")])
def test_resume_is_a_switch_a_session_or_a_folder(text: str, value: bool | str) -> None:
    assert parse_train_config(f"resume: {text}", "x.yaml").resume == value
    assert type(parse_train_config("", "x.yaml", {"resume": text}).resume) is type(value)


@pytest.mark.parametrize(("folder", "name"), [
    ("out/my_style", "my_style"), ("./output/", "output"), ("..", "lora"), (".", "lora"),
    ("/", "lora"), ("", "lora"), ("out/a:b?", "a_b_"), ("out/NUL", "lora"), ("out/水墨.", "水墨"),
    ("out/" + "x" * 250, "lora")])
def test_a_lora_without_a_name_is_called_as_its_folder(folder: str, name: str) -> None:
    """As far as every system can have such a file."""
    assert TrainConfig(output_dir=folder).name == name
    assert TrainConfig(output_dir=folder, output_name="own").name == "own"
