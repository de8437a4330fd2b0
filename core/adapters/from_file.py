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
from core.lora_files.layers import Lora

Ends = dict[str, Tensor]                    # what follows a layer's name -> tensor
# peft's names of a LoRA layer's tensors -> LyCORIS'.
_HALVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight",
           "lora_magnitude_vector.weight": "dora_scale"}
_BEYOND_DIFFUSERS = re.compile(r"\.(dora_scale|hada_\w+|lokr_\w+|oft_blocks)$")
# A layer is of the first kind whose tensor it has.
_KINDS = (("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("lokr", "lokr_w1_a"),
          ("oft", "oft_blocks"), ("lora", "lora_down.weight"))


# --- out ---

def tensors(model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype,
            part: str = "unet") -> dict[str, Tensor]:
    """What a file holds, by LyCORIS' ends and module paths: `unet.mid_block....lora_down.weight`.
    `state` are the weights of the adapter on `model`, as core.adapters.lora.state gives them.

    PiSSA is stored as the difference to its start, at twice the rank: a plain LoRA for the
    unchanged base. Alpha is such that alpha / rank is the scale, whatever rule gave it. Alpha and
    DoRA's lengths stay fp32: rounding these would scale a whole column of the base.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in lora.layers(model):
        weights = {key.removeprefix(f"{path}."): value for key, value in state.items()
                   if key.startswith(f"{path}.")}
        for end, value in _lycoris_tensors(layer, weights).items():
            exact = end in ("alpha", "dora_scale")
            tensors[f"{part}.{path}.{end}"] = value.detach().to(torch.float32 if exact else dtype)
    return tensors


def _lycoris_tensors(layer: Any, weights: Ends) -> Ends:
    """The weights of one layer by LyCORIS' names, with alpha."""
    if isinstance(layer, adapters.Rotation):
        # a file of diag-oft holds its constraint as alpha
        return weights | {"alpha": torch.tensor(layer.constraint[lora.ADAPTER])}
    scale = adapters.unit_scale(layer, lora.ADAPTER)
    if not isinstance(layer, LoraLayer):
        return weights | {"alpha": torch.tensor(scale * layer.r[lora.ADAPTER])}
    ends = {_HALVES[end]: value for end, value in weights.items()}
    # PiSSA: A B - A0 B0 = [A; A0] [B, -B0], a plain LoRA of twice the rank
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


def load(models: Mapping[str, object], file: Lora, adapter: str) -> list[str]:
    """Puts a file's layers into a pipeline's models ({"unet": ...}). -> those that fit none.

    Raises RuntimeError where shapes don't fit the layers that they name.
    """
    paths: dict[str, dict[str, str]] = {}
    for part in file.naming:
        model = models.get(part.name)
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        # by flat names: a file may not tell underscores from dots
        paths[part.name] = {
            part.unrooted(path).replace(".", "_"): path for path, module in modules
            if isinstance(module, nn.Linear | nn.Conv2d | BaseTunerLayer)}
    strangers = [*file.unknown]
    layers: dict[tuple[str, str], dict[str, Ends]] = {}
    for name, ends in file.layers.items():
        part_name, _, inner = name.partition(".")
        if path := paths[part_name].get(inner.replace(".", "_")):
            kind = next((kind for kind, sign in _KINDS if sign in ends), "")
            layers.setdefault((part_name, kind), {})[path] = ends
        else:
            strangers.append(name)
    # all layers of a kind at once: peft walks the whole model for each injection
    for kind in ("lora", "loha", "lokr", "oft"):
        for part in file.naming:
            if chosen := layers.get((part.name, kind)):
                _put(kind, models[part.name], chosen, adapter)
    return strangers


def _put(kind: str, model: Any, layers: Mapping[str, Ends], adapter: str) -> None:
    if kind == "oft":
        for path, ends in layers.items():
            layer: Any = adapters.rotate(model, path)
            weight, blocks = layer.get_base_layer().weight, ends["oft_blocks"].float()
            _check(blocks.shape[0] * blocks.shape[1] == len(weight), "oft_blocks")
            limit = float(ends["alpha"]) * len(weight) if "alpha" in ends else 0.0
            rescale = ends.get("rescale")
            layer.add(adapter, blocks.to(weight.device), limit,
                      None if rescale is None else rescale.float().to(weight.device))
        return
    config = {"lora": LoraConfig, "loha": LoHaConfig, "lokr": LoKrConfig}[kind]
    # the rank is the file's: it is set layer by layer
    inject_adapter_in_model(config(r=1, target_modules="|".join(map(re.escape, layers))),
                            model, adapter)
    for path, layer in lora.layers(model):
        if path in layers and lora.holds(layer, adapter):
            (_put_product if kind == "lora" else _put_factors)(layer, layers[path], adapter)


def _put_product(layer: Any, ends: Ends, adapter: str) -> None:
    down, up = _fp32(layer, ends["lora_down.weight"], ends["lora_up.weight"])
    weight = layer.get_base_layer().weight
    _check(up.shape[:1] + down.shape[1:2] == weight.shape[:2] and len(down) == up.shape[1], "lora")
    # files may hold a 1 x 1 convolution as a matrix, and the other way round
    rank = len(down)
    for half, value in ((layer.lora_A[adapter], down), (layer.lora_B[adapter], up)):
        shape = (*value.shape[:2], *half.weight.shape[2:])
        half.weight = nn.Parameter(value.reshape(shape), requires_grad=False)
    layer.r[adapter], layer.lora_alpha[adapter] = rank, float(ends.get("alpha", rank))
    # at weight 1; `lora.use` sets the weight of each picture
    layer.set_scale(adapter, 1.0)
    if "dora_scale" in ends:
        lengths = _fp32(layer, ends["dora_scale"])[0]
        lengths = lengths.view(*lengths.shape[:2], *[1] * (weight.ndim - min(2, lengths.ndim)))
        layer.lora_magnitude_vector[adapter] = adapters.Magnitude(lengths).requires_grad_(False)
        layer.lora_variant[adapter] = adapters.Decomposed(layer.scaling[adapter])


def _put_factors(layer: Any, ends: Ends, adapter: str) -> None:
    """LoHa and LoKr: the file decides which factors there are, and their sizes."""
    # peft has made factors by its own rules: they are replaced
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
    # raises where shapes don't fit
    layer.get_delta_weight(adapter)
    adapters.pose(layer)


def _fp32(layer: Any, *values: Tensor) -> list[Tensor]:
    device = layer.get_base_layer().weight.device
    return [value.to(device, torch.float32) for value in values]


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise RuntimeError(f"size mismatch for {what}")
