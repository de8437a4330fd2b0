"""LoRA files: their names and formats, reading, writing, converting, telling what a file is.

Importing this takes no torch; `describe` and `read_config` read the header alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core import paths
from core.errors import UserError
from core.families.layer_names import Naming, to_native
from core.families.lora_signs import NOT_LORA, TWINS, detect_format, family_of
from core.families.registry import STANDARD
from core.lora_files import metadata as lora_metadata
from core.safetensors_header import Header, TensorInfo, read_header, read_scalars

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIG_KEY = lora_metadata.CONFIG_KEY
SHOWN = 3                                  # names in a fault before "and N more"


# --- names -------------------------------------------------------------------------------------

_PEFT_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight")
_WRAPPER = "base_model.model."             # PeftModel around the real one


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA by module path: `unet.down_blocks.0 ... to_q`."""

    state: dict[str, Tensor]               # {path}.lora_A.weight, {path}.lora_B.weight
    alphas: dict[str, float]               # by path; scale = alpha / rank
    unknown: tuple[str, ...] = ()          # keys of the file that fit no module


def kohya_name(path: str, naming: Naming = STANDARD.naming) -> str:
    """`unet.mid_block.resnets.0.conv1` -> `lora_unet_mid_block_resnets_0_conv1`."""
    name, _, inner = path.partition(".")
    part = next((p for p in naming if p.name == name), None)
    if part is None or not inner:
        raise UserError("lora_file.unknown_part", key=path, known=", ".join(p.name for p in naming))
    inner = part.rooted(inner)
    if part.kohya_native:
        inner = to_native(part, inner).name
    return f"{part.kohya}_{inner.replace('.', '_')}"


def kohya_names(models: Mapping[str, nn.Module], naming: Naming = STANDARD.naming
                ) -> dict[str, str]:
    """Kohya names of all weighted layers: {"unet": unet, ...} -> {kohya name: module path}.

    Underscores don't tell where the dots were, so names are read only through such a map.
    """
    return names_of((f"{part}.{path}" for part, model in models.items()
                     for path in _layers(model)), naming)


def names_of(module_paths: Iterable[str], naming: Naming = STANDARD.naming) -> dict[str, str]:
    names: dict[str, str] = {}
    for path in module_paths:
        name = kohya_name(path, naming)
        if names.setdefault(name, path) != path:
            raise UserError("lora_file.same_name", key=name, first=names[name], second=path)
    return names


def _layers(model: nn.Module) -> Iterator[str]:
    """Paths of layers with a matrix or a kernel, as they were before peft wrapped them."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if path and getattr(weight, "ndim", 0) >= 2 and ".lora_" not in path:
            yield path.removeprefix(_WRAPPER).removesuffix(".base_layer")


def _module_path(path: str, part: str, naming: Naming) -> str:
    """A peft key's module with its part in front and without peft's wrapper."""
    path = path.removeprefix(_WRAPPER)
    first, _, inner = path.partition(".")
    if first in {p.name for p in naming}:
        part, path = first, inner
    return f"{part}.{path.removeprefix(_WRAPPER)}"


# --- conversion --------------------------------------------------------------------------------

def to_kohya(state: Mapping[str, Tensor], alpha: float | Mapping[str, float],
             dtype: torch.dtype | None = None, part: str = "unet",
             naming: Naming = STANDARD.naming) -> dict[str, Tensor]:
    """peft's adapter weights -> kohya's keys; `part` is what keys without a part belong to.

    `alpha` goes by module path where it is a mapping; a path that it lacks gets its rank.
    Values stay exact unless `dtype` rounds them; alpha is always float32, no dimension.
    """
    import torch
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in _pairs(state, part, naming).items():
        name, rank = kohya_name(path, naming), down.shape[0]
        if f"{name}.alpha" in tensors:
            raise UserError("lora_file.same_name", key=name, first=name, second=path)
        value = alpha.get(path, rank) if isinstance(alpha, Mapping) else alpha
        tensors[f"{name}.lora_down.weight"] = down.detach().to(dtype or down.dtype)
        tensors[f"{name}.lora_up.weight"] = up.detach().to(dtype or up.dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(value))
    return tensors


def to_peft(state: Mapping[str, Tensor], names: Mapping[str, str]) -> Adapter:
    """Kohya's keys -> peft's, through the map of `kohya_names`. Nothing is dropped silently:
    keys that fit no module, or not each other, are listed in `unknown`."""
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    used: set[str] = set()
    for name, path in names.items():
        down, up, alpha = (f"{name}.{end}" for end in ("lora_down.weight", "lora_up.weight",
                                                       "alpha"))
        if down in state and up in state and _fit(state[down], state[up]):
            tensors[f"{path}.lora_A.weight"] = state[down]
            tensors[f"{path}.lora_B.weight"] = state[up]
            alphas[path] = float(state[down].shape[0])         # the rule where none is given
            used |= {down, up}
            if alpha in state and state[alpha].numel() == 1:
                alphas[path] = float(state[alpha])
                used.add(alpha)
    return Adapter(tensors, alphas, tuple(sorted(set(state) - used)))


def _fit(down: Tensor, up: Tensor) -> bool:
    return min(down.ndim, up.ndim) >= 2 and down.shape[0] == up.shape[1]


def fold_alpha(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's own spelling, which has no alpha: alpha / rank is multiplied into B."""
    folded = dict(adapter.state)
    for path, alpha in adapter.alphas.items():
        scale = alpha / adapter.state[f"{path}.lora_A.weight"].shape[0]
        if scale != 1:
            folded[f"{path}.lora_B.weight"] = adapter.state[f"{path}.lora_B.weight"] * scale
    return folded


def _pairs(state: Mapping[str, Tensor], part: str, naming: Naming
           ) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A, B). Raises UserError where a key is no LoRA key or a half is missing."""
    halves: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in state.items():
        if not (found := _PEFT_KEY.fullmatch(key)):
            foreign.append(key)
            continue
        path = _module_path(found["module"], part, naming)
        if halves.setdefault(path, {}).setdefault(found["half"], tensor) is not tensor:
            raise UserError("lora_file.same_name", key=key, first=path, second=path)
    if foreign:
        raise UserError("lora_file.not_lora_keys", keys=_some(foreign), count=len(foreign))
    if lone := [path for path, pair in halves.items() if len(pair) < 2]:
        raise UserError("lora_file.lone_half", keys=_some(lone), count=len(lone))
    return {path: (pair["A"], pair["B"]) for path, pair in halves.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


# --- files -------------------------------------------------------------------------------------

def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
               ) -> dict[str, str]:
    """Writes atomically, with the hashes of A1111 and modelspec. -> the metadata written."""
    content, stamped = packed(path, tensors, metadata)
    paths.write_atomic(path, content)
    return stamped


def packed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
           ) -> tuple[bytes, dict[str, str]]:
    """-> a LoRA file's bytes, and its metadata with the hashes. `path` is told where a tensor
    can't be written."""
    import torch
    from safetensors.torch import save
    if not tensors:
        raise UserError("lora_file.empty", file=path)
    ready = {key: tensors[key].detach().to("cpu").clone(memory_format=torch.contiguous_format)
             for key in sorted(tensors)}
    for key, tensor in ready.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError("lora_file.not_finite", file=path, key=key, dtype=str(tensor.dtype)[6:])
    stamped = dict(metadata) | lora_metadata.hashes(ready, metadata)
    return save(ready, stamped), stamped


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata. Raises UserError for anything that isn't a LoRA."""
    from safetensors.torch import load
    header = read_header(path)
    format_ = detect_format(header.tensors)
    if format_ in NOT_LORA:
        raise UserError("lora_file.not_a_lora", file=path, what=format_)
    try:
        # from bytes, not mapped: the file stays free to be replaced, on Windows too
        tensors = load(path.read_bytes())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError("lora_file.unreadable", file=path, reason=error) from None
    refuse_not_finite(path, tensors)
    return tensors, header.metadata


def refuse_not_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """NaN in a LoRA makes every picture black; Raises UserError that names the first such
    tensor."""
    for key, tensor in tensors.items():
        wide = tensor.float() if tensor.is_floating_point() else tensor
        if not bool(wide.isfinite().all()):
            raise UserError("lora_file.holds_nan", file=path, key=key)


def read_config(path: Path) -> str:
    """The YAML of the run that made this file."""
    metadata = read_header(path).metadata
    if CONFIG_KEY in metadata:
        return metadata[CONFIG_KEY]
    if metadata:
        raise UserError("lora_file.no_config", file=path, count=len(metadata),
                        keys=_some(sorted(metadata)))
    raise UserError("lora_file.no_metadata", file=path)


# --- what is it? -------------------------------------------------------------------------------

PARTS = (
    ("text encoder", re.compile(r"lora_te\d?[_.]|text_encoder|clip_[lg]\.|t5\.")),
    ("unet", re.compile(r"lora_(unet|transformer)[_.]|lycoris_|(base_model\.model\.|model\.)?"
                        r"(unet|transformer|diffusion_model|down_blocks|mid_block|up_blocks)\b")),
)
_LAYER = re.compile(
    r"\.(lora_(down|up|mid|A|B)(\.[^.]+)?\.weight|hada_\w+|lokr_\w+|oft_\w+|dora_scale"
    r"|lora_magnitude_vector.*|alpha|diff|diff_b|w_norm|b_norm|lora(_linear_layer)?\.\w+\.weight)$"
    r"|(?<=_)lora\.\w+\.weight$")
_BLOCK = re.compile(r".*(?:blocks?|layers|attentions|resnets|samplers)[._](\d+[._])*")
_RANK_SIDE = re.compile(r"(lora_down|lora_A(\.[^.]+)?|[._]lora(_linear_layer)?\.down)\.weight$"
                        r"|\.(hada_w1_b|lokr_w[12]_b)$")


@dataclass(frozen=True, slots=True)
class Info:
    """What a file is, from its header alone."""

    path: Path
    size: int                              # bytes
    format: str                            # one of FORMATS, or unknown
    family: str                            # one of FAMILY_SIGNS, or unknown
    dtype: str                             # of most of the bytes: F16, BF16, F32
    ranks: tuple[int, ...]                 # different ones, ascending
    alphas: tuple[float, ...]              # none: the format has none
    scales: tuple[float, ...]              # alpha / rank: what the weights are multiplied with
    modules: dict[str, int]                # layers by part: "unet", "text encoder", "other"
    targets: tuple[str, ...]               # attn1_to_q, ff_net_2 ...
    facts: lora_metadata.Facts             # what the metadata says

    @property
    def is_lora(self) -> bool:
        return self.format not in NOT_LORA


def describe(path: Path) -> Info:
    """Tells what a .safetensors file is. Raises UserError only where the file is malformed."""
    header = read_header(path)
    format_ = detect_format(header.tensors)
    facts = lora_metadata.facts_of(header.metadata)
    layers = {} if format_ in NOT_LORA else _layers_of(header)
    ranks = {layer: header.tensors[key].shape[0] for key, layer in layers.items()
             if _RANK_SIDE.search(key) and header.tensors[key].shape}
    alphas = _alphas(path, header, ranks)
    return Info(
        path=path, size=header.size, format=format_,
        family=_family(header.tensors, facts.family),
        dtype=_main_dtype(header.tensors.values()),
        ranks=tuple(sorted(set(ranks.values()))), alphas=tuple(sorted(set(alphas.values()))),
        scales=tuple(sorted({alphas.get(layer, rank) / rank
                             for layer, rank in ranks.items() if rank})),
        modules=dict(Counter(map(_part, sorted(set(layers.values()))))),
        targets=tuple(sorted({_target(layer) for layer in layers.values()})), facts=facts)


def _layers_of(header: Header) -> dict[str, str]:
    """LoRA key -> its layer."""
    return {key: _LAYER.sub("", key).rstrip("_") for key in header.tensors if _LAYER.search(key)}


def _alphas(path: Path, header: Header, ranks: Mapping[str, int]) -> dict[str, float]:
    """By layer: the .alpha tensors, or what diffusers and peft note in the metadata."""
    keys = [f"{layer}.alpha" for layer in ranks if f"{layer}.alpha" in header.tensors]
    found = read_scalars(path, header, keys)
    alphas = {key.removesuffix(".alpha"): value for key, value in found.items()}
    noted = lora_metadata.noted(header.metadata)
    for layer in ranks:
        value = noted.get(layer.split(".")[0], {}).get("lora_alpha")
        if layer not in alphas and isinstance(value, int | float) and abs(value) < 2**63:
            alphas[layer] = float(value)
    return alphas


def _family(tensors: Mapping[str, TensorInfo], said: str) -> str:
    """`said` is the metadata's, which decides where two families' layers are called the same."""
    found = family_of(tensors)
    return said if said and TWINS.get(said, "") == found else found or "unknown"


def _part(layer: str) -> str:
    return next((part for part, pattern in PARTS if pattern.match(layer)), "other")


def _target(layer: str) -> str:
    """`lora_unet_..._transformer_blocks_0_attn1_to_q` -> `attn1_to_q`."""
    return _BLOCK.sub("", layer).replace(".", "_")


def _main_dtype(tensors: Iterable[TensorInfo]) -> str:
    bytes_of: Counter[str] = Counter()
    for info in tensors:
        bytes_of[info.dtype] += info.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype], default="")
