"""TrainConfig and GenerateConfig: the flat YAML that users write, checked once, frozen after.

Keys are lora-scripts' own. Form and documentation are built from each field's level, unit, range.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from core import i18n, paths, serialization

Precision = Literal["auto", "fp32", "fp16", "bf16"]
BasePrecision = Literal["same", "int8", "fp8", "nf4"]
Schedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial",
                   "warmup_stable_decay"]
AdapterKind = Literal["lora", "rslora", "dora", "pissa", "loha", "lokr", "oft"]
PRODUCTS = ("lora", "rslora", "dora", "pissa")          # adapters whose update is B times A
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedulefree", "came")
Extension = Annotated[str, Field(pattern=r"^.+:[A-Za-z_]\w*$")]     # "module:object"
LossType = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]


def _plain_size(value: Any) -> Any:
    """512, [512, 768], "512,768", "512x768" -> "512,768"."""
    # bool is an int to Python
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if not isinstance(value, str) or not value.strip():
        return value or ""
    numbers = re.fullmatch(r"[\s\[(]*(\d+)(?:\s*[,，xX×*\s]\s*(\d+))?\s*(?:px)?[\s\])]*", value)
    if not numbers or not all(8 <= int(n) <= 16384 for n in numbers.groups() if n):
        raise PydanticCustomError("size", "expected 'width,height' in pixels")
    return f"{int(numbers[1])},{int(numbers[2] or numbers[1])}"


Size = Annotated[str, BeforeValidator(_plain_size)]                 # "width,height" or ""


def _any_seed(value: Any) -> Any:
    """-1, as A1111 and ComfyUI call it, becomes one by chance."""
    return secrets.randbelow(2**31) if str(value).strip().lower() in ("-1", "random") else value


Seed = Annotated[int, BeforeValidator(_any_seed)]


def _field(default: Any, level: str, help_: str, unit: str = "", **limits: Any) -> Any:
    return Field(default, description=help_, json_schema_extra={"level": level, "unit": unit},
                 **limits)


class TrainConfig(BaseModel):
    """One training run. Relative paths are taken from the YAML's folder, then from the
    working folder (see `resolve`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # basic
    train_data_dir: str = _field("", "basic", "folder of pictures")
    base_model: str = _field("", "basic", "model folder or .safetensors file")
    output_dir: str = _field("./output", "basic", "where the LoRA goes")
    output_name: str = _field("", "basic", "file name of the LoRA; empty: the output folder's")
    trigger_word: str = _field("", "basic", "put first in every caption that lacks it")
    lora_rank: int = _field(8, "basic", "size of the LoRA", ge=1, le=1024)
    batch_size: int = _field(1, "basic", "pictures at once", "pictures", ge=1, le=256)
    epochs: int = _field(10, "basic", "rounds over all pictures", ge=1, le=100_000)
    learning_rate: float = _field(1e-4, "basic", "size of the update", gt=0, le=10)
    max_resolution: Size = _field("", "basic", "area cap 'W,H'; empty: the base's own", "px")

    # advanced
    family: str = _field(
        "auto", "advanced", "model family; auto: told from the base; module:Class: your own")
    vae: str = _field("", "advanced", "VAE file to use; empty: the base's, or that beside it")
    text_encoders: list[str] = _field(
        [], "advanced", "text encoder files to use; empty: the base's, or those beside it")
    tokenizer: str = _field(
        "", "advanced", "tokenizer folder to use; empty: the base's, or the app's own; shipped")
    metadata_path: str = _field("", "advanced", "captions as .csv or .jsonl")
    max_train_steps: int = _field(0, "advanced", "steps instead of epochs; 0: epochs", ge=0)
    lora_alpha: float | None = _field(None, "advanced", "scale = alpha / rank; empty: rank", gt=0)
    lora_dropout: float = _field(0.0, "advanced", "dropout before the LoRA", ge=0, lt=1)
    target_modules: list[str] | str = _field(
        "attention", "advanced",
        "layers by name, or a preset: attention | attention+ff | all-linear")
    init_lora_weights: str = _field(
        "", "advanced", "LoRA file or folder to continue from, of any format")
    base_loras: list[str] = _field(
        [], "advanced", "LoRAs that belong to the base while this one learns, 'file:weight'")
    adapter: AdapterKind | Extension = _field(
        "lora", "advanced", "kind of adapter; module:object: your own variant")
    conv_rank: int = _field(
        0, "advanced", "rank of the 3x3 convolutions (LoCon); 0: not trained", ge=0, le=1024)
    gradient_accumulation_steps: int = _field(1, "advanced", "batches per update", ge=1, le=4096)
    precision: Precision = _field("auto", "advanced", "number format of the base")
    base_precision: BasePrecision = _field(
        "same", "advanced", "numbers that hold the frozen base: int8, fp8, nf4 save memory")
    offload: float = _field(
        0.0, "advanced", "share of the base that waits in RAM; slower, less GPU memory", ge=0, le=1)
    gradient_checkpointing: bool = _field(False, "advanced", "less memory, slower steps")
    optimizer: str = _field("adamw", "advanced", "update rule: " + " | ".join(OPTIMIZERS) + (
        " | package.module.Class; module:Class: your own"))
    lr_scheduler: Schedule = _field("constant", "advanced", "course of the learning rate")
    lr_warmup_steps: int = _field(0, "advanced", "steps until the full rate", "steps", ge=0)
    save_steps: int = _field(0, "advanced", "checkpoint every N steps; 0: at the end", ge=0)
    keep_checkpoints: int = _field(3, "advanced", "newest kept; 0: all", ge=0)
    resume: bool | str = _field(False, "advanced", "go on from the newest checkpoint, or from this")
    sample_prompts: list[str] = _field([], "advanced", "prompts of the previews")
    sample_every: int = _field(0, "advanced", "preview every N steps; 0: none", "steps", ge=0)
    caption_dropout: float = _field(0.0, "advanced", "share of empty captions", ge=0, le=1)
    max_tokens: int = _field(
        225, "advanced", "tokens of a caption that SD 1.x, 2.x and SDXL read, in chunks of 75",
        "tokens", ge=75, le=750, multiple_of=75)
    clip_skip: int = _field(
        1, "advanced", "layer of SD 1.x's text encoder, counted from the end; 2 for anime bases",
        ge=1, le=12)
    shuffle_tags: bool = _field(False, "advanced", "shuffle comma-separated tags")
    keep_tokens: int = _field(0, "advanced", "leading tags never shuffled", ge=0)
    enable_wildcard: bool = _field(
        False, "advanced", "captions: each line is one of its own, {a|b} is one of them")
    flip: bool = _field(False, "advanced", "mirror pictures at random")
    validation_split: float = _field(0.0, "advanced", "share of pictures held out", ge=0, lt=1)
    seed: int = _field(42, "advanced", "same seed, same LoRA", ge=0, lt=2**63)
    min_snr_gamma: float = _field(0.0, "advanced", "min-SNR weighting; 5 is usual, 0: off", ge=0)
    noise_offset: float = _field(0.0, "advanced", "helps dark and bright pictures", ge=0, le=1)
    text_encoder_lr: float = _field(
        0.0, "advanced", "rate of the text encoder's own LoRA; 0: it stays as it is", ge=0, le=10)
    pivotal_tokens: int = _field(
        0, "advanced", "new words learned for the trigger word; 0: none", "tokens", ge=0, le=32)
    masked_loss: bool = _field(
        False, "advanced", "learn only what masks or transparency leave visible")
    reg_data_dir: str = _field("", "advanced", "folder of pictures that the LoRA must not change")
    reg_from_base: int = _field(
        0, "advanced", "pictures of that kind, drawn by the base itself first; 0: none",
        "pictures", ge=0, le=10_000)
    ema_decay: float = _field(
        0.0, "advanced", "average of the LoRA over steps, such as 0.99; 0: off", ge=0, lt=1)

    # expert
    conv_alpha: float | None = _field(
        None, "expert", "alpha of the convolutions; empty: conv_rank", gt=0)
    block_ranks: dict[str, int] = _field(
        {}, "expert", "rank by block, such as 'mid_block: 16, attn2: 4'; 0: not trained")
    block_rates: dict[str, float] = _field(
        {}, "expert", "factor of the learning rate by block, such as 'up_blocks: 0.5'")
    rank_dropout: float = _field(0.0, "expert", "share of ranks left out of a step", ge=0, lt=1)
    module_dropout: float = _field(0.0, "expert", "share of layers left out of a step", ge=0, lt=1)
    lora_plus_ratio: float = _field(
        1.0, "expert", "LoRA+: rate of B against A's; 16 is usual, 1: off", gt=0, le=1000)
    lokr_factor: int = _field(-1, "expert", "LoKr: sides of the first factor; -1: roots", ge=-1)
    optimizer_args: dict[str, Any] = _field({}, "expert", "further arguments of the optimizer")
    lr_cycles: int = _field(1, "expert", "cycles of cosine_with_restarts", "cycles", ge=1, le=1000)
    lr_power: float = _field(1.0, "expert", "power of polynomial", gt=0, le=100)
    lr_decay_share: float = _field(
        0.2, "expert", "share of the steps at the end of warmup_stable_decay that falls",
        ge=0, le=1)
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = _field(
        "auto", "expert", "what the base predicts")
    zero_terminal_snr: bool = _field(False, "expert", "last timestep is noise alone (v only)")
    multires_noise_iterations: int = _field(
        0, "expert", "levels of coarser noise added; 6 is usual, 0: off", "levels", ge=0, le=16)
    multires_noise_discount: float = _field(
        0.3, "expert", "strength of each coarser level", gt=0, le=1)
    loss_type: LossType = _field("l2", "expert", "how errors count; huber: outliers less")
    huber_c: float = _field(0.1, "expert", "smallest error that Huber takes as outlier", gt=0, le=1)
    huber_schedule: HuberSchedule = _field("snr", "expert", "course of that error over timesteps")
    debiased_estimation: bool = _field(False, "expert", "weight 1 / sqrt(SNR)")
    unmasked_weight: float = _field(0.0, "expert", "weight outside of masks", ge=0, le=1)
    reg_share: float = _field(
        0.5, "expert", "share of regularisation pictures in the batches", gt=0, lt=1)
    prior_loss_weight: float = _field(
        1.0, "expert", "weight of regularisation pictures in the loss", ge=0, le=100)
    text_encoder_rank: int = _field(
        0, "expert", "size of the text encoder's LoRA; 0: as the rank", ge=0, le=1024)
    text_encoder_stop: int = _field(
        0, "expert", "step after which the text encoder and new words rest; 0: never", "steps",
        ge=0)
    pivotal_lr: float = _field(1e-3, "expert", "rate of the new words", gt=0, le=10)
    pivotal_init: str = _field("", "expert", "text that new words start as; empty: the trigger")
    distilled: Literal["auto", "true", "false"] = _field(
        "auto", "expert", "whether the base draws in few steps (turbo); auto: told from the base")
    timestep_sampling: Literal["auto", "uniform", "logit_normal", "mode"] = _field(
        "auto", "expert", "which noise levels a flow model (Flux, SD 3) learns most")
    flow_shift: float = _field(
        0.0, "expert", "shift of these levels towards noise; 0: the family's own", ge=0, le=100)
    logit_mean: float = _field(
        0.0, "expert", "logit_normal: above 0 more noise, below 0 less", ge=-10, le=10)
    logit_std: float = _field(
        1.0, "expert", "logit_normal: how far levels spread from the middle", gt=0, le=10)
    mode_scale: float = _field(
        1.29, "expert", "mode: above 0 more of the middle, below 0 more of the ends",
        ge=-1, le=1.75)
    weight_decay: float = _field(0.01, "expert", "AdamW weight decay", ge=0)
    max_grad_norm: float = _field(1.0, "expert", "gradient clipping; 0: off", ge=0)
    adam_beta1: float = _field(0.9, "expert", "AdamW beta 1", ge=0, lt=1)
    adam_beta2: float = _field(0.999, "expert", "AdamW beta 2", ge=0, lt=1)
    bucket_no_upscale: bool = _field(False, "expert", "never enlarge a picture")
    min_bucket_side: int = _field(0, "expert", "px; 0: the family's", "px", ge=0)
    max_bucket_side: int = _field(0, "expert", "px; 0: the family's", "px", ge=0)
    crop_about: Literal["center", "subject"] = _field(
        "center", "expert", "what stays where a picture is cut; points set by hand always count")
    alpha_background: str = _field("white", "expert", "colour behind transparent pictures")
    cache_batch_size: int = _field(4, "expert", "pictures at once while caching", ge=1, le=64)
    cache_to_disk: bool = _field(True, "expert", "keep latents and embeddings for the next run")
    save_precision: Literal["fp16", "fp32", "bf16"] = _field(
        "fp16", "expert", "number format in the LoRA file")
    save_format: Literal["auto", "kohya", "peft", "diffusers", "comfyui"] = _field(
        "auto", "expert", "names of the layers in the LoRA file")
    metadata: Literal["public", "full"] = _field(
        "public", "expert", "what the LoRA file tells of its maker; full: whole paths, and a "
        "training picture as thumbnail where no preview was drawn")
    init_lora_resize: bool = _field(
        False, "expert", "change the rank of init_lora_weights by SVD where it differs")
    sample_size: Size = _field("", "expert", "'W,H' of previews; empty: the base's own", "px")
    sample_cfg: float | None = _field(
        None, "expert", "guidance of previews; empty: the family's, 1 of a distilled base",
        ge=0, le=50)
    sample_inference_steps: int | None = _field(
        None, "expert", "denoising steps of previews; empty: 20, of a distilled base 4 to 8", ge=1)
    sample_sampler: str = _field("auto", "expert", "sampler of previews")
    sample_weight: float = _field(0.8, "expert", "LoRA weight of previews", ge=-4, le=4)
    base_loras_in_previews: bool = _field(False, "expert", "draw previews with base_loras too")
    validation_steps: int = _field(0, "expert", "validate every N steps; 0: per checkpoint", ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = _field("auto", "expert", "where to train")
    picture_processors: list[str] = _field(
        [], "expert", "your own changes to each picture, module:object")
    callbacks: list[str] = _field([], "expert", "your own listeners to the run, module:object")
    task_type: Literal["text-to-image"] = _field("text-to-image", "expert", "kind of task")

    @field_validator("sample_prompts", "base_loras", "picture_processors", "callbacks",
                     "text_encoders", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("distilled", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """YAML reads true and false as booleans."""
        return str(value).lower() if isinstance(value, bool) else value

    @field_validator("base_loras")
    @classmethod
    def _finite_weights(cls, value: list[str]) -> list[str]:
        for text in value:
            if not re.fullmatch(r".*[^:\s].*", text) or re.search(
                    r":\s*[-+]?(nan|inf(inity)?)\s*$", text, re.IGNORECASE):
                raise PydanticCustomError("lora", "expected file:weight", {"given": text})
        return value

    @field_validator("resume", mode="before")
    @classmethod
    def _true_or_a_folder(cls, value: Any) -> Any:
        """The number of a session, which YAML reads as an integer, stays text; the words for true
        and false may be quoted."""
        words = {"": False, "0": False, "no": False, "off": False, "false": False,
                 "1": True, "yes": True, "on": True, "true": True}
        return words.get(str(value).casefold(), str(value) if isinstance(value, int) else value)

    @field_validator("train_data_dir", "base_model", "output_dir", "vae", "text_encoders",
                     "tokenizer", "metadata_path", "init_lora_weights", "base_loras",
                     "reg_data_dir")
    @classmethod
    def _no_escapes(cls, value: str | list[str]) -> str | list[str]:
        """In double quotes "data\new" is no path: \n became a line break."""
        if re.search(r"[\0-\x1f]", "".join(value)):
            raise PydanticCustomError("path", "expected a path without line breaks and tabs")
        return value

    @field_validator("output_name")
    @classmethod
    def _no_path(cls, value: str) -> str:
        if value and not paths.is_file_name(value):
            raise PydanticCustomError("file_name", "expected a file name without folders")
        return value

    @field_validator("block_ranks", "block_rates", "optimizer_args", mode="before")
    @classmethod
    def _one_map(cls, value: Any) -> Any:
        """Text 'mid_block: 16, attn2: 4', on one line or several, becomes a mapping."""
        if not isinstance(value, str):
            return value
        lines = ", ".join(part for part in re.split(r"[\n,]+", value) if part.strip())
        try:
            pairs = serialization.from_yaml("{" + lines + "}")
        except serialization.BadYaml:
            raise PydanticCustomError("pairs", "expected 'name: value, name: value'") from None
        return {str(k): v for k, v in pairs.items()} if isinstance(pairs, dict) else value

    @field_validator("block_ranks", "block_rates")
    @classmethod
    def _no_negative(cls, value: dict[str, float]) -> dict[str, float]:
        if bad := [key for key, number in value.items() if not 0 <= number <= 1024]:
            raise PydanticCustomError("rank", "expected 0 to 1024 for {name}", {"name": bad[0]})
        return value

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in OPTIMIZERS and not re.fullmatch(
                r"[A-Za-z_]\w*(\.\w+)+|.+:[A-Za-z_]\w*", value):
            nearest = (i18n.nearest(value, OPTIMIZERS, 1) or OPTIMIZERS)[0]
            raise PydanticCustomError("optimizer", "expected {known}; did you mean {nearest}?",
                                      {"known": ", ".join(OPTIMIZERS), "nearest": nearest})
        return value

    @property
    def name(self) -> str:
        """The LoRA's file name without suffix."""
        return lora_name(self.output_name, self.output_dir)

    @property
    def alpha(self) -> float:
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def trains_text(self) -> bool:
        """Whether captions must be encoded in the step, for a while at least."""
        return self.text_encoder_lr > 0 or self.pivotal_tokens > 0

    @property
    def regularized(self) -> bool:
        return bool(self.reg_data_dir) or self.reg_from_base > 0

    def with_changes(self, **changes: Any) -> Self:
        """A copy with changes, checked as a new config is. Raises ValidationError."""
        return type(self).model_validate(self.model_dump() | changes)


def lora_name(output_name: str, output_dir: str) -> str:
    """The name that a run wants for its LoRA: its own, else its output folder's as far as every
    system can have such a file."""
    folder = paths.BAD_CHARACTERS.sub("_", Path(output_dir).name).strip(" .")
    return output_name or (folder if paths.is_file_name(folder) else "lora")


COMPANIONS = ("vae", "text_encoders", "tokenizer")      # keys that name files of the base
# keys that name what is there already
INPUTS = ("train_data_dir", "metadata_path", "reg_data_dir", "base_model", "init_lora_weights",
          "resume", *COMPANIONS)


class GenerateConfig(BaseModel):
    """One `generate` call: a base, LoRAs, a prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    prompt: str = ""
    negative: str = ""
    loras: list[str] = []                  # "file-or-name[:weight]"
    seed: Seed = Field(default=42, ge=0, lt=2**63)          # -1: any
    steps: int | None = Field(default=None, ge=1, le=1000)  # None: 25, of a distilled base 4 to 8
    cfg: float | None = Field(default=None, ge=0, le=50)    # None: the family's, or 1
    size: Size = ""                        # "W,H"; empty: the base's own
    sampler: str = "auto"
    max_tokens: int = Field(default=225, ge=75, le=750, multiple_of=75)
    clip_skip: int | None = Field(default=None, ge=1, le=12)    # None: as the LoRAs were trained
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    distilled: Literal["auto", "true", "false"] = "auto"
    count: int = Field(default=1, ge=1, le=1000)
    sheet: str = ""                        # weights=0,0.8 | checkpoints=100,200
    out: str = "./output/generate"
    precision: Precision = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    family: str = "auto"
    # as in TrainConfig
    vae: str = ""
    text_encoders: list[str] = []
    tokenizer: str = ""


def size_of(text: str) -> tuple[int, int] | None:
    """'512,768' -> (512, 768); '' -> None. The text has passed validation."""
    if not text:
        return None
    width, height = text.split(",")
    return int(width), int(height)
