"""Adapters of every kind in the community's keys: from a model in training, and into a pipeline.

    lora, rslora, dora, pissa   lora_down, lora_up, alpha, dora_scale       (kohya, LyCORIS)
    loha                        hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b  (LyCORIS)
    lokr                        lokr_w1 or _a, _b, lokr_w2 or _a, _b        (LyCORIS)
    oft                         oft_blocks                                  (LyCORIS' diag-oft)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from core.adapters import layers as adapters
from core.adapters import lora
from core.families.layer_names import Naming, Part
from core.families.registry import STANDARD
from core.lora_files.files import kohya_name
from core.lora_files.layers import Lora

Ends = dict[str, Tensor]                    # what follows a layer's name -> tensor
_HALVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight",
           "lora_magnitude_vector.weight": "dora_scale"}
_BEYOND_DIFFUSERS = re.compile(r"\.(dora_scale|hada_\w+|lokr_\w+|oft_blocks)$")
_KINDS = (("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("lokr", "lokr_w1_a"),
          ("oft", "oft_blocks"), ("lora", "lora_down.weight"))


# --- out ---

def tensors(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype,
            part: str = "unet", naming: Naming | None = STANDARD.naming) -> dict[str, Tensor]:
    """What a file holds: `state` as core.adapters.lora.state gives it, of the layers of `model`.
    Without `naming`, layers have their own paths.

    PiSSA is stored as the difference to its start, at twice the rank: a plain LoRA for the
    unchanged base. Alpha is such that alpha / rank is the scale, whatever rule gave it. Alpha and
    DoRA's lengths stay fp32: rounding these would scale a whole column of the base.
    """
    found: dict[str, Tensor] = {}
    for path, layer in lora.layers(model):
        own = {key[len(path) + 1:]: value for key, value in state.items()
               if key.startswith(f"{path}.")}
        name = kohya_name(f"{part}.{path}", naming) if naming else f"{part}.{path}"
        for end, value in _written(layer, own).items():
            exact = end in ("alpha", "dora_scale")
            found[f"{name}.{end}"] = value.detach().to(torch.float32 if exact else dtype)
    return found


def _written(layer: Any, own: Ends) -> Ends:
    """One layer's tensors by the ends of their keys."""
    if isinstance(layer, adapters.Rotation):
        return own | {"alpha": torch.tensor(layer.constraint[lora.ADAPTER])}
    scale = adapters.unit_scale(layer, lora.ADAPTER)
    if not isinstance(layer, LoraLayer):
        return own | {"alpha": torch.tensor(scale * layer.r[lora.ADAPTER])}
    ends = {_HALVES[end]: value for end, value in own.items()}
    variant: Any = layer.lora_variant.get(lora.ADAPTER)
    if isinstance(variant, adapters.Product) and variant.start:
        start: Any = variant.start
        a, b = (half.weight.detach().cpu() for half in start)
        ends["lora_down.weight"] = torch.cat([ends["lora_down.weight"], a])
        ends["lora_up.weight"] = torch.cat([ends["lora_up.weight"], -b], 1)
    return ends | {"alpha": torch.tensor(scale * len(ends["lora_down.weight"]))}


# --- in ---

def is_ours(keys: Iterable[str]) -> bool:
    """Whether a file is of a kind that diffusers' own loader can't read."""
    return any(_BEYOND_DIFFUSERS.search(key) for key in keys)


def load(models: Mapping[str, object], found: Lora, adapter: str) -> list[str]:
    """Puts a file's layers into a pipeline's models ({"unet": ...}). -> those that fit none.

    Raises RuntimeError where shapes don't fit the layers that they name.
    """
    names = {part.name: _layers(models.get(part.name), part) for part in found.naming}
    strangers = [*found.unknown]
    by_part: dict[str, dict[str, Ends]] = {}
    for path, ends in found.layers.items():
        part, _, inner = path.partition(".")
        if own := names[part].get(inner.replace(".", "_")):
            by_part.setdefault(part, {})[own] = ends
        else:
            strangers.append(path)
    for part, layers in by_part.items():
        for kind in ("lora", "loha", "lokr", "oft"):
            some = {path: ends for path, ends in layers.items() if _kind(ends) == kind}
            if some:
                _put(kind, models[part], some, adapter)
    return strangers


def _layers(model: object, part: Part) -> dict[str, str]:
    """Layers by their flat names: a file may not tell underscores from dots."""
    found = model.named_modules() if isinstance(model, nn.Module) else ()
    return {part.unrooted(path).replace(".", "_"): path for path, module in found
            if isinstance(module, nn.Linear | nn.Conv2d | BaseTunerLayer)}


def _kind(ends: Ends) -> str:
    return next((kind for kind, sign in _KINDS if sign in ends), "")


def _put(kind: str, model: Any, found: Mapping[str, Ends], adapter: str) -> None:
    if kind == "oft":
        for path, ends in found.items():
            _put_rotation(adapters.rotate(model, path), ends, adapter)
        return
    made = {"lora": LoraConfig, "loha": LoHaConfig, "lokr": LoKrConfig}[kind]
    inject_adapter_in_model(made(r=1, target_modules="|".join(map(re.escape, found))),
                            model, adapter)
    for path, layer in lora.layers(model):
        if path in found and lora.holds(layer, adapter):
            (_put_product if kind == "lora" else _put_factors)(layer, found[path], adapter)


def _put_rotation(layer: Any, ends: Ends, adapter: str) -> None:
    weight, blocks = layer.get_base_layer().weight, ends["oft_blocks"].float()
    _check(blocks.shape[0] * blocks.shape[1] == len(weight), "oft_blocks")
    limit = float(ends["alpha"]) * len(weight) if "alpha" in ends else 0.0
    rescale = ends.get("rescale")
    layer.add(adapter, blocks.to(weight.device), limit,
              None if rescale is None else rescale.float().to(weight.device))


def _put_product(layer: Any, ends: Ends, adapter: str) -> None:
    down, up = _fp32(layer, ends["lora_down.weight"], ends["lora_up.weight"])
    weight = layer.get_base_layer().weight
    _check(up.shape[:1] + down.shape[1:2] == weight.shape[:2] and len(down) == up.shape[1], "lora")
    rank = len(down)
    for half, value in ((layer.lora_A[adapter], down), (layer.lora_B[adapter], up)):
        shape = (*value.shape[:2], *half.weight.shape[2:])
        half.weight = nn.Parameter(value.reshape(shape), requires_grad=False)
    layer.r[adapter], layer.lora_alpha[adapter] = rank, float(ends.get("alpha", rank))
    layer.set_scale(adapter, 1.0)
    if "dora_scale" in ends:
        lengths = _fp32(layer, ends["dora_scale"])[0]
        lengths = lengths.view(*lengths.shape[:2], *[1] * (weight.ndim - min(2, lengths.ndim)))
        layer.lora_magnitude_vector[adapter] = adapters.Magnitude(lengths).requires_grad_(False)
        layer.lora_variant[adapter] = adapters.Decomposed(layer.scaling[adapter])


def _put_factors(layer: Any, ends: Ends, adapter: str) -> None:
    """LoHa and LoKr: the file decides which factors there are and how large they are."""
    for name in layer.adapter_layer_names:
        factors = getattr(layer, name)
        if adapter in factors:
            del factors[adapter]
        if name in ends:
            factors[adapter] = nn.Parameter(_fp32(layer, ends[name])[0], requires_grad=False)
    rank = next((ends[name].shape[0] for name in (
        "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "lokr_w2_a") if name in ends), 0)
    layer.r[adapter] = rank or 1
    layer.alpha[adapter] = float(ends.get("alpha", rank)) if rank else 1.0
    layer.set_scale(adapter, 1.0)
    layer.get_delta_weight(adapter)                     # raises where shapes don't fit
    adapters.pose(layer)


def _fp32(layer: Any, *values: Tensor) -> list[Tensor]:
    device = layer.get_base_layer().weight.device
    return [value.to(device, torch.float32) for value in values]


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise RuntimeError(f"size mismatch for {what}")
