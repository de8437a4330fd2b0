"""Every key of every family's LoRA files is one that ComfyUI, Forge and A1111 take.

The tables say which names of layers a program looks for, by its published loader; they know
nothing of core.families.layer_names. Sources, read 2026-11: ComfyUI comfy/lora.py, comfy/utils.py
(*_to_diffusers), comfy/weight_adapter; Forge packages_3rdparty/comfyui_lora_collection; A1111
extensions-builtin/Lora.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core import families, paths
from core.adapters import lora
from core.config import TrainConfig
from core.families.registry import SPECS
from core.lora_files import export
from core.lora_files.formats import HOLDS, SINGLE, spell
from core.lora_files.layers import Layer, Lora
from tests.lora_files.test_formats import OTHER_KINDS

DOCS = paths.ROOT / "docs" / "interop.md"
PROGRAMS = ("comfyui", "forge", "a1111")
Layers = tuple[str, ...]                    # layers as regular expressions, dots between names

# --- what layers are called --------------------------------------------------------------------

N = r"\d+"
CLIP = (rf"encoder.layers.{N}.(self_attn.(q|k|v|out)_proj|mlp.fc[12])",)


def _inner(at: str) -> Layers:
    """A UNet's transformer."""
    block = rf"{at}.transformer_blocks.{N}"
    return (rf"{at}.proj_(in|out)", rf"{block}.attn[12].(to_[qkv]|to_out.0)",
            rf"{block}.ff.net.(0.proj|2)")


def _compvis(inputs: str, outputs: str, downs: str, ups: str) -> Layers:
    """`inputs`, `outputs`: which blocks have attention; `downs`, `ups`: samplers."""
    resnet = "(in_layers.2|emb_layers.1|out_layers.3|skip_connection)"
    return (rf"(in|out)put_blocks.{N}.0.{resnet}", rf"middle_block.[02].{resnet}",
            rf"input_blocks.({downs}).0.op", rf"output_blocks.({ups}).conv",
            "time_embed.[02]", "label_emb.0.[02]", *_inner(rf"input_blocks.({inputs}).1"),
            *_inner("middle_block.1"), *_inner(rf"output_blocks.({outputs}).1"))


def _diffusers(attentions: str) -> Layers:
    resnet = r"(conv1|conv2|time_emb_proj|conv_shortcut)"
    return (rf"(down_blocks.{N}|up_blocks.{N}|mid_block).resnets.{N}.{resnet}",
            rf"down_blocks.{N}.downsamplers.0.conv", rf"up_blocks.{N}.upsamplers.0.conv",
            *_inner(attentions))


SD1 = _compvis("1|2|4|5|7|8", "3|4|5|6|7|8|9|10|11", "3|6|9", "2.1|5.2|8.2")
SDXL = _compvis("4|5|7|8", "0|1|2|3|4|5", "3|6", "2.2|5.2")
SD1_DIFFUSERS = _diffusers(r"(down_blocks.[012]|up_blocks.[123]|mid_block).attentions.\d")
SDXL_DIFFUSERS = _diffusers(r"(down_blocks.[12]|up_blocks.[01]|mid_block).attentions.\d")

_ATTN = "attn.(to_[qkv]|add_[qkv]_proj|to_out.0|to_add_out)"
_FF = "(ff|ff_context).net.(0.proj|2)"
_STREAMS = rf"double_blocks.{N}.(img|txt)_(attn.(qkv|proj)|mlp.[02]|mod.lin)"
FLUX = (_STREAMS, rf"single_blocks.{N}.(linear[12]|modulation.lin)", "img_in", "txt_in",
        "(time|vector|guidance)_in.(in|out)_layer", "final_layer.(linear|adaLN_modulation.1)")
FLUX_DIFFUSERS = (
    rf"transformer_blocks.{N}.({_ATTN}|{_FF}|norm1(_context)?.linear)",
    rf"single_transformer_blocks.{N}.(attn.to_[qkv]|proj_mlp|proj_out|norm.linear)",
    "x_embedder", "context_embedder", "proj_out", "norm_out.linear",
    "time_text_embed.(timestep|text|guidance)_embedder.linear_[12]")
CHROMA = (*FLUX, r"distilled_guidance_layer.(in_proj|out_proj|layers.\d+.(in|out)_layer)")
FLUX2 = (_STREAMS, rf"single_blocks.{N}.linear[12]", "img_in", "txt_in",
         "(time|guidance)_in.(in|out)_layer", "(double_stream_modulation_(img|txt)"
         "|single_stream_modulation).lin", "final_layer.(linear|adaLN_modulation.1)")
FLUX2_DIFFUSERS = (
    rf"transformer_blocks.{N}.({_ATTN}|(ff|ff_context).linear_(in|out))",
    rf"single_transformer_blocks.{N}.attn.(to_qkv_mlp_proj|to_out)", "x_embedder",
    "context_embedder", "proj_out")
SD3 = (rf"joint_blocks.{N}.(x_block|context_block).(attn.(qkv|proj)|mlp.fc[12]"
       rf"|adaLN_modulation.1)", rf"joint_blocks.{N}.x_block.attn2.(qkv|proj)", "x_embedder.proj",
       "context_embedder", "[ty]_embedder.mlp.[02]", "final_layer.(linear|adaLN_modulation.1)")
SD3_DIFFUSERS = (
    rf"transformer_blocks.{N}.({_ATTN}|attn2.(to_[qkv]|to_out.0)|{_FF}|norm1(_context)?.linear)",
    "context_embedder", "pos_embed.proj", "proj_out", "norm_out.linear",
    "time_text_embed.(timestep|text)_embedder.linear_[12]")
_REFINED = rf"(layers|noise_refiner|context_refiner).{N}"
ZIMAGE = (rf"{_REFINED}.(attention.(qkv|out)|feed_forward.w[123]|adaLN_modulation.[01])",
          "x_embedder", "cap_embedder.1", "t_embedder.mlp.[02]",
          "final_layer.(linear|adaLN_modulation.1)")
ZIMAGE_DIFFUSERS = (
    rf"{_REFINED}.(attention.(to_[qkv]|to_out.0)|feed_forward.w[123]|adaLN_modulation.0)",
    "all_x_embedder.2-1", "all_final_layer.2-1.(linear|adaLN_modulation.1)", "cap_embedder.1",
    "t_embedder.mlp.[02]")
QWEN = (rf"transformer_blocks.{N}.({_ATTN}|(img|txt)_mlp.net.(0.proj|2)|(img|txt)_mod.1)",
        "img_in", "txt_in", "proj_out", "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_[12]")
_KREA = rf"(transformer_blocks|text_fusion.(layerwise|refiner)_blocks).{N}"
KREA2 = (rf"(blocks|txtfusion.(layerwise|refiner)_blocks).{N}.(attn.(w[qkvo]|gate)"
         r"|mlp.(gate|up|down))", "first", "tmlp.[02]", "tproj.1", "txtmlp.[13]",
         "txtfusion.projector", "last.linear")
KREA2_DIFFUSERS = (
    rf"{_KREA}.(attn.(to_[qkv]|to_gate|to_out.0)|ff.(gate|up|down))", "img_in",
    "time_embed.linear_[12]", "time_mod_proj", "txt_in.linear_[12]", "text_fusion.projector",
    "final_layer.linear")

# --- which of these names a program looks for: prefix, layers, what stands for a dot ------------

Look = tuple[str, Layers, str]


def _clip(*numbers: str, native: str) -> tuple[Look, ...]:
    """kohya's `lora_te`, diffusers' `text_encoder`, ComfyUI's own, as many as are given."""
    kohya = tuple((f"lora_te{n}_text_model_", CLIP, "_") for n in numbers)
    own = (f"text_encoders.{native}.transformer.text_model.", CLIP, ".")
    diffusers = "text_encoder_2" if "2" in numbers else "text_encoder"
    return (*kohya, own, (f"{diffusers}.text_model.", CLIP, "."))


def _native(layers: Layers) -> tuple[Look, ...]:
    """ComfyUI and Forge go through the original code's weights."""
    return ("lora_unet_", layers, "_"), ("diffusion_model.", layers, ".")


def _unet(native: Layers, diffusers: Layers) -> tuple[Look, ...]:
    """diffusers' names as they were before PEFT: attention's below a processor, to_out bare."""
    plain = tuple(one for one in diffusers if ".attn[12]." not in one)
    old = tuple(one.replace("(to_[qkv]|to_out.0)", "processor.(to_[qkv]|to_out)")
                for one in diffusers if ".attn[12]." in one)
    return (*_native(native), ("lora_unet_", diffusers, "_"), ("lycoris_", diffusers, "_"),
            ("unet.", (*plain, *old), "."))


def _transformer(native: Layers, diffusers: Layers) -> tuple[Look, ...]:
    return (*_native(native), ("transformer.", diffusers, "."), ("lycoris_", diffusers, "_"))


_L, _G = _clip("", "1", native="clip_l"), _clip("2", native="clip_g")
_H = _clip("", "1", native="clip_h")


def _forge(looks: Iterable[Look]) -> tuple[Look, ...]:
    """The same, without ComfyUI's own names of text encoders."""
    return tuple(one for one in looks if not one[0].startswith("text_encoders."))


COMFYUI: dict[str, tuple[Look, ...]] = {
    "sd15": (*_unet(SD1, SD1_DIFFUSERS), *_L), "sd2": (*_unet(SD1, SD1_DIFFUSERS), *_H),
    "sdxl": (*_unet(SDXL, SDXL_DIFFUSERS), *_L, *_G),
    "sd3": _transformer(SD3, SD3_DIFFUSERS), "flux": _transformer(FLUX, FLUX_DIFFUSERS),
    "chroma": _transformer(CHROMA, FLUX_DIFFUSERS), "flux2": _transformer(FLUX2, FLUX2_DIFFUSERS),
    "zimage": _transformer(ZIMAGE, ZIMAGE_DIFFUSERS), "qwen": _transformer(QWEN, QWEN),
    "krea2": _transformer(KREA2, KREA2_DIFFUSERS),
    # its q, k and v are of different heights, which ComfyUI's table for diffusers' names ignores
    "lumina2": _native(ZIMAGE)}
LOOKS: dict[str, dict[str, tuple[Look, ...]]] = {
    "comfyui": COMFYUI,
    "forge": {**{name: _forge(COMFYUI[name]) for name in ("sd15", "sd2", "sdxl", "flux")},
              "sd3": _native(SD3)},
    # A1111 takes diffusers' and CompVis' names of UNets, both as kohya writes them
    "a1111": {name: (("lora_unet_", native, "_"), ("lora_unet_", diffusers, "_"),
                     *((f"lora_te{n}_text_model_", CLIP, "_") for n in numbers))
              for name, native, diffusers, numbers in (
                  ("sd15", SD1, SD1_DIFFUSERS, ("", "1")), ("sd2", SD1, SD1_DIFFUSERS, ("",)),
                  ("sdxl", SDXL, SDXL_DIFFUSERS, ("1", "2")))}}

_PLAIN = r"lora_(up|down|mid)\.weight|alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]" \
    r"|lokr_w[12](_[ab])?|lokr_t2|oft_blocks|rescale|diff|diff_b|w_norm|b_norm"
ENDS = {"comfyui": rf"{_PLAIN}|lora_[AB]\.weight", "forge": rf"{_PLAIN}|lora_[AB]\.weight",
        "a1111": _PLAIN}


@cache
def pattern(program: str, family: str) -> re.Pattern[str]:
    names = "|".join(
        re.escape(prefix) + one.replace(".", "_" if dot == "_" else r"\.")
        for prefix, layers, dot in LOOKS[program][family] for one in layers)
    return re.compile(rf"({names})\.({ENDS[program]})")


def left(program: str, family: str, keys: Iterable[str]) -> list[str]:
    """Keys that the program would not load."""
    return [key for key in keys if not pattern(program, family).fullmatch(key)]


# --- the files ---------------------------------------------------------------------------------

FEWER = {"num_layers": 2, "num_single_layers": 1, "n_layers": 1, "num_refiner_layers": 1,
         "n_refiner_layers": 1}
MORE = {"sd3": {"dual_attention_layers": (0,)},    # as 3.5 medium has them
        "sdxl": {"transformer_layers_per_block": (1, 2, 2)}}


@cache
def network(family: str, name: str) -> nn.Module:
    """The real class by the config that we ship, with few layers and without weights."""
    component = next(one for one in families.get(family).components if one.name == name)
    folder = paths.family_configs(family) / name
    config = json.loads((folder / "config.json").read_text("utf-8"))
    with torch.device("meta"):
        if component.transformers:
            return component.cls(component.cls.config_class(**config | {"num_hidden_layers": 2}))
        config |= {key: few for key, few in FEWER.items() if key in config}
        return component.cls.from_config(config | MORE.get(family, {}))


def trained(family: str, targets: str | list[str], name: str) -> dict[str, Layer]:
    """A layer of rank 1 for each that `targets`, and kernels wider than a pixel, train."""
    spec, model = families.get(family).spec, network(family, name)
    config = TrainConfig(target_modules=targets, conv_rank=1, lora_rank=1)
    if isinstance(targets, list):           # of a text encoder, where the presets mean nothing
        spec = replace(spec, lora_aliases={}, lora_presets={})
    found = {}
    for path in lora.choose(model, config, spec):
        weight = model.get_submodule(path).weight
        kernel = weight.shape[2:]
        found[f"{name}.{path}"] = {
            "lora_down.weight": torch.zeros(1, weight.shape[1], *kernel, dtype=torch.float16),
            "lora_up.weight": torch.zeros(weight.shape[0], 1, *[1] * len(kernel),
                                          dtype=torch.float16), "alpha": torch.tensor(1.0)}
    return found


@cache
def keys(family: str, format_: str) -> dict[str, torch.Tensor]:
    """A file of all layers that a run trains."""
    spec = families.get(family).spec
    parts = SPECS[family].naming
    layers = trained(family, "all-linear", parts[0].name)
    for part in parts[1:] if spec.text_targets else ():
        layers |= trained(family, list(spec.text_targets), part.name)
    return spell(Lora(layers, parts), format_)


# --- tests -------------------------------------------------------------------------------------

def told() -> dict[str, dict[str, str]]:
    """docs/interop.md's table: family -> program -> the formats it reads, or a dash."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")]
            for line in DOCS.read_text("utf-8").splitlines() if line.startswith("| `")]
    return {row[0]: dict(zip(PROGRAMS, row[1:4], strict=True)) for row in rows}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("family", families.SPECS)
def test_every_key_that_a_program_gets_is_one_it_takes(family: str, program: str) -> None:
    """A family that no table here knows is one that the docs say the program doesn't run."""
    said = told().get(family, {}).get(program, "?")
    if family not in LOOKS[program]:
        assert said == "–", f"{family} in {program}: add a table here, or a dash to {DOCS.name}"
        return
    reads = export.reads(program, family)
    assert said == ", ".join(reads)
    for format_ in reads:
        assert left(program, family, keys(family, format_)) == []


@pytest.mark.parametrize("family", families.SPECS)
def test_the_file_that_a_run_writes_is_read_as_it_is(family: str) -> None:
    written = families.get(family).spec.lora_format
    if family in COMFYUI:
        assert written in export.reads("comfyui", family)
    for format_ in SINGLE:
        assert len(keys(family, format_)) > 15


def test_the_tables_know_what_is_not_read() -> None:
    """PEFT's names of a UNet's attention, ComfyUI's own text encoders in Forge, other families."""
    lost = left("comfyui", "sdxl", keys("sdxl", "diffusers"))
    assert lost
    assert all("attn" in key for key in lost)
    assert left("forge", "sd15", keys("sd15", "comfyui"))
    assert left("a1111", "sdxl", keys("sdxl", "comfyui")) == list(keys("sdxl", "comfyui"))
    assert left("comfyui", "sd15", keys("sdxl", "kohya"))
    assert left("comfyui", "flux", keys("sd3", "kohya")) == list(keys("sd3", "kohya"))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", sorted(OTHER_KINDS))
def test_every_kind_of_layer_has_ends_that_are_taken(program: str, kind: str) -> None:
    path = "unet.mid_block.attentions.0.proj_in"
    for format_ in export.reads(program, "sd15"):
        if kind in HOLDS[format_]:
            found = spell(Lora({path: OTHER_KINDS[kind]()}, SPECS["sd15"].naming), format_)
            assert left(program, "sd15", found) == []


@pytest.mark.parametrize(("family", "format_", "program", "as_it_is"), [
    ("sd3", "diffusers", "comfyui", True), ("sdxl", "diffusers", "comfyui", False),
    ("sdxl", "kohya", "forge", True), ("flux", "comfyui", "comfyui", True),
    ("flux", "diffusers", "forge", False), ("sdxl", "diffusers", "diffusers", True)])
def test_only_what_a_program_does_not_read_is_converted(
        tmp_path: Path, family: str, format_: str, program: str, as_it_is: bool) -> None:
    save_file(keys(family, format_), tmp_path / "a.safetensors")
    assert export.fits(tmp_path / "a.safetensors", program) == as_it_is
