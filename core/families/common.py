"""What families have in common: a table of their models, from which they are loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer

from core import paths
from core.errors import UserError
from core.families import checkpoint_keys, clip, detection, distilled, loading, schedulers, text
from core.families.base import ALL_PARTS, Cond, CropInfo, Objective, Parts
from core.families.components import lookup
from core.families.components.lookup import ComponentFiles, UsedComponent
from core.families.components.tokenizer_kinds import FILES, KINDS, MARKS
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.spec import FamilySpec, Part
from core.families.timestep_sampling import STEPS, TimestepSampling
from core.weights.precision import Precision

LARGEST_SIDE = 8192                         # px; a config that says more is not believed


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The tokenizer of one text encoder."""

    kind: str = ""                          # of tokenizer_kinds.KINDS; empty: CLIP's
    length: int = 77                        # tokens that the pipeline feeds
    pad: str = "<|endoftext|>"              # CLIP's padding; the other kinds know theirs
    chat: str = ""                          # the chat template that the model was trained with


def denoiser_spec(cls: Any, spec: FamilySpec) -> ComponentSpec:
    """The denoiser of a family whose table of names says all that single files call otherwise."""
    return ComponentSpec(spec.naming[0].name, cls, "denoiser",
                         convert=checkpoint_keys.by_table(spec.naming[0]))


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
            # An optional one may be missing.
            if model is None:
                continue
            if component.part == "text":
                parts.text[_tokenizer_of(component.name)] = self._tokenizer(
                    layout, component.name, is_plan)
                parts.text[component.name] = model
            else:
                setattr(parts, component.part, model)
        return parts

    def _components(self, layout: CheckpointLayout, only: frozenset[Part]) -> list[ComponentSpec]:
        return [component for component in self.components if component.name in layout.configs
                and (component.part in only or component.name in only)]

    def _tokenizer(self, layout: CheckpointLayout, encoder: str, is_plan: bool) -> Any:
        spec, own_folder = self.tokenizers[encoder], layout.source / _tokenizer_of(encoder)
        if not spec.kind:
            if not own_folder.is_dir():
                return CLIPTokenizer.from_pretrained(loading.TOKENIZER, pad_token=spec.pad)
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
        for component in self.components:
            name = component.name
            if component.part == "denoiser" or name not in layout.configs:
                continue
            location = loading.file_of(layout, component)
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
        models = {component.name: {"denoiser": parts.denoiser, "vae": parts.vae}.get(
            component.part, parts.text.get(component.name)) for component in self.components}
        tokenizers = {_tokenizer_of(name): parts.text.get(_tokenizer_of(name))
                      for name in self.tokenizers}
        pipeline = self.pipe(**models, **tokenizers, scheduler=schedulers.create("auto", parts),
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

    def token_limit(self, parts: Parts) -> int:
        return parts.reading.max_tokens

    def empty(self, layout: CheckpointLayout) -> Parts:
        unet, scheduler = layout.configs["unet"], dict(layout.scheduler)
        if not isinstance(unet["sample_size"], int) or not 1 <= unet["sample_size"] <= 1024:
            raise ValueError(f"sample_size: {unet['sample_size']}")
        factor, levels = vae_factor(layout), len(unet["block_out_channels"])
        objective: Objective = scheduler.get("prediction_type", "epsilon")
        if layout.found.v_prediction:
            objective = "v_prediction"
            scheduler["prediction_type"] = objective
        # As the makers of such bases draw with them (arXiv 2305.08891).
        if layout.found.zero_snr:
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return Parts(layout.source, scheduler, objective, native_size=unet["sample_size"] * factor,
                     bucket_step=factor * 2 ** (levels - 1) * self.step_multiple)


class FlowFamily(ComponentFamily):
    """A transformer that learns a flow."""

    sampling: ClassVar[TimestepSampling]    # how often each noise level is learned

    def sizes(self, layout: CheckpointLayout) -> tuple[int, int]:
        """Native side and bucket step, in px."""
        return dit_sizes(layout)

    def empty(self, layout: CheckpointLayout) -> Parts:
        return Parts(layout.source, layout.scheduler, "flow", *self.sizes(layout),
                     flow=self.sampling)


def index_of(source: Path) -> dict[str, Any]:
    """The model_index.json of a folder; empty for a single file, which has none."""
    return loading.read_json(source / "model_index.json", source) if source.is_dir() else {}


def vae_factor(layout: CheckpointLayout) -> int:
    """How many px a latent pixel is wide, for a VAE that halves the picture between its levels."""
    return int(2 ** (len(layout.configs["vae"]["block_out_channels"]) - 1))


def dit_sizes(layout: CheckpointLayout, patch: int = 2) -> tuple[int, int]:
    """Native side and bucket step, in px, of a transformer with tokens of `patch` latent pixels a
    side: what its VAE was made for, and four tokens, which are 64 px in practice."""
    return checked_side(layout.configs["vae"]["sample_size"]), 4 * patch * vae_factor(layout)


def checked_side(side: Any) -> int:
    """A side in px from a config. Raises ValueError for what no picture can be."""
    if not isinstance(side, int) or not 1 <= side <= LARGEST_SIDE:
        raise ValueError(f"sample_size: {side}")
    return side


def layer_count(shapes: Mapping[str, Any], prefix: str) -> int:
    """How many blocks there are whose names are `<prefix>0.`, `<prefix>1.` ..."""
    numbers = {name[len(prefix):].split(".")[0] for name in shapes if name.startswith(prefix)}
    return max((int(n) for n in numbers if n.isdigit()), default=-1) + 1


# --- transformers whose tokens are 2 x 2 latent pixels ---

def predict_packed(denoiser: Any, noisy: Tensor, t: Tensor, embeddings: Tensor,
                   **inputs: Any) -> Tensor:
    """Calls a denoiser that reads and writes packed latents; `noisy` and the result are unpacked,
    (B, C, h, w)."""
    tokens = denoiser(hidden_states=pack(noisy), timestep=t / STEPS,
                      encoder_hidden_states=embeddings, return_dict=False, **inputs)[0]
    return unpack(tokens, noisy.shape[2] // 2, noisy.shape[3] // 2)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, C * 4): tokens of 2 x 2 latent pixels."""
    b, c, h, w = latents.shape
    split = latents.reshape(b, c, h // 2, 2, w // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C * 4) -> (B, C, height * 2, width * 2): undoes `pack`; height and width
    are counted in tokens."""
    b, _, c = tokens.shape
    split = tokens.reshape(b, height, width, c // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height * 2, width * 2)


def positions(latents: Tensor) -> Tensor:
    """(h/2 * w/2, 3): 0, row and column of each token of latents (B, C, h, w)."""
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    rows, columns = (torch.arange(side, device=latents.device, dtype=latents.dtype)
                     for side in (height, width))
    grid = torch.stack([latents.new_zeros(height, width), rows[:, None].expand(height, width),
                        columns[None].expand(height, width)], -1)
    return grid.flatten(0, 1)
