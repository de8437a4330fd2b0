"""`init_lora_weights`: a fresh adapter takes over a LoRA of any format, delta for delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from core import paths
from core.adapters import lora
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.families.registry import STANDARD
from core.families.spec import FamilySpec
from core.jobs.events import Event, Note
from core.lora_files import formats
from core.lora_files.layers import DOWN, UP, Lora, alpha_of, kind_of, rank_of, scale_of
from core.lora_files.merge import Cut, resize

_INNER = {"proj", "net"}                   # words that say nothing alone: ff.net.0.proj


@torch.no_grad()
def start(models: Mapping[str, nn.Module], config: TrainConfig, spec: FamilySpec,
          emit: Callable[[Event], None]) -> None:
    """Puts the file of `config.init_lora_weights` into the adapters that `lora.attach` made. The
    deltas stay the same, whatever alpha and rank the two have.

    `models`: the trained ones by part, the denoiser first. Layers that the file lacks start as
    always; layers of the file for parts that aren't trained are left out, with a note. Raises
    UserError where something of the denoiser would be lost: another kind, another rank, layers
    that aren't targets."""
    if config.adapter not in ("lora", "rslora"):
        raise UserError("lora_init.other_adapter", adapter=config.adapter)
    path = paths.expanded(config.init_lora_weights)
    file = formats.read(path, spec.id)
    parts = {part.name: part for part in file.naming}
    modules = {f"{part}.{parts[part].unrooted(name)}": module for part, model in models.items()
               for name, module in lora.layers(model)}
    denoiser = f"{next(iter(models))}."
    layers = {name: layer for name, layer in file.layers.items()
              if name in modules or name.startswith(denoiser)}
    if not layers.keys() & modules.keys():
        raise UserError("lora_init.none_fit", file=path, count=len(file.layers),
                        example=next(iter(file.layers), "-"))
    for name, layer in layers.items():
        if (kind := kind_of(layer)) != "lora":
            raise UserError("lora_init.other_kind", file=path, kind=kind, layer=name)
    if strange := sorted(layers.keys() - modules.keys()):
        targets = _targets([name for name in layers if name.startswith(denoiser)], spec)
        raise UserError("lora_init.other_layers", file=path, count=len(strange), example=strange[0],
                        targets=config.target_modules,
                        fixes=[Fix("fixes.file_layers", {"target_modules": targets})])

    ranks = {name: modules[name].lora_A[lora.ADAPTER].weight.shape[0] for name in layers}
    other = [name for name, layer in layers.items() if rank_of(layer) != ranks[name]]
    if other and not config.init_lora_resize:
        first = layers[other[0]]
        raise UserError("lora_init.other_rank", file=path, there=rank_of(first),
                        here=ranks[other[0]],
                        fixes=[Fix("fixes.resize_lora", {"init_lora_resize": True}),
                               Fix("fixes.file_rank", {"lora_rank": rank_of(first),
                                                       "lora_alpha": alpha_of(first)})])
    for name, layer in layers.items():
        # a lower rank needs nothing: it leaves rows free
        if rank_of(layer) > ranks[name]:
            layer = resize(Lora({name: layer}, STANDARD.naming), Cut(ranks[name])).lora.layers[name]
        a, b = (half[lora.ADAPTER].weight for half in (modules[name].lora_A, modules[name].lora_B))
        # a memory plan runs without weights
        if a.is_meta:
            continue
        if layer[DOWN][0].numel() != a[0].numel() or layer[UP].shape[0] != b.shape[0]:
            raise UserError("lora_init.other_base", there=list(layer[UP].shape),
                            here=list(b.shape))
        # Where the model's rank is higher, the other rows of A stay as they start and those of B
        # are zero: the delta is the file's, and the new directions can learn.
        rank, scale = rank_of(layer), scale_of(layer) / modules[name].scaling[lora.ADAPTER]
        a[:rank] = layer[DOWN].reshape(rank, *a.shape[1:]).to(a)
        b.zero_()[:, :rank] = (layer[UP].float() * scale).reshape(-1, rank, *b.shape[2:]).to(b)
    emit(Note(key="lora_init.started", params={
        "file": str(path), "layers": len(layers), "fresh": len(modules) - len(layers)}))
    if left := len(file.layers) - len(layers) + len(file.unknown):
        emit(Note(key="lora_init.left_out", params={"file": str(path), "count": left}))


def _targets(names: list[str], spec: FamilySpec) -> str | list[str]:
    """The smallest preset that covers all layers of the file, else their names."""
    # presets stand in the spec from small to large
    for preset, suffixes in spec.lora_presets.items():
        if all(any(name == s or name.endswith(f".{s}") for s in suffixes) for name in names):
            return preset
    targets = set()
    for name in names:
        words = name.split(".")
        at = len(words) - 1
        # ff.net.0.proj: from the last word that says something, or `proj` would match everywhere
        while at and (words[at].isdigit() or words[at] in _INNER):
            at -= 1
        targets.add(".".join(words[at:]))
    return sorted(targets)
