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

from core import paths, plugins
from core.errors import Fix, UserError
from core.families import unet
from core.families.lora_signs import detect_format
from core.families.registry import SPECS
from core.families.spec import Found, Shapes, side, starts
from core.safetensors_header import PICKLES, TensorInfo, is_pickle, opened, read_header
from core.serialization import json_object
from core.weights.scaled_weights import scaling_of

Tensors = Mapping[str, TensorInfo]

# Before the names of a denoiser's tensors; the longest of those that begin alike comes first.
PREFIXES = ("model.diffusion_model.net.", "model.diffusion_model.", "diffusion_model.",
            "transformer.", "net.", "unet.")
# Marks that merging programs leave in checkpoints that predict v; ztsnr: with zero terminal SNR.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
# Names of layers in files whose weights other programs have quantised, the layers renamed as well.
QUANTISED = (".scale_weight", ".weight_scale", ".absmax", ".weight.scb", ".weight.SCB", ".qweight",
             "scaled_fp8")


def identify(path: Path) -> Found:
    """What a file or folder is. Raises UserError where nothing is there, where the file is torn,
    and where the folder holds no model."""
    if not path.exists():
        raise UserError("families.missing", path=path, folder=path.parent)
    return _identify_folder(path) if path.is_dir() else _identify_file(path, paths.stamp(path))


def detect(source: Path) -> str:
    """The id of a base's family. Raises UserError where no LoRA can be trained on it, which says
    what it is instead, and where nothing is there."""
    found = identify(source)
    if found.by_shapes and found.by_shapes.family in SPECS:
        raise UserError("families.by_name", path=source, found=found.description(),
                        plain=found.by_shapes.description(), family=found.by_shapes.family,
                        fixes=[Fix("fixes.family_anyway", {"family": found.by_shapes.family})])
    if found.family not in SPECS:
        raise UserError("families.not_a_base", path=source, found=found.description(),
                        known=", ".join(spec.title for spec in SPECS.values()))
    return found.family


def expect(path: Path, family: str) -> Found:
    """What a base is, once the user has named its family: its shapes count, whatever its name says.
    Raises UserError where it is no base of that family."""
    found = identify(path)
    if found.by_shapes and found.by_shapes.family == family:
        return found.by_shapes
    if found.family != family:
        raise UserError("families.other_model", path=path, found=found.description(),
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
        plugin = plugins.mark(family) if plugins.is_named(family) else ""
        digest = hashlib.sha256()
        # Configs decide the shapes of a folder's models, the header those of a file's.
        if source.is_dir():
            for path in sorted(source.glob("*/*config.json")):
                digest.update(path.relative_to(source).as_posix().encode() + path.read_bytes())
        else:
            header = read_header(source)
            for name, tensor in sorted(header.tensors.items()):
                digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
            # The metadata of SD 2 tells the native size.
            digest.update(repr(sorted(header.metadata.items())).encode())
        return Base(source, family, digest.hexdigest()[:20] + plugin)


# --- folders ---

# _class_name of model_index.json -> what it is, and its family.
PIPELINES = {name: (what, family) for spec in SPECS.values() for table, family in (
    (spec.pipelines, spec.id), (spec.relatives, "")) for name, what in table.items()}
UNET_PIPELINES = ("", "StableDiffusionPipeline", "StableDiffusionXLPipeline")


def _identify_folder(path: Path) -> Found:
    name = str(json_object(path / "model_index.json").get("_class_name", ""))
    config = json_object(path / "unet" / "config.json")
    # SD 1, SD 2 and XL share their pipelines with other models: the UNet's config tells them apart.
    if config and name in UNET_PIPELINES:
        if (channels := config.get("in_channels")) not in (4, None):
            return Found("inpainting" if channels == 9 else "editing")
        for spec in SPECS.values():
            if spec.unet is not None and spec.unet(config):
                return _with_scheduler(spec.unet_what, spec.id, path)
        is_refiner = config.get("addition_embed_type") == "text_time"
        return Found("sdxl_refiner" if is_refiner else "other_pipeline")
    if name in PIPELINES:
        return _with_scheduler(*PIPELINES[name], path)
    if name:
        return Found("other_pipeline")
    if (path / "adapter_config.json").is_file():
        return Found("lora")
    if json_object(path / "config.json"):
        return Found("part_folder")
    missing = "model_index.json" if not (path / "unet").exists() else "unet/config.json"
    raise UserError("families.not_a_folder", path=path, missing=missing)


def _with_scheduler(what: str, family: str, path: Path) -> Found:
    scheduler = json_object(path / "scheduler" / "scheduler_config.json")
    if family and (variant := SPECS[family].variant):
        what = variant(path)
    return Found(what, family, scheduler.get("prediction_type") == "v_prediction",
                 bool(scheduler.get("rescale_betas_zero_snr")))


# --- files ---

# (what it is by its shapes, a word in its name) -> what it is.
NAMESAKES = {pair: what for spec in SPECS.values() for pair, what in spec.namesakes.items()}


# Every file beside a base is asked for, component by component, and a header of thousands of names
# takes 15 ms. `stamp` makes the answer forgotten when the file changes.
@functools.lru_cache(maxsize=1024)
def _identify_file(path: Path, stamp: tuple[int, int, int]) -> Found:
    with opened(path) as file:
        head = file.read(64)
    for what, is_so in (("gguf", head[:4] == b"GGUF" or path.suffix.lower() == ".gguf"),
                        ("web_page", head.lstrip()[:1] == b"<"),
                        ("lfs_pointer", head.startswith(b"version https://git-lfs"))):
        if is_so:
            return Found(what)
    if path.suffix.lower() in PICKLES or is_pickle(head[:9]):
        raise UserError("families.pickle", path=path)
    try:
        header = read_header(path)
    except UserError as error:
        raise UserError("families.unreadable", path=path, reason=str(error)) from error
    found, metadata = of_tensors(header.tensors), header.metadata
    # modelspec's own words for a base that predicts v, and ComfyUI's.
    predicts_v = (metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
                  or metadata.get("modelspec.predict_key") == "v"
                  or metadata.get("modelspec.architecture", "").endswith("-v"))
    if found.family and predicts_v:
        found = replace(found, v_prediction=True)
    # Of a base only the denoiser counts, whatever formats the text encoders beside it are in.
    prefix = denoiser_prefix(header.tensors) if found.family else ""
    for name, unread_format in scaling_of(path, header).unread.items():
        if name.startswith(prefix):
            return replace(found, family="", unread_format=unread_format)
    names = " ".join([path.stem, metadata.get("modelspec.architecture", ""),
                      metadata.get("modelspec.title", "")]).lower()
    for (what, word), namesake in NAMESAKES.items():
        if what == found.what and re.search(rf"(?<![a-z]){word}(?![a-z])", names):
            return Found(namesake, by_shapes=found)
    return found


def of_tensors(tensors: Tensors) -> Found:
    """What tensors of these names and shapes make up."""
    # LoRAs come first: they carry any model's names.
    if any("lora" in k or k.endswith((".alpha", "hada_w1_a", ".lokr_w1", ".oft_blocks"))
           for k in tensors) and detect_format(tensors) not in ("checkpoint", "unknown", "vae"):
        return Found("lora")
    if "edm_mean" in tensors:
        return Found("playground")
    prefix = denoiser_prefix(tensors)
    denoiser = {name.removeprefix(prefix): info.shape for name, info in tensors.items()
                if name.startswith(prefix)}
    for rule in RULES:
        if found := rule(denoiser):
            if found.family and "edm_vpred.sigma_max" in tensors:
                return Found("cosxl")
            marked = bool(found.family) and V_MARK in tensors
            return replace(found, v_prediction=marked, zero_snr=marked and ZERO_SNR_MARK in tensors)
    shapes = {name: info.shape for name, info in tensors.items()}
    others = "quantised" if any(name.endswith(QUANTISED) for name in tensors) else "unknown"
    return next((Found(what) for what, fits in PARTS if fits(shapes)), Found(others))


def denoiser_prefix(names: Iterable[str]) -> str:
    """What stands before the denoiser's names in a whole checkpoint; empty where nothing does."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")


def other_unet(shapes: Shapes) -> Found | None:
    """A UNet that no family knows."""
    if not (channels := unet.channels(shapes)):
        return None
    return Found({4: "other_pipeline", 9: "inpainting"}.get(channels, "editing"))


def other_transformer(shapes: Shapes) -> Found | None:
    """A transformer that isn't trained here, by the names of OTHERS and PixArt's combinations."""
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
    *(spec.recognize for spec in reversed(SPECS.values())), other_unet, other_transformer)


# Convolutions of a VAE of videos, whose kernels have five sides.
FILM = ("decoder.conv1", "decoder.conv_in")
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
    ("clip_g", lambda s: _clip_width(s) == 1280), ("clip_l", lambda s: _clip_width(s) == 768),
    ("clip_h", lambda s: _clip_width(s) == 1024),
    ("clip", starts("text_model.", "cond_stage_model.", "conditioner.", "transformer.resblocks.",
                     "transformer.text_model.")),
    ("vae_dc", starts("encoder.stages.", "decoder.stages.", "encoder.down_blocks.0.0.")),
    ("vae_film", lambda s: any(len(s.get(f"{x}.weight", ())) == 5 for x in FILM)),
    ("vae_32", lambda s: _latent_channels(s) == 32 or "bn.running_mean" in s),
    ("vae_16", lambda s: _latent_channels(s) == 16),
    ("vae", starts("first_stage_model.", "encoder.conv_in", "decoder.conv_in", "encoder.down",
                    "decoder.conv1", "taesd_")),
    ("qwen3_vl", lambda s: _layer(s, "self_attn.q_norm.weight")
     and starts("visual.", "model.visual.")(s)),
    # Gemma 3 has Qwen3's norms, and one more.
    ("qwen3", lambda s: _layer(s, "self_attn.q_norm.weight")
     and not _layer(s, "pre_feedforward_layernorm.weight")),
    ("qwen25_vl", lambda s: _layer(s, "self_attn.q_proj.bias")),
    ("gemma_2", lambda s: _layer(s, "pre_feedforward_layernorm.weight")
     and not _layer(s, "self_attn.q_norm.weight")),
    ("language_model", starts("model.layers.", "model.embed_tokens", "language_model.",
                               "model.language_model.")),
    ("embedding", lambda s: len(s) <= 3 and bool({"emb_params", "clip_l", "clip_g"} & s.keys())),
    ("upscaler", starts("body.0.rdb1.", "model.1.sub.0.RDB1.", "RRDB_trunk.")),
)


def _clip_width(shapes: Shapes) -> int:
    """The width of a CLIP text encoder, whatever stands before its names; 0: it is none."""
    return next((shape[-1] for name, shape in shapes.items()
                 if name.endswith("text_model.embeddings.token_embedding.weight") and shape), 0)


def _latent_channels(shapes: Shapes) -> int:
    """How many channels a VAE decodes from; 0: it is none."""
    return max(side(shapes, f"{prefix}decoder.conv_in.weight", 1)
               for prefix in ("", "first_stage_model.", "vae."))
