"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core import extensions, plan
from core.config import TrainConfig
from core.events import Event, Note
from core.faults import Fault, Fix

_MAPS = ("qmap1", "qmap2")          # bitsandbytes' code books: constants, one for all tensors


def create(config: TrainConfig, parameters: Sequence[nn.Parameter],
           emit: Callable[[Event], None] | None = None) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), fused: one kernel for all tensors; or
    with 8-bit states (Dettmers et al. 2021, arXiv 2110.02861) where that can be had, else a note.
    """
    if extensions.is_named(config.optimizer):
        return _own(config, parameters)
    device = next(iter(parameters)).device.type
    options: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        if plan.eight_bit(config, device):
            return _adamw8bit(parameters, options)
        if emit:
            emit(Note(key="precision.no_adamw8bit", params={"device": device}))
    return torch.optim.AdamW(list(parameters), fused=True, **options)


def _adamw8bit(parameters: Sequence[nn.Parameter], options: dict[str, Any]
               ) -> torch.optim.Optimizer:
    library: Any = importlib.import_module("bitsandbytes")
    found: torch.optim.Optimizer = library.optim.AdamW8bit(list(parameters), **options)
    return found


def _own(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The user's own class, with those of the config's numbers that it takes."""
    extension = extensions.load(config.optimizer, "optimizer")
    takes = extension.run(inspect.signature, extension.found).parameters
    options = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
               "weight_decay": config.weight_decay}
    made = extension(list(parameters), **{k: v for k, v in options.items() if k in takes})
    if not isinstance(made, torch.optim.Optimizer):
        raise extension.wrong("torch.optim.Optimizer", made)
    made.step = functools.partial(extension.run, made.step)     # type: ignore[method-assign]
    return made


def describe(optimizer: torch.optim.Optimizer) -> str:
    """For ss_optimizer: "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.999))"."""
    kind, group = type(optimizer), optimizer.param_groups[0]
    known = {"weight_decay": group.get("weight_decay"), "betas": group.get("betas")}
    told = ",".join(f"{name}={tuple(value) if isinstance(value, (list, tuple)) else value}"
                    for name, value in known.items() if value is not None)
    return f"{kind.__module__}.{kind.__qualname__}({told})"


def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors: "<parameter>.<name>" -> CPU tensor. Taken from the
    live state: bitsandbytes hides its own from state_dict, and counts steps in plain integers."""
    found = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if name not in _MAPS and isinstance(value, (Tensor, int)):
                found[f"{number}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return found


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts `state` back. Raises Fault where it is another optimizer's: the two kinds of AdamW
    keep their moments under other names."""
    eight_bit = hasattr(optimizer, "name2qmap")
    kept = {key.partition(".")[2] for key in tensors}
    if tensors and ("state1" in kept) != eight_bit:
        there, here = ("adamw8bit", "adamw") if "state1" in kept else ("adamw", "adamw8bit")
        raise Fault("precision.other_optimizer", here=here, there=there,
                    fixes=[Fix("precision.same_optimizer", {"optimizer": there})])
    for number, parameter in enumerate(_parameters(optimizer)):
        own = {name: value for key, value in tensors.items()
               for index, _, name in [key.partition(".")] if index == str(number)}
        if own:
            optimizer.state[parameter] = (_eight_bit(optimizer, parameter, own) if eight_bit
                                          else _full(parameter, own))


def _full(parameter: Tensor, own: dict[str, Tensor]) -> dict[str, Any]:
    """Fused AdamW counts its steps on the device."""
    return {name: value.to(parameter.device, torch.float32, copy=True)
            for name, value in own.items()}


def _eight_bit(optimizer: Any, parameter: Tensor, own: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {name: value.to(parameter.device, copy=True)
                             for name, value in own.items()}
    found["step"] = int(own["step"])
    if own["state1"].dtype == torch.uint8:
        books = optimizer.name2qmap
        for name, book in zip(_MAPS, ("dynamic", "udynamic"), strict=True):
            found[name] = books[book] = books[book].to(parameter.device)
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def rate(config: TrainConfig, update: int, total: int) -> float:
    """The learning rate of update `update` (from 0) of `total`: a pure function, so that a
    resumed run needs no saved schedule."""
    warmup = config.lr_warmup_steps
    if update < warmup:
        return config.learning_rate * (update + 1) / (warmup + 1)
    share = (update - warmup) / max(1, total - warmup)
    match config.lr_scheduler:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - share
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate * factor
