"""How the models of a base are read, offline: from a diffusers folder, or from single files.

Single files have the original code's names; diffusers' own tables turn them into its own. Configs
ship with the app, since files have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from torch import Tensor, nn

from core import paths
from core.families import companions
from core.families.base import Part, Precision
from core.families.detection import Found, denoiser_prefix
from core.faults import Fault
from core.reading import from_json
from core.safetensors_header import PICKLES, read_header

TOKENIZER = paths.DEMO / "base" / "tokenizer"       # CLIP's own, shipped once
Tensors = dict[str, Tensor]
Convert = Callable[[Tensors, dict[str, Any]], Tensors]  # the file's names -> the model's


@dataclass(frozen=True, slots=True)
class Piece:
    """One model of a base."""

    name: str                               # its folder, and the pipeline's argument
    cls: Any
    part: Part
    prefixes: tuple[str, ...] = ()          # of its tensors in a whole checkpoint
    convert: Convert | None = None          # None: diffusers' own table for the class
    alone: str = ""                         # what a file is that holds only this; detection's word
    optional: bool = False
    # A text encoder that is a part of what its folder holds: config.json -> the part's own.
    config: Callable[[dict[str, Any]], Any] | None = None

    @property
    def transformers(self) -> bool:
        return self.part == "text"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the models of a base lie, and what they are made like."""

    source: Path
    found: Found
    configs: dict[str, dict[str, Any]]      # by piece
    scheduler: dict[str, Any]
    files: dict[str, tuple[Path, str]] = field(default_factory=dict)   # of single files; prefix

    @property
    def folder(self) -> bool:
        return self.source.is_dir()


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = from_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise Fault("families.not_a_folder", path=folder,
                    missing=path.relative_to(folder).as_posix()) from None
    except (OSError, ValueError) as error:
        raise Fault("families.unreadable", path=path, reason=first_line(error)) from error
    return found


def configs_in(folder: Path, pieces: tuple[Piece, ...]) -> dict[str, dict[str, Any]]:
    return {piece.name: read_json(folder / piece.name / "config.json", folder)
            for piece in pieces
            if not piece.optional or (folder / piece.name / "config.json").is_file()}


def files_of(source: Path, pieces: tuple[Piece, ...]) -> dict[str, tuple[Path, str]]:
    """The pieces that a single file holds itself, each with its prefix."""
    names = read_header(source).tensors
    found: dict[str, tuple[Path, str]] = {}
    for piece in pieces:
        for prefix in piece.prefixes:
            if any(name.startswith(prefix) for name in names):
                found[piece.name] = source, prefix
                break
        else:
            if piece.part == "denoiser":    # a file that is nothing else
                found[piece.name] = source, ""
    return found


def file_of(layout: Layout, piece: Piece) -> tuple[Path, str] | None:
    """The file of one piece: the base itself, else one beside it. Raises Fault where neither is
    there; None for one that needn't be."""
    if piece.name in layout.files:
        return layout.files[piece.name]
    if not piece.alone:
        raise Fault("families.part_missing", path=layout.source, part=piece.name)
    config = layout.configs[piece.name]
    width = config.get("text_config", config).get("hidden_size", 0)
    path = companions.find_file(layout.source, piece.alone, width)
    if path is None and not piece.optional:
        raise companions.missing(layout.source, piece.alone)
    return (path, "") if path else None


@contextmanager
def told(path: Path) -> Iterator[None]:
    """The libraries fail in any way on configs and weights that make no sense."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (Fault, MemoryError, torch.OutOfMemoryError)):
            raise
        pickles = [p for p in path.glob("*/*") if p.suffix in PICKLES] if path.is_dir() else []
        if pickles and "safetensors" in str(error):             # it looked for them in vain
            raise Fault("families.pickle", path=pickles[0]) from None
        raise Fault("families.unreadable", path=path, reason=first_line(error)) from error


def from_folder(layout: Layout, piece: Piece, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    with told(layout.source):
        if piece.config is not None:
            files = [one for one in weights_in(layout.source / piece.name)
                     if one[0].suffix == ".safetensors"]
            if not files:
                raise OSError(f"{piece.name} holds no .safetensors")
            return _built(layout, piece, dtype, files)
        if piece.transformers:
            return piece.cls.from_pretrained(layout.source / piece.name, dtype=dtype, **options)
        return piece.cls.from_pretrained(layout.source, subfolder=piece.name, torch_dtype=dtype,
                                         **options)


def from_file(layout: Layout, piece: Piece, dtype: torch.dtype) -> Any:
    """None: an optional piece that isn't there."""
    where = file_of(layout, piece)
    if where is None:
        return None
    with told(where[0]):
        return _built(layout, piece, dtype, [where])


def _built(layout: Layout, piece: Piece, dtype: torch.dtype, files: list[tuple[Path, str]]) -> Any:
    """What of the files is no weight of the model is never read."""
    config = layout.configs[piece.name]
    with init_empty_weights():
        model = create(piece, config)
    tensors = {name: value for path, prefix in files
               for name, value in read_tensors(path, prefix).items()}
    fill(model, converted(piece, config, tensors), dtype, files[0][0])
    return model


def create(piece: Piece, config: Mapping[str, Any]) -> Any:
    """A model of the config, where torch's default device says."""
    if piece.transformers:
        return piece.cls((piece.config or piece.cls.config_class.from_dict)(dict(config)))
    return piece.cls.from_config(dict(config))


def converted(piece: Piece, config: dict[str, Any], tensors: Tensors) -> Tensors:
    """By the names of diffusers' models. Some tables read `tensors` empty."""
    if piece.convert is not None:
        return piece.convert(tensors, config)
    return _table(piece.cls)(tensors, config)


def _table(cls: Any) -> Convert:
    """diffusers' own."""
    table = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"]
    return lambda tensors, config: table(checkpoint=tensors, config=config)


def bare(cls: Any) -> Convert:
    """diffusers' table for a denoiser, of those that know no prefix before the names."""
    def convert(tensors: Tensors, config: dict[str, Any]) -> Tensors:
        prefix = denoiser_prefix(tensors)
        return _table(cls)({name.removeprefix(prefix): value for name, value in tensors.items()},
                           config)
    return convert


def fill(model: nn.Module, tensors: Tensors, dtype: torch.dtype, path: Path) -> None:
    """Puts weights into a model without any. Raises Fault where one is missing."""
    if not hasattr(model, "text_model"):    # transformers 5 has none, files have
        tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    names = model.state_dict().keys()
    lacking = sorted(names - tensors.keys() - tied)
    if lacking:
        raise Fault("families.weights_missing", path=path, model=type(model).__name__,
                    count=len(lacking), example=lacking[0])
    numbers = numbers_of(model, dtype)
    model.load_state_dict({name: tensors[name].to(numbers(name))
                           if tensors[name].is_floating_point() else tensors[name]
                           for name in names if name in tensors},
                          strict=False, assign=True)
    if tied:
        model.tie_weights()                 # type: ignore[operator]


def numbers_of(model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What each weight is kept in: the libraries name some that must stay in fp32, transformers'
    for fp16 alone."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not isinstance(model, ModelMixin) and dtype != torch.float16:
        exact = set()
    return lambda name: torch.float32 if exact & set(name.split(".")) else dtype


def read_tensors(path: Path, prefix: str) -> Tensors:
    """One part of a file, memory-mapped; an unpruned file's EMA copy is never touched."""
    with safe_open(path, "pt") as file:
        found = {k: file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
    if not found:
        raise Fault("families.part_missing", path=path, part=prefix.rstrip("."))
    return found


def weights_in(folder: Path) -> list[tuple[Path, str]]:
    """The files of a model's folder that decide what it computes."""
    return [(path, "") for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".json")] if folder.is_dir() else []


def settle(model: Any, precision: Precision) -> Any:
    """Frozen, in eval mode, where it works; convolutions are 1.1x to 1.4x faster channels_last."""
    model.requires_grad_(False).eval().to(precision.device)
    if {p.ndim for p in model.parameters()} & {4, 5} == {4}:    # a video VAE's layout is its own
        model.to(memory_format=torch.channels_last)
    return model


def first_line(error: Exception) -> str:
    if "meta tensor" in str(error):         # what a missing weight looks like to torch
        return "some of its weights are missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
