"""Adapters on a model, by peft: choosing layers, attaching, scaling, reading the weights.

The kinds: lora (Hu et al. 2021, arXiv 2106.09685), rslora (Kalajdzievski 2023, 2312.03732),
loha (Hyeon-Woo et al. 2021, 2108.06098), lokr (Yeh et al. 2023, 2309.14859); dora, pissa and oft
are in core/adapters/layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lokr.layer import factorization
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from core import i18n, plugins
from core.adapters import layers as adapters
from core.config import PRODUCTS, TrainConfig
from core.errors import Fix, UserError
from core.families.spec import FamilySpec
from core.weights.quantization import repeated_blocks

ADAPTER = "default"
_TARGETABLE = (nn.Linear, nn.Conv2d)
_SUPPORTED = {                              # keys -> the adapters that have them
    "lora_dropout": PRODUCTS,
    "lora_plus_ratio": PRODUCTS,
    "rank_dropout": ("lora", "rslora", "pissa", "loha", "lokr"),
    "module_dropout": ("lora", "rslora", "pissa", "loha", "lokr", "oft"),
    "lokr_factor": ("lokr",),
}
# Formats without keys for an adapter. peft has some for DoRA and OFT, which mean something else:
# lengths of rows, and turned inputs.
_UNWRITTEN = {"peft": ("dora", "lokr", "oft"), "diffusers": ("dora", "loha", "lokr", "oft")}


@dataclass(frozen=True, slots=True)
class Size:
    """Of one layer's adapter."""

    rank: int
    alpha: float


def file_format(config: TrainConfig, spec: FamilySpec, wanted: str = "auto") -> str:
    """The format of a LoRA file. `auto` is the family's own format, or kohya's where that has no
    keys for what is trained."""
    if wanted != "auto":
        return wanted
    return "kohya" if config.adapter in _UNWRITTEN.get(spec.lora_format, ()) else spec.lora_format


def resolve_targets(wanted: list[str] | str, spec: FamilySpec, model: nn.Module) -> list[str]:
    """The user's preset or layer names -> suffixes of layers that exist in the model.

    A family's aliases count: other models' `q_proj, v_proj` are `to_q, to_v` in a UNet.
    Raises UserError naming the first target that matches no layer, with the nearest that does.
    """
    # a preset's name, or names with commas between
    if isinstance(wanted, str):
        wanted = list(spec.lora_presets.get(wanted) or [name.strip() for name in wanted.split(",")])
    suffixes = [spec.lora_aliases.get(name, name) for name in wanted]
    paths = _targetable(model)
    for suffix in suffixes:
        if not any(_ends(path, suffix) for path in paths):
            known = sorted({*spec.lora_presets, *spec.lora_aliases,
                            *(s for p in spec.lora_presets.values() for s in p)})
            raise UserError("engine.no_such_target", target=suffix, known=", ".join(known),
                            nearest=(i18n.nearest(suffix, known, 1) or ["to_q"])[0],
                            fixes=[Fix("fixes.attention", {"target_modules": "attention"})])
    return list(dict.fromkeys(suffixes))


def choose(model: nn.Module, config: TrainConfig, spec: FamilySpec) -> dict[str, Size]:
    """Path of each layer that gets an adapter -> its size, in the model's order.

    `conv_rank` adds the kernels wider than a pixel in the model's blocks (LoCon). A rank of
    `block_ranks` keeps the scale alpha / rank. Raises UserError for names that match no layer.
    """
    suffixes = resolve_targets(config.target_modules, spec, model)
    wide = {id(m) for block in repeated_blocks(model) for m in block.modules()
            if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1} if config.conv_rank else set()
    _match_all(config.block_ranks, model)
    sizes = {}
    for path in _targetable(model):
        if any(_ends(path, suffix) for suffix in suffixes):
            size = Size(config.lora_rank, config.alpha)
        elif id(model.get_submodule(path)) in wide:
            size = Size(config.conv_rank, config.conv_alpha or float(config.conv_rank))
        else:
            continue
        # rank 0 leaves a block out
        if rank := int(_last(config.block_ranks, path, size.rank)):
            sizes[path] = Size(rank, size.alpha * rank / size.rank)
    if not sizes:
        raise UserError("engine.no_layer_left")
    return sizes


def _ends(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def _targetable(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, _TARGETABLE)]


def _within(block: str, path: str) -> bool:
    """Whether a layer lies in a block: `down_blocks.1`, `mid_block`, `attn2` or
    `down_blocks.*.attentions.0`, whole names in a row."""
    pattern = re.escape(block.strip(".")).replace(r"\*", r"[^.]*")
    return re.search(rf"(^|\.){pattern}(\.|$)", path) is not None


def _last(values: Mapping[str, float], path: str, default: float) -> float:
    """The value of the last block that matches: users name large blocks first, then exceptions."""
    return next((value for block, value in reversed(list(values.items()))
                 if _within(block, path)), default)


def _match_all(blocks: Iterable[str], model: nn.Module) -> None:
    """Raises UserError for the first block that holds no layer, with the nearest that does."""
    paths = _targetable(model)
    for block in blocks:
        if not any(_within(block, path) for path in paths):
            known = sorted({".".join(path.split(".")[:n]) for path in paths for n in (1, 2)})
            raise UserError("engine.no_such_block", block=block, known=", ".join(known),
                            nearest=(i18n.nearest(block, known, 1) or known)[0])


def attach(model: Any, config: TrainConfig, spec: FamilySpec) -> list[nn.Parameter]:
    """Adds the adapter, freezes the rest of the model, and returns the trainable parameters. They
    are fp32 whatever the base is.

    Raises UserError where a key is set that this kind of adapter doesn't have.
    """
    kind = "lora" if plugins.is_named(config.adapter) else config.adapter
    for key, kinds in _SUPPORTED.items():
        default = TrainConfig.model_fields[key].default
        if getattr(config, key) != default and kind not in kinds:
            raise UserError("engine.adapter_lacks", adapter=config.adapter, key=key,
                            kinds=", ".join(kinds),
                            fixes=[Fix("fixes.without_key", {key: default})])
    # before the run, not at its end
    if kind in _UNWRITTEN.get(config.save_format, ()):
        raise UserError("engine.format_lacks", adapter=kind, format=config.save_format,
                        fixes=[Fix("fixes.kohya_file", {"save_format": "kohya"})])
    sizes = choose(model, config, spec)
    # the start of the adapter depends on the seed alone
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model.requires_grad_(False)
        if config.adapter == "oft":
            for path, size in sizes.items():
                rotation = adapters.rotate(model, path)
                weight: Tensor = rotation.get_base_layer().weight
                # As in LyCORIS: the rank is the largest side of a block, blocks divide the outputs,
                # and no block is larger than there are blocks.
                side, blocks = sorted(factorization(weight.shape[0], size.rank))
                rotation.add(ADAPTER, torch.zeros(blocks, side, side, device=weight.device),
                             module_dropout=config.module_dropout)
        else:
            inject_adapter_in_model(_peft_config(config, sizes), model, ADAPTER)
    # AdamW in half precision would round small steps to nothing
    for parameter in trainable(model):
        parameter.data = parameter.data.float()

    # What peft's own layers lack. It needs the fp32 weights.
    dropout = config.rank_dropout, config.module_dropout
    with torch.random.fork_rng():           # PiSSA's decomposition throws dice
        torch.manual_seed(config.seed)
        for _, layer in layers(model):
            if config.adapter == "lokr":
                adapters.full_kronecker(layer, ADAPTER)
            elif config.adapter == "dora":
                adapters.decompose(layer, ADAPTER)
            elif config.adapter == "pissa":
                start = adapters.start_at_principal(layer, ADAPTER)
                layer.lora_variant[ADAPTER] = adapters.Product(*dropout, start)
            elif any(dropout) and isinstance(layer, LoraLayer):
                layer.lora_variant[ADAPTER] = adapters.Product(*dropout)

    # The user's own variant changes the plain LoRA: which of it trains, how it starts.
    if plugins.is_named(config.adapter):
        extension = plugins.load(config.adapter, "adapter")
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            extension(model, config)
        if not trainable(model):
            raise extension.wrong("trainable parameters", None)
    return trainable(model)


def _peft_config(config: TrainConfig, sizes: Mapping[str, Size]) -> Any:
    common = {"target_modules": "|".join(map(re.escape, sizes)), "r": config.lora_rank,
              "rank_pattern": {re.escape(path): size.rank for path, size in sizes.items()
                               if size.rank != config.lora_rank},
              "alpha_pattern": {re.escape(path): size.alpha for path, size in sizes.items()
                                if size.alpha != config.alpha}}
    dropout = {"rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
    if config.adapter == "loha":
        return LoHaConfig(alpha=config.alpha, **dropout, **common)
    if config.adapter == "lokr":
        return LoKrConfig(alpha=config.alpha, decompose_factor=config.lokr_factor,
                          rank_dropout_scale=True, **dropout, **common)
    # its dropout of ranks and layers is in adapters.Product: peft has none
    return LoraConfig(lora_alpha=config.alpha, lora_dropout=config.lora_dropout,
                      use_rslora=config.adapter == "rslora", **common)


def groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The trainable parameters for the optimizer, grouped by the factor of their rate: LoRA+
    (Hayou et al. 2024, arXiv 2402.12354: B learns faster than A) and `block_rates`."""
    _match_all(config.block_rates, model)
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = _last(config.block_rates, name, 1.0)
            factor *= config.lora_plus_ratio if ".lora_B." in name else 1.0
            by_factor.setdefault(factor, []).append(parameter)
    return [{"params": members, "factor": factor} for factor, members in by_factor.items()]


def set_training(model: nn.Module, on: bool) -> None:
    """Dropout of the adapter on or off. The frozen base stays in eval mode: diffusers' UNets copy
    activations in train mode, for trainers with several cards."""
    model.eval()
    for _, layer in layers(model):
        if isinstance(layer, LoraLayer):
            layer.lora_dropout.train(on)
        # peft's LoHa and LoKr throw dice whenever they train: even at a dropout of 0 they would
        # leave out a layer once in 2^24 times
        shares = *getattr(layer, "rank_dropout", {}).values(), *getattr(
            layer, "module_dropout", {}).values()
        layer.training = on and (isinstance(layer, LoraLayer) or any(shares))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers: peft's LoraLayer, LoHaLayer, LoKrLayer, or Rotation."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def holds(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def count(models: Iterable[object], adapter: str) -> int:
    """The number of layers in a pipeline's models that hold the adapter."""
    return sum(holds(layer, adapter) for model in models if isinstance(model, nn.Module)
               for _, layer in layers(model))


def set_weight(model: nn.Module, weight: float) -> None:
    """Sets the strength of the adapter in training: 1.0 in the step, less for previews."""
    for _, layer in layers(model):
        layer.set_scale(ADAPTER, weight)


def use(models: Iterable[object], weights: Mapping[str, float]) -> None:
    """Switches a pipeline's adapters, of all kinds: those in `weights` on, all others off."""
    for model in models:
        for _, layer in layers(model) if isinstance(model, nn.Module) else ():
            layer.enable_adapters(bool(weights))
            if weights:
                layer.set_adapter(list(weights))
            for name, weight in weights.items():
                if holds(layer, name):
                    layer.set_scale(name, weight)


def starts(model: nn.Module) -> list[Any]:
    """The tensors that the adapter holds besides its parameters: PiSSA's start."""
    variants = [v for _, layer in layers(model) if isinstance(layer, LoraLayer)
                for v in layer.lora_variant.values()]
    return [half.weight for v in variants if isinstance(v, adapters.Product) and v.start
            for half in v.start]


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights by peft's names, copied to the CPU, fp32."""
    return {name: parameter.detach().to("cpu", torch.float32).clone()
            for name, parameter in parameters(model).items()}


def load_state(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts `state` back. Raises UserError where it is of other layers or another rank."""
    here = parameters(model)
    if {k: v.shape for k, v in here.items()} != {k: v.shape for k, v in weights.items()}:
        raise UserError("engine.other_adapter", here=len(here), there=len(weights))
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(weights[name])


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names in files of peft, which lack the adapter's own name:
    `... to_q.lora_A.default.weight` -> `... to_q.lora_A.weight`."""
    return {name.replace(f".{ADAPTER}", ""): p for name, p in model.named_parameters()
            if f".{ADAPTER}." in f"{name}."}
