"""Settings inside pictures: A1111's text and ComfyUI's graph come back; hostile files get one
sentence."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
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
                            "512,768", "dpm++2m_karras", "", "base.safetensors",
                            beyond=("strength_clip",))


@given(st.dictionaries(st.sampled_from([str(n) for n in range(1, 9)]), st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["inputs", "text", "model", "positive", "seed"]), inner, max_size=3),
    max_leaves=8)))
def test_any_graph_is_read_or_refused(changes: dict[str, Any]) -> None:
    with contextlib.suppress(UserError):
        told = png_info.parse_comfy(graph(**changes), Path("x.png"))
        assert told.seed is None or 0 <= told.seed < 2**63


def test_a_circle_ends(tmp_path: Path) -> None:
    around = graph()
    around["2"]["inputs"]["model"] = ["3", 0]
    assert png_info.parse_comfy(around, tmp_path).seed == 7


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


# --- other programs, other files ---

FACTS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 123, Size: 512x768, Model: dream"
TEXT = f"a 猫\nNegative prompt: bad\n{FACTS}"
TOLD = {"prompt": "a 猫", "negative": "bad", "seed": 123, "steps": 20, "cfg": 7.0,
        "size": "512,768", "sampler": "euler_a"}


def tells(found: Settings, **more: Any) -> None:
    expected = TOLD | more
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize("text", [
    f"{TEXT}\n\nTemplate: {{a|b}} cat, Steps: 3", f"{TEXT}\nUsed embeddings: easynegative [c7]",
    TEXT.replace("Model: dream", "\nModel: dream, Template: a,\nNegative Template: Seed: 4"),
    f"a 猫\nNegative prompt: bad\nSeed: 123, {FACTS.replace('Seed: 123, ', '')}",
    TEXT.replace("CFG scale: 7", "CFG scale: 1, Distilled CFG Scale: 7"),
    TEXT.replace("CFG scale", "CFG Scale").replace("\n", "\r\n"),
])
def test_lines_of_extensions_and_other_versions(text: str) -> None:
    tells(parse(text))


def test_what_else_made_a_picture_is_named() -> None:
    found = parse(f"{TEXT}, Denoising strength: 0.4, Hires upscale: 2, Version: 1")
    assert (found.beyond, found.not_told) == (("denoising strength", "hires upscale"), [])
    assert parse("a cat\nSteps: 20").not_told == ["seed", "cfg", "size", "sampler"]


def comment(data: bytes, own: bool = True) -> bytes:
    exif = Image.Exif()
    (exif.get_ifd(0x8769) if own else exif)[0x9286] = data
    return exif.tobytes()


def test_a_png_text_in_the_wrong_encoding(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(HEAD + chunk(b"tEXt", b"parameters\0" + TEXT.encode()) + chunk(b"IDAT", b""))
    tells(png_info.read(file))
    latin = TEXT.replace("猫", "café").encode("latin-1")
    file.write_bytes(HEAD + chunk(b"tEXt", b"parameters\0" + latin) + chunk(b"IDAT", b""))
    tells(png_info.read(file), prompt="a café")


COMMENTS = {"utf-16-be": b"UNICODE\0" + TEXT.encode("utf-16-be"),
            "utf-16-le": b"UNICODE\0" + TEXT.encode("utf-16-le"),
            "utf-16": b"UNICODE\0" + TEXT.encode("utf-16"),
            "ascii": b"ASCII\0\0\0" + TEXT.encode(), "bare": TEXT.encode()}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("kind", COMMENTS)
def test_the_user_comment_of_every_format(tmp_path: Path, suffix: str, kind: str) -> None:
    for own in (True, False):
        file = tmp_path / f"x{suffix}"
        Image.new("RGB", (8, 8)).save(file, exif=comment(COMMENTS[kind], own))
        tells(png_info.read(file))


SWARM = {"sui_image_params": {
    "prompt": "a 猫", "negativeprompt": "bad", "model": "dream", "seed": 123, "steps": 20,
    "cfgscale": 7.0, "width": 512, "height": 768, "sampler": "euler_ancestral",
    "scheduler": "normal", "loras": ["s/ink"], "loraweights": ["0.7"]}, "sui_extra_data": {}}
FOOOCUS = {"prompt": "a 猫", "negative_prompt": "bad", "seed": "123", "steps": 20,
           "guidance_scale": 7, "resolution": "(512, 768)", "sampler": "euler_ancestral",
           "scheduler": "normal", "base_model": "dream", "loras": [["ink.safetensors", 0.7, "ab"]],
           "full_prompt": ["a 猫", "x"], "metadata_scheme": "fooocus"}
INVOKE = {"positive_prompt": "a 猫", "negative_prompt": "bad", "seed": 123, "steps": 20,
          "cfg_scale": 7, "width": 512, "height": 768, "scheduler": "euler_a",
          "model": {"name": "dream", "base": "sdxl"},
          "loras": [{"model": {"name": "ink"}, "weight": 0.7}]}
OLD_INVOKE = {"model": "stable diffusion", "image": {
    "prompt": [{"prompt": "a 猫", "weight": 1}], "seed": 123, "steps": 20, "cfg_scale": 7,
    "width": 512, "height": 768, "sampler": "k_euler_a"}}
NOVELAI = {"prompt": "a 猫", "uc": "bad", "seed": 123, "steps": 20, "scale": 7, "width": 512,
           "height": 768, "sampler": "k_euler_ancestral"}
DRAW_THINGS = {"c": "a 猫", "uc": "bad", "seed": 123, "steps": 20, "scale": 7, "size": "512x768",
               "sampler": "Euler a", "model": "dream", "lora": [{"model": "ink.ckpt",
                                                                 "weight": 0.7}]}
LORA = {"prompt": "a 猫 <lora:ink:0.7>"}


@pytest.mark.parametrize(("key", "data", "more"), [
    ("parameters", SWARM, LORA), ("parameters", FOOOCUS, LORA), ("invokeai_metadata", INVOKE, LORA),
    ("sd-metadata", OLD_INVOKE, {"negative": ""}), ("Comment", NOVELAI, {}),
    ("Comment", DRAW_THINGS, LORA)], ids=str)
def test_programs_that_write_json(tmp_path: Path, key: str, data: dict[str, Any],
                                  more: dict[str, Any]) -> None:
    tells(png_info.read(png(tmp_path / "x.png", **{key: json.dumps(data)})), **more)
    file = tmp_path / "x.jpg"
    Image.new("RGB", (8, 8)).save(file, exif=comment(json.dumps(data).encode(), own=False))
    tells(png_info.read(file), **more)


def test_comfyui_s_webp_and_a_text_for_each_setting(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(graph())
    exif[0x010F] = "workflow:{}"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=exif)
    assert png_info.read(tmp_path / "x.webp").seed == 7
    told = png_info.read(png(tmp_path / "x.png", prompt="a 猫", negative_prompt="bad", seed="123",
                             num_inference_steps="20", guidance_scale="7.0", width="512",
                             height="768", sampler_name="euler_a"))
    tells(told)


@pytest.mark.parametrize("text", [
    '{"sui_image_params": {"prompt": "a c', '["a", "b"]', '{"a": 1}', '{"1": {"inputs": {}}}',
    "{}", "[]", '[{"prompt": "x"}]', '{ "prompt": {"a": "b"}, "seed": 3 }'])
@pytest.mark.parametrize("key", ["parameters", "prompt", "Comment"])
def test_json_is_never_a_prompt(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(UserError):
        png_info.read(png(tmp_path / "x.png", **{key: text, "seed": "1"}))


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.floats(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ["prompt", "seed", "loras", "lora", "model", "weight", "sampler", "size",
                         "width", "image", "sui_image_params", "loraweights"]), inner, max_size=4),
                    max_leaves=9), st.binary(max_size=40))
def test_any_json_and_any_exif_is_read_or_refused(data: Any, noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.jpg")
        for exif in (comment(json.dumps(data).encode()), comment(b"UNICODE\0" + noise),
                     b"Exif\0\0" + noise):
            Image.new("RGB", (4, 4)).save(file, exif=exif)
            with contextlib.suppress(UserError):
                assert not isinstance(png_info.read(file).prompt, dict)
