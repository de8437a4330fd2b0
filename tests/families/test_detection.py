"""Told from names and shapes alone: headers as the published files have them, without weights."""

from __future__ import annotations

import json
import struct
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import families, i18n
from core.cli import families as family_commands
from core.errors import UserError
from core.families import detection
from core.families.detection import identify
from core.families.spec import Found
from core.safetensors_header import TensorInfo

SD = "model.diffusion_model."
ATTENTION = "transformer_blocks.0.attn2.to_k.weight"
CLIP = "text_model.embeddings.token_embedding.weight"
FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": [128]}
GUIDED = {"guidance_in.in_layer.weight": [3072, 256]}


def unet(context: int, channels: int = 4, place: str = "1", width: int = 320) -> dict[str, Any]:
    return {f"{SD}input_blocks.0.0.weight": [width, channels, 3, 3],
            f"{SD}input_blocks.{place}.1.{ATTENTION}": [width, context]}


LABEL = {f"{SD}label_emb.0.0.weight": [1280, 2816]}
FILES: dict[str, tuple[dict[str, Any], str, str]] = {
    "SD 1.5": (unet(768), "sd1", "sd15"),
    "SD 1.5 inpainting": (unet(768, 9), "inpainting", ""),
    "InstructPix2Pix": (unet(768, 8), "editing", ""),
    "SD 2.1": (unet(1024), "sd2", "sd2"),
    "SDXL": (unet(2048, place="4") | LABEL, "sdxl", "sdxl"),
    "SDXL inpainting": (unet(2048, 9, place="4") | LABEL, "inpainting", ""),
    "SDXL refiner": (unet(1280, place="4", width=384) | LABEL, "sdxl_refiner", ""),
    "SD 3": ({f"{SD}joint_blocks.0.context_block.adaLN_modulation.1.bias": [9216]}, "sd3", "sd3"),
    "Flux dev": (FLUX | GUIDED | {"img_in.weight": [3072, 64]}, "flux_dev", "flux"),
    "Flux schnell": (FLUX | {"img_in.weight": [3072, 64]}, "flux_schnell", "flux"),
    "Flux fill": (FLUX | GUIDED | {"img_in.weight": [3072, 384]}, "flux_fill", ""),
    "Flux depth": (FLUX | GUIDED | {"img_in.weight": [3072, 128]}, "flux_control", ""),
    "Flux.2 klein": ({"single_stream_modulation.lin.weight": [9216, 3072]}, "flux2_klein", "flux2"),
    "Flux.2 dev": ({"single_stream_modulation.lin.weight": [18432, 6144]} | GUIDED,
                   "flux2_dev", ""),
    "Chroma": ({"distilled_guidance_layer.in_proj.bias": [5120]} | FLUX, "chroma", "chroma"),
    "Chroma Radiance": ({"distilled_guidance_layer.in_proj.bias": [5120],
                         "nerf_blocks.0.norm.scale": [64]}, "chroma_radiance", ""),
    "Z-Image": ({"layers.0.adaLN_modulation.0.weight": [15360, 256]}, "zimage", "zimage"),
    "Lumina 2": ({"cap_embedder.0.weight": [2304],
                  "layers.0.adaLN_modulation.1.weight": [9216, 1024]}, "lumina2", "lumina2"),
    "Qwen-Image": ({"txt_norm.weight": [3584], "transformer_blocks.0.img_mod.1.weight":
                    [18432, 3072]}, "qwen", "qwen"),
    "Sana": ({"blocks.0.mlp.inverted_conv.conv.weight": [11200, 2240, 1, 1]}, "sana", "sana"),
    "Qwen-Image Edit": ({"__index_timestep_zero__": [0], "txt_norm.weight": [3584]},
                        "qwen_edit", ""),
    "Qwen-Image Layered": ({"time_text_embed.addition_t_embedding.weight": [2, 3072]},
                           "qwen_layered", ""),
    "Krea 2": ({"txtfusion.projector.weight": [1, 12]}, "krea2", "krea2"),
    "kohya LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": [8, 1280, 1, 1],
                    "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": [1280, 8, 1, 1]},
                   "lora", ""),
    "ComfyUI LoRA": ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": [8, 3072],
                      "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": [9216, 8]},
                     "lora", ""),
    "SD VAE": ({"decoder.conv_in.weight": [512, 4, 3, 3], "encoder.conv_in.weight":
                [128, 3, 3, 3]}, "vae", ""),
    "Flux.2 VAE": ({"decoder.conv_in.weight": [512, 32, 3, 3], "bn.running_mean": [128]},
                   "vae_32", ""),
    "Qwen-Image VAE": ({"decoder.conv1.weight": [384, 16, 3, 3, 3]}, "vae_film", ""),
    "Qwen-Image VAE of diffusers": ({"decoder.conv_in.weight": [384, 16, 3, 3, 3]},
                                    "vae_film", ""),
    "Flux VAE": ({"decoder.conv_in.weight": [512, 16, 3, 3]}, "vae_16", ""),
    "CLIP-L": ({CLIP: [49408, 768]}, "clip_l", ""),
    "CLIP-G": ({CLIP: [49408, 1280]}, "clip_g", ""),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": [4096, 4096],
            "shared.weight": [32128, 4096]}, "t5", ""),
    "Qwen3": ({"model.layers.0.self_attn.q_norm.weight": [128]}, "qwen3", ""),
    "Qwen3-VL": ({"language_model.layers.0.self_attn.q_norm.weight": [128],
                  "visual.patch_embed.proj.weight": [1024, 3, 2, 16, 16]}, "qwen3_vl", ""),
    "Qwen2.5-VL": ({"model.layers.0.self_attn.q_proj.bias": [3584],
                    "visual.blocks.0.attn.qkv.bias": [3840]}, "qwen25_vl", ""),
    "Gemma 3": ({"model.layers.0.self_attn.q_norm.weight": [256],
                 "model.layers.0.pre_feedforward_layernorm.weight": [2560]}, "language_model", ""),
    "Llama": ({"model.layers.0.self_attn.q_proj.weight": [4096, 4096]}, "language_model", ""),
    "Sana's VAE": ({"encoder.project_in.conv.weight": [128, 3, 3, 3],
                    "decoder.stages.0.op_list.0.main.conv.conv.weight": [128, 128, 3, 3]},
                   "vae_dc", ""),
    "Gemma 2": ({"model.layers.0.self_attn.q_proj.weight": [2048, 2304],
                 "model.layers.0.pre_feedforward_layernorm.weight": [2304]}, "gemma_2", ""),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": [320, 4, 3, 3]}, "controlnet", ""),
    "embedding": ({"emb_params": [4, 768]}, "embedding", ""),
    "scaled fp8": (FLUX | {"img_in.weight": [3072, 64], "scaled_fp8": [0], "img_in.scale_weight":
                           [], "img_in.scale_input": []}, "flux_schnell", "flux"),
    "4 bits of another program": ({"transformer_blocks.0.attn.to_q.qweight": [64, 64]},
                                  "quantised", ""),
    "Flux in newer words": ({"double_blocks.0.img_attn.norm.key_norm.weight": [128],
                             "img_in.weight": [3072, 64]}, "flux_schnell", "flux"),
    "Flux dev of diffusers": (
        {f"transformer.{name}": shape for name, shape in {
            "single_transformer_blocks.0.proj_mlp.weight": [12288, 3072],
            "x_embedder.weight": [3072, 64],
            "time_text_embed.text_embedder.linear_1.weight": [3072, 768],
            "time_text_embed.guidance_embedder.linear_1.weight": [3072, 256]}.items()},
        "flux_dev", "flux"),
    "HunyuanVideo of diffusers": (
        {"single_transformer_blocks.0.proj_mlp.weight": [12288, 3072],
         "x_embedder.proj.weight": [3072, 16, 1, 2, 2],
         "time_text_embed.text_embedder.linear_1.weight": [3072, 768]}, "video", ""),
    "SD 3 of diffusers": ({"transformer_blocks.0.norm1_context.linear.weight": [9216, 1536],
                           "pos_embed.proj.weight": [1536, 16, 2, 2]}, "sd3", "sd3"),
    "Lumina 2 of diffusers": ({"time_caption_embed.caption_embedder.0.weight": [2304]},
                              "lumina2", "lumina2"),
    "Krea 2 of diffusers": ({"text_fusion.projector.weight": [1, 12]}, "krea2", "krea2"),
    "SD 1.5 UNet of diffusers": (
        {"conv_in.weight": [320, 4, 3, 3], "conv_out.weight": [4, 320, 3, 3],
         f"down_blocks.0.attentions.0.{ATTENTION}": [320, 768]}, "sd1", "sd15"),
    "SDXL UNet of diffusers": (
        {"conv_in.weight": [320, 4, 3, 3], "add_embedding.linear_1.weight": [1280, 2816],
         f"down_blocks.1.attentions.0.{ATTENTION}": [640, 2048]}, "sdxl", "sdxl"),
    "Kolors of diffusers": (
        {"conv_in.weight": [320, 4, 3, 3], "add_embedding.linear_1.weight": [1280, 5632],
         "encoder_hid_proj.weight": [2048, 4096],
         f"down_blocks.1.attentions.0.{ATTENTION}": [640, 2048]}, "kolors", ""),
    "Kolors": (unet(2048, place="4") | {f"{SD}label_emb.0.0.weight": [1280, 5632]}, "kolors", ""),
    "CosXL": (unet(2048, place="4") | LABEL | {"edm_vpred.sigma_max": [], "edm_vpred.sigma_min":
                                               []}, "cosxl", ""),
    "Anima": ({"net.blocks.0.mlp.layer1.weight": [8192, 2048],
               "net.llm_adapter.blocks.0.cross_attn.q_proj.weight": [1024, 1024]}, "anima", ""),
    "Cosmos Predict 2": ({"net.blocks.0.mlp.layer1.weight": [8192, 2048]}, "cosmos", ""),
    "Ideogram 4": ({"llm_cond_proj.weight": [4608, 4096], "layers.0.attention.to_q.weight":
                    [4608, 4608]}, "ideogram4", ""),
    "PixArt": ({"t_block.1.weight": [6912, 1152], "blocks.0.mlp.fc1.weight": [4608, 1152]},
               "pixart", ""),
    "PixArt of diffusers": (
        {"adaln_single.linear.weight": [6912, 1152], "pos_embed.proj.weight": [1152, 4, 2, 2],
         "caption_projection.linear_1.weight": [1152, 4096]}, "pixart", ""),
    "Playground": (unet(2048, place="4") | LABEL | {"edm_mean": [1, 4, 1, 1]}, "playground", ""),
    "anything": ({"weight": [3, 3]}, "unknown", ""),
}


def write(path: Path, shapes: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """A file of zeros that takes no place on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    shapes, what, family = FILES[name]
    found = identify(write(tmp_path / "model.safetensors", shapes))
    assert (found.what, found.family) == (what, family)
    for language in i18n.LANGUAGES:
        assert not found.description(language).startswith("families.")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_denoiser_alone_is_known_by_any_prefix(prefix: str, tmp_path: Path) -> None:
    shapes = {f"{prefix}{name}": shape for name, shape in FILES["Flux dev"][0].items()}
    assert identify(write(tmp_path / "a.safetensors", shapes)).what == "flux_dev"


def test_marks_of_v_prediction(tmp_path: Path) -> None:
    plain = FILES["SDXL"][0]
    marked = identify(write(tmp_path / "a.safetensors", plain | {"v_pred": [], "ztsnr": []}))
    assert (marked.family, marked.v_prediction, marked.zero_snr) == ("sdxl", True, True)
    told = identify(write(tmp_path / "b.safetensors", FILES["SD 2.1"][0],
                          {"modelspec.architecture": "stable-diffusion-v2-768-v"}))
    assert told.v_prediction
    assert not identify(write(tmp_path / "c.safetensors", plain)).v_prediction


@pytest.mark.parametrize(("name", "content", "what"), [
    ("model.gguf", b"GGUF\x03\x00\x00\x00", "gguf"),
    ("model.safetensors", b"<!DOCTYPE html><html>", "web_page"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "lfs_pointer"),
])
def test_other_files(name: str, content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert identify(tmp_path / name).what == what
    with pytest.raises(UserError) as caught:
        families.detect(tmp_path / name)
    assert caught.value.code == "families.not_a_base"
    assert "\n" not in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    for name, content, code in (("a.ckpt", b"\x80\x02", "families.pickle"),
                                ("a.safetensors", b"PK\x03\x04zip", "families.pickle"),
                                ("b.safetensors", b"\x10\x00", "families.unreadable")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            identify(tmp_path / name)
        assert caught.value.code == code
    with pytest.raises(UserError, match="nowhere"):
        identify(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(("configs", "what"), [
    ({"model_index.json": {"_class_name": "FluxPipeline"},
      "transformer/config.json": {"guidance_embeds": True}}, "flux_dev"),
    ({"model_index.json": {"_class_name": "FluxPipeline"},
      "transformer/config.json": {"guidance_embeds": False}}, "flux_schnell"),
    ({"model_index.json": {"_class_name": "ChromaPipeline"}}, "chroma"),
    ({"unet/config.json": {"in_channels": 4, "cross_attention_dim": 768}}, "sd1"),
    ({"unet/config.json": {"in_channels": 4, "cross_attention_dim": 1024,
                           "use_linear_projection": True}}, "sd2"),
    ({"unet/config.json": {"in_channels": 9, "cross_attention_dim": 768}}, "inpainting"),
    ({"unet/config.json": {"in_channels": 4, "addition_embed_type": "text_time"}}, "sdxl"),
    ({"adapter_config.json": {}}, "lora"),
    ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "part_folder"),
    ({"model_index.json": {"_class_name": "WanPipeline"}}, "other_pipeline"),
])
def test_folders(configs: dict[str, Any], what: str, tmp_path: Path) -> None:
    for name, content in configs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert identify(tmp_path).what == what


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json"):
        identify(tmp_path)


@given(st.dictionaries(st.text(max_size=40), st.lists(st.integers(0, 9), max_size=4), max_size=8))
def test_any_names_and_shapes_are_something(shapes: dict[str, list[int]]) -> None:
    tensors = {name: TensorInfo("F16", tuple(shape), 0, 0) for name, shape in shapes.items()}
    assert isinstance(detection.of_tensors(tensors), Found)


@pytest.mark.parametrize(("name", "shapes", "metadata", "what", "plain"), [
    ("flux1-dev-kontext_fp8_scaled", FILES["Flux dev"][0], {}, "flux_kontext", "flux"),
    ("mine", FILES["Flux dev"][0], {"modelspec.title": "Flux.1 Kontext dev"}, "flux_kontext",
     "flux"),
    ("qwen_image_edit_2509_bf16", FILES["Qwen-Image"][0], {}, "qwen_edit", "qwen"),
])
def test_models_of_the_same_shapes_are_told_by_their_names(
        name: str, shapes: dict[str, Any], metadata: dict[str, str], what: str, plain: str,
        tmp_path: Path) -> None:
    """Refused, with what to set where the name is wrong."""
    path = write(tmp_path / f"{name}.safetensors", shapes, metadata)
    assert (identify(path).what, identify(path).family) == (what, "")
    with pytest.raises(UserError, match=f"family: {plain}") as caught:
        families.detect(path)
    assert caught.value.fixes[0].changes == {"family": plain}
    assert detection.expect(path, plain).family == plain
    with pytest.raises(UserError):
        detection.expect(path, "sdxl")


@pytest.mark.parametrize("name", ["flux-edited", "kontextual-dev", "reflux"])
def test_other_words_are_no_names_of_models(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"{name}.safetensors", FILES["Flux dev"][0])
    assert families.detect(path) == "flux"


@pytest.mark.parametrize(("beside", "kind"), [
    ({"weight_scale_2": []}, "nvfp4"), ({"weight.absmax": [10]}, "bitsandbytes"),
    ({"weight_scale": [24, 1]}, "block")])
def test_only_the_denoisers_numbers_decide(beside: dict[str, Any], kind: str, tmp_path: Path
                                           ) -> None:
    """A text encoder in the same file may be in any; what the file is, is said all the same."""
    plain = {f"{SD}{name}": shape for name, shape in FILES["Flux dev"][0].items()}
    for place, trains in (("text_encoders.t5xxl.transformer.shared.", True),
                          (f"{SD}img_in.", False)):
        marks = {f"{place}{leaf}": shape for leaf, shape in beside.items()}
        path = write(tmp_path / "all.safetensors",
                     {f"{place}weight": [3072, 64]} | plain | marks)
        found = identify(path)
        assert (found.what, bool(found.family)) == ("flux_dev", trains)
        assert (kind in found.description("en")) is not trains
        if not trains:
            with pytest.raises(UserError, match=kind):
                families.detect(path)


def test_every_sentence_is_there() -> None:
    told = {f"families.is_{what}" for _, what, _ in FILES.values()} | {
        f"families.is_{what}" for what, _ in (*detection.PIPELINES.values(),)} | {
        f"families.is_{what}" for _, what in detection.OTHERS} | {
        f"families.is_{what}" for what, _ in detection.PARTS} | {
        f"families.is_{what}" for what in detection.NAMESAKES.values()}
    for language in i18n.LANGUAGES:
        assert told <= i18n.catalogue(language).keys()


def test_the_command_lists_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "noob.safetensors", FILES["SDXL"][0] | {"v_pred": []})
    answers = []
    for file in (None, path, write(tmp_path / "vae.safetensors", FILES["SD VAE"][0])):
        code = family_commands.families_command(Namespace(file=file, json=True))
        answers.append((code, json.loads(capsys.readouterr().out)))
    assert [one["id"] for one in answers[0][1]["families"]] == list(families.SPECS)
    assert (answers[1][1]["family"], answers[1][1]["v_prediction"]) == ("sdxl", True)
    assert answers[2][0] == 2
    assert answers[2][1]["what"] == "vae"
    assert family_commands.families_command(Namespace(file=None, json=False)) == 0
    assert "sdxl" in capsys.readouterr().out
