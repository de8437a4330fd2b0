"""Settings inside pictures: A1111's text and ComfyUI's graph come back; hostile files get one
sentence."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core import i18n
from core.errors import UserError
from core.families.schedulers import SAMPLERS
from core.inference import png_info
from core.inference.png_info import Settings, parse

LINES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")),
                min_size=1, max_size=60).map(str.strip).filter(
    lambda text: text and not text.startswith(("Negative prompt:", "Steps:")))


@given(prompt=st.lists(LINES, min_size=1, max_size=3), negative=st.lists(LINES, max_size=2),
       seed=st.integers(0, 2**63 - 1), steps=st.integers(1, 1000), cfg=st.integers(0, 500),
       sampler=st.sampled_from(sorted(SAMPLERS)), size=st.tuples(st.integers(8, 16384),
                                                                 st.integers(8, 16384)))
def test_what_a1111_writes_comes_back(prompt: list[str], negative: list[str], seed: int,
                                      steps: int, cfg: int, sampler: str,
                                      size: tuple[int, int]) -> None:
    text = "\n".join([*prompt, *(["Negative prompt: " + "\n".join(negative)] if negative else []),
                      f"Steps: {steps}, Sampler: {SAMPLERS[sampler][0]}, CFG scale: {cfg / 10:g}, "
                      f"Seed: {seed}, Size: {size[0]}x{size[1]}, Model: some model, "
                      f'Lora hashes: "a: 12, b: 34", Version: 1.9'])
    assert parse(text) == Settings(
        "\n".join(prompt), "\n".join(negative), seed, steps, cfg / 10, f"{size[0]},{size[1]}",
        sampler, "", "some model")


@given(st.text(max_size=300))
def test_any_text_is_read(text: str) -> None:
    told = parse(text)
    assert len(told.prompt) + len(told.negative) <= len(text)


def test_schedules_and_unknown_samplers() -> None:
    assert parse("x\nSteps: 4, Clip skip: 2").clip_skip == 2
    assert parse("x\nSteps: 4, Clip skip: 99").clip_skip is None
    newer = parse("x\nSteps: 4, Sampler: DPM++ 2M, Schedule type: Karras, Seed: -1, Size: 1x1")
    assert (newer.sampler, newer.seed, newer.size) == ("dpm++2m_karras", None, "")
    other = parse("x\nSteps: 4, Sampler: Restart, CFG scale: nan")
    assert (other.sampler, other.unknown_sampler, other.cfg) == ("", "Restart", None)


# --- files ---

def png(path: Path, **chunks: str) -> Path:
    info = PngInfo()
    for key, text in chunks.items():
        info.add_itxt(key, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


def graph(**changes: Any) -> dict[str, Any]:
    nodes: dict[str, Any] = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "base.safetensors"}},
        "2": {"class_type": "LoraLoader", "inputs": {
            "lora_name": "styles\\ink.safetensors", "strength_model": 0.7, "strength_clip": 1,
            "model": ["1", 0], "clip": ["1", 1]}},
        "3": {"class_type": "LoraLoader", "inputs": {
            "lora_name": "mia.safetensors", "strength_model": -0.25, "model": ["2", 0]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["3", 1]}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0], "clip": ["3", 1]}},
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768}},
        "7": {"class_type": "KSampler", "inputs": {
            "seed": 7, "steps": 20, "cfg": 5.5, "sampler_name": "dpmpp_2m", "scheduler": "karras",
            "model": ["3", 0], "positive": ["4", 0], "negative": ["5", 0],
            "latent_image": ["6", 0]}},
        "8": {"class_type": "PrimitiveString", "inputs": {"value": "blurry"}}}
    return nodes | changes


def test_a_comfyui_graph_is_read(tmp_path: Path) -> None:
    told = png_info.read(png(tmp_path / "x.png", prompt=json.dumps(graph())))
    assert told == Settings("a cat <lora:ink:0.7> <lora:mia:-0.25>", "blurry", 7, 20, 5.5,
                            "512,768", "dpm++2m_karras", "", "base.safetensors")


@given(st.dictionaries(st.sampled_from([str(n) for n in range(1, 9)]), st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["inputs", "text", "model", "positive", "seed"]), inner, max_size=3),
    max_leaves=8)))
def test_any_graph_is_read_or_refused(changes: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        told = png_info.parse_comfy(json.dumps(graph(**changes)), Path("x.png"))
        assert told.seed is None or 0 <= told.seed < 2**63


def test_a_circle_ends(tmp_path: Path) -> None:
    around = graph()
    around["2"]["inputs"]["model"] = ["3", 0]
    assert png_info.parse_comfy(json.dumps(around), tmp_path).seed == 7


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = b"parameters\0\0" + zlib.compress(b"a" * 80_000_000)
HEAD = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
HOSTILE = {
    "empty": b"", "text": b"<html>", "pickle": b"\x80\x04K\x01.", "head": HEAD[:20],
    "nothing in it": HEAD + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
    "text bomb": HEAD + chunk(b"zTXt", BOMB) + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
    "huge": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1,
                                                                8, 2, 0, 0, 0)),
    "long": HEAD + chunk(b"tEXt", b"parameters\0" + b"a" * 300_000) + chunk(b"IDAT", b""),
    "deep": HEAD + chunk(b"tEXt", b"prompt\0" + b"[" * 100_000) + chunk(b"IDAT", b""),
    "no graph": HEAD + chunk(b"tEXt", b"prompt\0[1]") + chunk(b"IDAT", b""),
    "other graph": HEAD + chunk(b"tEXt", b'prompt\0{"1": {"inputs": {}}}') + chunk(b"IDAT", b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_one_sentence(tmp_path: Path, name: str) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as caught:
        png_info.read(file)
    said = i18n.tr(caught.value.code, caught.value.params, "en")
    assert "x.png" in said
    assert len(said) < 200
