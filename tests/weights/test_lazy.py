"""Weights come one after the other; large text encoders hold no more than they need."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from core import families
from core.config import TrainConfig
from core.dataset.examples import Encoder
from core.errors import UserError
from core.families import loading
from core.jobs.control import Control
from core.weights import quantization
from core.weights.lazy import Weights, files_in
from core.weights.offload import stage_of
from core.weights.precision import choose
from core.weights.quantization import Frozen
from tests.tiny import families as tiny_families

FP32 = choose("fp32", "cpu")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.base("sd3", tmp_path_factory.mktemp("sd3") / "base")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text encoder counts as a large one, and its layers."""
    monkeypatch.setattr(loading, "LARGE_ENCODER", 0)
    monkeypatch.setattr(quantization, "SMALLEST", 64)


# --- one after the other ---

STEPS = {"halves": lambda t: torch.cat(t.chunk(2)[::-1]), "turned": lambda t: t.T.contiguous(),
         "row": lambda t: t[1:3], "twice": lambda t: torch.stack([t, t]).flatten(0, 1),
         "scaled": lambda t: t.float() * 0.5, "there": lambda t: t.contiguous()}


@settings(max_examples=40)
@given(st.lists(st.sampled_from([*STEPS]), max_size=4), st.integers(1, 3))
def test_a_converter_gives_what_it_gives_at_once(steps: list[str], count: int) -> None:
    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"own.weight": torch.eye(4)}
        for name in list(tensors):
            value = tensors.pop(name)
            for step in steps:
                value = STEPS[step](value)
            found[f"new.{name}"] = value
        return found
    torch.manual_seed(count)
    plain = {f"w{i}": torch.randn(4, 4) for i in range(count)}
    late = Weights([(paths_of(plain), "")], convert)
    at_once = convert(dict(plain))
    assert late.shapes.keys() == at_once.keys()
    for name, value in at_once.items():
        assert torch.equal(late[name], value)
        assert late.shapes[name].shape == value.shape


_folder: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    _folder.append(tmp_path_factory.mktemp("files"))


def paths_of(tensors: dict[str, Tensor]) -> Path:
    path = _folder[-1] / "some.safetensors"
    save_file(tensors, path)
    return path


def test_converters_that_write_into_weights_are_told() -> None:
    path = paths_of({"w": torch.ones(3)})
    with pytest.raises(AssertionError, match="mul_"):
        Weights([(path, "")], lambda found: {"w": found["w"].mul_(2)})


@pytest.mark.parametrize("changes", [
    {}, {"quantization": "nf4"}, {"quantization": "int8", "offload": 0.5},
    {"weights": torch.bfloat16}], ids=str)
def test_never_are_more_weights_of_a_file_in_memory(sd3: Path, changes: dict[str, Any],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is read only the one before may still be there; in the end nothing is mapped."""
    before: list[weakref.ref[Tensor]] = []
    real = Weights.__getitem__

    def read(self: Weights, name: str) -> Tensor:
        assert not [one for one in before[:-1] if one() is not None]
        found = real(self, name)
        before.append(weakref.ref(found))
        return found
    monkeypatch.setattr(Weights, "__getitem__", read)
    family = families.get("sd3")
    model = family.load(sd3, replace(FP32, **changes), frozenset({"denoiser"})).denoiser
    meta = replace(FP32, device=torch.device("meta"))
    assert len(before) == len(family.skeleton(sd3, meta, frozenset({"denoiser"}))
                              .denoiser.state_dict())
    assert not [p for p in (*model.parameters(), *model.buffers()) if p.is_meta]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(sd3) not in maps.read_text()


def test_what_the_library_would_give(sd3: Path) -> None:
    """A folder's models, read weight by weight, against from_pretrained."""
    parts = families.get("sd3").load(sd3, replace(FP32, weights=torch.bfloat16))
    for component in loading_pieces():
        ours = {"denoiser": parts.denoiser, "vae": parts.vae}.get(
            component.part, parts.text.get(component.name))
        dtype = torch.float32 if component.part == "vae" else torch.bfloat16
        theirs = component.cls.from_pretrained(
            sd3 / component.name, **{"dtype" if component.transformers else "torch_dtype": dtype})
        mine, other = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine)
        assert {b.dtype for b in ours.buffers()} == {b.dtype for b in theirs.buffers()}
        assert not ours.training


def loading_pieces() -> Any:
    from core.families.sd3.model import StableDiffusion3
    return StableDiffusion3.components


def test_folders_with_names_of_old_go_by_the_library(sd3: Path, tmp_path: Path) -> None:
    """VAEs of 2022 call their attention query, key, value, proj_attn."""
    import shutil

    from safetensors.torch import load_file
    folder = tmp_path / "old"
    shutil.copytree(sd3, folder)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(path).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        tensors[name] = value
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, path)
    family = families.get("sd3")
    mine, other = (family.load(f, FP32, frozenset({"vae"})).vae.state_dict()
                   for f in (folder, sd3))
    assert all(torch.equal(mine[k], other[k]) for k in other)


def test_weights_of_another_shape_are_named(sd3: Path, tmp_path: Path) -> None:
    import json
    import shutil
    folder = tmp_path / "base"
    shutil.copytree(sd3, folder)
    config = folder / "text_encoder_3" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"d_ff": 32}))
    with pytest.raises(UserError) as caught:
        families.get("sd3").load(folder, FP32, frozenset({"text_encoder_3"}))
    assert caught.value.code == "families.not_understood"


def test_sharded_folders(sd3: Path, tmp_path: Path) -> None:
    import shutil
    folder = tmp_path / "base"
    shutil.copytree(sd3, folder)
    family = families.get("sd3")
    whole = family.load(sd3, FP32, frozenset({"text_encoder_3"})).text["text_encoder_3"]
    shutil.rmtree(folder / "text_encoder_3")
    whole.save_pretrained(folder / "text_encoder_3", max_shard_size="20KB")
    assert len(files_in(folder / "text_encoder_3")) > 2
    found = family.load(folder, FP32, frozenset({"text_encoder_3"})).text["text_encoder_3"]
    ours, theirs = found.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


# --- text encoders ---

def embedding(base: Path, **changes: Any) -> tuple[Any, Tensor]:
    family = families.get("sd3")
    parts = family.load(base, replace(FP32, **changes), frozenset({"text_encoder_3"}))
    return parts.text["text_encoder_3"], family.encode_text(
        parts, ["red disc, flat", "blue", ""])["text_3"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("quantization", ["same", "int8"])
def test_an_encoder_whose_blocks_travel_gives_the_same_bits(sd3: Path, quantization: Any) -> None:
    resident, expected = embedding(sd3, quantization=quantization)
    travelling, found = embedding(sd3, quantization=quantization, vram_budget=0.0)
    assert stage_of(resident) is None
    assert stage_of(travelling) is not None
    assert torch.equal(found, expected)
    fitting, _ = embedding(sd3, quantization=quantization, vram_budget=1e9)
    assert stage_of(fitting) is None


@pytest.mark.usefixtures("large")
def test_an_encoder_in_eight_bits_is_off_by_a_hundredth(sd3: Path) -> None:
    _, expected = embedding(sd3)
    model, found = embedding(sd3, quantization="int8")
    assert any(isinstance(m, Frozen) for m in model.modules())
    off = (found - expected).norm() / expected.norm()
    assert 0 < off < 0.015


def test_small_encoders_stay_as_they_are(sd3: Path) -> None:
    model, _ = embedding(sd3, quantization="int8", vram_budget=0.0)
    assert not any(isinstance(m, Frozen) for m in model.modules())


@pytest.mark.usefixtures("large")
def test_the_engine_keeps_them_as_the_plan_has_it(sd3: Path) -> None:
    """Captions through the engine's own way beside a base in few bits: T5 in int8, cached under a
    name of its own."""
    config = TrainConfig(base_model=str(sd3), base_precision="nf4")
    encoder = Encoder(families.get("sd3"), sd3, FP32, config, lambda event: None, Control())
    found = encoder.embeddings(["red disc, flat"])["red disc, flat"]["text_3"]
    assert torch.equal(found, embedding(sd3, quantization="int8")[1][:1])
    assert not torch.equal(found, embedding(sd3)[1][:1])
    plain = Encoder(families.get("sd3"), sd3, FP32, TrainConfig(base_model=str(sd3)),
                    lambda event: None, Control())
    assert plain.encoders == {}
