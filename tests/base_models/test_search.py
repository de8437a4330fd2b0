"""What lies on a machine: files told apart by their headers, usual places, bounds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from core.base_models import search as model_search
from core.base_models.search import Found, look, search, usual_places
from core.errors import UserError
from core.paths import DEMO

UNET = "model.diffusion_model.input_blocks"
TEXT = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def safetensors(path: Path, **tensors: tuple[int, ...]) -> Path:
    """A real file of F16 zeros."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    return path


def checkpoint(path: Path, width: int = 768, channels: int = 4, **more: tuple[int, ...]) -> Path:
    return safetensors(path, **{
        f"{UNET}.0.0.weight": (320, channels, 3, 3), TEXT: (1, 77),
        f"{UNET}.1.1.transformer_blocks.0.attn2.to_k.weight": (4, width), **more})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_search, "LEAST", 0)


@pytest.mark.parametrize(("width", "channels", "family", "reason"), [
    (768, 4, "sd15", ""), (1024, 4, "sd2", ""), (768, 9, "", "other")])
def test_checkpoints_are_told_apart(tmp_path: Path, width: int, channels: int, family: str,
                                    reason: str) -> None:
    found = look(checkpoint(tmp_path / "a.safetensors", width, channels))
    assert found is not None
    assert (found.family, found.reason) == (family, reason)


def test_sdxl_is_known_as_such(tmp_path: Path) -> None:
    found = look(checkpoint(tmp_path / "xl.safetensors", 2048, **{
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "conditioner.embedders.1.model.ln_final.weight": (8,)}))
    assert found is not None
    assert found.family == "sdxl"


def test_a_denoiser_alone_is_a_base_where_its_family_trains_so(tmp_path: Path) -> None:
    """Start in the window must not be barred for what the engine trains."""
    found = look(safetensors(tmp_path / "flux.safetensors", **{
        "double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.weight": (3072, 64)}))
    assert found is not None
    assert (found.family, found.reason, found.what) == ("flux", "", "flux_schnell")


def test_loras_vaes_and_embeddings_are_no_bases(tmp_path: Path) -> None:
    for name, key in (("lora", "lora_unet_x.lora_down.weight"),
                      ("vae", "first_stage_model.encoder.conv_in.weight"),
                      ("embedding", "emb_params"), ("other", "abc.weight")):
        assert look(safetensors(tmp_path / f"{name}.safetensors", **{key: (2, 2)})) is None


def test_pickles_are_listed_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04")
    assert [one.reason for one in search([tmp_path])] == ["pickle"]


def test_model_folders_are_one_base(base: Path, tmp_path: Path) -> None:
    (found,) = search([base.parent])
    assert (found.path, found.family, found.reason) == (base, "sd15", "")
    assert look(DEMO / "base") is not None
    index = tmp_path / "xl" / "model_index.json"
    index.parent.mkdir()
    index.write_text('{"_class_name": "FluxPipeline"}')
    assert look(index.parent) == Found(index.parent, "flux", 0, "no_weights", "flux_schnell")
    index.write_text('{"_class_name": "FluxFillPipeline"}')
    found = look(index.parent)
    assert found is not None
    assert (found.reason, "Flux.1 Fill" in found.why("en")) == ("other", True)
    index.write_text("[1]")
    assert look(index.parent) is None


def test_a_torn_file_is_passed_over_and_named_when_asked(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    good = checkpoint(tmp_path / "good.safetensors")
    assert [one.path for one in search([tmp_path, tmp_path])] == [good]
    with pytest.raises(UserError):
        look(tmp_path / "torn.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_loops_depth_and_time_are_bounded(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    checkpoint(deep / "deep.safetensors")
    (deep / "loop").symlink_to(tmp_path)
    assert [one.path.name for one in search([tmp_path])] == ["deep.safetensors"]
    assert not list(search([tmp_path], depth=2))
    assert not list(search([tmp_path], seconds=-1))
    for number in range(300):
        (tmp_path / f"d{number}").mkdir()
    began = time.process_time()                 # of this process alone, however busy the machine
    list(search([tmp_path], seconds=0.01))
    assert time.process_time() - began < 1


def test_usual_places_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    wanted = [tmp_path / name for name in (
        "stable-diffusion-webui/models/Stable-diffusion", "Documents/ComfyUI/models/checkpoints",
        "Downloads/ComfyUI_windows_portable/ComfyUI/models/checkpoints",
        "Fooocus/models/checkpoints")]
    for folder in wanted:
        folder.mkdir(parents=True)
    own = tmp_path / "mine"
    own.mkdir()
    places = usual_places([str(own), "", str(tmp_path / "gone")])
    assert places[0] == own
    assert set(wanted) <= set(places)
    assert tmp_path / "gone" not in places
