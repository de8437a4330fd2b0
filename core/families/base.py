"""The protocol of a model family: its spec, and what the engine calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from core.families.components.lookup import UsedComponent
from core.families.distilled import Distilled
from core.families.spec import FamilySpec, Part
from core.families.timestep_sampling import TimestepSampling
from core.weights.attached import Attached
from core.weights.precision import Precision

Objective = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How much of a caption is read, and from which layer its embedding comes."""

    max_tokens: int = 225                   # for a family whose spec says `chunked`
    clip_skip: int = 1                      # for one that `skips`; 1: the last layer, as in A1111


@dataclass(slots=True)
class Parts:
    """A loaded base. A part that is no longer needed is set to None and leaves memory."""

    source: Path
    scheduler: dict[str, Any]               # diffusers scheduler config of the base
    objective: Objective
    native_size: int                        # px; this base's own
    bucket_step: int                        # px; this base's own
    flow: TimestepSampling | None = None    # of a base that learns a flow
    guidance: str = "guidance_scale"        # the pipeline's argument for a shot's cfg
    no_guidance_value: float = 1.0          # of that argument; a shot's cfg is 1 then
    architecture: str = ""                  # modelspec.architecture, where it isn't the spec's
    text_width: int = 0                     # to which the last CLIP's text is padded
    reading: Reading = Reading()
    distilled: Distilled | None = None      # a base that draws in few steps without guidance
    # The scheduler's shift for a base that isn't distilled, and for one that is.
    shifts: tuple[float, float] | None = None
    base_loras: Attached | None = None      # LoRAs on the denoiser while another one learns
    # Files of other places that the base is used with.
    beside: list[UsedComponent] = field(default_factory=list)
    is_video_vae: bool = False              # its latents are (B, C, frames, h, w)
    denoiser: Any = None                    # UNet or transformer
    vae: Any = None
    # Tokenizers and text encoders, by the names of the pipeline's arguments.
    text: dict[str, Any] = field(default_factory=dict)

    def take_as(self, distilled: Distilled | None) -> None:
        """Draws as a distilled base from now on, or as one that isn't (None)."""
        self.distilled = distilled
        if self.shifts is not None:
            self.scheduler["shift"] = self.shifts[distilled is not None]


PARTS: tuple[Part, ...] = ("denoiser", "vae", "text")
ALL_PARTS: frozenset[Part] = frozenset(PARTS)
Cond = dict[str, Tensor]                    # name -> (B, ...)


@dataclass(frozen=True, slots=True)
class CropInfo:
    """How a picture was cropped, in px; width before height."""

    original: tuple[int, int]               # before scaling
    left_top: tuple[int, int]               # corner of the crop in the scaled picture
    target: tuple[int, int]                 # size of the crop: the bucket


class Family(Protocol):
    """A model family, built in or a plugin's."""

    spec: ClassVar[FamilySpec]

    def load(self, source: Path, precision: Precision,
             only: frozenset[Part] = ALL_PARTS) -> Parts:
        """Reads a diffusers folder or a single .safetensors file. The models are frozen and in eval
        mode. Raises UserError where the source is missing, is no such base or can't be read."""

    def skeleton(self, source: Path, precision: Precision,
                 only: frozenset[Part] = ALL_PARTS) -> Parts:
        """The same without weights, for plans: models of the real classes on the meta device, and
        real tokenizers. Raises UserError as `load` does."""

    def weight_files(self, source: Path, part: Part) -> list[tuple[Path, str]]:
        """The files that decide what a part computes, each with the prefix of its tensors' names.
        Those of tokenizers belong to the text encoders: what is cached on disk depends on all."""

    def encode_text(self, parts: Parts, prompts: Sequence[str]) -> Cond:
        """Embeddings of B prompts, on the base's device. Each loaded encoder gives entries of its
        own, so that they can be loaded one after the other."""

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers (B, L) by encoder, padded, on the CPU; masks are `<encoder>.mask`."""

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        """Embeddings of tokens, on the base's device, with gradients where an encoder trains."""

    def size_conditioning(self, frame: CropInfo) -> Cond:
        """What the denoiser reads of a picture's size and crop, (1, ...) each; empty: nothing."""

    def count_tokens(self, parts: Parts, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, without the marks at its start and end."""

    def token_limit(self, parts: Parts) -> int:
        """How many tokens of a prompt are read."""

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the mean of the posterior."""

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser's output (B, C, h, w) for noisy latents (B, C, h, w) at timesteps `t` (B,)
        of 0 to 1000: integers for diffusion, any number for flows."""

    def pipeline(self, parts: Parts) -> Any:
        """A diffusers text-to-image pipeline that shares the weights; missing parts are None."""

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        """The pipeline's arguments for two prompts' embeddings from `encode_text`."""
