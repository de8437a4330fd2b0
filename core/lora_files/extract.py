"""A LoRA from the difference of two models, tensor by tensor: a few matrices in memory at a time.

Singular vectors of large matrices by randomised SVD with power iterations (Halko, Martinsson and
Tropp 2011, arXiv 0909.4061), seeded: the same models give the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError
from core.families import registry
from core.families.layer_names import Naming, from_native
from core.families.lora_signs import family_of
from core.families.registry import SPECS
from core.jobs.events import Event, Phase
from core.lora_files.layers import DOWN, UP, Layer, Lora, split, with_alpha
from core.lora_files.merge import balanced
from core.weights.tensor_file import TensorFile

_SMALL = 512                               # up to this side, an exact SVD takes no time
_MORE, _ROUNDS, _SEED = 16, 4, 0           # directions beside the wanted; power iterations
_SINGLE = (("model.diffusion_model.", 0), ("cond_stage_model.transformer.", 1),
           ("conditioner.embedders.0.transformer.", 1), ("double_blocks.", 0),
           ("single_blocks.", 0))          # prefixes in single files -> number of the part
_EMBEDDINGS = ("token_embedding", "position_embedding", "shared")


@dataclass(frozen=True, slots=True)
class Extracted:
    lora: Lora
    compared: int                          # matrices and kernels that both models have
    kept: float                            # share of the differences' energy
    rest: int                              # changed norms, biases, embeddings: not in the LoRA


@dataclass(frozen=True, slots=True)
class _Model:
    """Where the weights of a model lie, by module path."""

    naming: Naming
    weights: dict[str, tuple[TensorFile, str]]     # `unet.conv_in.weight` -> file, key


def extract(tuned: Path, base: Path, rank: int, conv_rank: int | None = None,
            emit: Callable[[Event], None] = lambda event: None) -> Extracted:
    """The best LoRA of this rank for tuned - base. `conv_rank`: of kernels wider than 1; 0 leaves
    them out, None takes `rank`. Raises UserError where the models have little in common."""
    ours, theirs = _model(tuned), _model(base)
    shared = [path for path in ours.weights if path in theirs.weights]
    if 2 * len(shared) < max(len(ours.weights), len(theirs.weights)):
        raise UserError("lora_convert.other_models", tuned=tuned, base=base, shared=len(shared),
                        count=len(theirs.weights))
    found: dict[str, Layer] = {}
    rest, compared, kept, whole = 0, 0, 0.0, 0.0
    for number, path in enumerate(shared):
        emit(Phase(name="extract", done=number, total=len(shared)))
        pair = [file[key] for file, key in (ours.weights[path], theirs.weights[path])]
        wanted = _rank(path, pair[1], rank, rank if conv_rank is None else conv_rank)
        compared += wanted > 0
        if pair[0].numel() != pair[1].numel():
            raise UserError("lora_convert.other_shapes", layer=path)
        difference = pair[0].float() - pair[1].reshape(pair[0].shape).float()
        if not difference.any():
            continue
        if not bool(difference.isfinite().all()):
            raise UserError("lora_convert.model_nan", tuned=tuned, base=base, key=path)
        if not wanted:
            rest += 1
            continue
        layer, energy = _layer(difference, wanted)
        found[path.removesuffix(".weight")] = layer
        kept, whole = kept + energy, whole + float(difference.double().square().sum())
    if not found:
        raise UserError("lora_convert.same_models", tuned=tuned, base=base)
    return Extracted(_unfused(found, ours.naming), compared, kept / whole, rest)


def _rank(path: str, weight: Tensor, rank: int, conv_rank: int) -> int:
    """0: no matrix that a LoRA layer could change, or one that is not wanted."""
    if weight.ndim < 2 or not path.endswith(".weight") or any(x in path for x in _EMBEDDINGS):
        return 0
    wide = weight.ndim > 2 and any(side > 1 for side in weight.shape[2:])
    return int(min(conv_rank if wide else rank, *weight.flatten(1).shape))


def _layer(difference: Tensor, rank: int) -> tuple[Layer, float]:
    """-> the layer and the energy that it keeps."""
    matrix = difference.flatten(1)
    if min(matrix.shape) <= max(_SMALL, rank + _MORE):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            left, values, columns = torch.svd_lowrank(matrix, rank + _MORE, _ROUNDS)
        right = columns.T
    kernel = difference.shape[1:]
    like = {DOWN: difference.new_empty(0, *kernel),
            UP: difference.new_empty(difference.shape[0], 0, *[1] * (len(kernel) - 1))}
    pair = balanced(left, values, right, rank, like)
    return with_alpha(pair), float(values[:rank].double().square().sum())


def _unfused(layers: dict[str, Layer], naming: Naming) -> Lora:
    parts = {part.name: part for part in naming}
    return Lora({f"{name}.{path}": one for whole, layer in layers.items()
                 for name, _, inner in [whole.partition(".")]
                 for path, one in split(parts[name], inner, layer)}, naming)


# --- models ------------------------------------------------------------------------------------

def _model(source: Path) -> _Model:
    files = [(part, TensorFile(file)) for part, file in _files(source)]
    tensors = {key: info for _, file in files for key, info in file.header.tensors.items()}
    naming = registry.naming(family_of(tensors))
    weights = {name: (file, key) for part, file in files
               for name, key in _names(part, file.names(), naming)}
    for file, key in weights.values():
        file.shape(key)                    # refuses numbers that aren't read
    if not weights:
        raise UserError("lora_convert.no_weights", source=source)
    return _Model(naming, weights)


def _files(source: Path) -> list[tuple[str, Path]]:
    """(part, file); no part: a single file that holds them all."""
    if not source.is_dir():
        return [("", source)]
    parts = dict.fromkeys(part.name for one in SPECS.values() for part in one.naming)
    return [(part, file) for part in parts for file in sorted(
        (source / part).glob("*.safetensors")) if not _is_variant(file)]


def _is_variant(file: Path) -> bool:
    """model.fp16.safetensors beside model.safetensors: the same weights again."""
    stem, _, _ = file.stem.partition(".")
    return file.stem != stem and (file.parent / f"{stem}.safetensors").exists()


def _names(part: str, keys: list[str], naming: Naming) -> Iterator[tuple[str, str]]:
    for key in keys:
        if part:
            one = next((p for p in naming if p.name == part), None)
            if one is not None:
                yield f"{part}.{one.unrooted(key)}", key
            continue
        for prefix, number in _SINGLE:
            if key.startswith(prefix):
                name = key.removeprefix(prefix) if prefix.endswith(("model.", "former.")) else key
                yield _plain(name, naming, number), key


def _plain(name: str, naming: Naming, number: int) -> str:
    """A single file's name in diffusers' words; fused matrices keep their own."""
    part = naming[number]
    module, dot, end = name.rpartition(".")
    paths, _ = from_native(part, part.unrooted(module))
    return f"{part.name}.{paths[0] if len(paths) == 1 else module}{dot}{end}"
