"""`base_loras`: LoRAs that belong to the base while a run learns, and to nothing else: a training
adapter on a distilled base, a style that the new LoRA shall not learn again.

They are added to their layers' outputs and never to the weights: what int8 and nf4 would round
away stays exact, a base that waits in RAM stays as it is, and for previews and the proof they are
gone to the bit. Without torch until they are attached.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from core import families
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.families.registry import SPECS
from core.hashes import data_hash
from core.jobs.events import Event, Note
from core.lora_files import formats
from core.lora_files.layers import DOWN, UP, Layer, kind_of, rank_of, scale_of, without_mid
from core.lora_files.library import Lora, checked, find_lora, parse_lora
from core.lora_files.metadata import BASE_LORAS_KEY
from core.safetensors_header import read_header
from core.weights.attached import Attached

if TYPE_CHECKING:
    from core.weights.precision import Precision

WEIGHT = 1.0                                # where the user gives none


def loras_of(config: TrainConfig) -> list[Lora]:
    """The files of `base_loras`. Raises UserError for one that isn't there, with the nearest
    names."""
    return [find_lora(*parse_lora(text, WEIGHT)) for text in config.base_loras]


def check(config: TrainConfig, family: str) -> None:
    """Raises UserError for a LoRA of another family, before anything is read or encoded."""
    for lora in loras_of(config):
        if family in families.SPECS:      # a family of the user's own may take any file
            checked(formats.weights_file(lora.path), family)


def size_in_bytes(config: TrainConfig, bytes_each: int) -> float:
    """Bytes that they take beside the base, at `bytes_each` a number; for memory plans."""
    return sum(bytes_each * math.prod(info.shape) for lora in loras_of(config)
               for info in read_header(formats.weights_file(lora.path)).tensors.values()
               if len(info.shape) > 1)


def attach(model: Any, config: TrainConfig, family: str, precision: Precision,
           emit: Callable[[Event], None] = lambda event: None) -> Attached:
    """Adds the config's LoRAs to a denoiser, before its adapter is attached.

    Layers for text encoders are left out, with a note: their output is cached. Raises UserError
    where a LoRA doesn't fit."""
    from torch import nn
    attached = Attached()
    for lora in loras_of(config):
        file = formats.read(lora.path, family if family in SPECS else "")
        part = file.naming[0]
        # by flat names: a file may not tell underscores from dots
        modules = {part.unrooted(path).replace(".", "_"): module for path, module
                   in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        fitting = {path: layer for path, layer in file.layers_of(part.name).items()
                   if path.replace(".", "_") in modules}
        if not fitting:
            raise UserError("base_loras.none_fit", file=lora.path, count=len(file.layers),
                            example=next(iter(file.layers), "-"))
        for path, layer in fitting.items():
            _add(attached, lora, path, layer, modules[path.replace(".", "_")], precision)
        attached.labels.append(f"{lora.path.stem}:{lora.weight:g}:"
                               f"{data_hash(formats.weights_file(lora.path))[:12]}")
        emit(Note(key="base_loras.used", params={
            "file": str(lora.path), "weight": f"{lora.weight:g}", "layers": len(fitting)}))
        if left := len(file.layers) - len(fitting) + len(file.unknown):
            emit(Note(key="base_loras.left_out", params={"file": str(lora.path), "count": left}))
    return attached


def _add(attached: Attached, lora: Lora, path: str, layer: Layer, base: Any,
         precision: Precision) -> None:
    if (kind := kind_of(layer)) != "lora":
        raise UserError("base_loras.other_kind", file=lora.path, kind=kind, layer=path)
    layer = without_mid(layer)
    rank, down, up = rank_of(layer), layer[DOWN], layer[UP]
    shape = tuple(base.weight.shape)
    if (down.flatten(1).shape[1] != math.prod(shape[1:]) or up.shape[0] != shape[0]
            or getattr(base, "groups", 1) != 1):
        raise UserError("base_loras.other_base", file=lora.path, layer=path,
                        there=[up.shape[0], *down.shape[1:]], here=list(shape))
    # a memory plan runs without weights
    if up.is_meta or base.weight.is_meta:
        return
    up = up.flatten(1).float() * (scale_of(layer) * lora.weight)
    halves = down.reshape(rank, *shape[1:]), up.view(-1, rank, *[1] * (len(shape) - 2))
    attached.add(base, *(half.to(precision.device, precision.compute) for half in halves))


def tags(attached: Attached | None) -> str:
    """Their tags in a prompt, for a picture that is drawn with them."""
    # "name:weight:hash"; a name may hold colons
    parts = [text.rsplit(":", 2) for text in attached.labels] if attached else []
    return "".join(f" <lora:{name}:{weight}>" for name, weight, _ in parts)


def metadata(labels: Sequence[str]) -> dict[str, str]:
    """Metadata for the trained LoRA: what it was trained upon and doesn't contain."""
    return {BASE_LORAS_KEY: json.dumps(list(labels))} if labels else {}


def refuse_others(here: Sequence[str], there: Sequence[str], before: Sequence[str]) -> None:
    """Raises UserError where a resumed run would go on upon other LoRAs (`here`) than it began
    with (`there`). `before`: the `base_loras` of that run's config, offered as the fix."""
    if list(here) != list(there):
        raise UserError("base_loras.other_on_resume", here=", ".join(here) or "-",
                        there=", ".join(there) or "-",
                        fixes=[Fix("fixes.same_base_loras", {"base_loras": list(before)})])
