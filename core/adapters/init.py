"""`init_lora_weights`: a fresh adapter takes over a LoRA of any format, delta for delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.adapters import lora
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.families.registry import STANDARD
from core.families.spec import FamilySpec
from core.jobs.events import Event, Note
from core.lora_files import formats
from core.lora_files.layers import DOWN, UP, Layer, Lora, alpha_of, kind_of, rank_of, scale_of
from core.lora_files.merge import Cut, resize

_INNER = {"proj", "net"}                   # words that say nothing alone: ff.net.0.proj


def start(models: Mapping[str, nn.Module], config: TrainConfig, spec: FamilySpec,
          emit: Callable[[Event], None]) -> None:
    """Puts the file of `config.init_lora_weights` into the adapters that `lora.attach` made: the
    same delta, whatever alpha and rank the two have. `models`: the trained ones by part, the
    denoiser first. Layers that the file lacks start as always; what the file has for parts that
    aren't trained is told. Raises UserError where something of the denoiser would be lost: another
    kind, another rank, layers that aren't targets."""
    adapter = getattr(config, "adapter", "lora")
    if adapter not in ("lora", "rslora"):
        raise UserError("lora_init.other_adapter", adapter=adapter)
    path = Path(config.init_lora_weights).expanduser()
    found = formats.read(path, spec.id)
    parts = {part.name: part for part in found.naming}
    layers = {f"{part}.{parts[part].unrooted(name)}": layer for part, model in models.items()
              for name, layer in lora.layers(model)}
    denoiser = f"{next(iter(models))}."
    own = {name: layer for name, layer in found.layers.items()
           if name in layers or name.startswith(denoiser)}
    if not own.keys() & layers.keys():
        raise UserError("lora_init.none_fit", file=path, count=len(found.layers),
                        example=next(iter(found.layers), "-"))
    _check_kinds(own, path)
    if strange := sorted(own.keys() - layers.keys()):
        raise UserError("lora_init.other_layers", file=path, count=len(strange), example=strange[0],
                        targets=config.target_modules, fixes=[Fix("fixes.file_layers", {
                        "target_modules": _targets([name for name in own
                                                    if name.startswith(denoiser)], spec)})])
    own = _fitting(own, layers, config, path)
    for name, layer in own.items():
        _take_over(layers[name], layer)
    emit(Note(key="lora_init.started", params={
        "file": str(path), "layers": len(own), "fresh": len(layers) - len(own)}))
    if left := len(found.layers) - len(own) + len(found.unknown):
        emit(Note(key="lora_init.left_out", params={"file": str(path), "count": left}))


def _check_kinds(own: dict[str, Layer], path: Path) -> None:
    for name, layer in own.items():
        if (kind := kind_of(layer)) != "lora":
            raise UserError("lora_init.other_kind", file=path, kind=kind, layer=name)


def _fitting(own: dict[str, Layer], layers: dict[str, Any], config: TrainConfig, path: Path
             ) -> dict[str, Layer]:
    """The file's layers, of no higher rank than the model's. Raises UserError where a rank differs
    and `init_lora_resize` doesn't ask for the change."""
    ranks = {name: layers[name].lora_A[lora.ADAPTER].weight.shape[0] for name in own}
    other = [name for name, layer in own.items() if rank_of(layer) != ranks[name]]
    if not other:
        return own
    if not config.init_lora_resize:
        first = own[other[0]]
        raise UserError("lora_init.other_rank", file=path, there=rank_of(first),
                        here=ranks[other[0]],
                        fixes=[Fix("fixes.resize_lora", {"init_lora_resize": True}),
                               Fix("fixes.file_rank", {"lora_rank": rank_of(first),
                                                       "lora_alpha": alpha_of(first)})])
    return {name: layer if rank_of(layer) <= ranks[name] else resize(
        Lora({name: layer}, STANDARD.naming), Cut(ranks[name])).lora.layers[name]
            for name, layer in own.items()}


@torch.no_grad()
def _take_over(layer: Any, found: Layer) -> None:
    """A higher rank in the model leaves its other rows of A as they start, and of B zero: the
    delta is the file's, and the new directions can learn."""
    a, b = layer.lora_A[lora.ADAPTER].weight, layer.lora_B[lora.ADAPTER].weight
    rank = rank_of(found)
    if a.is_meta:
        return
    if found[DOWN][0].numel() != a[0].numel() or found[UP].shape[0] != b.shape[0]:
        raise UserError("lora_init.other_base", there=list(found[UP].shape), here=list(b.shape))
    a[:rank] = found[DOWN].reshape(rank, *a.shape[1:]).to(a)
    scale = scale_of(found) / layer.scaling[lora.ADAPTER]
    b.zero_()[:, :rank] = (found[UP].float() * scale).reshape(-1, rank, *b.shape[2:]).to(b)


def _targets(own: list[str], spec: FamilySpec) -> str | list[str]:
    """The smallest preset that has all layers of the file, else their names."""
    for preset, suffixes in spec.lora_presets.items():
        if all(any(name == s or name.endswith(f".{s}") for s in suffixes) for name in own):
            return preset
    return sorted({_suffix(name) for name in own})


def _suffix(name: str) -> str:
    words = name.split(".")
    at = len(words) - 1
    while at and (words[at].isdigit() or words[at] in _INNER):
        at -= 1
    return ".".join(words[at:])
