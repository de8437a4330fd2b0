"""What a file or folder is, told from its tensors' names and shapes; needs no torch.

The names are those of the original code of each model: CompVis' LDM and Stability's sgm (UNets),
Black Forest Labs' Flux, Stability's MMDiT, the single files that ComfyUI publishes; or diffusers'
own, which finetunes have.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core import paths, plugins
from core.errors import Fix, UserError
from core.families import unet
from core.families.lora_signs import detect_format
from core.families.registry import SPECS
from core.families.spec import Found, Shapes, side, starts
from core.safetensors_header import (
    PICKLES,
    Header,
    TensorInfo,
    is_pickle,
    opened,
    read_header,
)
from core.serialization import json_object
from core.weights.scaled_weights import scaling_of

Tensors = Mapping[str, TensorInfo]

PREFIXES = ("model.diffusion_model.net.", "model.diffusion_model.", "diffusion_model.",
            "transformer.", "net.", "unet.")
# Marks that merging programs leave in checkpoints that predict v; ztsnr: with zero terminal SNR.
V_MARKS, ZERO_SNR_MARKS = ("v_pred",), ("ztsnr",)
# Names of layers in files whose weights other programs have quantised, the layers renamed as well.
QUANTISED = (".scale_weight", ".weight_scale", ".absmax", ".weight.scb", ".weight.SCB", ".qweight",
             "scaled_fp8")



def identify(path: Path) -> Found:
    """Raises UserError where nothing is there, or the file is torn."""
    if not path.exists():
        raise UserError("families.missing", path=path, folder=path.parent)
    if path.is_dir():
        return _folder(path)
    return _file(path, paths.stamp(path))


def detect(source: Path) -> str:
    """The family of a base, told from what it is. Raises UserError, with what it is instead, where
    no LoRA can be trained on it, and where nothing is there."""
    found = identify(source)
    if found.plain and found.plain.family in SPECS:
        raise UserError("families.by_name", path=source, found=found.said(),
                        plain=found.plain.said(), family=found.plain.family,
                        fixes=[Fix("fixes.family_anyway", {"family": found.plain.family})])
    if found.family not in SPECS:
        raise UserError("families.not_a_base", path=source, found=found.said(),
                        known=", ".join(one.title for one in SPECS.values()))
    return found.family


def expect(path: Path, family: str) -> Found:
    """What `path` is, by its shapes where its name says otherwise: the user has named the family.
    Raises UserError where it is no base of it."""
    found = identify(path)
    if found.plain and found.plain.family == family:
        return found.plain
    if found.family != family:
        raise UserError("families.other_model", path=path, found=found.said(),
                        wanted=SPECS[family].title)
    return found


@dataclass(frozen=True, slots=True)
class Base:
    """A base model as far as a plan needs it."""

    source: Path
    family: str
    digest: str                                 # of its shapes, not of its weights

    @staticmethod
    def of(source: Path, family: str = "auto") -> Base:
        """Raises UserError where nothing is there, or it can't be read."""
        family = detect(source) if family == "auto" else family
        own = plugins.mark(family) if plugins.is_named(family) else ""
        return Base(source, family, _digest(source) + own)


def _digest(source: Path) -> str:
    """Of what decides a model's shapes: the configs of a folder, the header of a file."""
    digest = hashlib.sha256()
    if source.is_dir():
        for path in sorted(source.glob("*/*config.json")):
            digest.update(path.relative_to(source).as_posix().encode() + path.read_bytes())
        return digest.hexdigest()[:20]
    header = read_header(source)
    for name, tensor in sorted(header.tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
    digest.update(repr(sorted(header.metadata.items())).encode())   # of SD 2 it tells the size
    return digest.hexdigest()[:20]


# --- folders ---

# _class_name of model_index.json -> what it is, and its family.
PIPELINES = {name: (what, family) for one in SPECS.values() for table, family in (
    (one.pipelines, one.id), (one.relatives, "")) for name, what in table.items()}
OF_UNETS = ("", "StableDiffusionPipeline", "StableDiffusionXLPipeline")


def _folder(path: Path) -> Found:
    index = json_object(path / "model_index.json")
    name = str(index.get("_class_name", ""))
    unet = json_object(path / "unet" / "config.json")
    if unet and name in OF_UNETS:
        return _unet_folder(unet, path)
    if name in PIPELINES:
        return _named(*PIPELINES[name], path)
    if name:
        return Found("other_pipeline")
    if (path / "adapter_config.json").is_file():
        return Found("lora")
    if json_object(path / "config.json"):
        return Found("part_folder")
    missing = "model_index.json" if not (path / "unet").exists() else "unet/config.json"
    raise UserError("families.not_a_folder", path=path, missing=missing)


def _unet_folder(unet: Mapping[str, Any], path: Path) -> Found:
    if unet.get("in_channels") == 9:
        return Found("inpainting")
    if unet.get("in_channels") not in (4, None):
        return Found("editing")
    for one in SPECS.values():
        if one.unet is not None and one.unet(unet):
            return _named(one.unet_what, one.id, path)
    refiner = unet.get("addition_embed_type") == "text_time"
    return Found("sdxl_refiner" if refiner else "other_pipeline")


def _named(what: str, family: str, path: Path) -> Found:
    scheduler = json_object(path / "scheduler" / "scheduler_config.json")
    if family and (variant := SPECS[family].variant):
        what = variant(path)
    return Found(what, family, scheduler.get("prediction_type") == "v_prediction",
                 bool(scheduler.get("rescale_betas_zero_snr")))


# --- files ---

@functools.lru_cache(maxsize=1024)
def _file(path: Path, stamp: tuple[int, int, int]) -> Found:
    """Kept: every file beside a base is asked for, part by part, and a header of thousands of
    names takes 15 ms."""
    with opened(path) as file:
        head = file.read(64)
    if head[:4] == b"GGUF" or path.suffix.lower() == ".gguf":
        return Found("gguf")
    if head.lstrip()[:1] == b"<":
        return Found("web_page")
    if head.startswith(b"version https://git-lfs"):
        return Found("lfs_pointer")
    if path.suffix.lower() in PICKLES or is_pickle(head[:9]):
        raise UserError("families.pickle", path=path)
    try:
        header = read_header(path)
    except UserError as fault:
        raise UserError("families.unreadable", path=path, reason=str(fault)) from fault
    found = of_tensors(header.tensors)
    if found.family and _says_v(header.metadata):
        found = replace(found, v_prediction=True)
    if kind := _unread(path, header, found):
        return replace(found, family="", numbers=kind)
    return _by_name(path, header.metadata, found)


def _says_v(metadata: Mapping[str, str]) -> bool:
    """modelspec's own words for it, and ComfyUI's."""
    return (metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
            or metadata.get("modelspec.predict_key") == "v"
            or metadata.get("modelspec.architecture", "").endswith("-v"))


def _unread(path: Path, header: Header, found: Found) -> str:
    """The kind of numbers that the file's own part is in, where it isn't read: of a base the
    denoiser, whatever text encoders beside it are in."""
    unread = scaling_of(path, header).unread
    prefix = denoiser_prefix(header.tensors) if found.family else ""
    return next((kind for name, kind in unread.items() if name.startswith(prefix)), "")


NAMESAKES = {pair: what for one in SPECS.values() for pair, what in one.namesakes.items()}


def _by_name(path: Path, metadata: Mapping[str, str], found: Found) -> Found:
    told = " ".join([path.stem, *(metadata.get(f"modelspec.{key}", "") for key in (
        "architecture", "title"))]).lower()
    what = next((what for (plain, word), what in NAMESAKES.items() if plain == found.what
                 and re.search(rf"(?<![a-z]){word}(?![a-z])", told)), "")
    return Found(what, plain=found) if what else found


def of_tensors(tensors: Tensors) -> Found:
    """What tensors of these names and shapes make up; LoRAs first: they carry any model's names."""
    if any("lora" in k or k.endswith((".alpha", "hada_w1_a", ".lokr_w1", ".oft_blocks"))
           for k in tensors) and detect_format(tensors) not in ("checkpoint", "unknown", "vae"):
        return Found("lora")
    if "edm_mean" in tensors:
        return Found("playground")
    denoiser = denoiser_shapes(tensors)
    for rule in RULES:
        if found := rule(denoiser):
            if found.family and "edm_vpred.sigma_max" in tensors:
                return Found("cosxl")
            marked = bool(found.family) and any(mark in tensors for mark in V_MARKS)
            return replace(found, v_prediction=marked,
                           zero_snr=marked and any(mark in tensors for mark in ZERO_SNR_MARKS))
    shapes = {name: info.shape for name, info in tensors.items()}
    others = "quantised" if any(name.endswith(QUANTISED) for name in tensors) else "unknown"
    return next((Found(what) for what, fits in PARTS if fits(shapes)), Found(others))


def denoiser_prefix(names: Iterable[str]) -> str:
    return next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")


def denoiser_shapes(tensors: Tensors) -> Shapes:
    """The denoiser's tensors without the prefix that whole checkpoints put before them."""
    prefix = denoiser_prefix(tensors)
    return {name.removeprefix(prefix): info.shape for name, info in tensors.items()
            if name.startswith(prefix)}


def _other_unet(shapes: Shapes) -> Found | None:
    if not (channels := unet.channels(shapes)):
        return None
    return Found({4: "other_pipeline", 9: "inpainting"}.get(channels, "editing"))


def _others(shapes: Shapes) -> Found | None:
    if {"t_block.1.weight", "blocks.0.mlp.fc1.weight"} <= shapes.keys() or {
            "adaln_single.linear.weight", "caption_projection.linear_1.weight",
            "pos_embed.proj.weight"} <= shapes.keys():
        return Found("pixart")
    return next((Found(what) for name, what in OTHERS if name in shapes), None)


OTHERS = (
    ("llm_adapter.blocks.0.cross_attn.q_proj.weight", "anima"),
    ("blocks.0.mlp.layer1.weight", "cosmos"),
    ("llm_cond_proj.weight", "ideogram4"),
    ("adaln_single.emb.resolution_embedder.linear_1.weight", "pixart"),
    ("joint_transformer_blocks.0.attn.to_q.weight", "auraflow"),
    ("double_stream_blocks.0.block.adaLN_modulation.1.bias", "hidream"),
    ("double_layers.0.attn.w1q.weight", "auraflow"),
    ("early_stream_modulations.image.lin.weight", "flux3"),
    ("clip_txt_mapper.weight", "cascade"), ("head.modulation", "video"),
    ("patchify_proj.weight", "video"),
)
# The newest family first: some have the marks of an older one, too.
RULES: tuple[Callable[[Shapes], Found | None], ...] = (
    *(one.recognize for one in reversed(SPECS.values())), _other_unet, _others)


FILM = ("decoder.conv1", "decoder.conv_in")     # of a VAE of videos, whose kernels have five sides


T5_WORDS = ("shared.weight", "encoder.embed_tokens.weight")
MOST_T5_WORDS = 100_000                         # T5 has 32128, UMT5 256384, mT5 250112
DECODERS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


def _layer(shapes: Shapes, part: str) -> bool:
    """Whether the layers of a language model have such a part."""
    return any(f"{prefix}layers.0.{part}" in shapes for prefix in DECODERS)


# What isn't a denoiser, the most particular first.
PARTS: tuple[tuple[str, Callable[[Shapes], bool]], ...] = (
    ("controlnet", starts("control_model.", "controlnet_", "input_hint_block.")),
    ("umt5", lambda s: max(side(s, name, 0) for name in T5_WORDS) > MOST_T5_WORDS),
    ("t5", starts("encoder.block.0.layer.0.SelfAttention", "shared.weight")),
    ("clip_g", lambda s: _width(s) == 1280), ("clip_l", lambda s: _width(s) == 768),
    ("clip_h", lambda s: _width(s) == 1024),
    ("clip", starts("text_model.", "cond_stage_model.", "conditioner.", "transformer.resblocks.",
                     "transformer.text_model.")),
    ("vae_dc", starts("encoder.stages.", "decoder.stages.", "encoder.down_blocks.0.0.")),
    ("vae_film", lambda s: any(len(s.get(f"{x}.weight", ())) == 5 for x in FILM)),
    ("vae_32", lambda s: _latents(s) == 32 or "bn.running_mean" in s),
    ("vae_16", lambda s: _latents(s) == 16),
    ("vae", starts("first_stage_model.", "encoder.conv_in", "decoder.conv_in", "encoder.down",
                    "decoder.conv1", "taesd_")),
    ("qwen3_vl", lambda s: _layer(s, "self_attn.q_norm.weight")
     and starts("visual.", "model.visual.")(s)),
    ("qwen3", lambda s: _layer(s, "self_attn.q_norm.weight")
     and not _layer(s, "pre_feedforward_layernorm.weight")),    # which Gemma 3 has
    ("qwen25_vl", lambda s: _layer(s, "self_attn.q_proj.bias")),
    ("gemma_2", lambda s: _layer(s, "pre_feedforward_layernorm.weight")
     and not _layer(s, "self_attn.q_norm.weight")),
    ("language_model", starts("model.layers.", "model.embed_tokens", "language_model.",
                               "model.language_model.")),
    ("embedding", lambda s: len(s) <= 3 and bool({"emb_params", "clip_l", "clip_g"} & s.keys())),
    ("upscaler", starts("body.0.rdb1.", "model.1.sub.0.RDB1.", "RRDB_trunk.")),
)


def _width(shapes: Shapes) -> int:
    """Of a CLIP text encoder, whatever stands before its names."""
    return next((shape[-1] for name, shape in shapes.items()
                 if name.endswith("text_model.embeddings.token_embedding.weight") and shape), 0)


def _latents(shapes: Shapes) -> int:
    """Channels that a VAE decodes from."""
    return max(side(shapes, f"{prefix}decoder.conv_in.weight", 1)
               for prefix in ("", "first_stage_model.", "vae."))
