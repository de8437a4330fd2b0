"""`darkroom lora convert | merge | resize | extract` and `config import`, as a user types them."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import UserError
from core.families.sd15.spec import NAMING as SD1
from core.hashes import data_hash
from core.importers import load_train_config
from core.lora_files import formats
from core.lora_files.files import describe
from core.lora_files.layers import Lora, rank_of
from core.lora_files.pickles import convert
from core.safetensors_header import read_header
from tests.cli.test_commands import Run, run  # noqa: F401  (a fixture)
from tests.lora_files.deltas import delta
from tests.lora_files.test_formats import OTHER_KINDS, layer
from tests.lora_files.test_merge import NAME, models

TEXT = "text_encoder.encoder.layers.0.mlp.fc1"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    lora = Lora({NAME: layer(4, 12, 11, alpha=2.0), TEXT: layer(4, 12, 11, alpha=2.0)}, SD1, {
        "ss_base_model_version": "sd_v1", "ss_network_dim": "4",
        "modelspec.trigger_phrase": "inkwash"})
    return formats.save(lora, "kohya", tmp_path / "style.safetensors")


SECRET = {                                  # what a file of another trainer tells of its owner
    "ss_sd_model_name": "/srv/ann lee/models/base.safetensors",
    "ss_dataset_dirs": '{"D:\\\\ann\\\\cats": {"n_repeats": 2}}',
    "ss_datasets": '[{"subsets": [{"image_dir": "C:/ann/cats", "caption_prefix": "a/b"}]}]',
    "ot_config": '{"base_model_name": "~/ann/base", "concepts": [{"path": "/mnt/ann/x"}]}',
    "darkroom.config":
        "train_data_dir: /srv/ann/cats\nbase_loras:\n- /srv/ann/a.safetensors:0.5\n",
    "modelspec.thumbnail": "data:image/jpeg;base64,ann", "ss_vae_name": "~/ann/v",
    "broken": "[/home"}


@pytest.mark.parametrize("verb", [["convert", "--to", "comfyui"], ["convert", "--to", "peft"],
                                  ["resize", "--rank", 2], ["merge", "--rank", 2]])
@pytest.mark.parametrize("asked", ["public", "full"])
def test_a_new_file_tells_nothing_of_its_owner(
        run: Run, style: Path, tmp_path: Path, verb: list[Any], asked: str) -> None:  # noqa: F811
    source, free = tmp_path / "owned.safetensors", {"modelspec.description": "~/ is my home",
                                                    "ss_training_comment": "/r/cats"}
    save_file(load_file(style), source, read_header(style).metadata | SECRET | free)
    told = run("lora", verb[0], source, *verb[1:], "--json", "--metadata", asked)
    assert told.code == 0
    found = read_header(formats.weights_file(Path(told.json["file"]))).metadata
    assert free.items() <= found.items()
    if asked == "full":
        assert verb[0] == "merge" or SECRET.items() <= found.items()
        return
    assert not [key for key, text in found.items() if "ann" in text]
    assert found["ss_sd_model_name"] == "base.safetensors"
    assert found["ss_dataset_dirs"] == '{"cats": {"n_repeats": 2}}'
    assert '"image_dir": "cats", "caption_prefix": "a/b"' in found["ss_datasets"]
    if verb[0] != "merge":                  # which keeps what is true of the sum
        assert found["darkroom.config"] == (
            "train_data_dir: cats\nbase_loras:\n- a.safetensors:0.5\n")
        assert found["broken"] == "[/home"


def test_convert_there_and_back(run: Run, style: Path, tmp_path: Path) -> None:  # noqa: F811
    before = style.read_bytes()
    for to, name in (("comfyui", "style-comfyui.safetensors"), ("peft", "style-peft"),
                     ("diffusers", "style-diffusers.safetensors")):
        told = run("lora", "convert", style, "--to", to, "--json")
        assert told.code == 0
        assert told.json["file"] == str(tmp_path / name)
        assert told.json["layers"] == 2
        back = run("lora", "convert", tmp_path / name, "--to", "kohya", "--out", f"back-{to}")
        assert back.code == 0
        again = formats.read(tmp_path / f"back-{to}.safetensors")
        for path, one in formats.read(style).layers.items():
            torch.testing.assert_close(delta(again.layers[path]), delta(one))
        assert again.metadata["modelspec.trigger_phrase"] == "inkwash"
        info = run("lora", "info", tmp_path / name)
        assert info.code == 0
        assert "inkwash" in info.out
    assert style.read_bytes() == before
    assert data_hash(tmp_path / "back-comfyui.safetensors") == data_hash(style)
    twice = run("lora", "convert", style, "--to", "comfyui", "--json")
    assert twice.json["file"].endswith("style-comfyui-2.safetensors")


def test_precision(run: Run, style: Path, tmp_path: Path) -> None:  # noqa: F811
    run("lora", "convert", style, "--to", "kohya", "--out", "half", "--precision", "bf16")
    assert describe(tmp_path / "half.safetensors").dtype == "BF16"


def test_merge(run: Run, style: Path, tmp_path: Path) -> None:  # noqa: F811
    other = formats.save(Lora({NAME: layer(3, 12, 11, alpha=1.0)}, SD1, {
        "ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "neon",
        "darkroom.base_loras": '["turbo_adapter:1:0123"]'}), "comfyui",
        tmp_path / "other.safetensors")
    told = run("lora", "merge", f"{style}:0.8", f"{other}:-0.5", "--out", "both", "--json")
    assert told.code == 0
    merged = formats.read(tmp_path / "both.safetensors")
    wanted = (0.8 * delta(formats.read(style).layers[NAME])
              - 0.5 * delta(formats.read(other).layers[NAME]))
    torch.testing.assert_close(delta(merged.layers[NAME]), wanted, rtol=1e-5, atol=1e-5)
    assert merged.metadata["modelspec.trigger_phrase"] == "inkwash, neon"
    assert merged.metadata["modelspec.merged_from"] == "style.safetensors, other.safetensors"
    assert merged.metadata["ss_base_model_version"] == "sd_v1"
    assert merged.metadata["ss_network_dim"] == "Dynamic"
    assert describe(tmp_path / "both.safetensors").facts.base_loras == ("turbo_adapter:1:0123",)
    less = run("lora", "merge", f"{style}", f"{other}", "--out", "less", "--rank", "2", "--json")
    assert 0 < less.json["kept"] < 1
    assert {rank_of(one) for one in formats.read(tmp_path / "less.safetensors"
                                                 ).layers.values()} == {2}


def test_resize(run: Run, style: Path, tmp_path: Path) -> None:  # noqa: F811
    told = run("lora", "resize", style, "--rank", "2")
    assert told.code == 0
    assert "%" in told.out
    small = describe(tmp_path / "style-r2.safetensors")
    assert small.ranks == (2,)
    assert small.facts.trigger_words == ("inkwash",)
    assert read_header(small.path).metadata["ss_network_dim"] == "2"
    assert run("lora", "resize", style, "--energy", "0.5", "--out", "e.safetensors").code == 0
    assert max(describe(tmp_path / "e.safetensors").ranks) < 4


def test_demo_is_a_base_everywhere(run: Run, tmp_path: Path) -> None:  # noqa: F811
    told = run("families", "demo", "--json")
    assert (told.code, told.json["family"]) == (0, "sd15")
    for tuned, base in (("demo", "gone"), ("gone", "demo")):
        told = run("lora", "extract", tuned, base, "--rank", "2", "--out", "found")
        assert told.code == 2
        assert "gone" in told.err
        assert "at demo" not in told.err


def test_extract(run: Run, tmp_path: Path) -> None:  # noqa: F811
    base, tuned, known = models(tmp_path, 2)
    told = run("lora", "extract", tuned, base, "--rank", "2", "--out", "found", "--json")
    assert told.code == 0
    assert told.json["layers"] == len(known)
    assert told.json["kept"] == pytest.approx(1, abs=1e-4)
    assert describe(tmp_path / "found.safetensors").dtype == "F16"


@pytest.mark.parametrize(("argv", "said"), [
    (["convert", "gone.safetensors", "--to", "peft"], "gone.safetensors"),
    (["merge", "style.safetensors:nan", "style.safetensors:1"], "`nan`"),
    (["merge", "style.safetensors:0,8", "style.safetensors:1"], "`nan`"),
    (["convert", "style.safetensors"], "--to"),
    (["resize", "style.safetensors"], "--energy"),
    (["resize", "style.safetensors", "--rank", "0"], "argument --rank: invalid rank value: '0'"),
    (["resize", "style.safetensors", "--energy", "2"],
     "argument --energy: invalid share value: '2'"),
    (["convert", "loha.safetensors", "--to", "diffusers"], "loha"),
    (["merge", "style.safetensors", "oft.safetensors"], "oft"),
    (["convert", "style.safetensors", "--to", "kohya", "--family", "sd99"], "sd15")])
def test_what_does_not_work_is_one_sentence(run: Run, style: Path, tmp_path: Path,  # noqa: F811
                                            argv: list[str], said: str) -> None:
    for kind in ("loha", "oft"):
        formats.save(Lora({NAME: OTHER_KINDS[kind]()}, SD1), "kohya",
                     tmp_path / f"{kind}.safetensors")
    files = {p.name for p in tmp_path.iterdir()}
    for language in ("en", "zh-CN"):
        told = run("lora", *argv, lang=language)
        assert told.code == 2
        assert said in told.err
        assert "Traceback" not in told.err
        assert "{" not in told.err.splitlines()[-1]
    assert {p.name for p in tmp_path.iterdir()} == files


def test_config_import(run: Run, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "lora.toml").write_text('network_dim = 8\nnetwork_alpha = 4\nlearning_rate = 1e-4\n'
                                        'max_train_steps = 9\nweighted_captions = true\n')
    told = run("config", "import", "lora.toml")
    assert told.code == 0
    assert "lora.toml, line 5: `weighted_captions: True`" in told.err
    config = load_train_config(tmp_path / "lora.yaml")
    assert (config.lora_rank, config.lora_alpha, config.max_train_steps) == (8, 4, 9)
    again = run("config", "import", "lora.toml", "--json")
    assert again.json["file"] == "lora-2.yaml"
    assert again.json["left"][0]["line"] == 5


# --- pickles: read here alone, on the user's word ----------------------------------------------

class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def test_pickles_become_safetensors(run: Run, tmp_path: Path) -> None:  # noqa: F811
    shared = torch.randn(4, 4)
    content = {"state_dict": {"a.weight": torch.randn(2, 3), "b": shared, "c": shared[:2],
                              "d": shared.T}, "global_step": 7, "epoch": 1}
    torch.save(content, tmp_path / "old.ckpt")
    torch.save(content, tmp_path / "older.pt", _use_new_zipfile_serialization=False)
    for name in ("old.ckpt", "older.pt"):
        told = run("lora", "convert", name, "--json")
        assert told.code == 0
        found = load_file(told.json["file"])
        assert found.keys() == content["state_dict"].keys()
        assert all(torch.equal(found[key], value) for key, value in content["state_dict"].items())


def test_a_pickled_lora_is_converted_on(run: Run,  # noqa: F811
                                        style: Path, tmp_path: Path) -> None:
    torch.save(load_file(style), tmp_path / "lora.bin")
    told = run("lora", "convert", "lora.bin", "--to", "comfyui", "--json")
    assert told.code == 0
    assert describe(Path(told.json["file"])).format == "comfyui"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_something_does_not(run: Run, tmp_path: Path,  # noqa: F811
                                                       zipped: bool) -> None:
    torch.save({"a": torch.ones(1), "b": Evil()}, tmp_path / "evil.ckpt",
               _use_new_zipfile_serialization=zipped)
    told = run("lora", "convert", "evil.ckpt")
    assert told.code == 2
    assert "mkdir" in told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.ckpt"]


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04", b"\x80\x02}q\x00.", pickle.dumps({"a": 1}), b"garbage" * 99,
    pickle.dumps(Evil())])
def test_broken_pickles_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_truncated_pickles_are_one_sentence(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.randn(50, 50)}, buffer)
    whole = buffer.getvalue()
    for share in (0.2, 0.6, 0.95):
        (tmp_path / "a.pt").write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(UserError):
            convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
