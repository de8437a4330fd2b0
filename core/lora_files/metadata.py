"""The metadata of LoRA files: ss_* (kohya), sshs_* (hashes), modelspec.*, darkroom.*.

All values are strings. Keys that would say something untrue of this trainer are left out.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from core import __version__
from core.config import TrainConfig
from core.families.registry import SPECS
from core.hashes import legacy_hash
from core.serialization import from_json, from_yaml, json_of, to_yaml

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_KEY = "darkroom.config"
VERSION_KEY = "darkroom.version"
BASE_KEY = "darkroom.base_fingerprint"      # of its denoiser: core/dataset/cache.py
BASE_LORAS_KEY = "darkroom.base_loras"     # what belonged to the base: adapters/base_loras.py
TOOL = "lora-darkroom"
MODELSPEC = "1.0.1"

# Keys of the config that kohya calls the same.
SAME = ("learning_rate", "text_encoder_lr", "lr_warmup_steps", "max_grad_norm", "loss_type",
        "gradient_accumulation_steps", "gradient_checkpointing", "seed", "zero_terminal_snr",
        "debiased_estimation", "validation_split", "bucket_no_upscale", "keep_tokens")
# kohya's names of bases with v-prediction.
V_VERSIONS = {"sd_v1": "sd_v1_v", "sd_v2": "sd_v2_v"}
# modelspec's words; it has none for flows.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
# kohya's other schedules warm up by themselves.
SCHEDULES_WITH_WARMUP = {"constant": "constant_with_warmup"}

# LyCORIS' names of the kinds that plain LoRA readers don't know.
ALGORITHMS = {"dora": {"algo": "locon", "dora_wd": "True", "wd_on_output": "False"},
              "loha": {"algo": "loha"}, "lokr": {"algo": "lokr"}, "oft": {"algo": "diag-oft"}}

# Things that kohya's trainer can do and this one never does, in kohya's spelling.
NEVER: dict[str, Any] = {
    "ss_full_fp16": False, "ss_lowram": False, "ss_fp8_base": False, "ss_fp8_base_unet": False,
    "ss_adaptive_noise_scale": None, "ss_ip_noise_gamma": None, "ss_scale_weight_norms": None,
    "ss_noise_offset_random_strength": False, "ss_ip_noise_gamma_random_strength": False,
    "ss_caption_dropout_every_n_epochs": 0, "ss_caption_tag_dropout_rate": 0.0,
    "ss_face_crop_aug_range": None, "ss_color_aug": False, "ss_random_crop": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    repeats: int
    pictures: int
    tags: Mapping[str, int]                # tag -> captions that hold it


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainFacts:
    """All that a run knows about itself when it saves."""

    config: TrainConfig
    config_text: str = ""                  # YAML; empty: `config` as YAML
    description: str = ""
    thumbnail: bytes = b""                 # small JPEG, WebP or PNG

    # the base
    base_version: str                      # these three come from the family's spec
    architecture: str
    implementation: str
    prediction_type: str                   # epsilon | v_prediction | flow, never auto
    base_name: str                         # file or folder name, no path
    base_sha256: str = ""                  # empty for a folder
    base_short_hash: str = ""

    # the pictures
    folders: Mapping[str, Folder]          # folder name, no path
    regular: Mapping[str, Folder] = field(default_factory=dict)     # regularisation pictures
    buckets: Mapping[tuple[int, int], int]      # width, height in px -> pictures, repeats counted
    aspect_error: float = 0.0              # mean |picture's aspect - bucket's|
    resolution: tuple[int, int]            # px
    validation_pictures: int = 0

    # the run
    session_id: str                        # same for all files of a run
    started_at: float                      # Unix time, s
    finished_at: float
    batches_per_epoch: int
    planned_epochs: int
    planned_steps: int
    epoch: int
    step: int
    optimizer: str                         # class and arguments
    mixed_precision: str = "no"            # no | fp16 | bf16
    clip_skip: int | None = None
    max_token_length: int | None = None    # None: 75
    extra: Mapping[str, str] = field(default_factory=dict)      # a family's own keys


def build_metadata(facts: TrainFacts) -> dict[str, str]:
    """All metadata of a trained file but the hashes, which `hashes` takes from the tensors."""
    version = facts.base_version
    if facts.prediction_type == "v_prediction":
        version = V_VERSIONS.get(version, version)
    base = {"ss_sd_model_name": facts.base_name, "ss_base_model_version": version,
            "ss_v2": version.startswith("sd_v2")}
    if facts.base_short_hash:
        base["ss_sd_model_hash"] = facts.base_short_hash
    if facts.base_sha256:
        base["ss_new_sd_model_hash"] = facts.base_sha256
    ours = {VERSION_KEY: __version__, CONFIG_KEY: facts.config_text or shared_yaml(facts.config)}
    # a family's own keys come last: they may correct the others
    values = (NEVER | _run(facts) | _network(facts) | _data(facts) | base | _modelspec(facts)
              | ours | dict(facts.extra))
    return {key: _clean(str(value)) for key, value in values.items()}


# Keys of a config whose values are words, whatever they begin with: `/imagine a cat`.
_TEXTS = ("sample_prompts", "trigger_word", "pivotal_init")


def shared_yaml(config: TrainConfig) -> str:
    """The config as YAML for a file that strangers see: of whole paths the last name alone, unless
    `metadata: full`."""
    values = config.model_dump(exclude_defaults=True)
    return to_yaml(values if config.metadata == "full" else {
        key: value if key in _TEXTS else _without_folders(value) for key, value in values.items()})


def shared(metadata: Mapping[str, str]) -> dict[str, str]:
    """Any trainer's metadata for a file that strangers see: of whole paths the last name alone, and
    no thumbnail, which may be a training picture."""
    found = {key: text for key, text in metadata.items() if key != "modelspec.thumbnail"}
    for key, text in found.items():
        read, write = (from_yaml, to_yaml) if key == CONFIG_KEY else (
            (from_json, json.dumps) if text.startswith(("{", "[")) else (str, str))
        # a value that can't be read stays; so does what people write to people
        with contextlib.suppress(ValueError):
            value = read(text)
            told = _without_folders(value)
            if told != value and not key.startswith(("modelspec.", "ss_training_comment")):
                found[key] = write(told)
    return found


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for key, item in value.items():
            # folders are also the names of what is known of them; two may end alike
            name = short = _without_folders(key) if isinstance(item, dict) else key
            for number in itertools.count(2):
                if name not in found:
                    break
                name = f"{short} ({number})"
            found[name] = _without_folders(item)
        return found
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    # C:\x\a.safetensors:0.8, \\server\x, ~/x, /x/own.py:Class, ../x
    whole = isinstance(value, str) and re.match(r"[A-Za-z]:[\\/]|\\\\|[~/]|\.\.[\\/]", value)
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1] if whole else value


def _run(facts: TrainFacts) -> dict[str, Any]:
    config, levels = facts.config, facts.config.multires_noise_iterations
    schedule: str = config.lr_scheduler
    if config.lr_warmup_steps:
        schedule = SCHEDULES_WITH_WARMUP.get(schedule, schedule)
    return {f"ss_{key}": getattr(config, key) for key in SAME} | {
        "ss_session_id": facts.session_id, "ss_unet_lr": config.learning_rate,
        "ss_training_started_at": facts.started_at, "ss_training_finished_at": facts.finished_at,
        "ss_output_name": config.name, "ss_training_comment": facts.description or None,
        "ss_lr_scheduler": schedule, "ss_optimizer": facts.optimizer,
        "ss_num_epochs": facts.planned_epochs, "ss_max_train_steps": facts.planned_steps,
        "ss_epoch": facts.epoch, "ss_steps": facts.step,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": config.batch_size * config.gradient_accumulation_steps,
        "ss_mixed_precision": facts.mixed_precision,
        "ss_min_snr_gamma": config.min_snr_gamma or None,
        "ss_noise_offset": config.noise_offset or None,
        "ss_multires_noise_iterations": levels or None,
        "ss_multires_noise_discount": config.multires_noise_discount if levels else None,
        **({} if config.loss_type == "l2" else {
            "ss_huber_schedule": config.huber_schedule, "ss_huber_c": config.huber_c}),
        **({"ss_prior_loss_weight": config.prior_loss_weight} if facts.regular else {}),
        "ss_validate_every_n_steps": config.validation_steps or None,
    }


def _network(facts: TrainFacts) -> dict[str, Any]:
    """Rank and alpha as readers of the file need them: alpha / dim is the scale."""
    config = facts.config
    # PiSSA is written with its start beside it, at twice the rank; rslora's scale is alpha / root
    times = 2 if config.adapter == "pissa" else 1
    root = config.lora_rank ** 0.5 if config.adapter == "rslora" else 1.0
    algo = ALGORITHMS.get(config.adapter, {})
    conv = {"conv_dim": str(config.conv_rank),
            "conv_alpha": str(config.conv_alpha or config.conv_rank)} if config.conv_rank else {}
    return {
        # readers choose by it, whoever wrote the file
        "ss_network_module": "lycoris.kohya" if algo else "networks.lora",
        "ss_network_dim": config.lora_rank * times,
        "ss_network_alpha": float(config.alpha * times * root),
        "ss_network_dropout": config.lora_dropout or None,
        "ss_network_args": json.dumps({"target_modules": config.target_modules} | conv | algo),
    }


def _data(facts: TrainFacts) -> dict[str, Any]:
    config, folders = facts.config, facts.folders
    buckets = {str(n): {"resolution": size, "count": count}
               for n, (size, count) in enumerate(facts.buckets.items())}
    sides = [side for size in facts.buckets for side in size]
    return {
        # with their repeats, as kohya counts
        "ss_num_train_images": sum(f.repeats * f.pictures for f in folders.values()),
        "ss_num_reg_images": sum(f.pictures for f in facts.regular.values()),
        "ss_reg_dataset_dirs": _dirs(facts.regular),
        "ss_num_validation_images": facts.validation_pictures,
        "ss_resolution": facts.resolution,             # "(512, 512)"
        "ss_min_bucket_reso": min(sides), "ss_max_bucket_reso": max(sides),
        "ss_bucket_info": json.dumps({"buckets": buckets, "mean_img_ar_error": facts.aspect_error}),
        "ss_dataset_dirs": _dirs(folders),
        "ss_tag_frequency": json.dumps({name: dict(f.tags) for name, f in folders.items()}),
        "ss_enable_bucket": True, "ss_cache_latents": True, "ss_flip_aug": config.flip,
        "ss_shuffle_caption": config.shuffle_tags,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_clip_skip": facts.clip_skip, "ss_max_token_length": facts.max_token_length,
    }


def _dirs(folders: Mapping[str, Folder]) -> str:
    return json.dumps({name: {"n_repeats": f.repeats, "img_count": f.pictures}
                       for name, f in folders.items()})


def _modelspec(facts: TrainFacts) -> dict[str, Any]:
    config = facts.config
    finished = datetime.fromtimestamp(int(facts.finished_at), UTC)
    thumbnail = ""
    if facts.thumbnail:
        # KeyError: no picture that browsers show
        kind = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}[facts.thumbnail[:2]]
        thumbnail = f"data:image/{kind};base64,{base64.b64encode(facts.thumbnail).decode('ascii')}"
    values = {
        "sai_model_spec": MODELSPEC, "architecture": f"{facts.architecture}/lora",
        "implementation": facts.implementation, "title": config.name,
        "resolution": "{}x{}".format(*facts.resolution), "description": facts.description,
        "date": finished.isoformat(), "implementation_version": f"{TOOL}/{__version__}",
        "trigger_phrase": config.trigger_word,
        "prediction_type": PREDICTIONS.get(facts.prediction_type, ""),
        "encoder_layer": str(facts.clip_skip or ""), "thumbnail": thumbnail,
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value}


def _clean(text: str) -> str:
    """Replaces lone surrogates, which no file can hold: Python spells so the bytes of a file name
    that are no text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes that sd-scripts writes: over the file as it would be with the ss_ metadata
    alone."""
    from safetensors.torch import save
    content = memoryview(save(dict(tensors),
                              {k: v for k, v in metadata.items() if k.startswith("ss_")}))
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[start:]).hexdigest()
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}",
            "sshs_legacy_hash": legacy_hash(content)}


TOP_TAGS = 10
MAX_TRIGGERS = 3                           # tags that all captions share and that may be triggers


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the metadata of any trainer's LoRA say; empty where they say nothing."""

    title: str = ""
    description: str = ""
    trigger_words: tuple[str, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()     # the most frequent ones
    family: str = ""
    base_model: str = ""
    base_loras: tuple[str, ...] = ()       # that the base had on it, "name:weight:hash"
    resolution: str = ""                   # 512x768
    pictures: int | None = None            # repeats counted
    steps: int | None = None
    epochs: int | None = None              # done
    learning_rate: float | None = None
    made_by: str = ""
    date: str = ""
    has_config: bool = False               # a run can be repeated from it


def facts_of(metadata: Mapping[str, str]) -> Facts:
    """Reads any trainer's metadata. Never fails: a value that can't be read counts as absent."""
    tags: Counter[str] = Counter()
    for folder in json_of(metadata.get("ss_tag_frequency", ""), dict).values():
        if isinstance(folder, dict):
            tags.update({_clean(tag.strip()): count for tag, count in folder.items()
                         if type(count) is int})

    # The phrase that the file names; else the tags that stand in every caption.
    phrase = _first(metadata, "modelspec.trigger_phrase")
    triggers = [word.strip() for word in phrase.split(",") if word.strip()]
    if not phrase:
        folders = json_of(metadata.get("ss_dataset_dirs", ""), dict).values()
        counts = [folder.get("img_count") for folder in folders if isinstance(folder, dict)]
        captions = sum(count for count in counts if type(count) is int)
        shared = [tag for tag, count in tags.items() if 1 < captions <= count]
        triggers = shared if len(shared) <= MAX_TRIGGERS else []

    family = next((spec.id for key in ("ss_base_model_version", "modelspec.architecture")
                   for spec in SPECS.values()
                   if metadata.get(key, "").startswith(spec.metadata_names)), "")
    # modelspec writes 512x768, kohya "(512, 768)"
    resolution = re.search(r"(\d{1,5})\D+(\d{1,5})",
                           _first(metadata, "modelspec.resolution", "ss_resolution"))
    made_by = f"{TOOL}/{metadata[VERSION_KEY]}" if VERSION_KEY in metadata else (
        _first(metadata, "modelspec.implementation_version")
        or ("sd-scripts" if "ss_sd_scripts_commit_hash" in metadata else ""))
    return Facts(
        title=_first(metadata, "modelspec.title", "ss_output_name"),
        description=_first(metadata, "modelspec.description", "ss_training_comment"),
        trigger_words=tuple(triggers), tags=tuple(tags.most_common(TOP_TAGS)),
        family=family, base_model=_first(metadata, "ss_sd_model_name"),
        base_loras=tuple(text for text in json_of(metadata.get(BASE_LORAS_KEY, ""), list)
                         if isinstance(text, str)),
        resolution=f"{resolution[1]}x{resolution[2]}" if resolution else "",
        pictures=_whole(metadata, "ss_num_train_images"),
        steps=_whole(metadata, "ss_steps"), epochs=_whole(metadata, "ss_epoch"),
        learning_rate=_number(metadata, "ss_learning_rate"), made_by=made_by,
        date=_first(metadata, "modelspec.date"), has_config=CONFIG_KEY in metadata)


def noted(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's config of each part, from the metadata that diffusers writes: "unet.lora_alpha" ..."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in json_of(metadata.get("lora_adapter_metadata", ""), dict).items():
        if "." in key:
            configs.setdefault(key.split(".")[0], {})[key.partition(".")[2]] = value
    return configs


def _first(metadata: Mapping[str, str], *keys: str) -> str:
    """The value of the first key that has one. kohya writes None where there is none."""
    return next((metadata[k] for k in keys if metadata.get(k, "None") not in ("", "None")), "")


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    try:
        number = float(metadata.get(key, ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _whole(metadata: Mapping[str, str], key: str) -> int | None:
    number = _number(metadata, key)
    return None if number is None else int(number)
