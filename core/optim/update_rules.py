"""Update rules that torch lacks: Lion, Prodigy, CAME. None of them asks the device for a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], float] | None


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): steps of one size, by sign. Rates
    are a third to a tenth of AdamW's."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-4,
                 betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights, grads = _with_gradient(group)
            if not weights:
                continue
            (one, two), rate = group["betas"], group["lr"]
            means = [_state(self, p, "exp_avg") for p in weights]
            signs = torch._foreach_mul(means, one)
            torch._foreach_add_(signs, grads, alpha=1 - one)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_add_(weights, signs, alpha=-rate)
            torch._foreach_mul_(means, two)
            torch._foreach_add_(means, grads, alpha=1 - two)


class Prodigy(torch.optim.Optimizer):
    """Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4): Adam that finds its own
    step size d from the way gone so far; `lr` is a factor of it, 1 as a rule.

    d is found for all groups together; a group's `lr` below the largest only shortens its steps.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.0,
                 betas: tuple[float, float] = (0.9, 0.999), beta3: float | None = None,
                 eps: float = 1e-8, weight_decay: float = 0.0, d0: float = 1e-6,
                 d_coef: float = 1.0, growth_rate: float = float("inf"),
                 use_bias_correction: bool = False, safeguard_warmup: bool = False) -> None:
        super().__init__(params, {
            "lr": lr, "betas": betas, "beta3": beta3, "eps": eps, "weight_decay": weight_decay,
            "d0": d0, "d_coef": d_coef, "growth_rate": growth_rate, "k": 0,
            "use_bias_correction": use_bias_correction, "safeguard_warmup": safeguard_warmup})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        first, every = self.param_groups[0], [_with_gradient(g) for g in self.param_groups]
        rate = max(group["lr"] for group in self.param_groups)
        if not any(weights for weights, _ in every) or rate <= 0:
            return
        way = self._estimate(next(weights[0] for weights, _ in every if weights))
        rate *= self._correction(first)
        d, step = way["d"].clone(), way["d"] * rate
        above: list[Tensor] = []
        below: list[Tensor] = []
        for group, (weights, grads) in zip(self.param_groups, every, strict=True):
            if weights:
                self._moments(group, weights, grads, d, step, above, below)
        self._grow(first, way, d, torch.stack(above).sum() * step * d / first["d0"],
                   torch.stack(below).sum())
        for group, (weights, _) in zip(self.param_groups, every, strict=True):
            if weights:
                share = group["lr"] / max(g["lr"] for g in self.param_groups)
                self._move(group, weights, step * share, way["d"])
            group["k"] += 1

    def _estimate(self, holder: Tensor) -> dict[str, Tensor]:
        """d and what leads to it, kept with the first weight: numbers on the device."""
        own = self.state[holder]
        d0 = self.param_groups[0]["d0"]
        for name, value in (("d", d0), ("d_max", d0), ("above", 0.0)):
            if name not in own:
                own[name] = torch.full((), value, dtype=holder.dtype, device=holder.device)
        found: dict[str, Tensor] = own
        return found

    def _correction(self, group: dict[str, Any]) -> float:
        if not group["use_bias_correction"]:
            return 1.0
        (one, two), k = group["betas"], group["k"] + 1
        return float((1 - two ** k) ** 0.5 / (1 - one ** k))

    def _moments(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor],
                 d: Tensor, step: Tensor, above: list[Tensor], below: list[Tensor]) -> None:
        one, two = group["betas"]
        three, first = _third(group), self.param_groups[0]
        starts = [_state(self, p, "p0", p) for p in weights]
        ways = torch._foreach_sub(starts, weights)
        above += [torch.dot(g.flatten(), w.flatten())
                  for g, w in zip(grads, ways, strict=True)]
        means, squares, sums = ([_state(self, p, name) for p in weights]
                                for name in ("exp_avg", "exp_avg_sq", "s"))
        _blend(means, one, grads, d * (1 - one))
        _blend(squares, two, torch._foreach_mul(grads, grads), d * d * (1 - two))
        _blend(sums, three, grads, d / first["d0"] * (d if group["safeguard_warmup"] else step))
        below += list(torch._foreach_norm(sums, 1))

    def _grow(self, group: dict[str, Any], kept: dict[str, Tensor], d: Tensor, above: Tensor,
              below: Tensor) -> None:
        """Without any gradient so far nothing is known: all stays."""
        known = below > 0
        kept["above"].copy_(torch.where(known, _third(group) * kept["above"] + above,
                                        kept["above"]))
        guess = group["d_coef"] * kept["above"] / below.clamp(min=torch.finfo(below.dtype).tiny)
        guess = torch.where(known, guess, torch.zeros_like(guess))
        start = torch.where(d == torch.full_like(d, group["d0"]), torch.maximum(d, guess), d)
        kept["d_max"].copy_(torch.maximum(kept["d_max"], guess))
        kept["d"].copy_(torch.minimum(kept["d_max"], start * group["growth_rate"]))

    def _move(self, group: dict[str, Any], weights: list[Tensor], step: Tensor, d: Tensor
              ) -> None:
        means, squares = ([_state(self, p, name) for p in weights]
                          for name in ("exp_avg", "exp_avg_sq"))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_mul_(roots, 1 / d)       # adding a tensor, d * eps, would wait for it
        torch._foreach_add_(roots, group["eps"])
        ways = torch._foreach_div(means, roots)
        torch._foreach_mul_(ways, step / d)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["weight_decay"] * step)
        torch._foreach_sub_(weights, ways)


class Came(torch.optim.Optimizer):
    """CAME (Luo et al. 2023, arXiv 2307.02047, algorithm 2): Adafactor's factored moments, and
    smaller steps where the last ones didn't agree with their mean."""

    def __init__(self, params: Iterable[Any], lr: float = 2e-4,
                 betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
                 eps: tuple[float, float] = (1e-30, 1e-16), clip_threshold: float = 1.0,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "clip_threshold": clip_threshold, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight, grad in zip(*_with_gradient(group), strict=True):
                update = self._update(group, weight, grad)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"])

    def _update(self, group: dict[str, Any], weight: Tensor, grad: Tensor) -> Tensor:
        one, two, three = group["betas"]
        small, smaller = group["eps"]
        update = grad * self._root(weight, "exp_avg_sq", two, grad.square() + small)
        size = torch.linalg.vector_norm(update) / update.numel() ** 0.5
        update.div_((size / group["clip_threshold"]).clamp_(min=1.0))
        mean = _state(self, weight, "exp_avg").lerp_(update, 1 - one)
        if grad.ndim < 2:
            return mean
        doubt = (update - mean).square_().add_(smaller)
        return mean * self._root(weight, "exp_avg_res", three, doubt)

    def _root(self, weight: Tensor, name: str, beta: float, squares: Tensor) -> Tensor:
        """1 / sqrt of the running mean of squares (..., n, m), kept as rows and columns."""
        if squares.ndim < 2:
            return _state(self, weight, name).lerp_(squares, 1 - beta).rsqrt()
        by_row, by_column = squares.mean(-1), squares.mean(-2)
        rows = _state(self, weight, f"{name}_row", by_row, zero=True).lerp_(by_row, 1 - beta)
        columns = _state(self, weight, f"{name}_col", by_column, zero=True).lerp_(
            by_column, 1 - beta)
        return ((rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
                * columns.rsqrt().unsqueeze(-2))


def _with_gradient(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    weights = [p for p in group["params"] if p.grad is not None]
    return weights, [p.grad for p in weights]


def _state(optimizer: torch.optim.Optimizer, weight: Tensor, name: str,
           like: Tensor | None = None, zero: bool = False) -> Tensor:
    """A weight's own tensor of that name; new ones are zero, or a copy of `like`."""
    own = optimizer.state[weight]
    if name not in own:
        own[name] = (torch.zeros_like(weight if like is None else like)
                     if zero or like is None else like.detach().clone())
    found: Tensor = own[name]
    return found


def _blend(into: list[Tensor], keep: float, more: Sequence[Tensor], share: Tensor) -> None:
    torch._foreach_mul_(into, keep)
    torch._foreach_add_(into, torch._foreach_mul(list(more), share))


def _third(group: dict[str, Any]) -> float:
    return float(group["beta3"] if group["beta3"] is not None else group["betas"][1] ** 0.5)
