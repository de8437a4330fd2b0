"""How the models of a base are read, offline: from a diffusers folder, or from single files.

Single files have the original code's names or diffusers' own (checkpoint_keys.py). Configs ship
with the app, since files have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from core import i18n, paths
from core.config import schema
from core.errors import UserError
from core.failures import ran_out
from core.families.base import Family
from core.families.checkpoint_keys import Convert, Tensors, unchanged
from core.families.components import lookup
from core.families.components.lookup import ComponentFiles
from core.families.detection import denoiser_prefix
from core.families.registry import SPECS, outgrows_fp16
from core.families.spec import Found, Part
from core.jobs.events import Event, Note
from core.safetensors_header import PICKLES, read_header
from core.serialization import from_json
from core.weights import precision_rules
from core.weights.lazy import File, Weights, files_in, shapes_of
from core.weights.offload import offload_
from core.weights.precision import Precision, quantize_and_offload_
from core.weights.quantization import fill_, quantize_

# CLIP's own tokenizer, which all CLIP encoders read with: it ships once, with the demo base.
TOKENIZER = paths.CLIP_TOKENIZER
# Parameters from which a text encoder is quantised. CLIP's encoders (0.1 to 0.7 billion) are
# smaller and stay as they are, T5 and the language models are larger.
LARGE_ENCODER = 1e9


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """One model of a base, and how its weights are found in files."""

    name: str                               # its folder, and the pipeline's argument
    cls: Any
    part: Part
    prefixes: tuple[str, ...] = ()          # of its tensors in a whole checkpoint
    convert: Convert = unchanged                  # names in files -> the model's
    # `Found.what` of a file that holds this component alone; empty: there are no such files.
    file_kind: str = ""
    optional: bool = False
    # For a text encoder that is only a part of what its folder holds: makes the encoder's own
    # config from the folder's config.json.
    config: Callable[[dict[str, Any]], Any] | None = None
    outgrows_fp16: bool = False             # its activations do; it is read in bf16 then

    @property
    def transformers(self) -> bool:
        """Whether its class is one of transformers; the others are diffusers'."""
        return self.part == "text"


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """Where the models of a base lie, and their configs."""

    source: Path
    found: Found
    configs: dict[str, dict[str, Any]]      # by component
    scheduler: dict[str, Any]
    # What a single file holds itself: component -> the file, and the prefix of its tensors.
    files: dict[str, tuple[Path, str]] = field(default_factory=dict)
    component_files: ComponentFiles = lookup.NO_FILES   # that the user named


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A config of the base in `folder`. Raises UserError where it is missing or unreadable."""
    try:
        config: dict[str, Any] = from_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError("families.not_a_folder", path=folder,
                        missing=path.relative_to(folder).as_posix()) from None
    except (OSError, ValueError) as error:
        raise UserError("families.unreadable", path=path, reason=first_line(error)) from error
    return config


def configs_in(folder: Path, components: tuple[ComponentSpec, ...]) -> dict[str, dict[str, Any]]:
    """The config.json of each component. An optional component without one is left out."""
    return {component.name: read_json(folder / component.name / "config.json", folder)
            for component in components
            if not component.optional or (folder / component.name / "config.json").is_file()}


def files_of(source: Path, components: tuple[ComponentSpec, ...]) -> dict[str, tuple[Path, str]]:
    """The components that a single file holds itself, each with the prefix of its tensors."""
    names = read_header(source).tensors
    # The denoiser's prefix may be empty: then the file holds nothing else.
    files = {components[0].name: (source, denoiser_prefix(names))}
    for component in components[1:]:
        # Some programs write diffusers' names behind the component's name.
        for prefix in (*component.prefixes, f"{component.name}."):
            if any(name.startswith(prefix) for name in names):
                files.setdefault(component.name, (source, prefix))
    return files


class Shapes(dict[str, tuple[int, ...]]):
    """The shapes of the tensors of a file's denoiser, by the model's names."""

    def __init__(self, layout: CheckpointLayout, component: ComponentSpec) -> None:
        self.path, prefix = layout.files[component.name]
        self.model = component.cls.__name__
        with as_user_error(self.path):
            tensors = shapes_of([(self.path, prefix)],
                                lambda tensors: component.convert(tensors, {}))
        super().__init__((name, tuple(tensor.shape)) for name, tensor in tensors.items())

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise UserError("families.names_unknown", path=self.path, model=self.model, count=1,
                        example=name, names=", ".join(list(self)[:3]))


def layer_count(shapes: Iterable[str], prefix: str) -> int:
    """How many blocks there are whose names are `<prefix>0.`, `<prefix>1.` ..."""
    numbers = {name[len(prefix):].split(".")[0] for name in shapes if name.startswith(prefix)}
    return max((int(n) for n in numbers if n.isdigit()), default=-1) + 1


def block_counts(shapes: Shapes) -> dict[str, int]:
    """How many blocks of two streams and of one stream a Flux has, for its config."""
    return {"num_layers": layer_count(shapes, "transformer_blocks."),
            "num_single_layers": layer_count(shapes, "single_transformer_blocks.")}


def file_of(layout: CheckpointLayout, component: ComponentSpec) -> tuple[Path, str] | None:
    """Where one component is read from: a file or folder, and the prefix of its tensors.

    A file that the user named comes first, then the base itself, then a file beside the base.
    Returns None where an optional component is missing. Raises UserError for any other.
    """
    if named := lookup.named(layout.component_files, component.part, component.file_kind):
        return named, ""
    if layout.source.is_dir():
        return layout.source / component.name, ""
    if component.name in layout.files:
        return layout.files[component.name]
    if not component.file_kind:
        raise UserError("families.part_missing", path=layout.source, part=component.name)
    path = lookup.find_file(layout.source, component.file_kind, layout.configs[component.name],
                            layout.component_files)
    if path is None and not component.optional:
        raise UserError("families.companion_missing", path=layout.source,
                        folder=layout.source.parent,
                        part=i18n.tr(f"families.is_{component.file_kind}"))
    return (path, "") if path else None


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turns what the libraries raise about the files at `path` into a UserError.

    On configs and weights that make no sense they fail in any way, so every exception counts.
    Running out of memory says nothing about the files and passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or ran_out(error):
            raise
        pickles = [p for p in path.glob("*/*") if p.suffix in PICKLES] if path.is_dir() else []
        # The library looked for .safetensors in vain: the folder has pickles in their place.
        if pickles and "safetensors" in str(error):
            raise UserError("families.pickle", path=pickles[0]) from None
        torn = isinstance(error, (OSError, SafetensorError))
        raise UserError("families.unreadable" if torn else "families.not_understood", path=path,
                        reason=first_line(error)) from error


def load(layout: CheckpointLayout, component: ComponentSpec, precision: Precision) -> Any:
    """Reads one model, in the dtype, quantisation and place that `precision` says.

    Tensors that the model does not have are skipped. Returns None for an optional component that
    is missing. Raises UserError.
    """
    if (location := file_of(layout, component)) is None:
        return None
    path, config = location[0], layout.configs[component.name]
    is_folder = path.is_dir()
    # A folder's weights have the model's names already, unless the model is a part of what is
    # in the folder.
    has_own_names = is_folder and component.config is None
    files: list[File] = [(file, "") for file in files_in(path)] if is_folder else [location]
    path = layout.source if is_folder else path
    with as_user_error(path):
        if not files and not has_own_names:
            raise OSError(f"{component.name} holds no .safetensors")
        with init_empty_weights():
            model = create(component, config)

        def convert(tensors: Tensors) -> Tensors:
            tensors = tensors if has_own_names else component.convert(tensors, config)
            # CLIP's text model lies under `text_model` in files, no longer so in transformers 5.
            if hasattr(model, "text_model"):
                return tensors
            return {name.removeprefix("text_model."): value for name, value in tensors.items()}

        weights = Weights(files, convert)
        if (error := mismatch(model, weights, path)) is None:
            return _fill(model, component, weights, precision)
        if not has_own_names:
            raise error
        # Older diffusers wrote other names, which the libraries know how to read; they need the
        # whole model in RAM.
        dtype = "dtype" if component.transformers else "torch_dtype"
        model = component.cls.from_pretrained(
            layout.source / component.name, local_files_only=True, use_safetensors=True,
            **{dtype: dtype_of(component, precision)})
        return _settle(model, component, precision)


def skeleton(layout: CheckpointLayout, component: ComponentSpec, precision: Precision) -> Any:
    """The same model as `load` gives, without weights: on the meta device, for plans."""
    with as_user_error(layout.source), torch.device("meta"):
        model = create(component, layout.configs[component.name])
    dtype = dtype_of(component, precision)
    _cast(model.to(dtype=dtype), dtype)
    return _settle(model, component, precision)


def mismatch(model: nn.Module, weights: Weights, path: Path) -> UserError | None:
    """Why the weights at `path` are not this model's: names or shapes differ. None: they are."""
    about: dict[str, Any] = {"path": path, "model": type(model).__name__}
    state = model.state_dict()
    tied = getattr(model, "_tied_weights_keys", None) or ()
    if lacking := sorted(state.keys() - weights.shapes.keys() - {*tied}):
        about |= {"count": len(lacking), "example": lacking[0]}
        if unknown := [name for name in weights.shapes if name not in state]:
            return UserError("families.names_unknown", **about, names=", ".join(unknown[:3]))
        return UserError("families.weights_missing", **about)
    for name in (name for name in state if name in weights.shapes):
        expected, actual = state[name].shape, weights.shapes[name].shape
        if expected != actual:
            return UserError("families.other_sizes", **about,
                             what=f"{name} is {[*actual]}, not {[*expected]}")
    return None


def _fill(model: Any, component: ComponentSpec, weights: Weights, precision: Precision) -> Any:
    """Reads weight after weight to the place and into the bits in which it stays: the whole model
    never has to fit the GPU."""
    dtype, device = dtype_of(component, precision), precision.device
    # Before layers are frozen: those have codes and scales in place of their weight.
    names = [name for name in model.state_dict() if name in weights.shapes]
    _cast(model, dtype)
    offload = _freeze(model, component, precision)
    fill_(model, ((name, weights[name]) for name in names), dtype,
          torch.device("cpu") if offload else device, quantize_on=device)
    if getattr(model, "_tied_weights_keys", None):
        model.tie_weights()
    offload_(model, offload, device)
    return model.to(device)


def _settle(model: Any, component: ComponentSpec, precision: Precision) -> Any:
    """Quantises and offloads a model that has all its weights already, or none at all."""
    offload_(model, _freeze(model, component, precision), precision.device)
    return model if precision.device.type == "meta" else model.to(precision.device)


def _freeze(model: Any, component: ComponentSpec, precision: Precision) -> float:
    """Freezes the model, puts it into eval mode and quantises its blocks.

    Returns the share of the blocks (0 to 1) that is to wait in RAM.
    """
    model.requires_grad_(False).eval()
    # Convolutions are 1.1x to 1.4x faster channels_last. A video VAE has kernels of five sides,
    # too, whose layout is another one.
    if {p.ndim for p in model.parameters()} & {4, 5} == {4}:
        model.to(memory_format=torch.channels_last)
    if component.part == "vae" or (component.part == "text" and sum(
            p.numel() for p in model.parameters()) < LARGE_ENCODER):
        return 0.0
    quantize_(model, precision.quantization, precision.device)
    if component.part == "denoiser":
        return precision.offload
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return 1.0 if precision.vram_budget is not None and size > precision.vram_budget else 0.0


def dtype_of(component: ComponentSpec, precision: Precision) -> torch.dtype:
    """The dtype in which a component's weights are kept."""
    if component.part == "vae":
        return precision.vae
    needs_bf16 = component.outgrows_fp16 and precision.weights == torch.float16
    return torch.bfloat16 if needs_bf16 else precision.weights


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts all parameters to `dtype`, except those that the library says must stay in fp32."""
    # transformers means its list for fp16 alone, diffusers for every dtype.
    counts = isinstance(model, ModelMixin) or dtype == torch.float16
    fp32_modules = {*(getattr(model, "_keep_in_fp32_modules", None) or ())} if counts else set()
    for name, weight in model.named_parameters():
        is_fp32 = fp32_modules & set(name.split("."))
        weight.data = weight.data.to(torch.float32 if is_fp32 else dtype)


def create(component: ComponentSpec, config: Mapping[str, Any]) -> Any:
    """Makes the model of a config, on torch's default device."""
    if component.transformers:
        make_config = component.config or component.cls.config_class.from_dict
        return component.cls(make_config(dict(config)))
    return component.cls.from_config(dict(config))


def weights_in(folder: Path) -> list[tuple[Path, str]]:
    """The files of a model's folder that decide what it computes, with empty prefixes."""
    return [(path, "") for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".json")] if folder.is_dir() else []


def first_line(error: Exception) -> str:
    """What a library says is wrong, in at most 300 characters."""
    # That is how torch says that a weight was missing: it is still on the meta device.
    if "meta tensor" in str(error):
        return "some of its weights are missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# --- the denoiser of a run ---

def tell_numbers(wanted: schema.Precision, family: str, precision: Precision,
                 emit: Callable[[Event], None]) -> None:
    """For a family whose activations outgrow fp16, notes that fp16 was asked for all the same, or
    that fp32 takes its place on a GPU without bf16."""
    if not outgrows_fp16(family):
        return
    params = {"title": SPECS[family].title}
    if precision.compute == torch.float16:
        emit(Note(key="precision.outgrows_fp16", params=params))
    elif (wanted, precision.device.type, precision.compute) == ("auto", "cuda", torch.float32):
        emit(Note(key="precision.fp32_for_fp16", params=params))


def load_denoiser(config: schema.TrainConfig, family: Family, source: Path, precision: Precision,
                  emit: Callable[[Event], None] | None = None) -> Any:
    """Loads the base's denoiser for a run: frozen, quantised, a part of it in RAM.

    Raises UserError as the family's `load` does.
    """
    settings = precision_rules.base_settings(config, precision.device.type)
    if config.offload and "offload" not in settings and emit:
        emit(Note(key="precision.offload_useless", params={"device": precision.device.type}))
    model = family.load(source, replace(precision, **settings), frozenset({"denoiser"})).denoiser
    # Done again for plugins' families, whose `load` may take no notice of it.
    done = quantize_and_offload_(model, precision.device, **settings)
    if done.blocks and not done.pinned and emit:
        emit(Note(key="precision.not_pinned"))
    return model
