"""How the models of a base are read, offline: from a diffusers folder, or from single files.

Single files have the original code's names or diffusers' own (checkpoint_keys.py). Configs ship
with the app, since files have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from core import paths
from core.config import schema
from core.errors import UserError
from core.families.base import Family
from core.families.checkpoint_keys import Convert, Tensors, own
from core.families.components import lookup
from core.families.components.lookup import Chosen
from core.families.detection import denoiser_prefix
from core.families.registry import SPECS, outgrows_fp16
from core.families.spec import Found, Part
from core.jobs.events import Event, Note
from core.safetensors_header import PICKLES, read_header
from core.serialization import from_json
from core.weights import precision_rules
from core.weights.lazy import File, Weights, files_in, shapes_of
from core.weights.offload import offload_
from core.weights.precision import Precision, keep_
from core.weights.quantization import fill_, quantize_

TOKENIZER = paths.DEMO / "base" / "tokenizer"       # CLIP's own, shipped once
LARGE_ENCODER = 1e9                                 # parameters; smaller ones stay as they are


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """One model of a base."""

    name: str                               # its folder, and the pipeline's argument
    cls: Any
    part: Part
    prefixes: tuple[str, ...] = ()          # of its tensors in a whole checkpoint
    convert: Convert = own                  # names in files -> the model's
    alone: str = ""                         # what a file is that holds only this; detection's word
    optional: bool = False
    # A text encoder that is a part of what its folder holds: config.json -> the part's own.
    config: Callable[[dict[str, Any]], Any] | None = None
    wide: bool = False                      # its numbers outgrow fp16: bf16 then

    @property
    def transformers(self) -> bool:
        return self.part == "text"


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """Where the models of a base lie, and what they are made like."""

    source: Path
    found: Found
    configs: dict[str, dict[str, Any]]      # by piece
    scheduler: dict[str, Any]
    files: dict[str, tuple[Path, str]] = field(default_factory=dict)   # of single files; prefix
    chosen: Chosen = lookup.NONE        # companions that the user named

    @property
    def folder(self) -> bool:
        return self.source.is_dir()


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = from_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError("families.not_a_folder", path=folder,
                        missing=path.relative_to(folder).as_posix()) from None
    except (OSError, ValueError) as error:
        raise UserError("families.unreadable", path=path, reason=first_line(error)) from error
    return found


def configs_in(folder: Path, pieces: tuple[ComponentSpec, ...]) -> dict[str, dict[str, Any]]:
    return {piece.name: read_json(folder / piece.name / "config.json", folder)
            for piece in pieces
            if not piece.optional or (folder / piece.name / "config.json").is_file()}


def files_of(source: Path, pieces: tuple[ComponentSpec, ...]) -> dict[str, tuple[Path, str]]:
    """The pieces that a single file holds itself, each with its prefix: ComfyUI's and the original
    code's, or the piece's name, as some programs put it before diffusers' names."""
    names = read_header(source).tensors
    found: dict[str, tuple[Path, str]] = {}
    for piece in pieces:
        if piece.part == "denoiser":        # without a prefix: a file that is nothing else
            found[piece.name] = source, denoiser_prefix(names)
            continue
        for prefix in (*piece.prefixes, f"{piece.name}."):
            if any(name.startswith(prefix) for name in names):
                found[piece.name] = source, prefix
                break
    return found


class Shapes(dict[str, tuple[int, ...]]):
    """The shapes of a file's denoiser, by the model's names."""

    def __init__(self, layout: CheckpointLayout, piece: ComponentSpec) -> None:
        self.path, prefix = layout.files[piece.name]
        self.model = piece.cls.__name__
        with told(self.path):
            shapes = shapes_of([(self.path, prefix)], lambda tensors: piece.convert(tensors, {}))
        super().__init__((name, tuple(one.shape)) for name, one in shapes.items())

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise UserError("families.names_unknown", path=self.path, model=self.model, count=1,
                        example=name, names=", ".join(list(self)[:3]))


def file_of(layout: CheckpointLayout, piece: ComponentSpec) -> tuple[Path, str] | None:
    """The file of one piece: one that the user named, the base itself, else one beside it; of a
    base's folder the piece's own. Raises UserError where none is there; None for one that needn't
    be.
    """
    if named := lookup.named(layout.chosen, piece.part, piece.alone):
        return named, ""
    if layout.folder:
        return layout.source / piece.name, ""
    if piece.name in layout.files:
        return layout.files[piece.name]
    if not piece.alone:
        raise UserError("families.part_missing", path=layout.source, part=piece.name)
    path = lookup.find_file(layout.source, piece.alone, layout.configs[piece.name],
                                layout.chosen)
    if path is None and not piece.optional:
        raise lookup.missing(layout.source, piece.alone)
    return (path, "") if path else None


@contextmanager
def told(path: Path) -> Iterator[None]:
    """The libraries fail in any way on configs and weights that make no sense."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)):
            raise
        pickles = [p for p in path.glob("*/*") if p.suffix in PICKLES] if path.is_dir() else []
        if pickles and "safetensors" in str(error):             # it looked for them in vain
            raise UserError("families.pickle", path=pickles[0]) from None
        torn = isinstance(error, (OSError, SafetensorError))
        raise UserError("families.unreadable" if torn else "families.not_understood", path=path,
                        reason=first_line(error)) from error


def load(layout: CheckpointLayout, piece: ComponentSpec, precision: Precision) -> Any:
    """One model as `precision` has it; None: an optional one that isn't there. What of the files is
    no weight of the model is never read. Raises UserError."""
    if (where := file_of(layout, piece)) is None:
        return None
    own = where[0].is_dir()
    plain = own and piece.config is None                # by the model's own names, or nearly
    files: list[File] = [(path, "") for path in files_in(where[0])] if own else [where]
    path = layout.source if own else where[0]
    config = layout.configs[piece.name]
    with told(path):
        if not files and not plain:
            raise OSError(f"{piece.name} holds no .safetensors")
        with init_empty_weights():
            model = create(piece, config)
        weights = Weights(files, lambda tensors: _named(
            model, tensors if plain else piece.convert(tensors, config)))
        if plain and (_lacking(model, weights) or _misshapen(model, weights)):
            return settle(_by_library(layout, piece, precision), piece, precision)
        _refuse_others(model, weights, path)
        return _filled(model, piece, weights, precision)


def _refuse_others(model: nn.Module, weights: Weights, path: Path) -> None:
    """Raises UserError where the files are not this model's."""
    about: dict[str, Any] = {"path": path, "model": type(model).__name__}
    if lacking := _lacking(model, weights):
        about |= {"count": len(lacking), "example": lacking[0]}
        known = model.state_dict()
        if unknown := [name for name in weights.shapes if name not in known]:
            raise UserError("families.names_unknown", **about, names=", ".join(unknown[:3]))
        raise UserError("families.weights_missing", **about)
    if wrong := _misshapen(model, weights):
        raise UserError("families.other_sizes", **about, what=wrong)


def _named(model: nn.Module, tensors: Tensors) -> Tensors:
    """transformers 5 has no `text_model`, files have."""
    if hasattr(model, "text_model"):
        return tensors
    return {name.removeprefix("text_model."): value for name, value in tensors.items()}


def _lacking(model: nn.Module, weights: Weights) -> list[str]:
    tied = getattr(model, "_tied_weights_keys", None) or ()
    return sorted(model.state_dict().keys() - weights.shapes.keys() - {*tied})


def _misshapen(model: nn.Module, weights: Weights) -> str:
    """The first weight of another shape, with both."""
    pairs = ((name, value.shape, weights.shapes[name].shape)
             for name, value in model.state_dict().items() if name in weights.shapes)
    return next((f"{name} is {[*there]}, not {[*here]}" for name, here, there in pairs
                 if here != there), "")


def _by_library(layout: CheckpointLayout, piece: ComponentSpec, precision: Precision) -> Any:
    """Folders with older names in their files, which the libraries know; whole, in RAM."""
    dtype = dtype_of(piece, precision)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    if piece.transformers:
        return piece.cls.from_pretrained(layout.source / piece.name, dtype=dtype, **options)
    return piece.cls.from_pretrained(layout.source, subfolder=piece.name, torch_dtype=dtype,
                                     **options)


def _filled(model: Any, piece: ComponentSpec, weights: Weights, precision: Precision) -> Any:
    """Weight after weight goes to where it stays, in the bits that it keeps."""
    names = [name for name in model.state_dict() if name in weights.shapes]
    dtype, device = dtype_of(piece, precision), precision.device
    cast(model, dtype)
    share = quantised(model, piece, precision)
    there = torch.device("cpu") if share else device
    fill_(model, ((name, weights[name]) for name in names), dtype, there, device)
    if getattr(model, "_tied_weights_keys", None):
        model.tie_weights()
    offload_(model, share, device)
    return model.to(device)


def settle(model: Any, piece: ComponentSpec, precision: Precision) -> Any:
    """The same of a model that is there already, or has no weights at all."""
    share = quantised(model, piece, precision)
    offload_(model, share, precision.device)
    return model if precision.device.type == "meta" else model.to(precision.device)


def quantised(model: Any, piece: ComponentSpec, precision: Precision) -> float:
    """Frozen, in eval mode, its blocks in few bits; convolutions are 1.1x to 1.4x faster
    channels_last. -> share of the blocks that is to wait in RAM"""
    model.requires_grad_(False).eval()
    if {p.ndim for p in model.parameters()} & {4, 5} == {4}:    # a video VAE's layout is its own
        model.to(memory_format=torch.channels_last)
    if piece.part == "denoiser":
        quantize_(model, precision.kept, precision.device)
        return precision.offload
    if piece.part == "vae" or sum(p.numel() for p in model.parameters()) < LARGE_ENCODER:
        return 0.0
    quantize_(model, precision.kept, precision.device)
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return 1.0 if precision.room is not None and held > precision.room else 0.0


def dtype_of(piece: ComponentSpec, precision: Precision) -> torch.dtype:
    if piece.part == "vae":
        return precision.vae
    wide = piece.wide and precision.weights == torch.float16
    return torch.bfloat16 if wide else precision.weights


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights to what each is kept in: the libraries name some that must stay in fp32,
    transformers' for fp16 alone."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not isinstance(model, ModelMixin) and dtype != torch.float16:
        exact = set()
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if exact & set(name.split(".")) else dtype)


def create(piece: ComponentSpec, config: Mapping[str, Any]) -> Any:
    """A model of the config, where torch's default device says."""
    if piece.transformers:
        return piece.cls((piece.config or piece.cls.config_class.from_dict)(dict(config)))
    return piece.cls.from_config(dict(config))


def weights_in(folder: Path) -> list[tuple[Path, str]]:
    """The files of a model's folder that decide what it computes."""
    return [(path, "") for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".json")] if folder.is_dir() else []


def first_line(error: Exception) -> str:
    if "meta tensor" in str(error):         # what a missing weight looks like to torch
        return "some of its weights are missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# --- the denoiser of a run ---

def tell_numbers(wanted: schema.Precision, family: str, precision: Precision,
                 emit: Callable[[Event], None]) -> None:
    """Where a family's numbers outgrow fp16: that fp16 was asked for all the same, or that fp32
    takes its place on a GPU without bf16."""
    if not outgrows_fp16(family):
        return
    title = SPECS[family].title
    if precision.compute == torch.float16:
        emit(Note(key="precision.outgrows_fp16", params={"title": title}))
    elif wanted == "auto" and precision.device.type == "cuda" and (
            precision.compute == torch.float32):
        emit(Note(key="precision.fp32_for_fp16", params={"title": title}))


def load_denoiser(config: schema.TrainConfig, family: Family, source: Path, precision: Precision,
                  emit: Callable[[Event], None] | None = None) -> Any:
    """The base's denoiser as the run keeps it: quantised, part of it in RAM; frozen.

    Weights come one after the other, in the bits that they keep: the whole never has to fit the
    GPU. Raises UserError as the family's `load` does.
    """
    kept = precision_rules.kept_settings(config, precision.device.type)
    if config.offload and "offload" not in kept and emit:
        emit(Note(key="precision.offload_useless", params={"device": precision.device.type}))
    model = family.load(source, replace(precision, **kept), frozenset({"denoiser"})).denoiser
    done = keep_(model, precision.device, **kept)   # families of one's own may have left it
    if done.blocks and not done.pinned and emit:
        emit(Note(key="precision.not_pinned"))
    return model
