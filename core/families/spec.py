"""What is known of a model family without loading it. Needs no torch.

Each family's facts stand in the spec.py of its folder: what its bases and LoRA files are told by,
how their layers are called, what its pictures and captions must be like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core import i18n
from core.families.layer_names import Naming

Shapes = dict[str, tuple[int, ...]]         # of a denoiser's tensors, without what precedes names
# "text": all encoders; by name: one of them, with its tokenizer.
Part = Literal["denoiser", "vae", "text", "text_encoder", "text_encoder_2", "text_encoder_3"]


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
        found = i18n.tr(f"families.is_{self.what}", lang=language)
        if self.numbers:
            return i18n.tr("families.in_numbers", {"found": found, "kind": self.numbers},
                           language)
        return found


def side(shapes: Shapes, name: str, side: int) -> int:
    """The length of one side of a tensor; 0 where it isn't there."""
    shape = shapes.get(name, ())
    return shape[side] if -len(shape) <= side < len(shape) else 0


def starts(*beginnings: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(name.startswith(beginnings) for name in shapes)


@dataclass(frozen=True, slots=True)
class DistilledSigns:
    """What tells a family's distilled bases, beside the words that all families' have."""

    steps: int = 8                          # that they are drawn in, where the name says none
    steps_of: Mapping[str, int] = field(default_factory=dict) # of single ones: `Found.what` ->
    named: Mapping[str, str] = field(default_factory=dict)  # `Found.what` that is one -> its name
    guided: tuple[str, ...] = ()            # of those: what takes guidance all the same
    words: str = ""                         # pattern of words in names that mean it here only
    shift: float | None = None              # of the scheduler in a folder of such a base


@dataclass(frozen=True, slots=True)
class VaeSigns:
    """What tells a VAE that has the layers of another family's."""

    title: str
    files: tuple[str, ...]                  # SHA-256 of published ones
    scale: float = 0.0                      # scaling_factor of its config
    key: str = ""                           # that only its config has


@dataclass(frozen=True, slots=True)
class FamilySpec:
    id: str
    title: str
    native_size: int                        # px a side
    bucket_step: int                        # px; sides of buckets are multiples of it
    lora_presets: dict[str, tuple[str, ...]]   # preset -> module-name suffixes for peft
    lora_aliases: dict[str, str]            # names that users know -> suffixes here
    kohya_prefix: str                       # "lora_unet"
    base_version: str                       # ss_base_model_version
    architecture: str                       # modelspec.architecture without "/lora"
    implementation: str                     # modelspec.implementation
    text_targets: tuple[str, ...] = ()      # of a LoRA on the text encoders
    encoders: tuple[Part, ...] = ("text_encoder",)   # in the order in which they are loaded
    chunked: bool = False                   # reads long texts in chunks of CLIP's 75 tokens
    skips: bool = False                     # clip_skip: text may be taken from an earlier layer
    cfg: float = 7.0                        # guidance where the user says nothing
    lora_format: str = "kohya"              # of its LoRA files where the user says nothing
    model: str = ""                         # the class in its model.py; empty: one's own family
    short_title: str = ""                   # in lists
    # What a single file of it holds: everything, the denoiser with other parts beside it, none.
    file: Literal["whole", "denoiser", "none"] = "whole"
    tokens: int = 0                         # of a caption that it reads; 0: as max_tokens says
    # Whether its numbers stay within fp16's 65504; ComfyUI computes the others in bf16 or fp32.
    fp16: bool = True
    naming: Naming = ()
    # A single file's denoiser -> what it is: this family, or a relative that isn't trained.
    recognize: Callable[[Shapes], Found | None] = lambda shapes: None
    # The same of folders: by _class_name of model_index.json; by unet/config.json.
    pipelines: Mapping[str, str] = field(default_factory=dict)      # -> `Found.what`
    relatives: Mapping[str, str] = field(default_factory=dict)      # the same of other models
    unet: Callable[[Mapping[str, Any]], bool] | None = None
    unet_what: str = ""                     # `Found.what` of those
    variant: Callable[[Path], str] | None = None   # folder -> `Found.what`, of several
    # Same shapes, another model: (`Found.what`, word of a file name or title) -> what it is.
    namesakes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    # LoRA files: (pattern of a key, its tensor's last side; None: any).
    lora_signs: tuple[tuple[str, int | None], ...] = ()
    names_of: str = ""                      # the family whose layers are called the same
    # Beginnings of ss_base_model_version and modelspec.architecture.
    metadata_names: tuple[str, ...] = ()
    trainer_names: tuple[str, ...] = ()     # in other trainers' configs, without marks
    distilled: DistilledSigns = DistilledSigns()
    vae: VaeSigns | None = None
