"""What a file or folder is, told from its tensors' names and shapes; needs no torch.

The names are those of the original code of each model: CompVis' LDM and Stability's sgm (UNets),
Black Forest Labs' Flux, Stability's MMDiT, the single files that ComfyUI publishes; or diffusers'
own, which finetunes have.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core import i18n, paths
from core.errors import Fault
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
Shapes = dict[str, tuple[int, ...]]

PREFIXES = ("model.diffusion_model.net.", "model.diffusion_model.", "diffusion_model.",
            "transformer.", "net.", "unet.")
# Marks that merging programs leave in checkpoints that predict v; ztsnr: with zero terminal SNR.
V_MARKS, ZERO_SNR_MARKS = ("v_pred",), ("ztsnr",)
# Names of layers in files whose weights other programs have quantised, the layers renamed as well.
QUANTISED = (".scale_weight", ".weight_scale", ".absmax", ".weight.scb", ".weight.SCB", ".qweight",
             "scaled_fp8")
# Of the same shapes as what they are made of: words of a file's name or of its metadata -> what it
# is; without a family: no LoRA is trained on it, unless the user names the family.
NAMED = {("flux_dev", "kontext"): "flux_kontext", ("qwen", "edit"): "qwen_edit"}


@dataclass(frozen=True, slots=True)
class Found:
    """`what` is a key of families.is_...; `family` is empty where no LoRA can be trained on it."""

    what: str
    family: str = ""
    v_prediction: bool = False             # marked in the file; configs of folders tell it, too
    zero_snr: bool = False
    numbers: str = ""                      # of its weights, where that kind isn't read
    plain: Found | None = None             # by the shapes alone, where names say otherwise

    def said(self, language: str | None = None) -> str:
        found = i18n.say(f"families.is_{self.what}", lang=language)
        if self.numbers:
            return i18n.say("families.in_numbers", {"found": found, "kind": self.numbers},
                            language)
        return found


def identify(path: Path) -> Found:
    """Raises Fault where nothing is there, or the file is torn."""
    if not path.exists():
        raise Fault("families.missing", path=path, folder=path.parent)
    if path.is_dir():
        return _folder(path)
    return _file(path, paths.stamp(path))


def expect(path: Path, family: str) -> Found:
    """What `path` is, by its shapes where its name says otherwise: the user has named the family.
    Raises Fault where it is no base of it."""
    found = identify(path)
    if found.plain and found.plain.family == family:
        return found.plain
    if found.family != family:
        from core.families.registry import MODULES
        raise Fault("families.other_model", path=path, found=found.said(),
                    wanted=MODULES[family].title)
    return found


# --- folders ---

# _class_name of model_index.json, without what stands for a use of the same weights.
PIPELINES = {
    "StableDiffusionXLPipeline": ("sdxl", "sdxl"), "StableDiffusion3Pipeline": ("sd3", "sd3"),
    "FluxPipeline": ("flux_dev", "flux"), "FluxFillPipeline": ("flux_fill", ""),
    "FluxControlPipeline": ("flux_control", ""), "FluxKontextPipeline": ("flux_kontext", ""),
    "Flux2Pipeline": ("flux2_dev", ""), "Flux2KleinPipeline": ("flux2_klein", "flux2"),
    "ChromaPipeline": ("chroma", "chroma"), "ZImagePipeline": ("zimage", "zimage"),
    "QwenImagePipeline": ("qwen", "qwen"), "QwenImageEditPipeline": ("qwen_edit", ""),
    "QwenImageEditPlusPipeline": ("qwen_edit", ""), "Lumina2Pipeline": ("lumina2", "lumina2"),
    "Lumina2Text2ImgPipeline": ("lumina2", "lumina2"), "SanaPipeline": ("sana", "sana"),
    "Krea2Pipeline": ("krea2", "krea2"),
    "StableDiffusionInpaintPipeline": ("inpainting", ""),
    "StableDiffusionXLInpaintPipeline": ("inpainting", ""),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl_refiner", ""),
}


def _folder(path: Path) -> Found:
    index = json_object(path / "model_index.json")
    name = str(index.get("_class_name", ""))
    unet = json_object(path / "unet" / "config.json")
    if unet and name in ("", "StableDiffusionPipeline", "StableDiffusionXLPipeline"):
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
    raise Fault("families.not_a_folder", path=path, missing=missing)


def _unet_folder(unet: Mapping[str, Any], path: Path) -> Found:
    if unet.get("in_channels") == 9:
        return Found("inpainting")
    if unet.get("in_channels") not in (4, None):
        return Found("editing")
    if unet.get("addition_embed_type") == "text_time":
        refiner = unet.get("projection_class_embeddings_input_dim") == 2560
        return Found("sdxl_refiner") if refiner else _named("sdxl", "sdxl", path)
    if not isinstance(unet.get("cross_attention_dim"), int):
        return Found("other_pipeline")
    # SD 2's transformers begin and end with linear layers; sizes don't tell, small bases have any.
    two = bool(unet.get("use_linear_projection"))
    return _named(*(("sd2", "sd2") if two else ("sd1", "sd15")), path)


def _named(what: str, family: str, path: Path) -> Found:
    scheduler = json_object(path / "scheduler" / "scheduler_config.json")
    if what == "flux_dev" and not json_object(path / "transformer" / "config.json").get(
            "guidance_embeds"):
        what = "flux_schnell"
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
        raise Fault("families.pickle", path=path)
    try:
        header = read_header(path)
    except Fault as fault:
        raise Fault("families.unreadable", path=path, reason=str(fault)) from fault
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


def _by_name(path: Path, metadata: Mapping[str, str], found: Found) -> Found:
    told = " ".join([path.stem, *(metadata.get(f"modelspec.{key}", "") for key in (
        "architecture", "title"))]).lower()
    what = next((what for (plain, word), what in NAMED.items() if plain == found.what
                 and re.search(rf"(?<![a-z]){word}(?![a-z])", told)), "")
    return Found(what, plain=found) if what else found


def of_tensors(tensors: Tensors) -> Found:
    """What tensors of these names and shapes make up; LoRAs first: they carry any model's names."""
    from core.lora_files.files import detect_format
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


def _side(shapes: Shapes, name: str, side: int) -> int:
    """The length of one side of a tensor; 0 where it isn't there."""
    shape = shapes.get(name, ())
    return shape[side] if -len(shape) <= side < len(shape) else 0


def _starts(*beginnings: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(name.startswith(beginnings) for name in shapes)


def _unet(shapes: Shapes) -> Found | None:
    own = "conv_in.weight" in shapes and _starts("down_blocks.")(shapes)     # diffusers' names
    if not own and "input_blocks.0.0.weight" not in shapes:
        return None
    channels = _side(shapes, "conv_in.weight" if own else "input_blocks.0.0.weight", 1)
    if channels != 4:
        return Found("inpainting" if channels == 9 else "editing")
    told = _side(shapes, "add_embedding.linear_1.weight" if own else "label_emb.0.0.weight", 1)
    places = ([f"down_blocks.{n}.attentions.0" for n in range(3)] if own
              else [f"input_blocks.{n}.1" for n in (1, 2, 4)])
    context = next(filter(None, (_side(
        shapes, f"{place}.transformer_blocks.0.attn2.to_k.weight", -1) for place in places)), 0)
    if told:
        if told == 5632 or _starts("encoder_hid_proj.")(shapes):
            return Found("kolors")
        return Found("sdxl_refiner") if context == 1280 else Found("sdxl", "sdxl")
    return {768: Found("sd1", "sd15"), 1024: Found("sd2", "sd2")}.get(
        context, Found("other_pipeline"))


def _sd3(shapes: Shapes) -> Found | None:
    own = {"pos_embed.proj.weight", "transformer_blocks.0.norm1_context.linear.weight"} <= (
        shapes.keys())
    return Found("sd3", "sd3") if own or _starts("joint_blocks.0.")(shapes) else None


def _flux(shapes: Shapes) -> Found | None:
    if _starts("distilled_guidance_layer.")(shapes):
        pixels = _starts("nerf_")(shapes)                              # no VAE, another model
        return Found("chroma_radiance") if pixels else Found("chroma", "chroma")
    guided = _starts("guidance_in.", "time_text_embed.guidance_embedder.",
                     "time_guidance_embed.guidance_embedder.")(shapes)
    if _starts("single_stream_modulation.")(shapes):
        return Found("flux2_dev") if guided else Found("flux2_klein", "flux2")
    if _starts(*(f"double_blocks.0.img_attn.norm.key_norm.{leaf}" for leaf in SCALES))(shapes):
        wide = _side(shapes, "img_in.weight", 1)
    elif {"single_transformer_blocks.0.proj_mlp.weight",
          "time_text_embed.text_embedder.linear_1.weight"} <= shapes.keys():
        wide = _side(shapes, "x_embedder.weight", 1)
    else:
        return None
    if wide in (0, 128, 384):
        return Found({0: "video", 128: "flux_control", 384: "flux_fill"}[wide])
    return Found("flux_dev" if guided else "flux_schnell", "flux")


SCALES = ("scale", "weight")               # of norms: by the original code, by newer files


def _lumina(shapes: Shapes) -> Found | None:
    if "layers.0.adaLN_modulation.0.weight" in shapes:
        return Found("zimage", "zimage")
    original = {"cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight"} <= shapes.keys()
    if original or "time_caption_embed.caption_embedder.0.weight" in shapes:
        return Found("lumina2", "lumina2")
    return None


def _qwen(shapes: Shapes) -> Found | None:
    if "txt_in.text_norm.weight" in shapes:
        return Found("qwen21")
    if "__index_timestep_zero__" in shapes:     # a mark in files of Edit's later versions
        return Found("qwen_edit")
    if "time_text_embed.addition_t_embedding.weight" in shapes:
        return Found("qwen_layered")
    fits = "txt_norm.weight" in shapes and "transformer_blocks.0.img_mod.1.weight" in shapes
    return Found("qwen", "qwen") if fits else None


def _others(shapes: Shapes) -> Found | None:
    if {"t_block.1.weight", "blocks.0.mlp.fc1.weight"} <= shapes.keys() or {
            "adaln_single.linear.weight", "caption_projection.linear_1.weight",
            "pos_embed.proj.weight"} <= shapes.keys():
        return Found("pixart")
    return next((Found(what, family) for name, what, family in OTHERS if name in shapes), None)


OTHERS = (
    ("blocks.0.mlp.inverted_conv.conv.weight", "sana", "sana"),
    ("transformer_blocks.0.ff.conv_inverted.weight", "sana", "sana"),
    ("txtfusion.projector.weight", "krea2", "krea2"),
    ("text_fusion.projector.weight", "krea2", "krea2"),
    ("llm_adapter.blocks.0.cross_attn.q_proj.weight", "anima", ""),
    ("blocks.0.mlp.layer1.weight", "cosmos", ""),
    ("llm_cond_proj.weight", "ideogram4", ""),
    ("adaln_single.emb.resolution_embedder.linear_1.weight", "pixart", ""),
    ("joint_transformer_blocks.0.attn.to_q.weight", "auraflow", ""),
    ("double_stream_blocks.0.block.adaLN_modulation.1.bias", "hidream", ""),
    ("double_layers.0.attn.w1q.weight", "auraflow", ""),
    ("early_stream_modulations.image.lin.weight", "flux3", ""),
    ("clip_txt_mapper.weight", "cascade", ""), ("head.modulation", "video", ""),
    ("patchify_proj.weight", "video", ""),
)
RULES: tuple[Callable[[Shapes], Found | None], ...] = (_unet, _sd3, _flux, _lumina, _qwen, _others)


FILM = ("decoder.conv1", "decoder.conv_in")     # of a VAE of videos, whose kernels have five sides


T5_WORDS = ("shared.weight", "encoder.embed_tokens.weight")
MOST_T5_WORDS = 100_000                         # T5 has 32128, UMT5 256384, mT5 250112
DECODERS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


def _layer(shapes: Shapes, part: str) -> bool:
    """Whether the layers of a language model have such a part."""
    return any(f"{prefix}layers.0.{part}" in shapes for prefix in DECODERS)


# What isn't a denoiser, the most particular first.
PARTS: tuple[tuple[str, Callable[[Shapes], bool]], ...] = (
    ("controlnet", _starts("control_model.", "controlnet_", "input_hint_block.")),
    ("umt5", lambda s: max(_side(s, name, 0) for name in T5_WORDS) > MOST_T5_WORDS),
    ("t5", _starts("encoder.block.0.layer.0.SelfAttention", "shared.weight")),
    ("clip_g", lambda s: _width(s) == 1280), ("clip_l", lambda s: _width(s) == 768),
    ("clip_h", lambda s: _width(s) == 1024),
    ("clip", _starts("text_model.", "cond_stage_model.", "conditioner.", "transformer.resblocks.",
                     "transformer.text_model.")),
    ("vae_dc", _starts("encoder.stages.", "decoder.stages.", "encoder.down_blocks.0.0.")),
    ("vae_film", lambda s: any(len(s.get(f"{x}.weight", ())) == 5 for x in FILM)),
    ("vae_32", lambda s: _latents(s) == 32 or "bn.running_mean" in s),
    ("vae_16", lambda s: _latents(s) == 16),
    ("vae", _starts("first_stage_model.", "encoder.conv_in", "decoder.conv_in", "encoder.down",
                    "decoder.conv1", "taesd_")),
    ("qwen3_vl", lambda s: _layer(s, "self_attn.q_norm.weight")
     and _starts("visual.", "model.visual.")(s)),
    ("qwen3", lambda s: _layer(s, "self_attn.q_norm.weight")
     and not _layer(s, "pre_feedforward_layernorm.weight")),    # which Gemma 3 has
    ("qwen25_vl", lambda s: _layer(s, "self_attn.q_proj.bias")),
    ("gemma_2", lambda s: _layer(s, "pre_feedforward_layernorm.weight")
     and not _layer(s, "self_attn.q_norm.weight")),
    ("language_model", _starts("model.layers.", "model.embed_tokens", "language_model.",
                               "model.language_model.")),
    ("embedding", lambda s: len(s) <= 3 and bool({"emb_params", "clip_l", "clip_g"} & s.keys())),
    ("upscaler", _starts("body.0.rdb1.", "model.1.sub.0.RDB1.", "RRDB_trunk.")),
)


def _width(shapes: Shapes) -> int:
    """Of a CLIP text encoder, whatever stands before its names."""
    return next((shape[-1] for name, shape in shapes.items()
                 if name.endswith("text_model.embeddings.token_embedding.weight") and shape), 0)


def _latents(shapes: Shapes) -> int:
    """Channels that a VAE decodes from."""
    return max(_side(shapes, f"{prefix}decoder.conv_in.weight", 1)
               for prefix in ("", "first_stage_model.", "vae."))
