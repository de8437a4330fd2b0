"""Files larger than memory, and weights with a scale beside them, as ComfyUI's users have them."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Tokenizer

from core import families, paths
from core.errors import UserError
from core.families import loading
from core.families.components.lookup import ComponentFiles
from core.families.detection import identify
from core.families.flux.spec import NAMING as FLUX
from core.families.registry import SPECS
from core.lora_files.extract import extract
from core.lora_files.layers import DOWN, UP
from core.safetensors_header import Header, TensorInfo
from core.weights.lazy import Weights
from core.weights.precision import Precision, choose
from core.weights.scaled_weights import scaling_of
from core.weights.tensor_file import TensorFile
from tests.families.test_detection import write
from tests.families.test_files import made  # noqa: F401 - a fixture
from tests.tiny.ldm_layout import behind, clip, original, vae

FP32 = choose("fp32", "cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# --- one tensor at a time ---

def test_every_kind_of_number_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    tensors = {str(dtype): (torch.randn(3, 5) * 50).to(dtype) for dtype in (
        torch.float32, torch.float16, torch.bfloat16, torch.float64, E4M3, E5M2, torch.int8,
        torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)}
    tensors |= {"none": torch.empty(0, 4), "one": torch.tensor(2.5), "odd": torch.ones(3).byte()}
    save_file(tensors, path)
    file = TensorFile(path)
    assert set(file.names()) == tensors.keys()
    for name, value in load_file(path).items():
        found = file[name]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert (file.shape(name).dtype, file.shape(name).shape) == (value.dtype, value.shape)
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8)) if found.ndim else (
            torch.equal(found, value))


def test_headers_of_odd_lengths(tmp_path: Path) -> None:
    """The numbers then begin at an address that torch can't take for theirs."""
    path = tmp_path / "odd.safetensors"
    for spaces in range(1, 5):
        text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        text += b" " * (spaces - len(text) % 4)
        path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.5, -2.0))
        assert TensorFile(path)["w"].tolist() == [1.5, -2.0]


def test_torn_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "torn.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut off") as caught:
        Weights([(path, "")], dict)
    assert caught.value.code == "families.unreadable"


linux = pytest.mark.skipif(sys.platform != "linux", reason="sparse files at once")


@linux
def test_a_file_larger_than_ram_and_swap(tmp_path: Path) -> None:
    """safetensors' own reader for torch maps such a file for writing, which Linux refuses."""
    path = tmp_path / "huge.safetensors"
    most = psutil.virtual_memory().total + psutil.swap_memory().total
    write(path, {"unused": [most // 2**21 + 1, 2**20], "v.w": [2, 3]})
    with open(path, "r+b") as file:
        file.seek(-12, 2)
        file.write(torch.arange(6).half().numpy().tobytes())
    weights = Weights([(path, "")], lambda tensors: {"w": tensors["v.w"].T})
    assert weights["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert Weights([(path, "v.")], dict)["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@linux
@pytest.mark.parametrize(("name", "size"), [("qwen", 40.8e9), ("krea2", 25.6e9)])
def test_published_sizes_are_opened_and_fit(name: str, size: float, tmp_path: Path) -> None:
    """Files of the real names and shapes, without numbers: all weights are there, the last can be
    read."""
    path = full_size(name, tmp_path)
    assert path.stat().st_size > size
    assert families.detect(path) == name
    family: Any = families.get(name)
    layout, component = family.layout(path), family.components[0]
    with torch.device("meta"):
        model = loading.create(component, layout.configs[component.name])
    weights = Weights([layout.files[component.name]],
                      lambda tensors: component.convert(tensors, layout.configs[component.name]))
    assert loading.mismatch(model, weights, path) is None
    last = [*model.state_dict()][-1]
    assert not weights[last].any()


def full_size(name: str, folder: Path) -> Path:
    family: Any = families.get(name)
    configs = loading.configs_in(paths.family_configs(name), family.components)
    with torch.device("meta"):
        state = loading.create(family.components[0], configs["transformer"]).state_dict()
    native = original(SPECS[name].naming[0], state)
    return write(folder / f"{name}.safetensors", {
        f"model.diffusion_model.{key}": list(value.shape) for key, value in native.items()})


# --- scales ---

def scaled(state: dict[str, Tensor], spelling: str, prefix: str = "", rows: bool = False,
           dtype: torch.dtype = E4M3) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Matrices in fp8 with scales, as ComfyUI writes them -> the file's tensors, what they stand
    for, the file's metadata. `spelling`: "old", "marks" or "metadata"."""
    found: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    kind = {"format": str(dtype).removeprefix("torch.")}
    layers = {}
    for name, value in state.items():
        layer = f"{prefix}{name.removesuffix('.weight')}"
        if value.ndim != 2 or not name.endswith(".weight"):
            found[f"{prefix}{name}"] = meant[name] = value.clone().contiguous()
            continue
        scale = value.float().abs().amax(*((1,) if rows else ())) / torch.finfo(dtype).max
        column = scale[:, None] if rows else scale
        codes = (value / column.clamp(min=1e-12)).to(dtype)
        found[f"{layer}.weight"], meant[name] = codes, codes.float() * column
        found[f"{layer}.{'scale_weight' if spelling == 'old' else 'weight_scale'}"] = scale
        found[f"{layer}.{'scale_input' if spelling == 'old' else 'input_scale'}"] = torch.ones(())
        if spelling == "marks":
            found[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(kind).encode()),
                                                         dtype=torch.uint8)
        layers[layer] = kind
    if spelling == "old":
        found[f"{prefix}scaled_fp8"] = torch.empty(2, dtype=dtype)
    told = {"format_version": "1.0", "layers": layers}
    return found, meant, {"_quantization_metadata": json.dumps(told)} if (
        spelling == "metadata") else None


@pytest.mark.parametrize(("spelling", "rows", "dtype"), [
    ("old", False, E4M3), ("old", False, E5M2), ("marks", False, E4M3), ("marks", True, E4M3),
    ("metadata", False, E5M2)])
@pytest.mark.parametrize("made", ["flux"], indirect=True)
def test_a_scaled_denoiser_is_what_it_stands_for(
        made: tuple[str, Path, Any], spelling: str, rows: bool,     # noqa: F811
        dtype: torch.dtype, tmp_path: Path) -> None:
    """Its fused matrices are cut after they were scaled. The number times its scale is exact in
    fp32 but for one rounding."""
    name, _, parts = made
    state = original(SPECS[name].naming[0], parts.denoiser.state_dict())
    tensors, meant, metadata = scaled(state, spelling, "model.diffusion_model.", rows, dtype)
    path = tmp_path / "scaled.safetensors"
    save_file(tensors, path, metadata)
    family: Any = families.get(families.detect(path))
    found = family.load(path, FP32, frozenset({"denoiser"})).denoiser.state_dict()
    wanted = family.components[0].convert(meant, {})
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    off = [float((found[key] - value).norm() / value.norm())
           for key, value in parts.denoiser.state_dict().items() if value.ndim == 2]
    assert 0 < max(off) < (0.04 if dtype == E4M3 else 0.08)     # 3 and 2 bits behind the point
    meta = Precision(torch.device("meta"), torch.float32, torch.float32, torch.float32)
    assert family.skeleton(path, meta, frozenset({"denoiser"})).denoiser is not None


@pytest.mark.parametrize("made", ["sd3"], indirect=True)
def test_everything_in_one_file_with_a_scaled_t5(made: tuple[str, Path, Any],   # noqa: F811
                                                 tmp_path: Path) -> None:
    """As Stability publishes SD 3.5 medium: all parts but T5 in fp16."""
    name, _, parts = made
    state = parts.denoiser.state_dict()
    grid = state.pop("pos_embed.pos_embed")
    own = original(SPECS[name].naming[0], state) | {"pos_embed": grid}
    texts = "text_encoders.{}.transformer."
    t5, meant, _ = scaled(parts.text["text_encoder_3"].state_dict(), "old", texts.format("t5xxl"))
    path = tmp_path / "sd3.5_incl_clips_t5xxlfp8scaled.safetensors"
    save_file(behind("model.diffusion_model.", own) | t5
              | behind("first_stage_model.", vae(parts.vae.state_dict(), 3))
              | behind(texts.format("clip_l"), clip(parts.text["text_encoder"].state_dict()))
              | behind(texts.format("clip_g"), clip(parts.text["text_encoder_2"].state_dict())),
              path)
    words = tmp_path / "words"
    T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581red", -1.0)],
                extra_ids=0).save_pretrained(words)
    assert families.detect(path) == "sd3"
    found = families.get("sd3", ComponentFiles(tokenizer=words)).load(path, FP32)
    weights = found.text["text_encoder_3"].state_dict()
    assert all(torch.equal(weights[key], value) for key, value in meant.items()
               if key in weights)
    plain = found.text["text_encoder"].state_dict()
    assert all(torch.equal(value, plain[key])
               for key, value in parts.text["text_encoder"].state_dict().items())


@pytest.mark.parametrize("spelling", ["old", "marks"])
@pytest.mark.parametrize("made", ["qwen"], indirect=True)
def test_a_scaled_text_encoder_beside_the_base(made: tuple[str, Path, Any],     # noqa: F811
                                               spelling: str, tmp_path: Path) -> None:
    """As in ComfyUI's own workflows for Qwen-Image."""
    name, folder, parts = made
    models = tmp_path / "models"
    models.mkdir()
    path, reader = models / "base.safetensors", models / "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    save_file(behind("", parts.denoiser.state_dict()), path)
    tensors, meant, _ = scaled(load_file(folder / "text_encoder" / "model.safetensors"), spelling)
    save_file(tensors, reader)
    assert identify(reader).what == "qwen25_vl"
    family: Any = families.get(name)
    text_encoder = next(component for component in family.components if component.part == "text")
    found = loading.load(family.layout(path), text_encoder, FP32).state_dict()
    wanted = text_encoder.convert(meant, {})
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_a_lora_is_extracted_from_scaled_models(tmp_path: Path) -> None:
    """The difference of what both stand for, not of their numbers."""
    layers = [f"double_blocks.{i}.img_attn.proj" for i in range(2)]
    plain = {f"{layer}.weight": torch.randn(96, 64) for layer in layers}
    tensors, meant, _ = scaled(plain, "marks")
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file(tensors, base)
    change = torch.randn(96, 2) @ torch.randn(2, 64)
    save_file({name: value + change for name, value in meant.items()}, tuned)
    found = extract(tuned, base, 2)
    assert (found.compared, found.rest) == (2, 0)
    for layer in found.lora.layers.values():
        torch.testing.assert_close(layer[UP] @ layer[DOWN], change, atol=1e-4, rtol=1e-4)
    save_file({f"{layers[0]}.weight": torch.zeros(4, 4, dtype=torch.uint8),
               f"{layers[0]}.weight_scale_2": torch.ones(())}, base)
    with pytest.raises(UserError, match="nvfp4"):
        extract(tuned, base, 2)


@pytest.mark.parametrize("made", ["flux"], indirect=True)
def test_of_two_encoders_the_one_that_is_read(made: tuple[str, Path, Any],      # noqa: F811
                                              tmp_path: Path) -> None:
    """In other numbers alone it is found, and refused by its kind: never "it isn't there"."""
    name, _, parts = made
    models = tmp_path / "models"
    models.mkdir()
    path = models / "base.safetensors"
    save_file(behind("", original(FLUX[0], parts.denoiser.state_dict())), path)
    state = parts.text["text_encoder_2"].state_dict()
    mark = {"encoder.block.0.layer.0.SelfAttention.q.weight_scale_2": torch.ones(())}
    save_file(behind("", state) | mark, models / "t5xxl_a_nvfp4.safetensors")
    family = families.get(name)
    component = next(one for one in family.components if one.name == "text_encoder_2")
    with pytest.raises(UserError, match="nvfp4") as caught:
        loading.load(family.layout(path), component, FP32)
    assert caught.value.code == "families.numbers_unread"
    save_file(behind("", state), models / "t5xxl_fp16.safetensors")
    found = loading.load(family.layout(path), component, FP32).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "nvfp4": ({"format": "nvfp4"}, {"weight": torch.zeros(4, 4, dtype=torch.uint8), "weight_scale":
              torch.zeros(4, 1).to(E4M3), "weight_scale_2": torch.ones(())}, "nvfp4"),
    "mxfp8": ({"format": "mxfp8"}, {"weight": torch.zeros(4, 8).to(E4M3), "weight_scale":
              torch.zeros(4, 1, dtype=torch.uint8)}, "mxfp8"),
    "rotated int8": ({"format": "int8_tensorwise", "convrot": True}, {
        "weight": torch.zeros(4, 8, dtype=torch.int8), "weight_scale": torch.ones(4, 1)},
        "int8_tensorwise (convrot)"),
    "rotated int8 without scales": ({"format": "int8_tensorwise", "convrot": True}, {
        "weight": torch.zeros(4, 8, dtype=torch.int8)}, "int8_tensorwise (convrot)"),
    "blocks": ({}, {"weight": torch.zeros(4, 8).to(E4M3), "weight_scale": torch.ones(2, 2)},
               "block"),
    "blocks, inverted": ({}, {"weight": torch.zeros(4, 8).to(E4M3), "weight_scale_inv":
                              torch.ones(2, 2)}, "block"),
    "bitsandbytes": ({}, {"weight": torch.zeros(16, 1, dtype=torch.uint8), "weight.absmax":
                          torch.ones(4)}, "nf4"),
    "plain int8": ({}, {"weight": torch.ones(4, 8, dtype=torch.int8)}, "int8"),
    "later": ({"format": "float3_e1m1"}, {"weight": torch.zeros(4, 8).to(E4M3), "weight_scale":
              torch.ones(())}, "float3_e1m1"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_numbers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    kind, tensors, said = OTHERS[name]
    path = tmp_path / "x.safetensors"
    mark = {"comfy_quant": torch.tensor(list(json.dumps(kind).encode()), dtype=torch.uint8)}
    save_file(behind("layer.", tensors | (mark if kind else {})), path)
    with pytest.raises(UserError) as caught:
        Weights([(path, "")], dict)
    assert caught.value.code == "families.numbers_unread"
    assert said in str(caught.value)
    assert "layer.weight" in str(caught.value)
    with pytest.raises(UserError) as caught:            # nor are they taken for numbers of another
        TensorFile(path)["layer.weight"]
    assert caught.value.code == "families.numbers_unread"


def test_int8_with_scales_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    codes = torch.randint(-127, 128, (4, 8), dtype=torch.int8)
    scale = torch.rand(4, 1)
    mark = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    save_file({"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": mark}, path)
    weights = Weights([(path, "")], dict)
    assert [*weights.shapes] == ["a.weight"]
    assert torch.equal(weights["a.weight"], codes.float() * scale)


words = st.sampled_from(["a", "b.weight", "weight", "scale_weight", "weight_scale", "input_scale",
                         "scaled_fp8", "absmax", "comfy_quant", "weight_scale_2"])


@given(st.dictionaries(st.lists(words, min_size=1, max_size=3).map(".".join), st.tuples(
    st.sampled_from(["F32", "F16", "F8_E4M3", "I8", "U8"]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=8), st.text(max_size=30))
def test_any_names_have_a_meaning(entries: dict[str, tuple[str, tuple[int, ...]]],
                                  metadata: str) -> None:
    """What is multiplied is there, and is no helper; nothing is both read and unread."""
    tensors = {name: TensorInfo(*entry, 0, 20_000) for name, entry in entries.items()}
    header = Header({"_quantization_metadata": metadata}, tensors, 0, 0)
    found = scaling_of(Path("nowhere"), header)
    assert set(found.scales.values()) <= found.helpers <= tensors.keys()
    assert set(found.scales) <= tensors.keys() - found.helpers
    assert not set(found.scales) & set(found.unread)
