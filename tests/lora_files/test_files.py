"""LoRA files: strict reading, kohya names against real models, diffusers as the second reader."""

from __future__ import annotations

import copy
import json
import logging
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from diffusers.utils import logging as diffusers_logging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from core import i18n, paths
from core.errors import UserError
from core.families import lora_signs
from core.families.lora_signs import detect_format
from core.families.sd15.spec import NAMING as SD1
from core.hashes import data_hash
from core.lora_files import files, formats, layers
from core.lora_files.files import describe, read_config, read_lora, write_lora
from core.lora_files.layers import Lora, alpha_of, with_alpha
from core.safetensors_header import PICKLES, read_header

RANK, ALPHA = 4, 2.0
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in",
                "proj_out"]
CONV_TARGETS = [*UNET_TARGETS, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SLOW_FIXTURE = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def _english(monkeypatch):
    monkeypatch.setattr(i18n, "language", lambda: "en")


# --- real models -------------------------------------------------------------------------------

def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()


def make_text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=98,
        eos_token_id=99)).eval()


def lora_config(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets,
                      init_lora_weights="gaussian")


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Up matrices start as zeros, which would hide every mistake."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    model = make_unet()
    return randomised(inject_adapter_in_model(lora_config(CONV_TARGETS), model))


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    model = make_text_encoder()
    return randomised(inject_adapter_in_model(lora_config(TEXT_TARGETS), model))


@pytest.fixture(scope="module")
def unet_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(unet)


@pytest.fixture(scope="module")
def text_state(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(text_encoder)
    return {f"text_encoder.{key}": value for key, value in state.items()}


@pytest.fixture(scope="module")
def both(unet_state, text_state) -> dict[str, Tensor]:
    return kohya({**unet_state, **text_state}, ALPHA)


def kohya(state: dict[str, Tensor], alpha: float, dtype: torch.dtype | None = None,
          family: str = "sd15") -> dict[str, Tensor]:
    """As a run writes what it trained."""
    found = formats.from_tensors(formats.cast(state, dtype), family, alpha)
    assert found.unknown == ()
    return formats.spell(found, "kohya")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first)


# --- names -------------------------------------------------------------------------------------

def test_unet_keys_and_values_are_those_of_diffusers_converter(unet_state):
    theirs = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in unet_state.items()})
    ours = kohya(unet_state, RANK)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha" in ours


def test_text_keys_are_those_of_diffusers_converter_but_for_the_prefix(text_state):
    theirs = convert_state_dict_to_kohya({
        k.replace("text_encoder.", "text_encoder.text_model."): v for k, v in text_state.items()})
    ours = kohya(text_state, RANK)
    assert ours.keys() == {k.replace("lora_te1_", "lora_te_") for k in theirs}


@pytest.mark.parametrize("key", [
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight",
    "text_encoder.encoder.layers.0.self_attn.q_proj.lora_{}.weight",
    "text_encoder.base_model.model.encoder.layers.0.self_attn.q_proj.lora_{}.default.weight",
    "base_model.model.text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"])
def test_text_model_is_in_the_kohya_key_whatever_the_model_says(key):
    state = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(8, 2)}
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert set(kohya(state, 1)) == {f"{name}.alpha", f"{name}.lora_down.weight",
                                       f"{name}.lora_up.weight"}


def test_all_spellings_of_peft_give_the_same_file(unet_state):
    wrapped = get_peft_model(make_unet(), lora_config(CONV_TARGETS))
    randomised(wrapped)
    raw = {k: v for k, v in wrapped.state_dict().items() if ".lora_" in k}
    assert all(k.startswith("base_model.model.") and ".default.weight" in k for k in raw)
    reference = kohya(unet_state, ALPHA)
    assert same(kohya(raw, ALPHA), reference)
    assert same(kohya(get_peft_model_state_dict(wrapped), ALPHA), reference)
    assert same(kohya({f"unet.{k}": v for k, v in unet_state.items()}, ALPHA), reference)


def test_convolutions_keep_four_dimensions_and_alpha_has_none(both):
    down = both["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    up = both["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"]
    alpha = both["lora_unet_down_blocks_0_resnets_0_conv1.alpha"]
    assert down.shape == (RANK, 32, 3, 3)
    assert up.shape == (32, RANK, 1, 1)
    assert (alpha.shape, alpha.dtype, float(alpha)) == ((), torch.float32, ALPHA)


def test_a_dtype_rounds_the_weights_only(unet_state):
    halves = kohya(unet_state, 0.3, torch.float16)
    for key, tensor in halves.items():
        assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.float16)
    key = "lora_unet_mid_block_resnets_0_conv1.lora_down.weight"
    exact = kohya(unet_state, 0.3)[key]
    assert torch.equal(halves[key], exact.half())
    assert not torch.equal(halves[key].float(), exact)


def test_round_trip_through_the_real_models(unet_state, text_state, both):
    found = formats.from_tensors(both, "sd15")
    assert found.unknown == ()
    assert {alpha_of(layer) for layer in found.layers.values()} == {ALPHA}
    wanted = {f"unet.{k}": v for k, v in unet_state.items()} | text_state
    peft = {f"{path}.{end}.weight": layer[ours] for path, layer in found.layers.items()
            for end, ours in (("lora_A", layers.DOWN), ("lora_B", layers.UP))}
    assert same(peft, wanted)
    assert same(formats.spell(found, "kohya"), both)


def test_unknown_keys_and_odd_pairs_are_reported(both):
    assert formats.from_tensors({**both, "strange.key": torch.ones(1)}, "sd15").unknown == (
        "strange.key",)
    gone = "lora_unet_mid_block_resnets_0_conv1.lora_up.weight"
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv1") as caught:
        kohya({key: value for key, value in both.items() if key != gone}, ALPHA)
    assert caught.value.code == "lora_file.lone_half"
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv1") as caught:
        kohya({**both, gone: torch.ones(64, RANK + 1, 1, 1)}, ALPHA)
    assert caught.value.code == "lora_convert.misfit"


def test_two_layers_with_one_name_are_a_fault():
    layer = {layers.DOWN: torch.ones(2, 8), layers.UP: torch.ones(8, 2)}
    with pytest.raises(UserError, match="lora_unet_a_b_c") as caught:
        formats.spell(Lora({"unet.a_b.c": layer, "unet.a.b_c": layer}, SD1), "kohya")
    assert caught.value.code == "lora_file.same_name"


def test_another_family_is_another_table():
    state = {f"text_encoder_2.text_model.encoder.layers.3.mlp.fc1.lora_{h}.weight": w
             for h, w in (("A", torch.ones(2, 8)), ("B", torch.ones(8, 2)))}
    assert "lora_te2_text_model_encoder_layers_3_mlp_fc1.alpha" in kohya(state, 2, family="sdxl")


@pytest.mark.parametrize("change", [{"unet.mid.lora_magnitude_vector": torch.ones(1)},
                                    {"unet.mid.lora_A.weight": torch.ones(2, 8)}])
def test_half_a_lora_is_not_written(change):
    with pytest.raises(UserError) as caught:
        kohya(change, 1)
    assert caught.value.code == "lora_file.lone_half"


def test_two_adapters_at_once_are_a_fault():
    state = {f"unet.mid.lora_{h}.{name}.weight": torch.ones(2, 2)
             for h in "AB" for name in ("one", "two")}
    with pytest.raises(UserError) as caught:
        kohya(state, 1)
    assert caught.value.code == "lora_file.same_name"


segment = st.from_regex(r"[a-z]{1,3}(_[a-z]{1,3})?|\d{1,2}", fullmatch=True)
module_path = st.lists(segment, min_size=1, max_size=5).map(".".join).filter(
    lambda path: not path.startswith("out."))            # names of the original code


@settings(deadline=None, max_examples=300)
@given(st.sets(module_path, min_size=1, max_size=8), st.integers(1, 4), st.data())
def test_any_module_names_round_trip_or_are_refused(modules, rank, data):
    paths = [f"unet.{m}" for m in sorted(modules)]
    state = {f"{p}.lora_{h}.weight": torch.randn(shape) for p in paths
             for h, shape in (("A", (rank, 3)), ("B", (5, rank)))}
    found = formats.from_tensors(state, "sd15")
    assert list(found.layers) == paths
    found.layers = {path: with_alpha(layer, data.draw(st.floats(0.125, 64, width=32)))
                    for path, layer in found.layers.items()}
    if len({p.replace(".", "_") for p in paths}) < len(paths):
        with pytest.raises(UserError, match="two layers"):
            formats.spell(found, "kohya")
        return
    written = formats.spell(found, "kohya")
    assert same(written, {f"lora_{path.replace('.', '_')}.{end}": value
                          for path, layer in found.layers.items() for end, value in layer.items()})
    again = formats.from_tensors(written, "sd15")
    assert again.unknown == ()
    assert same(formats.spell(again, "kohya"), written)


def test_folded_alpha_keeps_the_product(both):
    """diffusers' single file has no alpha."""
    found = formats.from_tensors(both, "sd15")
    folded = formats.spell(found, "diffusers")
    assert not any(key.endswith("alpha") for key in folded)
    for path, layer in found.layers.items():
        path = path.replace("text_encoder.", "text_encoder.text_model.")
        assert torch.equal(folded[f"{path}.lora_A.weight"], layer[layers.DOWN])
        assert torch.equal(folded[f"{path}.lora_B.weight"], layer[layers.UP] * (ALPHA / RANK))
        unchanged = layers.folded(with_alpha(layer, RANK))
        assert all(unchanged[end] is layer[end] for end in unchanged)


# --- diffusers reads it ------------------------------------------------------------------------

@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=make_text_encoder(), tokenizer=None, unet=make_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)


@pytest.fixture
def diffusers_log(caplog):
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    diffusers_logging.disable_propagation()


def loaded_state(model: torch.nn.Module) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name="ours")


@torch.no_grad()
def predict(model: UNet2DConditionModel) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return model(torch.randn(1, 4, 8, 8, generator=rng), torch.tensor([500]),
                 torch.randn(1, 7, 32, generator=rng)).sample


def test_diffusers_matches_every_key_and_computes_the_same(
        tmp_path, pipeline, diffusers_log, unet, text_encoder, both):
    path = tmp_path / "画风 style.safetensors"
    write_lora(path, both, {"ss_network_module": "networks.lora"})
    before = predict(pipeline.unet)
    pipeline.load_lora_weights(str(path), adapter_name="ours")
    assert [r.getMessage() for r in diffusers_log.records if r.levelno >= logging.WARNING] == []
    assert same(loaded_state(pipeline.unet), get_peft_model_state_dict(unet))
    assert same(loaded_state(pipeline.text_encoder), get_peft_model_state_dict(text_encoder))
    after = predict(pipeline.unet)
    assert (after - predict(unet)).abs().max() < 5e-6    # alpha / rank included
    assert (after - before).abs().max() > 1e-2
    tokens = torch.tensor([[98, 5, 6, 99]])
    with torch.no_grad():
        theirs = pipeline.text_encoder(tokens).last_hidden_state
        assert (theirs - text_encoder(tokens).last_hidden_state).abs().max() < 5e-6


def test_diffusers_takes_an_alpha_of_one_layer(tmp_path, pipeline, unet_state):
    """Of convolutions; for attention layers it falls back to the most frequent alpha."""
    found = formats.from_tensors(unet_state, "sd15", ALPHA)
    path = "unet.mid_block.resnets.0.conv1"
    found.layers[path] = with_alpha(found.layers[path], 1.0)
    write_lora(tmp_path / "a.safetensors", formats.spell(found, "kohya"), {})
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="ours")
    layers = dict(pipeline.unet.named_modules())
    assert layers["mid_block.resnets.0.conv1"].scaling["ours"] == 1 / RANK
    assert layers["mid_block.resnets.0.conv2"].scaling["ours"] == ALPHA / RANK


def test_diffusers_reads_the_folded_spelling_too(tmp_path, pipeline, diffusers_log, unet, both):
    of_unet = {key: value for key, value in both.items() if key.startswith("lora_unet_")}
    path = tmp_path / "peft.safetensors"
    write_lora(path, formats.spell(formats.from_tensors(of_unet, "sd15"), "diffusers"), {})
    pipeline.load_lora_weights(str(path), adapter_name="ours")
    noise = [r.getMessage() for r in diffusers_log.records if "No LoRA keys" not in r.getMessage()]
    assert noise == []                                   # it has no text encoder, rightly
    torch.testing.assert_close(predict(pipeline.unet), predict(unet), rtol=1e-5, atol=1e-6)


# --- files -------------------------------------------------------------------------------------

def test_write_and_read(tmp_path, both):
    path = tmp_path / "new folder" / "a.safetensors"
    written = write_lora(path, both, {"ss_output_name": "风格 é 🎨", "空": ""})
    tensors, metadata = read_lora(path)
    assert same(tensors, both)
    assert metadata == written
    assert written.items() >= {"ss_output_name": "风格 é 🎨", "空": ""}.items()
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    assert same(load_file(path), both)


def test_views_and_transposed_tensors_are_written_whole(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"x.lora_down.weight": whole[:2], "x.lora_up.weight": whole.T}
    write_lora(tmp_path / "a.safetensors", tensors, {})
    assert same(read_lora(tmp_path / "a.safetensors")[0], tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_values_that_are_not_finite_are_refused_and_the_old_file_stays(tmp_path, bad):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    weight = torch.tensor([[0.0, bad]]).half()           # 1e6 overflows to inf
    with pytest.raises(UserError, match=r"x\.lora_up\.weight.*float16"):
        write_lora(path, {"x.lora_down.weight": torch.ones(1, 1), "x.lora_up.weight": weight}, {})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_to_write_is_a_fault(tmp_path):
    with pytest.raises(UserError, match="no tensors"):
        write_lora(tmp_path / "a.safetensors", {}, {})


def test_config_inside_a_file(tmp_path, both):
    path = tmp_path / "a.safetensors"
    write_lora(path, both, {"darkroom.config": "base_model: ./基础\nlora_rank: 4\n"})
    assert read_config(path) == "base_model: ./基础\nlora_rank: 4\n"
    save_file(both, path, {"ss_a": "1", "ss_b": "2", "ss_c": "3", "ss_d": "4"})
    with pytest.raises(UserError, match=r"4 other metadata entries \(ss_a, ss_b, ss_c \.\.\.\)"):
        read_config(path)
    save_file(both, path)
    with pytest.raises(UserError, match="no metadata at all"):
        read_config(path)


def test_a_checkpoint_is_not_read_as_a_lora(tmp_path):
    path = tmp_path / "v1-5.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.ones(4)}, path)
    with pytest.raises(UserError, match="checkpoint"):
        read_lora(path)


def test_types_that_torch_lacks_are_a_fault(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(spell({"x.lora_down.weight": entry("F6_E2M3", [4], 0, 3)}, b"abc"))
    assert read_header(path).tensors["x.lora_down.weight"].nbytes == 3
    with pytest.raises(UserError) as caught:
        read_lora(path)
    assert caught.value.code == "lora_file.unreadable"


# --- malformed files ---------------------------------------------------------------------------

def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def spell(header: dict | str | bytes, content: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + content


GOOD = entry("F16", [2, 1], 0, 4)
MALFORMED = {
    "empty": (b"", "truncated"),
    "only a length": (struct.pack("<Q", 2), "truncated"),
    "header cut": (spell({"a": GOOD}, length=4000), "truncated"),
    "huge header": (spell({"a": GOOD}, length=2**60), "header_length"),
    "html": (b"<!DOCTYPE html><html><head>", "web_page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git_pointer"),
    "no brace": (spell("[1, 2]"), "bad_header"),
    "no json": (spell("{nothing}"), "bad_header"),
    "no utf-8": (spell(b'{"\xff": 1}'), "bad_header"),
    "nan": (spell('{"a": NaN}'), "bad_header"),
    "half a pair": (spell('{"__metadata__": {"a": "\\ud800"}}'), "bad_header"),
    "deep": (spell('{"a":' * 100_000), "bad_header"),
    "huge number": (spell('{"a": ' + "9" * 5000 + "}"), "bad_header"),
    "twice": (spell(f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}', b"1234"),
              "duplicate_key"),
    "metadata number": (spell({"__metadata__": {"ss_steps": 7}}), "bad_metadata"),
    "metadata list": (spell({"__metadata__": ["a"]}), "bad_metadata"),
    "entry is text": (spell({"a": "F16"}), "bad_tensor"),
    "unknown type": (spell({"a": entry("F17", [1], 0, 2)}, b"12"), "bad_tensor"),
    "negative side": (spell({"a": entry("F16", [-1, -2], 0, 4)}, b"1234"), "bad_tensor"),
    "minus zero": (spell(json.dumps({"a": GOOD}).replace("[0,", "[-0,"), b"1234"),
                   "bad_tensor"),
    "true as side": (spell({"a": entry("U8", [True], 0, 1)}, b"1"), "bad_tensor"),
    "fraction": (spell({"a": entry("U8", [1.0], 0, 1)}, b"1"), "bad_tensor"),
    "backwards": (spell({"a": entry("U8", [1], 1, 0)}, b"1"), "bad_tensor"),
    "three offsets": (spell({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, b"1"),
                      "bad_tensor"),
    "endless": (spell({"a": entry("U8", [2**40, 2**40, 0], 0, 0)}), "bad_tensor"),
    "wrong size": (spell({"a": entry("F32", [2, 1], 0, 4)}, b"1234"), "wrong_size"),
    "overlap": (spell({"a": GOOD, "b": entry("F16", [1], 2, 4)}, b"1234"), "overlap"),
    "gap": (spell({"a": entry("F16", [1], 0, 2), "b": entry("F16", [1], 4, 6)}, b"123456"), "gap"),
    "more at the end": (spell({"a": GOOD}, b"12345"), "gap"),
    "data cut": (spell({"a": GOOD}, b"123"), "outside"),
    "zip": (b"PK\x03\x04" + b"archive/data.pkl" * 4, "pickle"),
    "pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00epoch", "pickle"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("reader", [read_header, read_lora, describe, read_config, data_hash])
def test_malformed_files(tmp_path, name, reader):
    content, code = MALFORMED[name]
    path = tmp_path / "some file.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"some file\.safetensors") as caught:
        reader(path)
    assert caught.value.code == f"lora_file.{code}"
    assert "{" not in i18n.tr(caught.value.code, caught.value.params).replace("no { at", "")
    assert is_refused_by_safetensors(content) == (name not in STRICTER)


STRICTER = {"twice"}                                     # safetensors takes the last of the two


def is_refused_by_safetensors(content: bytes) -> bool:
    try:
        deserialize(content)
    except SafetensorError:
        return True
    return False


@pytest.mark.parametrize("suffix", sorted(PICKLES))
def test_pickles_are_refused_with_what_to_do(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"any code.*\.safetensors") as caught:
        read_header(path)
    assert caught.value.code == "lora_file.pickle"


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    header = json.dumps({"a": GOOD}).ljust(0x0280)
    path = tmp_path / "a.safetensors"
    path.write_bytes(spell(header, b"1234"))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_header(path).tensors["a"].shape == (2, 1)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match=r"no file .*a\.safetensors") as caught:
        describe(tmp_path / "a.safetensors")
    assert caught.value.code == "lora_file.missing"
    with pytest.raises(UserError) as caught:
        describe(tmp_path)
    assert caught.value.code == "lora_file.unreadable"


def sample_file() -> bytes:
    tensors = {"lora_unet_a_b.lora_down.weight": torch.ones(2, 3).half(),
               "lora_unet_a_b.lora_up.weight": torch.ones(3, 2).half(),
               "lora_unet_a_b.alpha": torch.tensor(1.0)}
    return save(tensors, {"ss_tag_frequency": '{"d": {"cat": 3}}', "ss_steps": "7",
                          "ss_resolution": "(64, 64)", "modelspec.title": "t"})


SAMPLE = sample_file()
HEADER_END = 8 + int.from_bytes(SAMPLE[:8], "little")
small_edit = st.tuples(st.integers(0, HEADER_END + 8), st.integers(0, 3),
                       st.sampled_from([b"", b"0", b"-", b"9", b'"', b"}", b",", b"null", b"1e1",
                                        b"[", b"\\", b"\xff", b"\x00", b"F32", b"a", b" "])
                       | st.binary(max_size=4))


@settings(deadline=None, max_examples=600, suppress_health_check=SLOW_FIXTURE)
@given(st.lists(small_edit, min_size=1, max_size=3), st.booleans())
def test_mutated_files_only_ever_give_faults(tmp_path, edits, keep_length):
    content = SAMPLE
    for place, cut, inserted in edits:
        content = content[:place] + inserted + content[place + cut:]
    if keep_length:                                      # else most die at the length alone
        grown = HEADER_END - 8 + len(content) - len(SAMPLE)
        content = struct.pack("<Q", max(grown, 0)) + content[8:]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except UserError:
        return
    describe(path)
    official = deserialize(content)                      # accepted by us: by safetensors, too
    assert {name for name, _ in official} == set(header.tensors)
    assert {n: tuple(t["shape"]) for n, t in official} == {
        n: info.shape for n, info in header.tensors.items()}


@settings(deadline=None, max_examples=300, suppress_health_check=SLOW_FIXTURE)
@given(st.binary(max_size=200))
def test_any_bytes_only_ever_give_faults(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError):
        describe(path)


# --- what is it? -------------------------------------------------------------------------------

UNET_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(("format_", "keys"), [
    ("kohya", [f"lora_unet_{UNET_Q.replace('.', '_')}.{end}"
               for end in ("lora_down.weight", "lora_up.weight", "alpha")]),
    ("peft", [f"unet.{UNET_Q}.lora_A.weight", f"unet.{UNET_Q}.lora_B.weight"]),
    ("peft", [f"base_model.model.{UNET_Q}.lora_A.default.weight"]),
    ("peft", ["transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight"]),
    ("diffusers-old", ["unet.mid_block.attn1.processor.to_q_lora.down.weight"]),
    ("diffusers-old", ["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer"
                       ".up.weight"]),
    ("comfyui", ["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"]),
    ("onetrainer", ["lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight"]),
    ("onetrainer", ["unet.down_blocks.0.attentions.0.proj_in.lora_up.weight"]),
    ("lycoris-loha", ["lora_unet_mid_block.hada_w1_a", "lora_unet_mid_block.alpha"]),
    ("lycoris-lokr", ["lycoris_blocks_0.lokr_w1", "lycoris_blocks_0.lokr_w2_a"]),
    ("lycoris-oft", ["lora_unet_mid_block.oft_blocks"]),
    ("lycoris-dora", ["lora_unet_mid.lora_down.weight", "lora_unet_mid.dora_scale"]),
    ("lycoris-dora", ["unet.mid.lora_A.weight", "unet.mid.lora_magnitude_vector"]),
    ("full-difference", ["lora_unet_mid.diff", "lora_unet_mid.diff_b"]),
    ("checkpoint", ["model.diffusion_model.input_blocks.0.0.weight",
                    "first_stage_model.encoder.conv_in.weight"]),
    ("vae", ["encoder.conv_in.weight", "decoder.conv_out.weight"]),
    ("vae", ["first_stage_model.encoder.conv_in.weight"]),
    ("embedding", ["emb_params"]), ("embedding", ["clip_l", "clip_g"]),
    ("controlnet", ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"]),
    ("unknown", []), ("unknown", ["model.layers.0.mlp.weight"])])
def test_detect_format(format_, keys):
    assert detect_format(keys) == format_
    assert detect_format(reversed(keys)) == format_
    known = {name for name, _ in lora_signs.FORMATS} | {"unknown"}
    assert {*lora_signs.NOT_LORA, format_} <= known


def test_the_files_of_real_models_are_told_apart():
    assert detect_format(make_unet().state_dict()) == "unet"
    assert detect_format(make_text_encoder().state_dict()) == "text-encoder"
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    assert detect_format(vae.state_dict()) == "vae"


def test_describe_our_file(tmp_path, both):
    path = tmp_path / "a.safetensors"
    halves = {k: v if k.endswith("alpha") else v.half() for k, v in both.items()}
    write_lora(path, halves, {"ss_base_model_version": "sd_v1", "darkroom.config": "{}"})
    info = describe(path)
    assert (info.format, info.family, info.dtype) == ("kohya", "sd15", "F16")
    assert (info.ranks, info.alphas, info.scales) == ((RANK,), (ALPHA,), (ALPHA / RANK,))
    te_layers = sum(".alpha" in k and k.startswith("lora_te_") for k in both)
    assert info.modules == {"text encoder": te_layers, "unet": len(both) // 3 - te_layers}
    assert {"attn1_to_q", "attn2_to_out_0", "ff_net_0_proj", "proj_in", "conv1", "conv",
            "self_attn_q_proj", "mlp_fc2"} <= set(info.targets)
    assert all("block" not in t and "layers" not in t for t in info.targets)
    assert info.size == path.stat().st_size
    assert info.is_lora
    assert info.facts.has_config


def test_describe_mixed_ranks_and_no_alpha(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.ones(8, 4),
               "lora_unet_a.alpha": torch.tensor(2.0).bfloat16(),
               "lora_unet_b.lora_down.weight": torch.ones(4, 4),
               "lora_unet_b.alpha": torch.tensor(4)}, path)
    info = describe(path)
    assert (info.ranks, info.alphas, info.scales) == ((4, 8), (2.0, 4.0), (0.25, 1.0))
    noted = json.dumps({"unet.lora_alpha": 2, "unet.r": 8})
    for metadata, alphas, scales in ((None, (), (1.0,)),
                                     ({"lora_adapter_metadata": noted}, (2.0,), (0.25,))):
        save_file({f"unet.{UNET_Q}.lora_A.weight": torch.ones(8, 4)}, path, metadata)
        info = describe(path)
        assert (info.format, info.ranks) == ("peft", (8,))
        assert (info.alphas, info.scales) == (alphas, scales)
        assert info.modules == {"unet": 1}
        assert info.targets == ("attn1_to_q",)


@pytest.mark.parametrize(("family", "key", "side"), [
    ("sd15", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
     768),
    ("sd2", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
     1024),
    ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v.lora_down.weight", 2048),
    ("sdxl", "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight", 640),
    ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", 1280),
    ("sd15", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", 768),
    ("sd2", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", 1024),
    ("sd15", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", 768),
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 3072),
    ("flux", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 3072),
    ("flux", "lora_unet_single_blocks_0_linear2.lora_down.weight", 15360),
    ("flux2", "lora_unet_single_blocks_0_linear2.lora_down.weight", 12288),
    ("flux2", "diffusion_model.single_blocks.0.linear2.lora_A.weight", 16384),
    ("flux2", "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight", 3072),
    ("flux2", "transformer.transformer_blocks.0.ff.linear_in.lora_A.weight", 3072),
    ("qwen", "transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight", 12288),
    ("qwen", "lora_unet_transformer_blocks_59_attn_to_q.lora_down.weight", 3072),
    ("qwen", "transformer.transformer_blocks.59.attn.add_q_proj.lora_A.weight", 3072),
    ("krea2", "transformer.transformer_blocks.0.attn.to_gate.lora_A.weight", 6144),
    ("krea2", "diffusion_model.blocks.0.attn.wq.lora_A.weight", 6144),
    ("krea2", "lora_unet_blocks_0_attn_wq.lora_down.weight", 6144),
    ("sd3", "transformer.transformer_blocks.5.attn.to_q.lora_A.weight", 1536),
    ("chroma", "lora_unet_distilled_guidance_layer_layers_0_in_layer.lora_down.weight", 64),
    ("zimage", "transformer.layers.3.attention.to_q.lora_A.weight", 3840),
    ("zimage", "lora_unet_layers_3_attention_qkv.lora_down.weight", 3840),
    ("zimage", "diffusion_model.noise_refiner.0.adaLN_modulation.0.lora_A.weight", 256),
    ("lumina2", "transformer.layers.3.attn.to_q.lora_A.weight", 2304),
    ("lumina2", "lora_unet_layers_3_feed_forward_w1.lora_down.weight", 2304),
    ("lumina2", "lora_unet_layers_3_adaLN_modulation_1.lora_down.weight", 1024),
    ("sana", "transformer.transformer_blocks.5.attn1.to_q.lora_A.weight", 2240),
    ("sana", "transformer.transformer_blocks.5.ff.conv_inverted.lora_A.weight", 1),
    ("unknown", "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight", 2304),
    ("unknown", "transformer.transformer_blocks.5.attn.to_q.lora_A.weight", 1920),
    ("unknown", f"unet.{UNET_Q}.lora_A.weight", 320)])
def test_family_by_names_and_shapes(tmp_path, family, key, side):
    save_file({key: torch.ones(2, side)}, tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors").family == family


def test_chroma_is_told_from_flux_by_its_metadata(tmp_path):
    """Their layers are called the same."""
    key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    for number, (metadata, family) in enumerate((
            ({"ss_base_model_version": "chroma"}, "chroma"), ({}, "flux"),
            ({"modelspec.architecture": "chroma/lora"}, "chroma"),
            ({"ss_base_model_version": "sdxl_base_v1-0"}, "flux"))):
        save_file({key: torch.ones(2, 3072)}, tmp_path / f"{number}.safetensors", metadata)
        assert describe(tmp_path / f"{number}.safetensors").family == family


def test_describe_other_files(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight":
               torch.ones(4, 768)}, path)
    info = describe(path)
    assert (info.format, info.family, info.is_lora) == ("checkpoint", "sd15", False)
    assert (info.ranks, info.modules, info.targets) == ((), {}, ())


def test_info_needs_no_torch(tmp_path, both):
    path = tmp_path / "a.safetensors"
    write_lora(path, both, {"darkroom.config": "epochs: 3\n"})
    code = ("import sys; from pathlib import Path; from core.lora_files import files as f;"
            "from core.hashes import data_hash; p = Path(sys.argv[1]);"
            "print(f.describe(p).format, f.read_config(p).strip(), len(data_hash(p)),"
            "'torch' in sys.modules)")
    root = paths.ROOT
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True,
                          cwd=root, timeout=120)
    assert done.stdout.split() == ["kohya", "epochs:", "3", "64", "False"], done.stderr


def test_every_fault_has_its_sentence_in_both_languages():
    sources = [*map(Path, (files.__file__, formats.__file__, layers.__file__)),
               paths.ROOT / "core/safetensors_header.py"]
    text = "".join(p.read_text("utf-8") for p in sources)
    codes = {part.split('"')[0] for part in text.split('"lora_file.')[1:]}
    catalogues = [{k.removeprefix("lora_file."): v for k, v in i18n.catalogue(lang).items()
                   if k.startswith("lora_file.")} for lang in i18n.LANGUAGES]
    assert codes == set(catalogues[0]) == set(catalogues[1])
    for code in codes:
        assert _placeholders(catalogues[0][code]) == _placeholders(catalogues[1][code])


def _placeholders(sentence: str) -> set[str]:
    return {part.split("}")[0] for part in sentence.split("{")[1:]}


def test_the_base_models_stay_as_they_were(unet):
    before = copy.deepcopy(unet.state_dict())
    kohya(get_peft_model_state_dict(unet), ALPHA, torch.float16)
    assert same(before, unet.state_dict())
