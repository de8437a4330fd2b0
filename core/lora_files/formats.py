"""One LoRA in every spelling: kohya, PEFT folder, diffusers' single file, ComfyUI's own names.

Any of them is read into `Lora`: layers by diffusers' module paths, tensors by LyCORIS' names.
Torch is imported by the functions that need it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import paths
from core.errors import UserError
from core.families.layer_names import Naming, Part, dotted
from core.families.registry import SPECS, STANDARD, naming
from core.lora_files import files
from core.lora_files import metadata as lora_metadata
from core.lora_files.layers import (
    ALPHA,
    DORA,
    DOWN,
    MID,
    UP,
    Layer,
    Lora,
    alpha_of,
    fits,
    folded,
    kind_of,
    native,
    rank_of,
    refuse_broken,
    split,
    with_alpha,
    without_mid,
)
from core.safetensors_header import read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What kinds of layers a format has keys for.
HOLDS = {"kohya": {"lora", "dora", "loha", "lokr", "oft", "full"},
         "comfyui": {"lora", "dora", "loha", "lokr", "oft", "full"},
         "diffusers": {"lora", "dora"}, "peft": {"lora", "dora", "loha"}}
FORMATS = tuple(HOLDS)
SINGLE = ("kohya", "comfyui", "diffusers")  # one file each
CONFIG, WEIGHTS, DIFFUSERS = ("adapter_config.json", "adapter_model.safetensors",
                              "pytorch_lora_weights.safetensors")
LARGEST = 2.0**63                          # an alpha beyond it is none
_BUNDLED = "bundle_emb."                   # embeddings that travel in a LoRA file

# --- reading -----------------------------------------------------------------------------------

_ENDS = (r"lora_(?:down|up|mid)\.weight|lora_[AB](?:\.[^.]+)?\.weight|lora_[AB]"
         r"|lora\.(?:down|up)\.weight|lora_linear_layer\.(?:down|up)\.weight"
         r"|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?|alpha|dora_scale"
         r"|hada_\w+|lokr_\w+|oft_\w+|rescale|diff|diff_b|w_norm|b_norm")
_FLAT = re.compile(rf"(?P<module>[^.]+)\.(?P<end>{_ENDS})")
_DOTTED = re.compile(rf"(?P<module>.+?)(?:\.(?P<end>{_ENDS})"
                     r"|_lora\.(?P<old>down|up)\.weight)")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET = re.compile(r"^unet\.|(down|up|input|output)_blocks|mid_block|middle_block|text_model"
                   r"|text_encoder|^(base_model\.model\.)?encoder\.layers")
_WRAPPER = "base_model.model."
_PEFT = re.compile(r"(unet|transformer|text_encoder(_[23])?)\..*\.(lora_[AB]\.weight"
                   r"|lora_magnitude_vector)$")


def read(path: Path, family: str = "") -> Lora:
    """Any LoRA: a .safetensors file, or a folder as PEFT and diffusers save them.

    `family` names the table where the file doesn't tell. Raises UserError as `read_lora` does."""
    if path.is_dir():
        return _read_folder(path, family)
    tensors, metadata = files.read_lora(path)
    naming = _naming(path, family)
    notes = lora_metadata.noted(metadata)
    configs = {part.name: notes[part.name] for part in naming if part.name in notes}
    return replace(_gathered(tensors, naming, configs), metadata=metadata)


def from_tensors(tensors: Mapping[str, Tensor], family: str) -> Lora:
    return _gathered(tensors, naming(family), {})


def for_diffusers(path: Path, family: str) -> dict[str, Tensor] | None:
    """A LoRA in PEFT's names, which diffusers' loader of the family surely reads, alpha folded in
    as fp32; None: the file has them.

    Its tables for other names hold sizes and orders of single published models, and want certain
    layers to be there."""
    if not path.is_dir() and all(_PEFT.match(name) or name.startswith(_BUNDLED)
                                 for name in read_header(path).tensors):
        return None
    found = replace(read(path, family), bundled={})
    found.layers = {name: {end: value.float() for end, value in layer.items()}
                    for name, layer in found.layers.items()}
    return spell(found, "diffusers")


def fuses(family: str) -> bool:
    """Whether the original code has one matrix where diffusers has several."""
    return any(len(one.ours) > 1 for one in naming(family)[0].renames)


def _naming(path: Path, family: str) -> Naming:
    """The table of the family that the file tells; a UNet's where it tells none, such as a tiny
    one's. Raises UserError for families without a table: their names would be guessed."""
    family = family or files.describe(path).family
    if family == "unknown" and any(map(_UNET.search, read_header(path).tensors)):
        family = STANDARD.id
    if family not in SPECS:
        raise UserError("lora_convert.no_names", family=family, known=", ".join(SPECS))
    return SPECS[family].naming


def _read_folder(folder: Path, family: str) -> Lora:
    if (folder / DIFFUSERS).is_file():
        return read(folder / DIFFUSERS, family)
    parts = {"": folder} if (folder / CONFIG).is_file() else {
        one.parent.name: one.parent for one in sorted(folder.glob(f"*/{CONFIG}"))}
    if not parts:
        raise UserError("lora_convert.no_adapter", folder=folder)
    found: Lora | None = None
    for part, place in parts.items():
        config = _config(place / CONFIG)
        tensors, metadata = files.read_lora(place / WEIGHTS)
        naming = found.naming if found else _naming(place / WEIGHTS, family)
        one = _gathered(tensors, naming, {p.name: config for p in naming},
                        next((p for p in naming if p.name == part), None))
        found = found or Lora({}, naming, metadata)
        found.layers |= one.layers
        found.unknown += one.unknown
    assert found is not None
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("lora_file.unreadable", file=path, reason=error) from None
    if not isinstance(config, dict):
        raise UserError("lora_file.unreadable", file=path, reason="no JSON object")
    return config


def _gathered(tensors: Mapping[str, Tensor], naming: Naming, configs: Mapping[str, dict[str, Any]],
              only: Part | None = None) -> Lora:
    grouped: dict[tuple[str, str], Layer] = defaultdict(dict)
    unknown, bundled = [], {}
    for key, tensor in tensors.items():
        found = _parsed(key, naming, only)
        if key.startswith(_BUNDLED):
            bundled[key] = tensor
        elif found is None:
            unknown.append(key)
        else:
            part, inner, end = found
            layer = grouped[part.name, inner]
            if end in layer:
                raise UserError("lora_file.same_name", key=key, first=inner, second=inner)
            layer[end] = tensor
    parts = {part.name: part for part in naming}
    layers: dict[str, Layer] = {}
    for (name, inner), layer in grouped.items():
        if not fits(layer):
            raise UserError("lora_convert.misfit", layer=inner)
        plain = _plain_magnitude(layer)
        if name in configs and ALPHA not in plain:
            plain = _configured(plain, inner, configs[name])
        layers |= {f"{name}.{path}": one for path, one in split(parts[name], inner, plain)}
    return Lora(layers, naming, bundled=bundled, unknown=tuple(sorted(unknown)))


def _parsed(key: str, naming: Naming, only: Part | None) -> tuple[Part, str, str] | None:
    """A key -> its part, its layer (in diffusers' or the original code's words), its end."""
    if match := _FLAT.fullmatch(key):
        for prefix, part in _flat_prefixes(naming):
            if key.startswith(prefix):
                inner = dotted(part, match["module"][len(prefix):])
                return part, part.unrooted(inner), _end(match["end"])
    if not (match := _DOTTED.fullmatch(key)):
        return None
    part, inner = _located(match["module"].removeprefix(_WRAPPER), naming, only)
    end = _end(match["end"] or f"lora.{match['old']}.weight")
    inner = part.unrooted(inner.removeprefix(_WRAPPER).replace(".processor.", "."))
    if match["old"]:
        inner = _old_name(inner, part)
    return part, inner, end


def _flat_prefixes(naming: Naming) -> Iterator[tuple[str, Part]]:
    for part in naming:
        yield f"{part.kohya}_", part
    for alias in ("lora_transformer_", "lycoris_"):            # OneTrainer, SimpleTuner
        yield alias, naming[0]
    for part in naming[1:2]:                                   # one text encoder or the first
        yield "lora_te_", part
        yield "lora_te1_", part


def _located(module: str, naming: Naming, only: Part | None) -> tuple[Part, str]:
    if only is not None:
        return only, module
    for part in naming:
        for prefix in (part.name, part.native, part.kohya):
            if module.startswith(f"{prefix}."):
                return part, module[len(prefix) + 1:]
    if module.startswith("model.diffusion_model."):
        return naming[0], module.removeprefix("model.diffusion_model.")
    text = "self_attn" in module or module.startswith(("text_model.", "encoder.layers."))
    return naming[1] if text and len(naming) > 1 else naming[0], module


def _end(end: str) -> str:
    if end.startswith("lora_magnitude_vector"):
        return "lora_magnitude_vector"
    if end.startswith("lora_A") or end.endswith("down.weight"):
        return DOWN
    return UP if end.startswith("lora_B") or end.endswith("up.weight") else end


def _old_name(inner: str, part: Part) -> str:
    """diffusers before PEFT named attention layers after its processors."""
    head, _, last = inner.rpartition(".")
    if part.root:
        last = _OLD_TEXT.get(last, last)
    return f"{head}.{'to_out.0' if last == 'to_out' else last}"


def _plain_magnitude(layer: Layer) -> Layer:
    """PEFT's magnitudes (out,) and (1, out, 1, 1) -> LyCORIS' (out, 1) and (out, 1, 1, 1)."""
    if "lora_magnitude_vector" not in layer:
        return layer
    rest = {key: value for key, value in layer.items() if key != "lora_magnitude_vector"}
    sides = rest[DOWN].ndim if DOWN in rest else 2
    vector = layer["lora_magnitude_vector"]
    return {**rest, DORA: vector.reshape(-1, *[1] * (sides - 1))}


def _configured(layer: Layer, inner: str, config: Mapping[str, Any]) -> Layer:
    """The layer with the alpha that an adapter_config.json gives it."""
    rank = rank_of(layer)
    if not rank:
        return layer
    alpha = _pattern(config.get("alpha_pattern"), inner)
    if alpha is None:
        alpha = config.get("lora_alpha", config.get("alpha"))
    if type(alpha) not in (int, float) or not abs(alpha) < LARGEST:
        return layer
    return with_alpha(layer, alpha * math.sqrt(rank) if config.get("use_rslora") is True else alpha)


def _pattern(patterns: Any, inner: str) -> Any:
    """PEFT takes its patterns as regular expressions at the end of a path. Those from a file are
    compared as text: no file may choose what our regex engine runs."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        plain = str(pattern).removeprefix("^").replace("\\", "")
        if inner == plain or (not str(pattern).startswith("^") and inner.endswith(f".{plain}")):
            return value
    return None


# --- writing -----------------------------------------------------------------------------------

def spell(lora: Lora, to: str) -> dict[str, Tensor]:
    """The tensors of a single file: kohya | comfyui | diffusers.

    kohya and comfyui keep every value; diffusers has no alpha, so it is folded in. Raises UserError
    `lora_convert.no_room` for kinds of layers that the format has no keys for."""
    refuse_broken(lora, HOLDS[to], to)
    tensors: dict[str, Tensor] = {}
    for part in lora.naming:
        own = {path.partition(".")[2]: layer for path, layer in lora.layers.items()
               if path.partition(".")[0] == part.name}
        for key, value in _SPELLERS[to](part, own):
            if key in tensors:
                raise UserError("lora_file.same_name", key=key, first=key, second=part.name)
            tensors[key] = value
    return tensors | (lora.bundled if to in ("kohya", "comfyui") else {})


def _kohya(part: Part, layers: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    """What can't be fused goes by SimpleTuner's names, which ComfyUI and Forge read as well."""
    named, apart = native(part, layers) if part.kohya_native else (
        {part.rooted(inner): layer for inner, layer in layers.items()}, {})
    for prefix, some in ((part.kohya, named), ("lycoris", apart)):
        for name, layer in some.items():
            for end, value in with_alpha(layer).items():
                yield f"{prefix}_{name.replace('.', '_')}.{end}", value


def _comfyui(part: Part, layers: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    for prefix, some in zip((part.native, part.name), native(part, layers), strict=True):
        for name, layer in some.items():
            # ComfyUI looks for a middle matrix beside kohya's pair alone
            ends = {} if MID in layer else {DOWN: "lora_A.weight", UP: "lora_B.weight"}
            for end, value in with_alpha(layer).items():
                yield f"{prefix}.{name}.{ends.get(end, end)}", value


def _diffusers(part: Part, layers: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    for inner, layer in layers.items():
        for end, value in _peft_ends(f"{part.name}.{inner}", folded(without_mid(layer))):
            yield f"{part.name}.{part.rooted(inner)}.{end}", value


_SPELLERS = {"kohya": _kohya, "comfyui": _comfyui, "diffusers": _diffusers}


def _peft_ends(path: str, layer: Layer) -> Iterator[tuple[str, Tensor]]:
    for end, value in layer.items():
        if end == DORA:
            yield "lora_magnitude_vector", _magnitude(path, layer)
        elif end != ALPHA:
            yield {DOWN: "lora_A.weight", UP: "lora_B.weight"}.get(end, end), value


def _magnitude(path: str, layer: Layer) -> Tensor:
    """PEFT's DoRA scales rows; LyCORIS' older one scaled columns, which PEFT can't."""
    if UP not in layer:
        raise UserError("lora_convert.no_room", kind=f"{kind_of(layer)} + DoRA", to="peft", count=1,
                        example=path)
    scale, rows = layer[DORA], layer[UP].shape[0]
    if scale.shape[0] != rows or scale.numel() != rows:
        raise UserError("lora_convert.dora_columns", layer=path)
    return scale.reshape(rows) if layer[DOWN].ndim == 2 else scale.reshape(1, rows, 1, 1)


def peft_parts(lora: Lora) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """For each part: adapter_config.json and adapter_model.safetensors. Nothing is rounded: ranks
    and alphas of single layers go into the config's patterns."""
    refuse_broken(lora, HOLDS["peft"], "peft")
    parts = {}
    for part in lora.naming:
        own = {path.partition(".")[2]: without_mid(layer) for path, layer in lora.layers.items()
               if path.partition(".")[0] == part.name}
        if own:
            tensors = {f"{_WRAPPER}{inner}.{end}": value for inner, layer in own.items()
                       for end, value in _peft_ends(f"{part.name}.{inner}", layer)}
            parts[part.name] = _peft_config(own), tensors
    return parts


def _peft_config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    kinds = {kind_of(layer) for layer in layers.values()}
    if len(kinds) > 1:
        raise UserError("lora_convert.mixed", kinds=", ".join(sorted(kinds)), to="peft")
    ranks = {inner: rank_of(layer) for inner, layer in layers.items()}
    alphas = {inner: _tidy(alpha_of(layer)) for inner, layer in layers.items()}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    config = {
        "r": rank, "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha), "target_modules": sorted(layers),
        "inference_mode": True, "base_model_name_or_path": None, "task_type": None}
    if kinds == {"loha"}:
        return {"peft_type": "LOHA", "alpha": alpha, **config,
                "use_effective_conv2d": any("hada_t1" in layer for layer in layers.values())}
    return {"peft_type": "LORA", "lora_alpha": alpha, "use_dora": kinds == {"dora"},
            "lora_dropout": 0.0, "bias": "none", **config}


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    return {f"^{re.escape(inner)}": value for inner, value in values.items() if value != usual}


def _tidy(value: float) -> float:
    return int(value) if value == int(value) else value


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights in another number format; alpha stays float32."""
    return {key: value if dtype is None or key.endswith(f".{ALPHA}")
            or not value.is_floating_point() else value.to(dtype)
            for key, value in tensors.items()}


def weights_file(path: Path) -> Path:
    """The file itself, or the first one of PEFT's folder."""
    if not path.is_dir():
        return path
    return next(iter([*path.glob(DIFFUSERS), *sorted(path.rglob(WEIGHTS))]), path / WEIGHTS)


def file_name(name: str, format_: str) -> str:
    return name if format_ == "peft" else f"{name}.safetensors"


def save(lora: Lora, to: str, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Writes one of FORMATS under the next free name -> the file, or PEFT's folder."""
    if to != "peft":
        content, _ = files.packed(out, cast(spell(lora, to), dtype), lora.metadata)
        return paths.create(out, lambda path: path.write_bytes(content))
    parts = peft_parts(lora)
    if not parts:
        raise UserError("lora_file.empty", file=out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        for name, (config, tensors) in parts.items():
            folder = beside / name if len(parts) > 1 else beside
            files.write_lora(folder / WEIGHTS, cast(tensors, dtype), lora.metadata)
            paths.write_atomic(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False))
        os.chmod(beside, 0o777 & ~paths.umask())
        return paths.place(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
