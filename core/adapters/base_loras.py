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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import families
from core.config import TrainConfig, resolve
from core.errors import Fix, UserError
from core.families.layer_names import Part
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

WEIGHT = 1.0                                # where the user says none


def wanted(config: TrainConfig) -> list[Lora]:
    """Raises UserError for a file that isn't there, with the nearest names."""
    return [find_lora(*parse_lora(text, WEIGHT)) for text in config.base_loras]


def located(config: TrainConfig, folder: Path | None) -> TrainConfig:
    """The config with the files that lie in `folder` by their full path."""
    found = []
    for text in config.base_loras:
        name, weight = parse_lora(text, WEIGHT)
        path = resolve(name, folder)
        found.append(f"{path}:{weight:g}" if path.exists() else text)
    return config.with_changes(base_loras=found) if found != config.base_loras else config


def check(config: TrainConfig, family: str) -> None:
    """Before anything is read or encoded. Raises UserError for a LoRA of another family."""
    for one in wanted(config):
        if family in families.SPECS:      # a family of the user's own may take any file
            checked(formats.weights_file(one.path), family)


def held(config: TrainConfig, bytes_each: int) -> float:
    """Bytes that they take beside the base; for plans."""
    return sum(bytes_each * math.prod(info.shape) for one in wanted(config)
               for name, info in read_header(formats.weights_file(one.path)).tensors.items()
               if len(info.shape) > 1)


def attach(model: Any, config: TrainConfig, family: str, precision: Precision,
           emit: Callable[[Event], None] = lambda event: None) -> Attached:
    """Adds the config's to a denoiser, before an adapter is. Raises UserError where one doesn't
    fit. Their layers for text encoders, whose output is cached, are told and left out."""
    attached = Attached()
    for one in wanted(config):
        found = formats.read(one.path, family if family in SPECS else "")
        part = found.naming[0]
        own = {path.partition(".")[2]: layer for path, layer in found.layers.items()
               if path.partition(".")[0] == part.name}
        layers = _layers(model, part)
        fitting = {path: layer for path, layer in own.items() if path.replace(".", "_") in layers}
        if not fitting:
            raise UserError("base_loras.none_fit", file=one.path, count=len(found.layers),
                            example=next(iter(found.layers), "-"))
        for path, layer in fitting.items():
            _add(attached, one, path, layer, layers[path.replace(".", "_")], precision)
        attached.told.append(f"{one.path.stem}:{one.weight:g}:"
                             f"{data_hash(formats.weights_file(one.path))[:12]}")
        emit(Note(key="base_loras.used", params={
            "file": str(one.path), "weight": f"{one.weight:g}", "layers": len(fitting)}))
        if left := len(found.layers) - len(fitting) + len(found.unknown):
            emit(Note(key="base_loras.left_out", params={"file": str(one.path), "count": left}))
    return attached


def _layers(model: Any, part: Part) -> dict[str, Any]:
    """By their flat names: a file may not tell underscores from dots."""
    from torch import nn
    return {part.unrooted(path).replace(".", "_"): module for path, module
            in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def _add(attached: Attached, one: Lora, path: str, layer: Layer, base: Any,
         precision: Precision) -> None:
    if (kind := kind_of(layer)) != "lora":
        raise UserError("base_loras.other_kind", file=one.path, kind=kind, layer=path)
    plain = without_mid(layer)
    rank, down, up = rank_of(plain), plain[DOWN], plain[UP]
    shape = tuple(base.weight.shape)
    if (down.flatten(1).shape[1] != math.prod(shape[1:]) or up.shape[0] != shape[0]
            or getattr(base, "groups", 1) != 1):
        raise UserError("base_loras.other_base", file=one.path, layer=path,
                        there=[up.shape[0], *down.shape[1:]], here=list(shape))
    if up.is_meta or base.weight.is_meta:
        return
    up = up.flatten(1).float() * (scale_of(plain) * one.weight)
    attached.add(base, down.reshape(rank, *shape[1:]).to(precision.device, precision.compute),
                 up.view(-1, rank, *[1] * (len(shape) - 2)).to(precision.device,
                                                               precision.compute))


def tags(attached: Attached | None) -> str:
    """As a prompt names them, for a picture that is drawn with them."""
    told = [one.rsplit(":", 2) for one in attached.told] if attached else []
    return "".join(f" <lora:{name}:{weight}>" for name, weight, _ in told)


def metadata(told: Sequence[str]) -> dict[str, str]:
    """For the LoRA that was trained: what it was trained upon, and doesn't hold."""
    return {BASE_LORAS_KEY: json.dumps(list(told))} if told else {}


def refuse_others(here: Sequence[str], there: Sequence[str], before: Sequence[str]) -> None:
    """A resumed run goes on with the base that it began with: `there`; `before` are that run's
    config's. Raises UserError."""
    if list(here) != list(there):
        raise UserError("base_loras.other_on_resume", here=", ".join(here) or "-",
                        there=", ".join(there) or "-",
                        fixes=[Fix("fixes.same_base_loras", {"base_loras": list(before)})])
