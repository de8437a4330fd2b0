"""What a family hands over to the engine: a small spec and a few callables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from core.families.components.lookup import Taken
from core.families.distilled import Distilled
from core.families.spec import FamilySpec, Part
from core.families.timestep_sampling import TimestepSampling
from core.weights.attached import Attached
from core.weights.precision import Precision

Objective = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How much of a text is read, and where it is taken from; of families whose spec says so."""

    max_tokens: int = 225                   # where the family is `chunked`
    clip_skip: int = 1                      # where it `skips`; 1: the last layer, as A1111 counts


@dataclass(slots=True)
class Parts:
    """A loaded base. A part that is no longer needed is dropped and leaves memory."""

    source: Path
    scheduler: dict[str, Any]               # diffusers scheduler config of the base
    objective: Objective
    native_size: int                        # px; this base's own
    bucket_step: int                        # px; this base's own
    flow: TimestepSampling | None = None            # of a base that learns a flow
    guidance: str = "guidance_scale"        # the pipeline's argument for a shot's cfg
    no_guidance_value: float = 1.0                   # that argument's value for none; cfg's is 1
    architecture: str = ""                  # where it isn't the spec's
    text_width: int = 0                     # of the last CLIP's text, where it is padded
    reading: Reading = Reading()
    distilled: Distilled | None = None      # a base that draws in few steps without guidance
    shifts: tuple[float, float] | None = None   # the scheduler's, of one that isn't and one that is
    base_loras: Attached | None = None      # what the denoiser has on it while it learns
    beside: list[Taken] = field(default_factory=list)   # files of other places that it is used with
    is_video_vae: bool = False                      # the VAE is one of videos: (B, C, frames, h, w)
    denoiser: Any = None                    # UNet or transformer
    vae: Any = None
    text: dict[str, Any] = field(default_factory=dict)  # tokenizers, encoders by pipeline name

    def take_as(self, distilled: Distilled | None) -> None:
        """As one that is distilled, or isn't (None)."""
        self.distilled = distilled
        if self.shifts is not None:
            self.scheduler["shift"] = self.shifts[distilled is not None]


PARTS: tuple[Part, ...] = ("denoiser", "vae", "text")
ALL_PARTS: frozenset[Part] = frozenset(PARTS)
Cond = dict[str, Tensor]                    # name -> (B, ...)


@dataclass(frozen=True, slots=True)
class CropInfo:
    """How a picture was cut; px, width before height."""

    original: tuple[int, int]               # before scaling
    left_top: tuple[int, int]               # where the cut begins, in the scaled picture
    target: tuple[int, int]                 # what is kept: the bucket


class Family(Protocol):
    spec: ClassVar[FamilySpec]

    def load(self, source: Path, precision: Precision,
             only: frozenset[Part] = ALL_PARTS) -> Parts:
        """Reads a diffusers folder or a single .safetensors file; frozen, eval mode.

        Raises UserError where the source is missing, is no such base or can't be read."""

    def skeleton(self, source: Path, precision: Precision,
                 only: frozenset[Part] = ALL_PARTS) -> Parts:
        """The same without weights: modules of the real classes on the meta device, for plans.
        Tokenizers are real. Raises UserError as `load` does."""

    def weight_files(self, source: Path, part: Part) -> list[tuple[Path, str]]:
        """Where a part's weights lie: (file, prefix of its tensors' names). Of text encoders the
        files of tokenizers as well: what is kept on disk goes by all of them."""

    def encode_text(self, parts: Parts, prompts: Sequence[str]) -> Cond:
        """Embeddings of B prompts, on the base's device, of the encoders that are loaded: each
        gives entries of its own, so that they can be loaded one after the other."""

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token numbers (B, L) by encoder, padded, on the CPU; masks as `<encoder>.mask`."""

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        """Embeddings of tokens, on the base's device, with gradients where an encoder trains."""

    def size_conditioning(self, frame: CropInfo) -> Cond:
        """What the denoiser is told of a picture's cut, (1, ...) each; empty: nothing."""

    def count_tokens(self, parts: Parts, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt without start and end."""

    def token_limit(self, parts: Parts) -> int: ...

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the posterior's mean."""

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser's output (B, C, h, w) for noisy latents (B, C, h, w) at timesteps (B,),
        0 to 1000; integers of diffusion bases, any number of flows."""

    def pipeline(self, parts: Parts) -> Any:
        """A diffusers text-to-image pipeline that shares the weights; missing parts are None."""

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        """The pipeline's arguments for embeddings made by `encode_text`."""
