"""LoRA files in every spelling: round trips, other programs' own loaders, what is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from core import i18n
from core.errors import UserError
from core.families.flux.spec import NAMING as FLUX
from core.families.layer_names import Naming
from core.families.sd15.spec import NAMING as SD1
from core.families.sdxl.spec import NAMING as SDXL
from core.lora_files import files, formats
from core.lora_files.formats import read, save, spell
from core.lora_files.layers import Layer, Lora, alpha_of, kind_of
from core.lora_files.merge import Cut, merge, resize
from tests import tiny
from tests.lora_files.deltas import delta

UNET = [path for path, module in tiny.tiny_unet().named_modules()
        if getattr(module, "weight", torch.zeros(1)).ndim > 1]
TEXT = [f"encoder.layers.{i}.{x}" for i in (0, 1)
        for x in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
SLOW_FIXTURE = [HealthCheck.function_scoped_fixture]


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i18n, "language", lambda: "en")


def layer(rank: int, out: int = 6, width: int = 5, kernel: int = 0, alpha: float | None = None,
          dtype: torch.dtype = torch.float32, dora: bool = False) -> Layer:
    sides = [kernel, kernel] if kernel else []
    found = {"lora_down.weight": torch.randn(rank, width, *sides).to(dtype),
             "lora_up.weight": torch.randn(out, rank, *[1] * len(sides)).to(dtype)}
    if alpha is not None:
        found["alpha"] = torch.tensor(alpha)
    if dora:
        found["dora_scale"] = torch.rand(out, *[1] * (1 + len(sides))).to(dtype)
    return found


OTHER_KINDS: dict[str, Callable[[], Layer]] = {
    "loha": lambda: {"hada_w1_a": torch.randn(6, 2), "hada_w1_b": torch.randn(2, 5),
                     "hada_w2_a": torch.randn(6, 2), "hada_w2_b": torch.randn(2, 5),
                     "alpha": torch.tensor(1.0)},
    "lokr": lambda: {"lokr_w1": torch.randn(2, 1), "lokr_w2_a": torch.randn(3, 2),
                     "lokr_w2_b": torch.randn(2, 5), "alpha": torch.tensor(2.0)},
    "oft": lambda: {"oft_blocks": torch.randn(3, 2, 2), "alpha": torch.tensor(0.001),
                    "rescale": torch.rand(6, 1)},
    "full": lambda: {"diff": torch.randn(6, 5), "diff_b": torch.randn(6)},
    "dora": lambda: layer(2, alpha=1.0, dora=True), "lora": lambda: layer(2)}


def same(first: Lora, second: Lora) -> bool:
    return first.layers.keys() == second.layers.keys() and all(
        first.layers[p].keys() == second.layers[p].keys() and all(
            torch.equal(first.layers[p][end], second.layers[p][end])
            and first.layers[p][end].dtype == second.layers[p][end].dtype
            for end in first.layers[p]) for p in first.layers)


@st.composite
def loras(draw: st.DrawFn, naming: Naming = SD1, dora: bool = False) -> Lora:
    """Any ranks, alphas and types on the layers of the tiny UNet and text encoder."""
    torch.manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    layers = {}
    for path in draw(st.sets(st.sampled_from([f"unet.{p}" for p in UNET]
                                             + [f"text_encoder.{p}" for p in TEXT]),
                             min_size=1, max_size=6)):
        kernel = draw(st.sampled_from([0, 1, 3]))
        layers[path] = layer(draw(st.integers(1, 5)), kernel=kernel, dtype=dtype, dora=dora,
                             alpha=draw(st.floats(0.125, 64, width=32)))
    return Lora(layers, naming)


# --- round trips -------------------------------------------------------------------------------

@settings(deadline=None, max_examples=40, suppress_health_check=SLOW_FIXTURE)
@given(loras(), st.sampled_from(["kohya", "comfyui", "peft"]))
def test_formats_that_know_alpha_keep_every_bit(tmp_path: Path, lora: Lora, to: str) -> None:
    path = save(lora, to, tmp_path / f"a{'' if to == 'peft' else '.safetensors'}")
    again = read(path, "sd15")
    assert again.unknown == ()
    assert same(again, lora)
    assert same(read(save(again, "kohya", tmp_path / "b.safetensors"), "sd15"), lora)


@settings(deadline=None, max_examples=40, suppress_health_check=SLOW_FIXTURE)
@given(loras())
def test_diffusers_files_have_no_alpha_and_the_same_delta(tmp_path: Path, lora: Lora) -> None:
    """Tolerance: alpha is multiplied into one matrix, whose numbers are rounded once more."""
    path = save(lora, "diffusers", tmp_path / "a.safetensors")
    assert not any("alpha" in key for key in load_file(path))
    again = read(path, "sd15")
    for name, found in again.layers.items():
        step = torch.finfo(found["lora_up.weight"].dtype).eps
        wanted = delta(lora.layers[name])
        bound = (lora.layers[name]["lora_up.weight"].double().flatten(1).abs()
                 @ lora.layers[name]["lora_down.weight"].double().flatten(1).abs())
        bound = bound * abs(alpha_of(lora.layers[name])) / found["lora_down.weight"].shape[0]
        assert ((delta(found) - wanted).flatten(1).abs() <= bound * step + 1e-7).all()
    assert again.layers.keys() == lora.layers.keys()


@settings(deadline=None, max_examples=15, suppress_health_check=SLOW_FIXTURE)
@given(loras(dora=True), st.sampled_from(["kohya", "comfyui", "peft", "diffusers"]))
def test_dora_keeps_its_magnitudes(tmp_path: Path, lora: Lora, to: str) -> None:
    path = save(lora, to, tmp_path / f"a{'' if to == 'peft' else '.safetensors'}")
    again = read(path, "sd15")
    for name, found in lora.layers.items():
        assert kind_of(again.layers[name]) == "dora"
        assert torch.equal(again.layers[name]["dora_scale"], found["dora_scale"])


@pytest.mark.parametrize("kind", sorted(OTHER_KINDS))
@pytest.mark.parametrize("to", formats.FORMATS)
def test_every_kind_is_carried_through_or_refused(tmp_path: Path, kind: str, to: str) -> None:
    lora = Lora({f"unet.{UNET[5]}": OTHER_KINDS[kind](), f"unet.{UNET[6]}": OTHER_KINDS[kind]()},
                SD1, {"ss_steps": "7"})
    if kind not in formats.HOLDS[to]:
        with pytest.raises(UserError, match=f"{kind}.*kohya or comfyui") as caught:
            save(lora, to, tmp_path / "a")
        assert caught.value.code == "lora_convert.no_room"
        assert list(tmp_path.iterdir()) == []
        return
    path = save(lora, to, tmp_path / f"a{'' if to == 'peft' else '.safetensors'}")
    again = read(path, "sd15")
    assert {kind_of(one) for one in again.layers.values()} == {kind}
    assert again.metadata["ss_steps"] == "7"
    if to != "diffusers":
        lora.layers = {path: {**found, **({"alpha": again.layers[path]["alpha"]}
                                          if "alpha" in again.layers[path] else {})}
                       for path, found in lora.layers.items()}
        assert same(again, lora)


def test_embeddings_in_the_file_travel_where_they_have_a_place(tmp_path: Path) -> None:
    bundled = {"bundle_emb.ohwx.string_to_param.*": torch.randn(2, 8)}
    tensors = spell(Lora({f"unet.{UNET[5]}": layer(2)}, SD1), "kohya") | bundled
    files.write_lora(tmp_path / "a.safetensors", tensors, {})
    lora = read(tmp_path / "a.safetensors")
    assert lora.bundled.keys() == bundled.keys()
    assert bundled.keys() <= spell(lora, "comfyui").keys()
    assert not bundled.keys() & spell(lora, "diffusers").keys()


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    tensors = spell(Lora({f"unet.{UNET[5]}": layer(2)}, SD1), "kohya")
    save_file(tensors | {"strange.key": torch.ones(1)}, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").unknown == ("strange.key",)


# --- other spellings ---------------------------------------------------------------------------

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT_Q = "encoder.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(("down", "up", "path"), [
    (f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight", f"unet.{Q}"),
    (f"base_model.model.{Q}.lora_A.default.weight", f"base_model.model.{Q}.lora_B.default.weight",
     f"unet.{Q}"),
    (f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight", f"unet.{Q}"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
     "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
     f"unet.{Q}"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
     "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
     f"unet.{OUT}"),
    ("text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.down.weight",
     "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.up.weight",
     f"text_encoder.{TEXT_Q}"),
    (f"text_encoder.text_model.{TEXT_Q}.lora_linear_layer.down.weight",
     f"text_encoder.text_model.{TEXT_Q}.lora_linear_layer.up.weight", f"text_encoder.{TEXT_Q}"),
    (f"text_encoders.clip_l.transformer.text_model.{TEXT_Q}.lora_A.weight",
     f"text_encoders.clip_l.transformer.text_model.{TEXT_Q}.lora_B.weight",
     f"text_encoder.{TEXT_Q}"),
    ("lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight",
     "lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight",
     f"text_encoder.{TEXT_Q}"),
    ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
     "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight",
     f"unet.{Q}"),
    ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
     "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight", f"unet.{Q}"),
    (f"lycoris_{Q.replace('.', '_')}.lora_down.weight",
     f"lycoris_{Q.replace('.', '_')}.lora_up.weight", f"unet.{Q}"),
])
def test_all_spellings_name_the_same_layer(tmp_path: Path, down: str, up: str, path: str) -> None:
    save_file({down: torch.ones(2, 5), up: torch.ones(6, 2)}, tmp_path / "a.safetensors")
    lora = read(tmp_path / "a.safetensors", "sd15")
    assert lora.unknown == ()
    assert {name: sorted(one) for name, one in lora.layers.items()} == {
        path: ["lora_down.weight", "lora_up.weight"]}


@pytest.mark.parametrize("keys", [
    ["lora_unet_double_layers_0_attn_w1q"], ["lora_unet_blocks_0_self_attn_q"],
    ["diffusion_model.layers.0.attention.qkv"]])
def test_names_of_unknown_families_are_not_guessed(tmp_path: Path, keys: list[str]) -> None:
    save_file({f"{key}.lora_{half}.weight": torch.ones(2, 2) for key in keys
               for half in ("down", "up")}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="--family") as caught:
        read(tmp_path / "a.safetensors")
    assert caught.value.code == "lora_convert.no_names"


def test_one_layer_spelled_twice_is_a_fault(tmp_path: Path) -> None:
    save_file({f"unet.{Q}.lora_A.weight": torch.ones(2, 5),
               f"lora_unet_{Q.replace('.', '_')}.lora_down.weight": torch.ones(2, 5)},
              tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.safetensors")
    assert caught.value.code == "lora_file.same_name"


def test_alpha_noted_by_diffusers_and_rslora_counts(tmp_path: Path) -> None:
    tensors = {f"unet.{Q}.lora_A.weight": torch.ones(4, 5),
               f"unet.{Q}.lora_B.weight": torch.ones(6, 4)}
    for note, alpha in (({"unet.r": 4, "unet.lora_alpha": 2}, 2.0),
                        ({"unet.lora_alpha": 2, "unet.use_rslora": True}, 4.0),
                        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"attn1.to_q": 3}}, 3.0),
                        ({"unet.lora_alpha": "x"}, 4.0)):
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(note)})
        assert alpha_of(read(tmp_path / "a.safetensors").layers[f"unet.{Q}"]) == alpha


def test_patterns_of_a_file_are_text_not_programs(tmp_path: Path) -> None:
    evil = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"(a+)+$": 3, "(" * 50: 1}}
    save_file({f"unet.{'a' * 60}.lora_A.weight": torch.ones(4, 5)}, tmp_path / "a.safetensors",
              {"lora_adapter_metadata": json.dumps(evil)})
    assert alpha_of(read(tmp_path / "a.safetensors").layers[f"unet.{'a' * 60}"]) == 2


sides = st.lists(st.integers(0, 4), max_size=4)


@settings(deadline=None, max_examples=150, suppress_health_check=SLOW_FIXTURE)
@given(st.dictionaries(st.sampled_from([
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a",
    "hada_w1_b", "lokr_w1", "oft_blocks", "diff"]), sides, min_size=1, max_size=5),
    st.sampled_from(["unet_mid_block_attentions_0_proj_in", "unet_double_blocks_0_img_attn_qkv",
                     "te1_text_model_encoder_layers_0_mlp_fc1"]), st.sampled_from(["sd15", "flux"]))
def test_hostile_shapes_only_ever_give_faults(tmp_path: Path, ends: dict[str, list[int]],
                                              name: str, family: str) -> None:
    save_file({f"lora_{name}.{end}": torch.ones(shape) for end, shape in ends.items()},
              tmp_path / "a.safetensors")
    try:
        lora = read(tmp_path / "a.safetensors", family)
    except UserError:
        return
    for work in (*(lambda to=to: spell(lora, to) for to in ("kohya", "comfyui", "diffusers")),
                 lambda: formats.peft_parts(lora), lambda: resize(lora, Cut(1)),
                 lambda: merge([(lora, 0.5), (lora, 2.0)])):
        with contextlib.suppress(UserError):
            work()


# --- families whose original code has other names ----------------------------------------------

def test_sdxl_is_written_with_the_names_kohya_uses(tmp_path: Path) -> None:
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    text = "text_encoder_2.encoder.layers.3.mlp.fc1"
    lora = Lora({path: layer(2, alpha=1.0), text: layer(2, alpha=1.0)}, SDXL)
    file = save(lora, "kohya", tmp_path / "a.safetensors")
    assert {key.split(".")[0] for key in load_file(file)} == {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
        "lora_te2_text_model_encoder_layers_3_mlp_fc1"}
    assert same(read(file, "sdxl"), lora)
    comfy = save(lora, "comfyui", tmp_path / "b.safetensors")
    assert "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1.lora_A.weight" in (
        load_file(comfy))
    assert same(read(comfy, "sdxl"), lora)


BLOCK = "transformer.transformer_blocks.0.attn"


def test_fused_layers_split_and_join_again_exactly(tmp_path: Path) -> None:
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.randn(3, 8),
               "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.randn(24, 3),
               "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(1.5),
               "lora_unet_single_blocks_2_linear1.lora_down.weight": torch.randn(2, 8),
               "lora_unet_single_blocks_2_linear1.lora_up.weight": torch.randn(56, 2),
               "lora_unet_single_blocks_2_linear1.alpha": torch.tensor(2.0)}
    files.write_lora(tmp_path / "a.safetensors", tensors, {})
    lora = read(tmp_path / "a.safetensors", "flux")
    assert len(lora.layers) == 7
    assert lora.layers[f"{BLOCK}.to_v"]["lora_up.weight"].shape == (8, 3)
    assert lora.layers["transformer.single_transformer_blocks.2.proj_mlp"][
        "lora_up.weight"].shape == (32, 2)
    again = spell(lora, "kohya")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@settings(deadline=None, max_examples=30)
@given(st.sets(st.sampled_from("qkv"), min_size=1), st.data())
def test_layers_trained_apart_are_fused_with_the_same_deltas(chosen: set[str], data: Any) -> None:
    """The rows of a layer that isn't there don't change. Tolerance: float32."""
    lora = Lora({f"{BLOCK}.to_{x}": layer(
        data.draw(st.integers(1, 3)), 4, 5, alpha=data.draw(st.sampled_from([0.5, 1.0, 3.0])))
        for x in sorted(chosen)}, FLUX)
    fused = spell(lora, "comfyui")
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    whole = delta({"lora_down.weight": fused[f"{key}.lora_A.weight"],
                   "lora_up.weight": fused[f"{key}.lora_B.weight"],
                   "alpha": fused[f"{key}.alpha"]})
    for number, x in enumerate("qkv"):
        wanted = delta(lora.layers[f"{BLOCK}.to_{x}"]) if x in chosen else torch.zeros(4, 5)
        torch.testing.assert_close(whole[4 * number:4 * number + 4], wanted.double(),
                                   rtol=1e-5, atol=1e-5)


def test_swapped_halves_of_flux_come_back() -> None:
    lora = Lora({"transformer.norm_out.linear": layer(2, 8, 5, alpha=2.0)}, FLUX)
    tensors = spell(lora, "comfyui")
    up = tensors["diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"]
    assert torch.equal(up[:4], lora.layers["transformer.norm_out.linear"]["lora_up.weight"][4:])
    assert same(formats.from_tensors(tensors, "flux"), lora)


HALVES = {"loha": {end: (24 if end.endswith("_a") else 2, 2 if end.endswith("_a") else 5)
                   for end in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
          "lokr": {"lokr_w1": (6, 1), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
          "full": {"diff": (24, 5), "diff_b": (24,)}}


def whole(one: Layer) -> Tensor:
    """What these kinds add to a matrix."""
    if "hada_w1_a" in one:
        return (one["hada_w1_a"] @ one["hada_w1_b"]) * (one["hada_w2_a"] @ one["hada_w2_b"])
    if "lokr_w1" in one:
        return torch.kron(one["lokr_w1"], one["lokr_w2_a"] @ one["lokr_w2_b"])
    return one["diff"]


@pytest.mark.parametrize("kind", sorted(HALVES))
def test_fused_layers_of_other_kinds_are_cut_by_rows(kind: str) -> None:
    made = {end: torch.randn(shape) for end, shape in HALVES[kind].items()}
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{end}": value
               for end, value in made.items()}
    found = formats.from_tensors(tensors, "flux")
    assert sorted(found.layers) == [f"{BLOCK}.to_{x}" for x in "kqv"]
    torch.testing.assert_close(
        torch.cat([whole(found.layers[f"{BLOCK}.to_{x}"]) for x in "qkv"]), whole(made))
    assert {len(one["diff_b"]) for one in found.layers.values() if "diff_b" in one} <= {8}


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
@pytest.mark.parametrize("kind", ["loha", "lokr", "oft", "dora"])
def test_what_cannot_be_fused_has_names_of_its_own(kind: str, to: str) -> None:
    """Other kinds of layers, and DoRA's lengths of columns: those of one row each is no row."""
    def made() -> Layer:
        return OTHER_KINDS[kind]() | ({"dora_scale": torch.rand(1, 5)} if kind == "dora" else {})
    lora = Lora({f"{BLOCK}.to_{x}": made() for x in "qkv"} | {
        "transformer.norm_out.linear": made()}, FLUX)
    tensors = spell(lora, to)
    beginning = {"kohya": "lycoris_transformer_blocks_0_attn_to_q.",
                 "comfyui": "transformer.transformer_blocks.0.attn.to_q."}[to]
    assert sum(key.startswith(beginning) for key in tensors) >= 3
    again = formats.from_tensors(tensors, "flux")
    lora.layers = {path: {**layer, **({"alpha": again.layers[path]["alpha"]}
                                      if "alpha" in again.layers[path] else {})}
                   for path, layer in lora.layers.items()}
    assert same(again, lora)


def test_fused_layers_that_cannot_be_cut_stay_whole() -> None:
    tensors = {f"lora_unet_double_blocks_0_img_attn_qkv.{end}": value
               for end, value in OTHER_KINDS["oft"]().items()}
    assert spell(formats.from_tensors(tensors, "flux"), "kohya").keys() == tensors.keys()


# --- Tucker, DoRA by columns -------------------------------------------------------------------

def test_a_tucker_convolution_becomes_a_plain_one() -> None:
    from torch.nn.functional import conv2d
    down, mid, up = torch.randn(2, 5, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(6, 2, 1, 1)
    lora = Lora({f"unet.{UNET[5]}": {"lora_down.weight": down, "lora_mid.weight": mid,
                                     "lora_up.weight": up, "alpha": torch.tensor(2.0)}}, SD1)
    tensors = spell(lora, "diffusers")
    a, b = (next(v for k, v in tensors.items() if f"lora_{x}" in k) for x in "AB")
    x = torch.randn(1, 5, 8, 8)
    torch.testing.assert_close(conv2d(conv2d(x, a, padding=1), b),
                               conv2d(conv2d(conv2d(x, down), mid, padding=1), up),
                               rtol=1e-4, atol=1e-4)
    assert any("lora_mid" in key for key in spell(lora, "comfyui"))


def test_dora_by_columns_is_refused_where_it_has_no_place() -> None:
    found = layer(2) | {"dora_scale": torch.rand(1, 5)}
    lora = Lora({f"unet.{UNET[5]}": found}, SD1)
    assert torch.equal(spell(lora, "kohya")[
        f"lora_unet_{UNET[5].replace('.', '_')}.dora_scale"], found["dora_scale"])
    for to in (lambda: spell(lora, "diffusers"), lambda: formats.peft_parts(lora)):
        with pytest.raises(UserError, match="for each input") as caught:
            to()
        assert caught.value.code == "lora_convert.dora_columns"


# --- other programs' own loaders ---------------------------------------------------------------

def trained(kind: str) -> tuple[PeftModel, dict[str, Tensor]]:
    """A PeftModel whose weights are all random, and what it computes."""
    torch.manual_seed(3)
    targets = ["to_q", "to_out.0", "conv1", "proj_in"]
    config = (LoHaConfig(r=3, alpha=2, target_modules=targets) if kind == "loha" else
              LoraConfig(r=4, lora_alpha=2, target_modules=targets, use_dora=kind == "dora",
                         use_rslora=kind == "rslora", rank_pattern={"to_q": 2},
                         alpha_pattern={"conv1": 3}))
    torch.manual_seed(0)
    model = get_peft_model(tiny.tiny_unet(), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name or "hada_" in name:
                parameter.normal_(std=0.3)
    return model.eval(), predict(model)


@torch.no_grad()
def predict(model: Any) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return model(torch.randn(1, 4, 8, 8, generator=rng), torch.tensor([500]),
                 torch.randn(1, 7, 32, generator=rng)).sample


def fresh() -> Any:
    torch.manual_seed(0)
    return tiny.tiny_unet().eval()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha"])
def test_peft_reads_what_we_write_and_we_what_peft_writes(tmp_path: Path, kind: str) -> None:
    """Through kohya's keys and back: the same prediction. Tolerance: float32."""
    model, wanted = trained(kind)
    model.save_pretrained(tmp_path / "theirs")
    kohya = save(read(tmp_path / "theirs"), "kohya", tmp_path / "a.safetensors")
    ours = save(read(kohya), "peft", tmp_path / "ours")
    again = PeftModel.from_pretrained(fresh(), ours).eval()
    assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(model).keys()
    torch.testing.assert_close(predict(again), wanted, rtol=1e-4, atol=1e-5)
    assert (predict(fresh()) - wanted).abs().max() > 1e-2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pipeline(base: Path) -> Any:
    found = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    found.unet.load_state_dict(fresh().state_dict())
    return found


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_diffusers_reads_what_we_write(tmp_path: Path, pipeline: Any, kind: str) -> None:
    model, wanted = trained(kind)
    model.save_pretrained(tmp_path / "theirs")
    lora = read(tmp_path / "theirs")
    lora.layers |= {f"text_encoder.{path}": layer(2, 64 if "fc1" in path else 32, 32,
                                                  dora=kind == "dora") for path in TEXT}
    path = save(lora, "diffusers", tmp_path / "a.safetensors")
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="ours")
    torch.testing.assert_close(predict(pipeline.unet), wanted, rtol=1e-4, atol=1e-5)
    held = [name for name, module in pipeline.text_encoder.named_modules()
            if "ours" in getattr(module, "lora_A", {})]
    assert held == sorted(TEXT, key=held.index)


def test_a_folder_with_several_parts(tmp_path: Path) -> None:
    lora = Lora({f"unet.{UNET[5]}": layer(2, alpha=1.0),
                 f"text_encoder.{TEXT[0]}": layer(3, alpha=3.0)}, SD1)
    folder = save(lora, "peft", tmp_path / "both.v1")
    assert sorted(p.name for p in folder.iterdir()) == ["text_encoder", "unet"]
    assert same(read(folder), lora)
    again = save(lora, "peft", tmp_path / "both.v1")
    assert again.name == "both.v1-2"


def test_folders_without_a_lora(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert caught.value.code == "lora_file.unreadable"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert caught.value.code == "lora_file.missing"


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    bad = layer(2)
    bad["lora_up.weight"][0, 0] = float("nan")
    for to in ("peft", "kohya"):
        with pytest.raises(UserError, match="not finite"):
            save(Lora({f"unet.{UNET[5]}": bad}, SD1), to, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    lora = Lora({f"unet.{UNET[5]}": layer(2)}, SD1)
    names = [save(lora, "kohya", tmp_path / "a.safetensors").name for _ in range(3)]
    assert names == ["a.safetensors", "a-2.safetensors", "a-3.safetensors"]
