"""Stable Diffusion 1.x (Rombach et al. 2022, arXiv 2112.10752): UNet, CLIP ViT-L/14, VAE f8.

The demo base is of this family as well: the same classes, only smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core import paths, samplers
from core.families.base import ALL_PARTS, Cond, FamilySpec, Objective, Part, Parts, Precision
from core.faults import Fault
from core.reading import from_json
from core.safetensors_header import PICKLES, is_pickle

CONFIGS = paths.FAMILY_CONFIGS / "sd15"
TOKENIZER = paths.DEMO / "base" / "tokenizer"       # CLIP's own, shipped once
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"


class StableDiffusion1:
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="sd15", title="Stable Diffusion 1.x",
        native_size=512, bucket_step=64,
        lora_presets={"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                      "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out")},
        lora_aliases={"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v",
                      "out_proj": "to_out.0", "o_proj": "to_out.0", "to_out": "to_out.0",
                      "fc1": "ff.net.0.proj", "fc2": "ff.net.2"},
        kohya_prefix="lora_unet", base_version="sd_v1", architecture="stable-diffusion-v1",
        implementation="diffusers",
        text_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"))

    def load(self, source: Path, precision: Precision,
             only: frozenset[Part] = ALL_PARTS) -> Parts:
        return (_load_folder if source.is_dir() else _load_file)(source, precision, only)

    def skeleton(self, source: Path, precision: Precision,
                 only: frozenset[Part] = ALL_PARTS) -> Parts:
        configs, tokenizer = source, source / "tokenizer"
        if not source.is_dir():
            _check_file(source)
            configs, tokenizer = CONFIGS, TOKENIZER
        with _readable(source):
            parts = _empty_parts(source, configs)
            with torch.device("meta"):
                if "denoiser" in only:
                    parts.denoiser = UNet2DConditionModel.from_config(
                        _config(configs, "unet")).to(dtype=precision.weights)
                if "vae" in only:
                    parts.vae = AutoencoderKL.from_config(
                        _config(configs, "vae")).to(dtype=precision.vae)
                if "text" in only:
                    encoder = CLIPTextModel(CLIPTextConfig(**_config(configs, "text_encoder")))
                    parts.text = {"text_encoder": encoder.to(dtype=precision.weights)}
            if "text" in only:
                parts.text["tokenizer"] = CLIPTokenizer.from_pretrained(tokenizer)
        return _ready(parts, precision)

    def weight_files(self, source: Path, part: Part) -> list[tuple[Path, str]]:
        folder, prefix = {"denoiser": ("unet", "model.diffusion_model."),
                          "vae": ("vae", "first_stage_model."),
                          "text": ("text_encoder", "cond_stage_model.")}[part]
        if not source.is_dir():
            return [(source, prefix)]
        return [(p, "") for p in sorted((source / folder).iterdir())
                if p.suffix in (".safetensors", ".json")]

    def encode_text(self, parts: Parts, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            return self.encode_tokens(parts, self.tokenize(parts, prompts))

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = parts.text["tokenizer"]
        return {"text_encoder": tokenizer(
            list(prompts), padding="max_length", truncation=True,
            max_length=tokenizer.model_max_length, return_tensors="pt").input_ids}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        encoder = parts.text["text_encoder"]
        return {"text": encoder(
            tokens["text_encoder"].to(encoder.device)).last_hidden_state}

    def count_tokens(self, parts: Parts, prompts: Sequence[str]) -> list[int]:
        ids = parts.text["tokenizer"](list(prompts), add_special_tokens=False).input_ids
        return [len(i) for i in ids]

    def token_limit(self, parts: Parts) -> int:
        return int(parts.text["tokenizer"].model_max_length) - 2

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            vae = parts.vae
            latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
            return latents * float(vae.config.scaling_factor)

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        predicted: Tensor = denoiser(noisy, t, cond["text"], return_dict=False)[0]
        return predicted

    def pipeline(self, parts: Parts) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline(
            vae=parts.vae, unet=parts.denoiser, text_encoder=parts.text.get("text_encoder"),
            tokenizer=parts.text.get("tokenizer"), scheduler=samplers.create("auto", parts),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return {"prompt_embeds": cond["text"], "negative_prompt_embeds": negative["text"]}


def _load_folder(source: Path, precision: Precision, only: frozenset[Part]) -> Parts:
    options = {"local_files_only": True, "use_safetensors": True}
    with _readable(source):
        parts = _empty_parts(source, source)
        if "denoiser" in only:
            parts.denoiser = UNet2DConditionModel.from_pretrained(
                source, subfolder="unet", torch_dtype=precision.weights, **options)
        if "vae" in only:
            parts.vae = AutoencoderKL.from_pretrained(
                source, subfolder="vae", torch_dtype=precision.vae, **options)
        if "text" in only:
            parts.text = {
                "tokenizer": CLIPTokenizer.from_pretrained(source / "tokenizer"),
                "text_encoder": CLIPTextModel.from_pretrained(
                    source / "text_encoder", dtype=precision.weights, **options)}
    return _ready(parts, precision)


def _load_file(source: Path, precision: Precision, only: frozenset[Part]) -> Parts:
    """A single file in the LDM layout; configs and tokenizer come with the app, no hub needed."""
    _check_file(source)
    options = {"config": str(CONFIGS), "local_files_only": True}
    parts = _empty_parts(source, CONFIGS)
    with _readable(source):
        if "denoiser" in only:
            parts.denoiser = UNet2DConditionModel.from_single_file(
                _tensors(source, "model.diffusion_model."), subfolder="unet",
                torch_dtype=precision.weights, **options)
        if "vae" in only:
            parts.vae = AutoencoderKL.from_single_file(
                _tensors(source, "first_stage_model."), subfolder="vae",
                torch_dtype=precision.vae, **options)
        if "text" in only:
            encoder = create_diffusers_clip_model_from_ldm(
                CLIPTextModel, _tensors(source, "cond_stage_model."), subfolder="text_encoder",
                torch_dtype=precision.weights, **options)
            parts.text = {"tokenizer": CLIPTokenizer.from_pretrained(TOKENIZER),
                          "text_encoder": encoder}
    return _ready(parts, precision)


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """The libraries fail in any way on configs and weights that make no sense."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (Fault, MemoryError, torch.OutOfMemoryError)):
            raise
        pickles = [p for p in source.glob("*/*") if p.suffix in PICKLES] if source.is_dir() else []
        if pickles and "safetensors" in str(error):             # it looked for them in vain
            raise Fault("families.pickle", path=pickles[0]) from None
        raise Fault("families.unreadable", path=source, reason=_first_line(error)) from error


def _check_file(source: Path) -> None:
    keys = _keys_of(source)
    if UNET_KEY not in keys:
        raise Fault("families.not_sd15", path=source, found=_guess(keys))


def _keys_of(source: Path) -> set[str]:
    if not source.exists():
        raise Fault("families.missing", path=source, folder=source.parent)
    with open(source, "rb") as file:
        pickled = is_pickle(file.read(9))
    if pickled or source.suffix.lower() in PICKLES:
        raise Fault("families.pickle", path=source)
    try:
        with safe_open(source, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise Fault("families.unreadable", path=source, reason=_first_line(error)) from error


def _tensors(source: Path, prefix: str) -> dict[str, Tensor]:
    """One part of the file, memory-mapped; an unpruned file's EMA copy is never touched."""
    with safe_open(source, "pt") as file:
        found = {k: file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    if not found:
        raise Fault("families.part_missing", path=source, part=prefix.rstrip("."))
    return found


def _config(configs: Path, part: str) -> dict[str, Any]:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    try:
        found: dict[str, Any] = from_json((configs / part / name).read_text("utf-8"))
    except FileNotFoundError:
        raise Fault("families.not_a_folder", path=configs, missing=f"{part}/{name}") from None
    except (OSError, ValueError) as error:
        raise Fault("families.unreadable", path=configs / part / name,
                    reason=_first_line(error)) from error
    return found


def _empty_parts(source: Path, configs: Path) -> Parts:
    scheduler, unet, vae = (_config(configs, part) for part in ("scheduler", "unet", "vae"))
    if unet.get("in_channels") != 4 or not isinstance(unet.get("cross_attention_dim"), int):
        raise Fault("families.not_sd15", path=source,
                    found="inpainting" if unet.get("in_channels") == 9 else "another model")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    objective: Objective = scheduler.get("prediction_type", "epsilon")
    levels = len(unet["block_out_channels"])
    if not isinstance(unet["sample_size"], int) or not 1 <= unet["sample_size"] <= 1024:
        raise ValueError(f"sample_size: {unet['sample_size']}")
    return Parts(source, scheduler, objective, native_size=unet["sample_size"] * factor,
                 bucket_step=factor * 2 ** (levels - 1))


def _ready(parts: Parts, precision: Precision) -> Parts:
    for module in (parts.denoiser, parts.vae, parts.text.get("text_encoder")):
        if module is not None:
            module.requires_grad_(False).eval().to(precision.device)
    for module in (parts.denoiser, parts.vae):      # 1.1x to 1.4x faster convolutions
        if module is not None:
            module.to(memory_format=torch.channels_last)
    return parts


def _guess(keys: set[str]) -> str:
    """What a file is that isn't an SD 1.x checkpoint, from its tensors' names."""
    if any("lora_" in k or "hada_" in k or "lokr_" in k for k in keys):
        return "a LoRA"
    if any(k.startswith("conditioner.embedders") for k in keys):
        return "an SDXL checkpoint"
    if any("double_blocks" in k for k in keys):
        return "a Flux checkpoint"
    if any(k.startswith(("encoder.", "first_stage_model.")) for k in keys):
        return "a VAE"
    return "another kind of model"


def _first_line(error: Exception) -> str:
    if "meta tensor" in str(error):         # what a missing weight looks like to torch
        return "some of its weights are missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
