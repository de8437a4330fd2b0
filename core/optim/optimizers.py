"""Optimizers by name, their state as flat tensors, and learning-rate schedules."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core import plugins
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.jobs.events import Event, Note
from core.weights import precision_rules

_MAPS = ("qmap1", "qmap2")          # bitsandbytes' code books: constants, one for all tensors
_SET = ("params", "lr", "factor", "train_mode", "scheduled_lr")     # of a group, by every run
_CLASSES = {
    "adafactor": "transformers.optimization.Adafactor", "lion": "core.optim.update_rules.Lion",
    "prodigy": "core.optim.update_rules.Prodigy", "came": "core.optim.update_rules.Came",
    "schedulefree": "schedulefree.AdamWScheduleFree"}
# Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) at the run's own rate: LoRA's B starts at
# zero, where steps relative to a weight's size are no steps.
_FIXED = {"adafactor": {"relative_step": False, "scale_parameter": False}}
_SMALL_FOR_PRODIGY = 0.1

Groups = Sequence[nn.Parameter] | Sequence[dict[str, Any]]


def create(config: TrainConfig, parameters: Groups,
           emit: Callable[[Event], None] | None = None) -> torch.optim.Optimizer:
    """The config's optimizer over parameters, or over groups with the `factor` of their rate.

    AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) is fused: one kernel for all tensors; with
    8-bit states (Dettmers et al. 2021, arXiv 2110.02861) where that can be had, else a note.
    Raises UserError where a class isn't there or doesn't take `optimizer_args`.
    """
    if plugins.is_named(config.optimizer):
        return _own(config, parameters)
    found: list[Any] = list(parameters)
    device = next(_weights(found)).device.type
    if config.optimizer == "adamw8bit":
        if precision_rules.eight_bit(config, device):
            return _adamw8bit(found, _options(config, ("betas", "weight_decay")))
        if emit:
            emit(Note(key="precision.no_adamw8bit", params={"device": device}))
    if config.optimizer in ("adamw", "adamw8bit"):
        return _make(torch.optim.AdamW, found, config,
                     {"fused": True, **_options(config, ("betas", "weight_decay"))})
    if config.optimizer == "prodigy" and config.learning_rate < _SMALL_FOR_PRODIGY and emit:
        emit(Note(key="engine.prodigy_rate", params={"rate": config.learning_rate}))
    kind = _class(config.optimizer)
    takes = inspect.signature(kind).parameters
    optimizer = _make(kind, found, config, _options(config, takes)
                      | _FIXED.get(config.optimizer, {}))
    _training(optimizer, True)
    return optimizer


def _weights(parameters: list[Any]) -> Iterator[nn.Parameter]:
    for one in parameters:
        yield from one["params"] if isinstance(one, dict) else (one,)


def _options(config: TrainConfig, takes: Any) -> dict[str, Any]:
    """The config's own keys that a class takes. Betas only where the user changed AdamW's: others
    have other defaults."""
    options: dict[str, Any] = {"lr": config.learning_rate}
    betas = (config.adam_beta1, config.adam_beta2)
    changed = betas != tuple(TrainConfig.model_fields[k].default
                             for k in ("adam_beta1", "adam_beta2"))
    adam = config.optimizer in ("adamw", "adamw8bit")
    if "betas" in takes and (adam or (changed and config.optimizer != "came")):
        options["betas"] = betas
    if "weight_decay" in takes:
        options["weight_decay"] = config.weight_decay
    return options


def _make(kind: type[torch.optim.Optimizer], parameters: list[Any], config: TrainConfig,
          options: dict[str, Any]) -> torch.optim.Optimizer:
    given = {key: tuple(value) if isinstance(value, list) else value
             for key, value in config.optimizer_args.items()}
    try:
        return kind(parameters, **options | given)
    except (TypeError, ValueError) as error:
        raise UserError("engine.optimizer_args", optimizer=config.optimizer,
                        given=", ".join(given) or "-", reason=error) from None


def _class(name: str) -> type[torch.optim.Optimizer]:
    module, _, leaf = _CLASSES.get(name, name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), leaf)
    except (ImportError, AttributeError) as error:
        raise UserError("engine.no_optimizer", optimizer=name, reason=error,
                        fixes=[Fix("fixes.adamw", {"optimizer": "adamw"})]) from None
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError("engine.no_optimizer", optimizer=name, reason=f"{name}: {type(found)}",
                        fixes=[Fix("fixes.adamw", {"optimizer": "adamw"})])
    return found


def _adamw8bit(parameters: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer:
    library: Any = importlib.import_module("bitsandbytes")
    found: torch.optim.Optimizer = library.optim.AdamW8bit(parameters, **options)
    return found


def _own(config: TrainConfig, parameters: Groups) -> torch.optim.Optimizer:
    """The user's own class, with those of the config's numbers that it takes."""
    extension = plugins.load(config.optimizer, "optimizer")
    takes = extension.run(inspect.signature, extension.found).parameters
    options = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
               "weight_decay": config.weight_decay}
    options = {k: v for k, v in options.items() if k in takes} | config.optimizer_args
    made = extension(list(parameters), **options)
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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within: the weights are those that the run would give away now. Schedule-free (Defazio et
    al. 2024, arXiv 2405.15682) trains at another point than the mean that it is after; its way
    back rounds, so that the training's weights are put back from a copy."""
    if not optimizer.param_groups[0].get("train_mode"):
        yield
        return
    weights = _parameters(optimizer)
    kept = [w.detach().clone() for w in weights]
    _training(optimizer, False)
    try:
        yield
    finally:
        _training(optimizer, True)
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)


def _training(optimizer: Any, on: bool) -> None:
    switch = getattr(optimizer, "train" if on else "eval", None)
    if switch:
        switch()


# --- state ---

def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors: "<parameter>.<name>" and "group<n>.<name>" -> CPU
    tensor. Taken from the live state: bitsandbytes hides its own from state_dict. Plain numbers
    become int64 and float64 without dimension."""
    found = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if name not in _MAPS and isinstance(value, (Tensor, int, float)):
                found[f"{number}.{name}"] = _tensor(value)
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if (name not in _SET and isinstance(value, (Tensor, int, float))
                    and not isinstance(value, bool) and value != optimizer.defaults.get(name)):
                found[f"group{number}.{name}"] = _tensor(value)
    return found


def _tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):           # a copy also on the CPU: the live one moves on
        return value.detach().to("cpu", copy=True).contiguous()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _plain(value: Tensor) -> Any:
    """Back from `_tensor`."""
    return value.item() if not value.ndim and value.dtype in (
        torch.int64, torch.float64) else value.clone()


def check_same(there: str, here: str) -> None:
    """Raises UserError where a checkpoint's state is another rule's; the two AdamWs are told apart
    by `load_state`."""
    adam = {"adamw", "adamw8bit"}
    if there != here and not {there, here} <= adam:
        raise _other(there, here)


def _other(there: str, here: str) -> UserError:
    return UserError("precision.other_optimizer", here=here, there=there,
                     fixes=[Fix("precision.same_optimizer", {"optimizer": there})])


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts `state` back. Raises UserError where it is another optimizer's."""
    eight_bit = hasattr(optimizer, "name2qmap")
    kept = {key.partition(".")[2] for key in tensors if not key.startswith("group")}
    if tensors and ("state1" in kept) != eight_bit:
        there, here = ("adamw8bit", "adamw") if "state1" in kept else ("adamw", "adamw8bit")
        raise _other(there, here)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, _, name = key.partition(".")
        by_parameter.setdefault(owner, {})[name] = value
    for number, group in enumerate(optimizer.param_groups):
        group |= {name: _plain(v) for name, v in by_parameter.pop(f"group{number}", {}).items()}
    if eight_bit:
        for number, parameter in enumerate(_parameters(optimizer)):
            if own := by_parameter.get(str(number)):
                optimizer.state[parameter] = _eight_bit(optimizer, parameter, own)
        return
    optimizer.load_state_dict({             # which knows where each number belongs
        "param_groups": optimizer.state_dict()["param_groups"],
        "state": {int(number): {name: _plain(v) for name, v in own.items()}
                  for number, own in by_parameter.items()}})


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


# --- schedules ---

def rate(config: TrainConfig, update: int, total: int) -> float:
    """The learning rate of update `update` (from 0) of `total`: a pure function, so that a
    resumed run needs no saved schedule."""
    warmup = config.lr_warmup_steps
    if update < warmup:
        return config.learning_rate * (update + 1) / (warmup + 1)
    share = (update - warmup) / max(1, total - warmup)
    return config.learning_rate * _factor(config, share)


def _factor(config: TrainConfig, share: float) -> float:
    """Of the full rate, `share` (0 to 1) of the way after the warm-up."""
    match config.lr_scheduler:
        case "constant":
            return 1.0
        case "linear":
            return 1 - share
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        case "cosine_with_restarts":
            return 0.5 * (1 + math.cos(math.pi * (share * config.lr_cycles % 1.0)))
        case "polynomial":
            return float((1 - share) ** config.lr_power)
        case "warmup_stable_decay":         # MiniCPM (Hu et al. 2024, arXiv 2404.06395)
            return min(1.0, (1 - share) / config.lr_decay_share) if config.lr_decay_share else 1.0
