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

# bitsandbytes' code books in a parameter's state: constants, which no checkpoint needs.
_MAPS = ("qmap1", "qmap2")
# Keys of a parameter group that every run sets anew.
_SET = ("params", "lr", "factor", "train_mode", "scheduled_lr")
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
    """The config's optimizer over parameters, or over groups that have a `factor` of the rate.

    AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) is fused: one kernel for all tensors; with
    8-bit states (Dettmers et al. 2021, arXiv 2110.02861) where that can be had, else a note.
    Raises UserError where a class isn't there or doesn't take `optimizer_args`.
    """
    if plugins.is_named(config.optimizer):
        # The user's own class, with those of the config's numbers that it takes.
        extension = plugins.load(config.optimizer, "optimizer")
        accepted = extension.run(inspect.signature, extension.found).parameters
        numbers = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
                   "weight_decay": config.weight_decay}
        optimizer = extension(list(parameters), **{
            **{k: v for k, v in numbers.items() if k in accepted}, **config.optimizer_args})
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise extension.wrong("torch.optim.Optimizer", optimizer)
        # An error in its step is then told as the extension's, with its line.
        optimizer.step = functools.partial(  # type: ignore[method-assign]
            extension.run, optimizer.step)
        return optimizer
    groups: list[Any] = list(parameters)
    device = next(weight for group in groups for weight in (
        group["params"] if isinstance(group, dict) else (group,))).device.type
    if config.optimizer == "adamw8bit":
        if precision_rules.eight_bit(config, device):
            return adamw8bit(groups, _options(config, ("betas", "weight_decay")))
        if emit:
            emit(Note(key="precision.no_adamw8bit", params={"device": device}))
    if config.optimizer in ("adamw", "adamw8bit"):
        return _make(torch.optim.AdamW, groups, config,
                     {"fused": True, **_options(config, ("betas", "weight_decay"))})
    if config.optimizer == "prodigy" and config.learning_rate < _SMALL_FOR_PRODIGY and emit:
        emit(Note(key="engine.prodigy_rate", params={"rate": config.learning_rate}))
    kind = _class_of(config.optimizer)
    optimizer = _make(kind, groups, config, _options(config, inspect.signature(kind).parameters)
                      | _FIXED.get(config.optimizer, {}))
    _training(optimizer, True)
    return optimizer


def _options(config: TrainConfig, takes: Any) -> dict[str, Any]:
    """The config's keys that a class takes, by the names of its arguments."""
    options: dict[str, Any] = {"lr": config.learning_rate}
    # Betas only where the user changed AdamW's: other rules have other defaults, and CAME three.
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
    # YAML knows no tuples, which optimizers want for betas.
    given = {key: tuple(value) if isinstance(value, list) else value
             for key, value in config.optimizer_args.items()}
    try:
        return kind(parameters, **options | given)
    except (TypeError, ValueError) as error:
        raise UserError("engine.optimizer_args", optimizer=config.optimizer,
                        given=", ".join(given) or "-", reason=error) from None


def _class_of(name: str) -> type[torch.optim.Optimizer]:
    """The class by its name, or by its path as a module's attribute."""
    module, _, leaf = _CLASSES.get(name, name).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), leaf)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            return kind
        reason = f"{name}: {type(kind)}"
    except (ImportError, AttributeError) as error:
        reason = str(error)
    raise UserError("engine.no_optimizer", optimizer=name, reason=reason,
                    fixes=[Fix("fixes.adamw", {"optimizer": "adamw"})])


def adamw8bit(parameters: list[Any], options: dict[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, a package that only CUDA machines have."""
    library: Any = importlib.import_module("bitsandbytes")
    return library.optim.AdamW8bit(parameters, **options)   # type: ignore[no-any-return]


def describe(optimizer: torch.optim.Optimizer) -> str:
    """ss_optimizer of the metadata, as kohya writes it:
    "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.999))"."""
    kind, group = type(optimizer), optimizer.param_groups[0]
    known = {"weight_decay": group.get("weight_decay"), "betas": group.get("betas")}
    arguments = ",".join(f"{name}={tuple(value) if isinstance(value, (list, tuple)) else value}"
                         for name, value in known.items() if value is not None)
    return f"{kind.__module__}.{kind.__qualname__}({arguments})"


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups, each by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the weights are those that the run would save now. Schedule-free (Defazio et al.
    2024, arXiv 2405.15682) trains at another point than the mean that it is after."""
    if not optimizer.param_groups[0].get("train_mode"):
        yield
        return
    weights = _parameters(optimizer)
    # The optimizer's own way back rounds: the training's weights come back from a copy.
    copies = [w.detach().clone() for w in weights]
    _training(optimizer, False)
    try:
        yield
    finally:
        _training(optimizer, True)
        with torch.no_grad():
            torch._foreach_copy_(weights, copies)


def _training(optimizer: Any, on: bool) -> None:
    if switch := getattr(optimizer, "train" if on else "eval", None):
        switch()


# --- state ---

def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as CPU tensors, by "<parameter>.<name>" and "group<n>.<name>". Plain
    numbers become int64 and float64 tensors without dimension."""
    # Taken from the live state: bitsandbytes hides its own from state_dict.
    tensors = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if name not in _MAPS and isinstance(value, (Tensor, int, float)):
                tensors[f"{number}.{name}"] = _tensor(value)
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if (name not in _SET and isinstance(value, (Tensor, int, float))
                    and not isinstance(value, bool) and value != optimizer.defaults.get(name)):
                tensors[f"group{number}.{name}"] = _tensor(value)
    return tensors


def _tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):           # a copy also on the CPU: the live one moves on
        return value.detach().to("cpu", copy=True).contiguous()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _plain(value: Tensor) -> Any:
    """The value that `_tensor` was made of."""
    return value.item() if not value.ndim and value.dtype in (
        torch.int64, torch.float64) else value.clone()


def check_same(there: str, here: str) -> None:
    """Raises UserError where a checkpoint's state is of another optimizer."""
    # The two AdamWs are told apart by `load_state`: adamw8bit may have run as adamw.
    adam = {"adamw", "adamw8bit"}
    if there != here and not {there, here} <= adam:
        raise _other(there, here)


def _other(there: str, here: str) -> UserError:
    return UserError("precision.other_optimizer", here=here, there=there,
                     fixes=[Fix("precision.same_optimizer", {"optimizer": there})])


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts `state` back. Raises UserError where it is another optimizer's."""
    books = getattr(optimizer, "name2qmap", None)           # bitsandbytes' optimizers have it
    names = {key.partition(".")[2] for key in tensors if not key.startswith("group")}
    if tensors and ("state1" in names) != (books is not None):
        there, here = ("adamw8bit", "adamw") if "state1" in names else ("adamw", "adamw8bit")
        raise _other(there, here)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, _, name = key.partition(".")
        by_parameter.setdefault(owner, {})[name] = value
    for number, group in enumerate(optimizer.param_groups):
        group |= {name: _plain(v) for name, v in by_parameter.pop(f"group{number}", {}).items()}
    if books is None:
        # torch's own loader knows on which device each number belongs.
        optimizer.load_state_dict({
            "param_groups": optimizer.state_dict()["param_groups"],
            "state": {int(number): {name: _plain(v) for name, v in values.items()}
                      for number, values in by_parameter.items()}})
        return
    for number, parameter in enumerate(_parameters(optimizer)):
        if saved := by_parameter.get(str(number)):
            state: dict[str, Any] = {name: value.to(parameter.device, copy=True)
                                     for name, value in saved.items()}
            state["step"] = int(saved["step"])
            if saved["state1"].dtype == torch.uint8:        # small parameters stay in fp32
                for name, book in zip(_MAPS, ("dynamic", "udynamic"), strict=True):
                    state[name] = books[book] = books[book].to(parameter.device)
            optimizer.state[parameter] = state


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# --- schedules ---

def rate(config: TrainConfig, update: int, total: int) -> float:
    """The learning rate of update `update` (from 0) of `total`: a pure function, so that a
    resumed run needs no saved schedule."""
    warmup = config.lr_warmup_steps
    # From 1 to `warmup` of warmup + 1 parts: an update at rate 0 would be wasted.
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
        case "cosine_with_restarts":
            factor = 0.5 * (1 + math.cos(math.pi * (share * config.lr_cycles % 1.0)))
        case "polynomial":
            factor = float((1 - share) ** config.lr_power)
        case "warmup_stable_decay":         # MiniCPM (Hu et al. 2024, arXiv 2404.06395)
            factor = min(1.0, (1 - share) / config.lr_decay_share) if config.lr_decay_share else 1.0
    return config.learning_rate * factor
