"""What families have in common: a table of their models, from which they are loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer

from core import paths
from core.errors import UserError
from core.families import clip, detection, distilled, loading, schedulers, text
from core.families.base import ALL_PARTS, Cond, CropInfo, Objective, Parts
from core.families.components import lookup
from core.families.components.lookup import Chosen, Taken
from core.families.components.tokenizer_kinds import FILES, KINDS, MARKS
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.spec import FamilySpec, Part
from core.weights.precision import Precision


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """An encoder's tokenizer."""

    kind: str = ""                          # of vocabularies.KINDS; empty: CLIP's
    length: int = 77                        # tokens that the pipeline feeds
    pad: str = "<|endoftext|>"              # of CLIP's
    chat: str = ""                          # the template that the model was trained with


class ComponentFamily:
    """The part of the Family protocol that follows from `pieces` and `vocabularies`."""

    spec: ClassVar[FamilySpec]
    kind: ClassVar[str]                     # its id among the built-in ones, also of heirs
    pieces: ClassVar[tuple[ComponentSpec, ...]]
    vocabularies: ClassVar[Mapping[str, TokenizerSpec]]
    pipe: ClassVar[Any]                     # of diffusers
    chosen: Chosen = lookup.NONE        # companions that the user named

    def layout(self, source: Path) -> CheckpointLayout:
        """Raises UserError where `source` is no base of this family, or lacks a config."""
        found = detection.expect(source, self.kind)
        configs = source if source.is_dir() else paths.family_configs(self.kind)
        scheduler = loading.read_json(configs / "scheduler" / "scheduler_config.json", configs)
        layout = CheckpointLayout(source, found, loading.configs_in(configs, self.pieces),
                                  scheduler,
                                  {} if source.is_dir() else loading.files_of(source, self.pieces),
                                  self.chosen)
        if not source.is_dir():
            with loading.told(source):
                self.adapt(layout)
        return layout

    def adapt(self, layout: CheckpointLayout) -> None:
        """Makes the shipped configs fit a single file."""

    def shapes(self, layout: CheckpointLayout) -> loading.Shapes:
        """Of a single file's denoiser, by its names in diffusers."""
        return loading.Shapes(layout, self.pieces[0])

    def empty(self, layout: CheckpointLayout) -> Parts:
        raise NotImplementedError

    def load(self, source: Path, precision: Precision,
             only: frozenset[Part] = ALL_PARTS) -> Parts:
        layout, parts = self._begin(source)
        for piece in self._wanted(layout, only):
            model = loading.load(layout, piece, precision)
            if model is not None:
                self._put(parts, layout, piece, model, real=True)
        return parts

    def skeleton(self, source: Path, precision: Precision,
                 only: frozenset[Part] = ALL_PARTS) -> Parts:
        layout, parts = self._begin(source)
        for piece in self._wanted(layout, only):
            with loading.told(source), torch.device("meta"):
                model = loading.create(piece, layout.configs[piece.name])
            dtype = loading.dtype_of(piece, precision)
            loading.cast(model.to(dtype=dtype), dtype)
            self._put(parts, layout, piece, loading.settle(model, piece, precision), real=False)
        return parts

    def _begin(self, source: Path) -> tuple[CheckpointLayout, Parts]:
        layout = self.layout(source)
        with loading.told(source):          # configs may say anything
            parts = self.empty(layout)
        parts.take_as(distilled.told(source, layout.found))
        return layout, parts

    def _wanted(self, layout: CheckpointLayout, only: frozenset[Part]) -> list[ComponentSpec]:
        return [piece for piece in self.pieces if piece.name in layout.configs
                and (piece.part in only or piece.name in only)]

    def _put(self, parts: Parts, layout: CheckpointLayout, piece: ComponentSpec, model: Any,
             real: bool) -> None:
        if piece.part == "text":
            parts.text[_tokenizer_of(piece.name)] = self._tokenizer(layout, piece.name, real)
            parts.text[piece.name] = model
        else:
            setattr(parts, piece.part, model)

    def _tokenizer(self, layout: CheckpointLayout, encoder: str, real: bool) -> Any:
        vocabulary, own = self.vocabularies[encoder], layout.source / _tokenizer_of(encoder)
        if not vocabulary.kind:
            if not own.is_dir():
                return CLIPTokenizer.from_pretrained(loading.TOKENIZER, pad_token=vocabulary.pad)
            with loading.told(own):
                return AutoTokenizer.from_pretrained(own, local_files_only=True)
        try:
            folder = self._words(layout, encoder)
            with loading.told(folder):
                made = text.open_tokenizer(folder, KINDS[vocabulary.kind])
        except UserError as fault:
            if real:
                raise
            return text.Blank(vocabulary.length, fault)
        if folder != own:
            made.padding_side = "right"
        made.chat_template = vocabulary.chat or made.chat_template
        return made

    def _words(self, layout: CheckpointLayout, encoder: str) -> Path:
        """The folder of an encoder's tokenizer. Raises UserError where it is none for it."""
        config = layout.configs[encoder]
        with loading.told(layout.source):   # some configs leave out what is usual
            rows = int(config.get("text_config", config).get("vocab_size", sys.maxsize))
        return lookup.find_tokenizer(layout.source, _tokenizer_of(encoder), KINDS[
            self.vocabularies[encoder].kind], rows, self.chosen)

    def beside(self, source: Path) -> list[Taken]:
        """What a base is used with that it doesn't hold itself. Raises UserError where something is
        missing, and where it can't be told which of several files is meant."""
        layout = self.layout(source)
        found: list[Taken] = []
        for piece in self.pieces:
            if piece.part == "denoiser" or piece.name not in layout.configs:
                continue
            file = loading.file_of(layout, piece)
            if file is None or file[0] not in (source, source / piece.name):
                found.append(lookup.taken_file(
                    piece.name, file[0], layout.configs[piece.name]) if file
                             else Taken(piece.name, None))
            if file and piece.part == "text" and self.vocabularies[piece.name].kind:
                folder = self._words(layout, piece.name)
                if not folder.is_relative_to(source) or folder == self.chosen.tokenizer:
                    found.append(lookup.taken_tokenizer(_tokenizer_of(piece.name), folder))
        lookup.check_used(self.chosen, found, self.spec.title)
        return found

    def weight_files(self, source: Path, part: Part) -> list[tuple[Path, str]]:
        layout, found = self.layout(source), list[tuple[Path, str]]()
        for piece in self._wanted(layout, frozenset({part})):
            if (file := loading.file_of(layout, piece)) is None:
                continue
            found += loading.weights_in(file[0]) if file[0].is_dir() else [file]
            if piece.part == "text" and self.vocabularies[piece.name].kind:
                words = self._words(layout, piece.name)     # other tokens are another text
                found += [(words / name, "") for name in (*FILES, *MARKS)
                          if (words / name).is_file()]
        return found

    def encode_text(self, parts: Parts, prompts: Sequence[str]) -> Cond:
        with torch.no_grad():
            return self.encode_tokens(parts, self.tokenize(parts, prompts))

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: text.padded(parts.text[_tokenizer_of(name)], prompts, kind.length).input_ids
                for name, kind in self.vocabularies.items() if name in parts.text}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        raise NotImplementedError

    def count_tokens(self, parts: Parts, prompts: Sequence[str]) -> list[int]:
        return text.count(parts.text[_tokenizer_of(self._last(parts))], prompts)

    def token_limit(self, parts: Parts) -> int:
        kind = self.vocabularies[self._last(parts)]
        return kind.length - (1 if kind.kind else 2)

    def _last(self, parts: Parts) -> str:
        """The encoder that reads the most of a prompt."""
        return [name for name in self.vocabularies if name in parts.text][-1]

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            vae = parts.vae
            latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
            shift = float(vae.config.get("shift_factor") or 0.0)
            return (latents - shift) * float(vae.config.scaling_factor)

    def size_conditioning(self, frame: CropInfo) -> Cond:
        return {}

    def pipeline(self, parts: Parts) -> Any:
        models = {piece.name: {"denoiser": parts.denoiser, "vae": parts.vae}.get(
            piece.part, parts.text.get(piece.name)) for piece in self.pieces}
        words = {_tokenizer_of(name): parts.text.get(_tokenizer_of(name))
                 for name in self.vocabularies}
        made = self.pipe(**models, **words, scheduler=schedulers.create("auto", parts),
                         **self.pipe_options(parts))
        made.set_progress_bar_config(disable=True)
        return made

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        return {}


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def index_of(source: Path) -> dict[str, Any]:
    """A folder's model_index.json; a single file has none."""
    return loading.read_json(source / "model_index.json", source) if source.is_dir() else {}


def vae_factor(layout: CheckpointLayout) -> int:
    """Pixels of a latent pixel, a side."""
    return int(2 ** (len(layout.configs["vae"]["block_out_channels"]) - 1))


def dit_sizes(layout: CheckpointLayout, patch: int = 2) -> tuple[int, int]:
    """Native side and bucket step, in px, of a transformer with tokens of `patch` latent pixels a
    side: what its VAE was made for, and four tokens, which are 64 px in practice."""
    native = layout.configs["vae"]["sample_size"]
    if not isinstance(native, int) or not 1 <= native <= 8192:
        raise ValueError(f"sample_size: {native}")
    return native, 4 * patch * vae_factor(layout)


def layer_count(shapes: Mapping[str, Any], prefix: str) -> int:
    """Blocks called `<prefix>0.`, `<prefix>1.` ..."""
    numbers = {name[len(prefix):].split(".")[0] for name in shapes if name.startswith(prefix)}
    return max((int(n) for n in numbers if n.isdigit()), default=-1) + 1


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, C * 4): tokens of 2 x 2 latent pixels."""
    b, c, h, w = latents.shape
    split = latents.reshape(b, c, h // 2, 2, w // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back; height and width in tokens."""
    b, _, c = tokens.shape
    split = tokens.reshape(b, height, width, c // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height * 2, width * 2)


class UNetFamily(ComponentFamily):
    """Stable Diffusion 1, 2 and XL."""

    step_multiple: ClassVar[int] = 1        # of what the UNet itself asks of sides

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: clip.tokenize(parts.text[_tokenizer_of(name)], prompts,
                                    parts.reading.max_tokens)
                for name in self.vocabularies if name in parts.text}

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
        if layout.found.zero_snr:           # as its makers draw with it (arXiv 2305.08891)
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return Parts(layout.source, scheduler, objective, native_size=unet["sample_size"] * factor,
                     bucket_step=factor * 2 ** (levels - 1) * self.step_multiple)
