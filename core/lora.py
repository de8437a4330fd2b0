"""Adapters on a denoiser, by peft: which layers, attach, scale, read out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from core import extensions, words
from core.config import TrainConfig
from core.families.base import FamilySpec
from core.faults import Fault, Fix

ADAPTER = "default"
_TARGETABLE = (nn.Linear, nn.Conv2d)


def resolve_targets(wanted: list[str] | str, spec: FamilySpec, model: nn.Module) -> list[str]:
    """Preset or layer names of users -> suffixes that exist in the model.

    `q_proj, v_proj`, which the described configs name, are `to_q, to_v` in a UNet.
    Raises Fault naming the first target that matches no layer, with the nearest that does.
    """
    if isinstance(wanted, str):
        wanted = list(spec.lora_presets.get(wanted) or [w.strip() for w in wanted.split(",")])
    suffixes = [spec.lora_aliases.get(name, name) for name in wanted]
    layers = [n for n, m in model.named_modules() if isinstance(m, _TARGETABLE)]
    for suffix in suffixes:
        if not any(n == suffix or n.endswith(f".{suffix}") for n in layers):
            known = sorted({*spec.lora_presets, *spec.lora_aliases,
                            *(s for p in spec.lora_presets.values() for s in p)})
            raise Fault("engine.no_such_target", target=suffix, known=", ".join(known),
                        nearest=(words.nearest(suffix, known, 1) or ["to_q"])[0],
                        fixes=[Fix("fixes.attention", {"target_modules": "attention"})])
    return list(dict.fromkeys(suffixes))


def attach(model: Any, config: TrainConfig, spec: FamilySpec) -> list[nn.Parameter]:
    """Adds the LoRA; its weights are fp32 whatever the base is. -> the trainable parameters.

    Layers with fewer than `rank` inputs or outputs are no exception: rank is the user's word.
    """
    targets = resolve_targets(config.target_modules, spec, model)
    with torch.random.fork_rng():       # the start of the LoRA depends on the seed alone
        torch.manual_seed(config.seed)
        model.add_adapter(LoraConfig(
            r=config.lora_rank, lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout, target_modules=targets, init_lora_weights=True))
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    if extensions.is_named(config.adapter):
        _vary(model, config)
    return trainable(model)


def _vary(model: nn.Module, config: TrainConfig) -> None:
    """The user's own variant changes the LoRA that is there: which of it trains, how it starts."""
    extension = extensions.load(config.adapter, "adapter")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        extension(model, config)
    if not trainable(model):
        raise extension.wrong("trainable parameters", None)


def set_training(model: nn.Module, on: bool) -> None:
    """Dropout of the adapter on or off. The frozen base stays in eval mode: diffusers' UNets copy
    activations in train mode, for trainers with several cards."""
    model.eval()
    for _, layer in layers(model):
        layer.lora_dropout.train(on)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def count(models: Iterable[object], adapter: str) -> int:
    """Layers of a pipeline's models that hold the adapter."""
    return sum(adapter in layer.lora_A for model in models if isinstance(model, nn.Module)
               for _, layer in layers(model))


def set_weight(model: nn.Module, weight: float) -> None:
    """Strength of the adapter: 1.0 while training, 0.8 for previews."""
    for _, layer in layers(model):
        layer.set_scale(ADAPTER, weight)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights by peft's names, on the CPU, fp32."""
    found: Mapping[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=ADAPTER, save_embedding_layers=False)   # "auto" would ask the hub
    return {k: v.detach().to("cpu", torch.float32).clone() for k, v in found.items()}


def load_state(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises Fault where the weights are of other layers or another rank."""
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    shapes = {k: v.shape for k, v in own.items()}
    if shapes != {k: v.shape for k, v in weights.items()}:
        raise Fault("engine.other_adapter", here=len(shapes), there=len(weights))
    set_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER)
