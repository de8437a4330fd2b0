"""Names of layers, against the real networks: built without weights, by their real configs."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from core import paths
from core.families.chroma.spec import NAMING as CHROMA
from core.families.flux.spec import NAMING as FLUX
from core.families.layer_names import Naming, dotted, from_native, to_native
from core.families.lumina2.spec import NAMING as LUMINA2
from core.families.registry import SPECS
from core.families.sana.spec import NAMING as SANA
from core.families.sd15.spec import NAMING as SD1
from core.families.sdxl.spec import NAMING as SDXL
from core.families.unet import unet_renames

XL = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
      "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
      "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
      "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
      "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
      "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True}


@cache
def network(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        match name:
            case "sd15":
                return UNet2DConditionModel(cross_attention_dim=768)
            case "sdxl":
                return UNet2DConditionModel(**XL)
            case "flux":
                return FluxTransformer2DModel(guidance_embeds=True)
            case "chroma" | "lumina2" | "sana":
                config = paths.family_configs(name) / "transformer" / "config.json"
                cls = {"chroma": ChromaTransformer2DModel, "lumina2": Lumina2Transformer2DModel,
                       "sana": SanaTransformer2DModel}[name]
                return cls.from_config(json.loads(config.read_text()))
            case "clip_g":
                return CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32))
            case _:
                return CLIPTextModel(CLIPTextConfig())


@cache
def layers(name: str) -> list[str]:
    return [path for path, module in network(name).named_modules()
            if getattr(module, "weight", None) is not None]


REAL = [("sd15", SD1, 0), ("sdxl", SDXL, 0), ("flux", FLUX, 0), ("chroma", CHROMA, 0),
        ("lumina2", LUMINA2, 0), ("sana", SANA, 0), ("clip_l", SD1, 1),
        ("clip_g", SDXL, 2)]


@pytest.mark.parametrize(("name", "naming", "number"), REAL)
def test_every_layer_of_a_real_network_has_one_name_and_comes_back(
        name: str, naming: Naming, number: int) -> None:
    part, seen = naming[number], {}
    for path in layers(name):
        place = to_native(part, path)
        paths, rename = from_native(part, place.name)
        assert paths[place.number] == path
        assert rename is place.of
        assert seen.setdefault((place.name, place.number), path) == path
        for spelled in (path, part.rooted(path), place.name):
            assert dotted(part, spelled.replace(".", "_")) == spelled
    assert len(seen) == len(layers(name)) > 90


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_unet_names_are_those_of_the_original_checkpoints(name: str) -> None:
    """diffusers' own reader of single files, given a checkpoint with our names, finds its own."""
    unet, part = network(name), SPECS[name].naming[0]
    theirs = {}
    for key in unet.state_dict():
        module, _, end = key.rpartition(".")
        theirs[f"model.diffusion_model.{to_native(part, module).name}.{end}"] = torch.tensor(
            len(theirs))
    config = {"layers_per_block": 2, "class_embed_type": None, "num_class_embeds": None,
              "down_block_types": unet.config.down_block_types,
              "up_block_types": unet.config.up_block_types,
              "addition_embed_type": unet.config.addition_embed_type}
    converted = convert_ldm_unet_checkpoint(dict(theirs), config=config)
    assert list(unet.state_dict()) == sorted(converted, key=lambda key: int(converted[key]))


def test_sdxl_kohya_names_are_read_by_diffusers() -> None:
    part = SDXL[0]
    wanted = [path for path in layers("sdxl") if re.search("attn|resnets|samplers|proj_", path)
              and "norm" not in path]
    keys = {f"lora_unet_{to_native(part, path).name.replace('.', '_')}.alpha": torch.tensor(i)
            for i, path in enumerate(wanted)}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.alpha" in keys
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(keys), network("sdxl").config)
    inner = ("in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection", "_op")
    for key, number in mapped.items():             # its next step renames blocks and their inside
        for theirs, ours in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks"),
                             ("middle_block", "mid_block")):
            key = key.replace(theirs, ours)
        if not any(x in key for x in inner):
            assert key == f"lora_unet_{wanted[int(number)].replace('.', '_')}.alpha"


@given(levels=st.integers(1, 5), per_level=st.integers(1, 3),
       attention=st.sets(st.integers(0, 4)))
def test_unet_tables_of_any_shape_are_one_to_one(levels: int, per_level: int,
                                                 attention: set[int]) -> None:
    renames = unet_renames(levels, per_level, attention)
    assert len({one.ours for one in renames}) == len({one.theirs for one in renames})
    assert len(renames) == len(set(renames))


@given(st.lists(st.sampled_from(sorted({*layers("sd15"), *layers("sdxl")})), min_size=1),
       st.sampled_from(["", ".0", ".proj", ".net.2"]))
def test_layers_below_a_renamed_one_follow_it(paths: list[str], below: str) -> None:
    for path in paths:
        for naming in (SD1, SDXL):
            place = to_native(naming[0], path + below)
            assert from_native(naming[0], place.name)[0] == [path + below]


@given(st.from_regex(r"[a-z0-9_.]{1,40}", fullmatch=True))
def test_names_that_no_table_has_stay_as_they_are_or_come_back(name: str) -> None:
    for naming in [one.naming for one in SPECS.values()]:
        for part in naming:
            place = to_native(part, name)
            assert name in from_native(part, place.name)[0]
            assert dotted(part, name).replace(".", "_") == name.replace(".", "_")


def test_fused_layers_of_flux() -> None:
    part = FLUX[0]
    assert to_native(part, "transformer_blocks.3.attn.to_k").name == "double_blocks.3.img_attn.qkv"
    assert to_native(part, "transformer_blocks.3.attn.to_k").number == 1
    paths, rename = from_native(part, "single_blocks.7.linear1")
    assert paths == [*(f"single_transformer_blocks.7.attn.to_{x}" for x in "qkv"),
                     "single_transformer_blocks.7.proj_mlp"]
    assert rename is not None
    sizes = [network("flux").get_submodule(path).out_features for path in paths]
    assert [size // sizes[0] for size in sizes] == list(rename.rows)


@pytest.mark.parametrize(("family", "names"), [
    ("sd15", {"text_encoder": "lora_te"}),
    ("sd2", {"text_encoder": "lora_te"}),
    ("sdxl", {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}),
    ("sd3", {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2",
             "text_encoder_3": "lora_te3"}),
    ("flux", {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"}),
    ("chroma", {"text_encoder": "lora_te3"})])
def test_text_encoders_are_numbered_as_sd_scripts_has_them(
        family: str, names: dict[str, str]) -> None:
    """CLIP-L is the first, CLIP-G the second, T5 the third, whichever of them a base has."""
    denoiser, *texts = SPECS[family].naming
    assert denoiser.kohya == "lora_unet"
    assert {part.name: part.kohya for part in texts} == names
    clips = {part.kohya: part.native for part in texts}
    for kohya, word in (("lora_te1", "clip_l"), ("lora_te2", "clip_g"), ("lora_te3", "t5xxl")):
        assert word in clips.get(kohya, word)
