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
from collections.abc import Iterable, Iterator, Mapping
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
LARGEST = 2.0**63                          # a larger number in a config is no alpha
BUNDLED = "bundle_emb."                   # embeddings that travel in a LoRA file

# --- reading -----------------------------------------------------------------------------------

_ENDS = (r"lora_(?:down|up|mid)\.weight|lora_[AB](?:\.[^.]+)?\.weight|lora_[AB]"
         r"|lora\.(?:down|up)\.weight|lora_linear_layer\.(?:down|up)\.weight"
         r"|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?|alpha|dora_scale"
         r"|hada_\w+|lokr_\w+|oft_\w+|rescale|diff|diff_b|w_norm|b_norm")
# kohya, LyCORIS, OneTrainer: lora_unet_mid_block_attentions_0_proj_in.lora_down.weight
_FLAT = re.compile(rf"(?P<module>[^.]+)\.(?P<end>{_ENDS})")
# PEFT, diffusers, ComfyUI: unet.mid_block.attentions.0.proj_in.lora_A.weight; and diffusers before
# PEFT, `old`: unet.mid_block...attn1.processor.to_q_lora.down.weight
_DOTTED = re.compile(rf"(?P<module>.+?)(?:\.(?P<end>{_ENDS})"
                     r"|_lora\.(?P<old>down|up)\.weight)")
# diffusers before PEFT used a UNet's words for the text encoder, too.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET = re.compile(r"^unet\.|(down|up|input|output)_blocks|mid_block|middle_block|text_model"
                   r"|text_encoder|^(base_model\.model\.)?encoder\.layers")
_WRAPPER = "base_model.model."             # PeftModel around the real model
_IN_BLOCKS = re.compile(r"block|layers\.|refiner|self_attn|mlp")
# Keys that diffusers' loader takes as they are.
_PEFT = re.compile(r"(unet|transformer|text_encoder(_[23])?)\..*\.(lora_[AB]\.weight"
                   r"|lora_magnitude_vector)$")


def read(path: Path, family: str = "") -> Lora:
    """Reads any LoRA: a .safetensors file, or a folder as PEFT and diffusers save them.

    `family` chooses the table of names where the file doesn't tell. Raises UserError as
    `read_lora` does."""
    if (path / DIFFUSERS).is_file():
        path = path / DIFFUSERS
    if not path.is_dir():
        tensors, metadata = files.read_lora(path)
        naming = _naming(path, family)
        notes = lora_metadata.noted(metadata)
        configs = {part.name: notes[part.name] for part in naming if part.name in notes}
        return replace(_gathered(tensors, naming, configs), metadata=metadata)

    # PEFT's folder, or one that holds such a folder for each part
    # the denoiser's first: it tells the family
    folders = {"": path} if (path / CONFIG).is_file() else {
        config.parent.name: config.parent for config in sorted(
            path.glob(f"*/{CONFIG}"), key=lambda file: (file.parent.name[:4] == "text", file))}
    if not folders:
        raise UserError("lora_convert.no_adapter", folder=path)
    lora: Lora | None = None
    for name, folder in folders.items():
        try:
            config = json.loads((folder / CONFIG).read_bytes())
            if not isinstance(config, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError("lora_file.unreadable", file=folder / CONFIG, reason=error) from None
        tensors, metadata = files.read_lora(folder / WEIGHTS)
        naming = lora.naming if lora else _naming(folder / WEIGHTS, family, folders)
        of_part = _gathered(tensors, naming, {part.name: config for part in naming},
                            next((part for part in naming if part.name == name), None))
        lora = lora or Lora({}, naming, metadata)
        lora.layers |= of_part.layers
        lora.unknown += of_part.unknown
    assert lora is not None
    return lora


def from_tensors(tensors: Mapping[str, Tensor], family: str, alpha: float | None = None) -> Lora:
    """A LoRA from tensors by the keys of any format. `alpha` is that of layers that have none of
    their own; None: their rank."""
    parts = naming(family)
    configs = {} if alpha is None else {part.name: {"lora_alpha": alpha} for part in parts}
    return _gathered(tensors, parts, configs)


def for_diffusers(path: Path, family: str) -> dict[str, Tensor] | None:
    """A LoRA in PEFT's names with alpha folded in, fp32; None: the file has such names already.

    diffusers' loaders surely read these. Their tables for other names hold sizes and orders of
    single published models, and want certain layers to be there."""
    if not path.is_dir() and all(_PEFT.match(name) or name.startswith(BUNDLED)
                                 for name in read_header(path).tensors):
        return None
    lora = replace(read(path, family), bundled={})
    lora.layers = {name: {end: value.float() for end, value in layer.items()}
                   for name, layer in lora.layers.items()}
    return spell(lora, "diffusers")


def beyond_kohya(lora: Lora) -> list[str]:
    """The layers of a file in kohya's format that kohya's own scripts leave out in silence: those
    outside of the model's blocks, such as conv_in, and those by LyCORIS' names."""
    found = []
    for part in lora.naming:
        layers = lora.layers_of(part.name)
        apart = native(part, layers)[1] if part.kohya_native else {}
        found += [f"{part.name}.{inner}" for inner in layers
                  if inner in apart or not _IN_BLOCKS.search(inner)]
    return found


def _naming(path: Path, family: str, parts: Iterable[str] = ()) -> Naming:
    """The table of the file's family; a UNet's, with all `parts` that have a folder, where the
    family can't be told, as for a tiny model. Raises UserError for families without a table: their
    names would be guessed."""
    family = family or files.describe(path).family
    if family == "unknown" and any(map(_UNET.search, read_header(path).tensors)):
        family = next((spec.id for spec in SPECS.values() if {*parts, STANDARD.naming[0].name} <= {
            "", *(part.name for part in spec.naming)}), STANDARD.id)
    if family not in SPECS:
        raise UserError("lora_convert.no_names", family=family, known=", ".join(SPECS))
    return SPECS[family].naming


def _gathered(tensors: Mapping[str, Tensor], naming: Naming, configs: Mapping[str, dict[str, Any]],
              only: Part | None = None) -> Lora:
    """Tensors by the keys of any format -> layers. `configs`: adapter_config.json of each part;
    `only`: all keys are of this part."""
    grouped: dict[tuple[str, str], Layer] = defaultdict(dict)
    unknown, bundled = [], {}
    for key, tensor in tensors.items():
        parsed = _parsed(key, naming, only)
        # words are kept, but are no layers
        if key.startswith(BUNDLED):
            bundled[key] = tensor
        elif parsed is None:
            unknown.append(key)
        else:
            part, inner, end = parsed
            layer = grouped[part.name, inner]
            if end in layer:
                raise UserError("lora_file.same_name", key=key, first=inner, second=inner)
            layer[end] = tensor
    parts = {part.name: part for part in naming}
    layers: dict[str, Layer] = {}
    for (name, inner), layer in grouped.items():
        # files come from anywhere: sizes that can't be multiplied are refused here, once
        if not fits(layer):
            raise UserError("lora_convert.misfit", layer=inner)
        if (vector := layer.pop("lora_magnitude_vector", None)) is not None:
            # PEFT's (out,) and (1, out, 1, 1) are LyCORIS' (out, 1) and (out, 1, 1, 1)
            sides = layer[DOWN].ndim if DOWN in layer else 2
            layer[DORA] = vector.reshape(-1, *[1] * (sides - 1))
        if name in configs and ALPHA not in layer:
            layer = _with_alpha_of(configs[name], layer, inner)
        layers |= {f"{name}.{path}": piece for path, piece in split(parts[name], inner, layer)}
    return Lora(layers, naming, bundled=bundled, unknown=tuple(sorted(unknown)))


def _with_alpha_of(config: Mapping[str, Any], layer: Layer, inner: str) -> Layer:
    """The layer with the alpha that PEFT's adapter_config.json gives it."""
    rank = rank_of(layer)
    if not rank:
        return layer
    alpha = config.get("lora_alpha", config.get("alpha"))
    patterns = config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        # PEFT takes its patterns as regular expressions at the end of a path. Here they are
        # compared as text: no file may choose what our regex engine runs.
        plain = str(pattern).removeprefix("^").replace("\\", "")
        if inner == plain or (not str(pattern).startswith("^") and inner.endswith(f".{plain}")):
            alpha = alpha if value is None else value
            break
    if type(alpha) not in (int, float) or not abs(alpha) < LARGEST:
        return layer
    return with_alpha(layer, alpha * math.sqrt(rank) if config.get("use_rslora") is True else alpha)


def _parsed(key: str, naming: Naming, only: Part | None) -> tuple[Part, str, str] | None:
    """A key -> its part, its layer (in diffusers' or the original code's words), its end. None: no
    key of a LoRA."""
    if match := _FLAT.fullmatch(key):
        prefixes = [(f"{part.kohya}_", part) for part in naming]
        # OneTrainer's and SimpleTuner's; then those of the only text encoder, or the first
        prefixes += [("lora_transformer_", naming[0]), ("lycoris_", naming[0])]
        prefixes += [(prefix, part) for part in naming[1:2] for prefix in ("lora_te_", "lora_te1_")]
        for prefix, part in prefixes:
            if key.startswith(prefix):
                inner = dotted(part, match["module"][len(prefix):])
                return part, part.unrooted(inner), _end(match["end"])
    if not (match := _DOTTED.fullmatch(key)):
        return None
    part, inner = _located(match["module"].removeprefix(_WRAPPER), naming, only)
    end = _end(match["end"] or f"lora.{match['old']}.weight")
    inner = part.unrooted(inner.removeprefix(_WRAPPER).replace(".processor.", "."))
    if match["old"]:
        # diffusers before PEFT named attention layers after its processors
        head, _, last = inner.rpartition(".")
        if part.root:
            last = _OLD_TEXT.get(last, last)
        inner = f"{head}.{'to_out.0' if last == 'to_out' else last}"
    return part, inner, end


def _located(module: str, naming: Naming, only: Part | None) -> tuple[Part, str]:
    """The part that a dotted module path belongs to, and the path inside of it."""
    if only is not None:
        return only, module
    for part in naming:
        for prefix in (part.name, part.native, part.kohya):
            if module.startswith(f"{prefix}."):
                return part, module[len(prefix) + 1:]
    # without a part's name: a checkpoint's prefix, else what only text encoders have
    if module.startswith("model.diffusion_model."):
        return naming[0], module.removeprefix("model.diffusion_model.")
    text = "self_attn" in module or module.startswith(("text_model.", "encoder.layers."))
    return naming[1] if text and len(naming) > 1 else naming[0], module


def _end(end: str) -> str:
    """The end of a key in any spelling -> LyCORIS' name of the tensor."""
    if end.startswith("lora_magnitude_vector"):
        return "lora_magnitude_vector"
    if end.startswith("lora_A") or end.endswith("down.weight"):
        return DOWN
    return UP if end.startswith("lora_B") or end.endswith("up.weight") else end


# --- writing -----------------------------------------------------------------------------------

def spell(lora: Lora, to: str) -> dict[str, Tensor]:
    """The tensors of a single file: kohya | comfyui | diffusers.

    kohya and comfyui keep every value; diffusers has no alpha, so it is multiplied in. Raises
    UserError `lora_convert.no_room` for kinds of layers that the format has no keys for."""
    refuse_broken(lora, HOLDS[to], to)
    tensors: dict[str, Tensor] = {}
    for part in lora.naming:
        for key, value in _SPELLERS[to](part, lora.layers_of(part.name)):
            if key in tensors:
                raise UserError("lora_file.same_name", key=key, first=key, second=part.name)
            tensors[key] = value
    return tensors | (lora.bundled if to in ("kohya", "comfyui") else {})


def _kohya(part: Part, layers: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    # Layers that can't be fused get SimpleTuner's names, which ComfyUI and Forge read as well.
    named, apart = native(part, layers) if part.kohya_native else (
        {part.rooted(inner): layer for inner, layer in layers.items()}, {})
    for prefix, group in ((part.kohya, named), ("lycoris", apart)):
        for name, layer in group.items():
            for end, value in with_alpha(layer).items():
                yield f"{prefix}_{name.replace('.', '_')}.{end}", value


def _comfyui(part: Part, layers: dict[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    for prefix, group in zip((part.native, part.name), native(part, layers), strict=True):
        for name, layer in group.items():
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
            if UP not in layer:
                raise UserError("lora_convert.no_room", kind=f"{kind_of(layer)} + DoRA", to="peft",
                                count=1, example=path)
            # PEFT's DoRA scales rows; LyCORIS' older one scaled columns, which PEFT can't
            rows = layer[UP].shape[0]
            if value.shape[0] != rows or value.numel() != rows:
                raise UserError("lora_convert.dora_columns", layer=path)
            yield "lora_magnitude_vector", value.reshape(
                (rows,) if layer[DOWN].ndim == 2 else (1, rows, 1, 1))
        elif end != ALPHA:
            yield {DOWN: "lora_A.weight", UP: "lora_B.weight"}.get(end, end), value


def peft_parts(lora: Lora) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """For each part: the contents of adapter_config.json and adapter_model.safetensors. Nothing
    is rounded: ranks and alphas of single layers go into the config's patterns."""
    refuse_broken(lora, HOLDS["peft"], "peft")
    parts = {}
    for part in lora.naming:
        layers = {inner: without_mid(layer) for inner, layer in lora.layers_of(part.name).items()}
        if layers:
            tensors = {f"{_WRAPPER}{inner}.{end}": value for inner, layer in layers.items()
                       for end, value in _peft_ends(f"{part.name}.{inner}", layer)}
            parts[part.name] = _peft_config(layers), tensors
    return parts


def _peft_config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    # one config speaks for all layers of a part
    kinds = {kind_of(layer) for layer in layers.values()}
    if len(kinds) > 1:
        raise UserError("lora_convert.mixed", kinds=", ".join(sorted(kinds)), to="peft")
    ranks = {inner: rank_of(layer) for inner, layer in layers.items()}
    # 8, not 8.0, as PEFT itself writes it
    alphas = {inner: int(alpha) if alpha == int(alpha) else alpha
              for inner, layer in layers.items() for alpha in [alpha_of(layer)]}
    # the most frequent ones are the rule, the others its exceptions
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
    # ^: without it PEFT takes a pattern for the end of longer paths, too
    return {f"^{re.escape(inner)}": value for inner, value in values.items() if value != usual}


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights in another number format; alpha stays float32, integers stay as they are."""
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
    # beside its place and moved there as a whole: a folder is there complete or not at all
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        for name, (config, tensors) in parts.items():
            folder = beside / name if len(parts) > 1 else beside
            files.write_lora(folder / WEIGHTS, cast(tensors, dtype), lora.metadata)
            paths.write_atomic(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False))
        # mkdtemp makes a folder that only its owner can read
        os.chmod(beside, 0o777 & ~paths.umask())
        return paths.place(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
