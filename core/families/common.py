"""What families have in common: a table of their models, from which they are loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer, T5EncoderModel

from core import paths
from core.errors import UserError
from core.families import checkpoint_keys, clip, detection, distilled, loading, schedulers, text
from core.families.base import ALL_PARTS, Cond, CropInfo, Parts
from core.families.checkpoint_keys import Tensors
from core.families.components import lookup
from core.families.components.lookup import ComponentFiles, UsedComponent
from core.families.components.tokenizer_kinds import FILES, KINDS, MARKS
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.spec import FamilySpec, Part
from core.families.timestep_sampling import TimestepSampling
from core.prompt_markup import Spans
from core.weights.precision import Precision

LARGEST_SIDE = 8192                         # px; a config that says more is not believed


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The tokenizer of one text encoder."""

    kind: str = ""                          # of tokenizer_kinds.KINDS; empty: CLIP's
    length: int = 77                        # tokens that the pipeline feeds
    pad: str = "<|endoftext|>"              # CLIP's padding; the other kinds know theirs
    chat: str = ""                          # the chat template that the model was trained with


def denoiser_spec(cls: Any, spec: FamilySpec,
                  finish: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> ComponentSpec:
    """The denoiser of a family. `finish` does what the family's table of names can't say."""
    by_table = checkpoint_keys.by_table(spec.naming[0])
    return ComponentSpec(spec.naming[0].name, cls, "denoiser",
                         convert=lambda tensors, config: finish(by_table(tensors, config)))


def vae_spec(file_kind: str, *prefixes: str) -> ComponentSpec:
    """Stable Diffusion's VAE and those of its shape; `prefixes` are of its tensors in a file."""
    return ComponentSpec("vae", AutoencoderKL, "vae", prefixes, checkpoint_keys.vae, file_kind)


def t5_spec(name: str, optional: bool = False) -> ComponentSpec:
    return ComponentSpec(name, T5EncoderModel, "text", ("text_encoders.t5xxl.transformer.",),
                         file_kind="t5", optional=optional)


class ComponentFamily:
    """The part of the Family protocol that follows from `components` and `tokenizers`."""

    spec: ClassVar[FamilySpec]
    kind: ClassVar[str]                     # id of the built-in family, also in plugins' subclasses
    components: ClassVar[tuple[ComponentSpec, ...]]     # the denoiser first
    tokenizers: ClassVar[Mapping[str, TokenizerSpec]]   # by text encoder
    pipe: ClassVar[Any]                     # the pipeline class of diffusers
    component_files: ComponentFiles = lookup.NO_FILES   # that the user named

    def layout(self, source: Path) -> CheckpointLayout:
        """Reads the configs of a base, but no weights. Raises UserError where `source` is no base
        of this family, or lacks a config."""
        found = detection.expect(source, self.kind)
        is_file = not source.is_dir()
        # Single files hold no configs: the family's own ship with the app.
        configs = paths.family_configs(self.kind) if is_file else source
        scheduler = loading.read_json(configs / "scheduler" / "scheduler_config.json", configs)
        layout = CheckpointLayout(
            source, found, loading.configs_in(configs, self.components), scheduler,
            loading.files_of(source, self.components) if is_file else {}, self.component_files)
        if is_file:
            with loading.as_user_error(source):
                self.adapt(layout)
        return layout

    def adapt(self, layout: CheckpointLayout) -> None:
        """Changes the shipped configs so that they fit a single file."""

    def shapes(self, layout: CheckpointLayout) -> loading.Shapes:
        """The shapes of a single file's denoiser, by the names that diffusers gives its weights."""
        return loading.Shapes(layout, self.components[0])

    def empty(self, layout: CheckpointLayout) -> Parts:
        """A base without its models. Raises any error where a config makes no sense."""
        raise NotImplementedError

    def load(self, source: Path, precision: Precision,
             only: frozenset[Part] = ALL_PARTS) -> Parts:
        return self._assemble(source, precision, only, loading.load, is_plan=False)

    def skeleton(self, source: Path, precision: Precision,
                 only: frozenset[Part] = ALL_PARTS) -> Parts:
        return self._assemble(source, precision, only, loading.skeleton, is_plan=True)

    def _assemble(self, source: Path, precision: Precision, only: frozenset[Part],
                  make: Callable[[CheckpointLayout, ComponentSpec, Precision], Any],
                  is_plan: bool) -> Parts:
        layout = self.layout(source)
        # Configs may say anything.
        with loading.as_user_error(source):
            parts = self.empty(layout)
        parts.take_as(distilled.of(source, found=layout.found))
        for component in self._components(layout, only):
            model = make(layout, component, precision)
            if component.part != "text":
                setattr(parts, component.part, model)
            # An optional one may be missing.
            elif model is not None:
                parts.text |= {_tokenizer_of(component.name): self._tokenizer(
                    layout, component.name, is_plan), component.name: model}
        return parts

    def _components(self, layout: CheckpointLayout, only: frozenset[Part]) -> list[ComponentSpec]:
        return [component for component in self.components if component.name in layout.configs
                and {component.part, component.name} & only]

    def _tokenizer(self, layout: CheckpointLayout, encoder: str, is_plan: bool) -> Any:
        spec, own_folder = self.tokenizers[encoder], layout.source / _tokenizer_of(encoder)
        if not spec.kind and not own_folder.is_dir():
            return CLIPTokenizer.from_pretrained(loading.TOKENIZER, pad_token=spec.pad)
        if not spec.kind:
            with loading.as_user_error(own_folder):
                return AutoTokenizer.from_pretrained(own_folder, local_files_only=True)
        try:
            folder = self._tokenizer_folder(layout, encoder)
            with loading.as_user_error(folder):
                tokenizer = text.open_tokenizer(folder, KINDS[spec.kind])
        except UserError as error:
            if not is_plan:
                raise
            # A plan needs only the length of the longest text.
            return text.Blank(spec.length, error)
        # The side of padding is only taken from a base's own tokenizer.
        if folder != own_folder:
            tokenizer.padding_side = "right"
        tokenizer.chat_template = spec.chat or tokenizer.chat_template
        return tokenizer

    def _tokenizer_folder(self, layout: CheckpointLayout, encoder: str) -> Path:
        """Raises UserError where no tokenizer for this encoder is found."""
        config = layout.configs[encoder]
        # Some configs leave out what is usual in their library: then any tokenizer fits.
        with loading.as_user_error(layout.source):
            rows = int(config.get("text_config", config).get("vocab_size", sys.maxsize))
        return lookup.find_tokenizer(layout.source, _tokenizer_of(encoder), KINDS[
            self.tokenizers[encoder].kind], rows, self.component_files)

    def beside(self, source: Path) -> list[UsedComponent]:
        """What a base is used with that it doesn't hold itself.

        Raises UserError where something is missing, where several files fit and differ, and where
        the user named a file that the base has no use for.
        """
        layout = self.layout(source)
        used: list[UsedComponent] = []
        for component in self._components(layout, frozenset(("vae", "text"))):
            name, location = component.name, loading.file_of(layout, component)
            if location is None:
                used.append(UsedComponent(name, None))
                continue
            if location[0] not in (source, source / name):
                used.append(lookup.used_file(name, location[0], layout.configs[name]))
            if component.part == "text" and self.tokenizers[name].kind:
                folder = self._tokenizer_folder(layout, name)
                if not folder.is_relative_to(source) or folder == self.component_files.tokenizer:
                    used.append(lookup.used_tokenizer(_tokenizer_of(name), folder))
        lookup.check_used(self.component_files, used, self.spec.title)
        return used

    def weight_files(self, source: Path, part: Part) -> list[tuple[Path, str]]:
        layout, files = self.layout(source), list[tuple[Path, str]]()
        for component in self._components(layout, frozenset({part})):
            if (location := loading.file_of(layout, component)) is None:
                continue
            files += loading.weights_in(location[0]) if location[0].is_dir() else [location]
            # The same encoder gives other embeddings for other tokens.
            if component.part == "text" and self.tokenizers[component.name].kind:
                folder = self._tokenizer_folder(layout, component.name)
                files += [(folder / name, "") for name in (*FILES, *MARKS)
                          if (folder / name).is_file()]
        return files

    def encode_text(self, parts: Parts, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            return self.encode_tokens(parts, self.tokenize(parts, prompts))

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: text.padded(parts.text[_tokenizer_of(name)], prompts, spec.length).input_ids
                for name, spec in self.tokenizers.items() if name in parts.text}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        raise NotImplementedError

    def count_tokens(self, parts: Parts, prompts: Sequence[str]) -> list[int]:
        return text.count(parts.text[_tokenizer_of(self._last(parts))], prompts)

    def token_limit(self, parts: Parts) -> int:
        spec = self.tokenizers[self._last(parts)]
        # CLIP's texts have a mark at the start and one at the end, the others' only one.
        return spec.length - (1 if spec.kind else 2)

    def _last(self, parts: Parts) -> str:
        """The last of the loaded text encoders, which reads the most of a prompt."""
        return [name for name in self.tokenizers if name in parts.text][-1]

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            vae = parts.vae
            latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
            shift = float(vae.config.get("shift_factor") or 0.0)
            return (latents - shift) * float(vae.config.scaling_factor)

    def size_conditioning(self, frame: CropInfo) -> Cond:
        return {}

    def pipeline(self, parts: Parts) -> Any:
        tokenizers = map(_tokenizer_of, self.tokenizers)
        loaded = {self.components[0].name: parts.denoiser, "vae": parts.vae,
                  **{name: parts.text.get(name) for name in (*self.tokenizers, *tokenizers)}}
        pipeline = self.pipe(**loaded, scheduler=schedulers.create("auto", parts),
                             **self.pipe_options(parts))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        """More arguments for the pipeline's class."""
        return {}


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


class UNetFamily(ComponentFamily):
    """Stable Diffusion 1, 2 and XL."""

    step_multiple: ClassVar[int] = 1        # bucket step / the step that the UNet itself needs

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: clip.tokenize(parts.text[_tokenizer_of(name)], prompts,
                                    parts.reading.max_tokens)
                for name in self.tokenizers if name in parts.text}

    def encode_spans(self, parts: Parts, prompts: Sequence[Spans]) -> Cond:
        """Embeddings of B prompts whose parts weigh differently. As in ComfyUI, a token's states go
        from those of an empty prompt to their own and, beyond a weight of 1, further."""
        encoded = {name: clip.tokenize_spans(parts.text[_tokenizer_of(name)], prompts,
                                             parts.reading.max_tokens)
                   for name in self.tokenizers if name in parts.text}
        with torch.no_grad():
            cond = self.encode_tokens(parts, {name: ids for name, (ids, _) in encoded.items()})
            nothing = self.encode_text(parts, [""])
            for name, (_, weights) in encoded.items():
                key = name.replace("text_encoder", "text")
                empty = nothing[key].repeat(1, weights.shape[1] // clip.WHOLE, 1)
                # exact for a weight of 1
                cond[key] = torch.lerp(empty, cond[key], weights[..., None].to(cond[key]))
        return cond

    def token_limit(self, parts: Parts) -> int:
        return parts.reading.max_tokens

    def empty(self, layout: CheckpointLayout) -> Parts:
        unet, scheduler, factor = layout.configs["unet"], dict(layout.scheduler), vae_factor(layout)
        side, levels = checked_side(unet["sample_size"], 1024), len(unet["block_out_channels"])
        if layout.found.v_prediction:
            scheduler["prediction_type"] = "v_prediction"
        # As the makers of such bases draw with them (arXiv 2305.08891).
        if layout.found.zero_snr:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return Parts(layout.source, scheduler, scheduler.get("prediction_type", "epsilon"),
                     side * factor, factor * 2 ** (levels - 1) * self.step_multiple)


class FlowFamily(ComponentFamily):
    """A transformer that learns a flow."""

    sampling: ClassVar[TimestepSampling]    # how often each noise level is learned
    # As in Parts.
    guidance: ClassVar[str] = "guidance_scale"
    no_guidance_value: ClassVar[float] = 1.0
    is_video_vae: ClassVar[bool] = False

    def sizes(self, layout: CheckpointLayout) -> tuple[int, int]:
        """Native side and bucket step, in px: what the VAE was made for, and four tokens of two
        latent pixels a side, which are 64 px in practice."""
        return checked_side(layout.configs["vae"]["sample_size"]), 8 * vae_factor(layout)

    def empty(self, layout: CheckpointLayout) -> Parts:
        return Parts(layout.source, layout.scheduler, "flow", *self.sizes(layout), self.sampling,
                     self.guidance, self.no_guidance_value, is_video_vae=self.is_video_vae)


def vae_factor(layout: CheckpointLayout) -> int:
    """How many px a latent pixel is wide, for a VAE that halves the picture between its levels."""
    return int(2 ** (len(layout.configs["vae"]["block_out_channels"]) - 1))


def checked_side(side: Any, largest: int = LARGEST_SIDE) -> int:
    """A side in (latent) px from a config. Raises ValueError for what no picture can be."""
    if not isinstance(side, int) or not 1 <= side <= largest:
        raise ValueError(f"sample_size: {side}")
    return side


