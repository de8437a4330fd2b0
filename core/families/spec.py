"""What is known of a model family without loading it. Needs no torch.

Each family's facts stand in the spec.py of its folder: how its bases and LoRA files are recognised,
what their layers are called, what its pictures and captions must be like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core import i18n
from core.families.layer_names import Naming

Shapes = dict[str, tuple[int, ...]]         # of a denoiser's tensors, whose names have no prefix
# "text": all encoders; by name: one of them, with its tokenizer.
Part = Literal["denoiser", "vae", "text", "text_encoder", "text_encoder_2", "text_encoder_3"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a file or folder is."""

    what: str                               # the sentence families.is_... says it
    family: str = ""                        # empty where no LoRA can be trained on it
    v_prediction: bool = False              # by marks in the file, or the folder's config
    zero_snr: bool = False
    unread_format: str = ""                 # of its weights, where it can't be read here
    by_shapes: Found | None = None          # what the shapes alone say, where the name differs

    def description(self, language: str | None = None) -> str:
        sentence = i18n.tr(f"families.is_{self.what}", lang=language)
        if self.unread_format:
            return i18n.tr("families.in_numbers", {
                "found": sentence, "kind": self.unread_format}, language)
        return sentence


def side(shapes: Shapes, name: str, side: int) -> int:
    """The length of one side of a tensor; 0 where the tensor or the side isn't there."""
    shape = shapes.get(name, ())
    return shape[side] if -len(shape) <= side < len(shape) else 0


def starts(*beginnings: str) -> Callable[[Shapes], bool]:
    """A test for tensors whose names begin with one of these."""
    return lambda shapes: any(name.startswith(beginnings) for name in shapes)


@dataclass(frozen=True, slots=True)
class DistilledSigns:
    """How a family's distilled bases are recognised, beside the words in all families' names."""

    steps: int = 8                          # in which they draw, where the name says none
    steps_of: Mapping[str, int] = field(default_factory=dict)   # `Found.what` -> steps, where other
    named: Mapping[str, str] = field(default_factory=dict)  # `Found.what` that always is -> name
    guided: tuple[str, ...] = ()            # `Found.what` that takes guidance all the same
    words: str = ""                         # pattern of words in names that mean it here only
    shift: float | None = None              # of the scheduler in a folder of such a base


@dataclass(frozen=True, slots=True)
class VaeSigns:
    """How a VAE is recognised that has the layers of another family's."""

    title: str
    files: tuple[str, ...]                  # SHA-256 of the published files
    scale: float = 0.0                      # scaling_factor of its config
    key: str = ""                           # a key that only its config has


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """The facts of one family."""

    id: str
    title: str
    native_size: int                        # px a side
    bucket_step: int                        # px; sides of buckets are multiples of it
    lora_presets: dict[str, tuple[str, ...]]   # preset -> module-name suffixes for peft
    lora_aliases: dict[str, str]            # names that users know -> suffixes here
    base_version: str                       # ss_base_model_version
    architecture: str                       # modelspec.architecture without "/lora"
    implementation: str                     # modelspec.implementation
    text_targets: tuple[str, ...] = ()      # of a LoRA on the text encoders
    encoders: tuple[Part, ...] = ("text_encoder",)   # in the order in which they are loaded
    chunked: bool = False                   # reads long texts in chunks of CLIP's 75 tokens
    skips: bool = False                     # clip_skip: text may come from an earlier layer
    cfg: float = 7.0                        # guidance where the user says nothing
    lora_format: str = "kohya"              # of its LoRA files where the user says nothing
    model: str = ""                         # the class in its model.py; empty: a plugin's family
    short_title: str = ""                   # in lists
    # What a single file of it holds: everything, the denoiser with other parts beside it, or there
    # are no such files.
    file: Literal["whole", "denoiser", "none"] = "whole"
    tokens: int = 0                         # of a caption that it reads; 0: as max_tokens says
    # Whether its activations stay within fp16's 65504; ComfyUI computes the others in bf16 or fp32.
    fp16: bool = True
    naming: Naming = ()
    # Says what a single file's denoiser is: this family, a relative that isn't trained, or neither.
    recognize: Callable[[Shapes], Found | None] = lambda shapes: None
    # Folders: _class_name of model_index.json -> `Found.what`, of this family and of relatives that
    # aren't trained.
    pipelines: Mapping[str, str] = field(default_factory=dict)
    relatives: Mapping[str, str] = field(default_factory=dict)
    # Folders of UNets: whether unet/config.json is this family's, and its `Found.what`.
    unet: Callable[[Mapping[str, Any]], bool] | None = None
    unet_what: str = ""
    # Folder -> `Found.what`, for a family that has several.
    variant: Callable[[Path], str] | None = None
    # Same shapes, another model: (`Found.what`, word of a file name or title) -> what it is.
    namesakes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    # LoRA files: (pattern of a key, last side of its tensor; None: any).
    lora_signs: tuple[tuple[str, int | None], ...] = ()
    names_of: str = ""                      # the family whose layers are called the same
    # Beginnings of ss_base_model_version and modelspec.architecture.
    metadata_names: tuple[str, ...] = ()
    trainer_names: tuple[str, ...] = ()     # in other trainers' configs, letters and digits only
    # target_modules that train what kohya's and musubi's networks do.
    kohya_targets: str | tuple[str, ...] = "all-linear"
    distilled: DistilledSigns = DistilledSigns()
    vae: VaeSigns | None = None
