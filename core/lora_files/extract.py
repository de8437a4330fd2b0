"""A LoRA from the difference of two models. Only a few matrices are in memory at a time.

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
from core.jobs.events import Event, Phase
from core.lora_files.layers import DOWN, UP, Layer, Lora, split, with_alpha
from core.lora_files.merge import balanced
from core.weights.tensor_file import TensorFile

_SMALL = 512                               # up to this side, an exact SVD takes no time
_OVERSAMPLING, _ITERATIONS, _SEED = 16, 4, 0   # of the randomised SVD
_SINGLE = (("model.diffusion_model.", 0), ("cond_stage_model.transformer.", 1),
           ("conditioner.embedders.0.transformer.", 1), ("double_blocks.", 0),
           ("single_blocks.", 0))          # prefix in a single file, number of the part
_EMBEDDINGS = ("token_embedding", "position_embedding", "shared")


@dataclass(frozen=True, slots=True)
class Extracted:
    lora: Lora
    compared: int                          # matrices and kernels that both models have
    kept: float                            # share of the differences' energy
    rest: int                              # changed norms, biases, embeddings: not in the LoRA


# Where the weights of a model lie: `unet.conv_in.weight` -> file, key.
_Weights = dict[str, tuple[TensorFile, str]]


def extract(tuned: Path, base: Path, rank: int, conv_rank: int | None = None,
            emit: Callable[[Event], None] = lambda event: None) -> Extracted:
    """The best LoRA of this rank for tuned - base. `conv_rank`: of kernels wider than 1; 0 leaves
    them out, None takes `rank`. Raises UserError where the models have little in common."""
    (naming, ours), (_, theirs) = _model(tuned), _model(base)
    shared = [path for path in ours if path in theirs]
    if 2 * len(shared) < max(len(ours), len(theirs)):
        raise UserError("lora_convert.other_models", tuned=tuned, base=base, shared=len(shared),
                        count=len(theirs))
    parts = {part.name: part for part in naming}
    layers: dict[str, Layer] = {}
    rest, compared, kept_energy, whole_energy = 0, 0, 0.0, 0.0
    for number, path in enumerate(shared):
        emit(Phase(name="extract", done=number, total=len(shared)))
        after, before = (file[key] for file, key in (ours[path], theirs[path]))
        # 0: no matrix that a LoRA layer could change, or one that is not wanted
        layer_rank = 0
        if before.ndim >= 2 and path.endswith(".weight") and not any(
                word in path for word in _EMBEDDINGS):
            wide = before.ndim > 2 and any(side > 1 for side in before.shape[2:])
            most = conv_rank if wide and conv_rank is not None else rank
            layer_rank = int(min(most, *before.flatten(1).shape))
        compared += layer_rank > 0
        if after.numel() != before.numel():
            raise UserError("lora_convert.other_shapes", layer=path)
        difference = after.float() - before.reshape(after.shape).float()
        if not difference.any():
            continue
        if not bool(difference.isfinite().all()):
            raise UserError("lora_convert.model_nan", tuned=tuned, base=base, key=path)
        if not layer_rank:
            rest += 1
            continue
        layer, energy = _layer(difference, layer_rank)
        kept_energy += energy
        whole_energy += float(difference.double().square().sum())
        # a fused matrix of a single file becomes the layers that diffusers has for it
        part, _, inner = path.removesuffix(".weight").partition(".")
        layers |= {f"{part}.{name}": piece for name, piece in split(parts[part], inner, layer)}
    if not layers:
        raise UserError("lora_convert.same_models", tuned=tuned, base=base)
    return Extracted(Lora(layers, naming), compared, kept_energy / whole_energy, rest)


def _layer(difference: Tensor, rank: int) -> tuple[Layer, float]:
    """-> the layer of this rank that is nearest to the difference, and the energy that it keeps."""
    matrix = difference.flatten(1)
    if min(matrix.shape) <= max(_SMALL, rank + _OVERSAMPLING):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            left, values, columns = torch.svd_lowrank(matrix, rank + _OVERSAMPLING, _ITERATIONS)
        right = columns.T
    kernel = difference.shape[1:]
    like = {DOWN: difference.new_empty(0, *kernel),
            UP: difference.new_empty(difference.shape[0], 0, *[1] * (len(kernel) - 1))}
    pair = balanced(left, values, right, rank, like)
    return with_alpha(pair), float(values[:rank].double().square().sum())


# --- models ------------------------------------------------------------------------------------

def _model(source: Path) -> tuple[Naming, _Weights]:
    """A single file, or the folder of a pipeline. Raises UserError where it has no weights that
    are known."""
    parts = dict.fromkeys(part.name for spec in registry.SPECS.values() for part in spec.naming)
    files = [] if source.is_dir() else [("", TensorFile(source))]
    for part in parts:
        for path in sorted((source / part).glob("*.safetensors")):
            # model.fp16.safetensors beside model.safetensors: the same weights again
            stem = path.name.partition(".")[0]
            if stem == path.stem or not (path.parent / f"{stem}.safetensors").exists():
                files.append((part, TensorFile(path)))
    tensors = {key: info for _, file in files for key, info in file.header.tensors.items()}
    naming = registry.naming(family_of(tensors))
    weights = {name: (file, key) for part, file in files
               for name, key in _names(part, file.names(), naming)}
    for file, key in weights.values():
        file.shape(key)                    # raises for number formats that aren't read
    if not weights:
        raise UserError("lora_convert.no_weights", source=source)
    return naming, weights


def _names(part_name: str, keys: list[str], naming: Naming) -> Iterator[tuple[str, str]]:
    """(path with its part in diffusers' words, key) of each weight. No part: a single file that
    holds them all, in the original code's words."""
    if part_name:
        yield from ((f"{part.name}.{part.unrooted(key)}", key)
                    for part in naming if part.name == part_name for key in keys)
        return
    for key in keys:
        for prefix, number in _SINGLE:
            if key.startswith(prefix):
                # Flux's files have no prefix: there it is a part of the name
                name = key.removeprefix(prefix) if prefix.endswith(("model.", "former.")) else key
                part = naming[number]
                module, dot, end = name.rpartition(".")
                paths, _ = from_native(part, part.unrooted(module))
                # a fused matrix keeps its name until its layer is split
                yield f"{part.name}.{paths[0] if len(paths) == 1 else module}{dot}{end}", key
