"""Update rules that torch lacks: Lion, Prodigy, CAME.

None of them asks the device for a number, which would make the CPU wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], float] | None


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): every weight moves by the same
    amount, only the sign is learned. Its learning rates are a third to a tenth of AdamW's."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-4,
                 betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights, grads = _with_gradient(group)
            if not weights:
                continue
            (beta1, beta2), rate = group["betas"], group["lr"]
            means = [_state(self, p, "exp_avg") for p in weights]
            signs = torch._foreach_mul(means, beta1)
            torch._foreach_add_(signs, grads, alpha=1 - beta1)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_add_(weights, signs, alpha=-rate)
            torch._foreach_mul_(means, beta2)
            torch._foreach_add_(means, grads, alpha=1 - beta2)


class Prodigy(torch.optim.Optimizer):
    """Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4): Adam that estimates its
    own step size d from the distance to the start; `lr` is a factor of it, 1 as a rule.

    d is estimated for all groups together; a group's `lr` below the largest only shortens its
    steps.
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
        first, gradients = self.param_groups[0], [_with_gradient(g) for g in self.param_groups]
        largest_rate = max(group["lr"] for group in self.param_groups)
        if not any(weights for weights, _ in gradients) or largest_rate <= 0:
            return

        # d and what leads to it are numbers on the device, kept with the first weight.
        holder = next(weights[0] for weights, _ in gradients if weights)
        estimate = self.state[holder]
        for name, value in (("d", first["d0"]), ("d_max", first["d0"]), ("above", 0.0)):
            if name not in estimate:
                estimate[name] = torch.full((), value, dtype=holder.dtype, device=holder.device)
        rate = largest_rate
        if first["use_bias_correction"]:
            (beta1, beta2), k = first["betas"], first["k"] + 1
            rate *= float((1 - beta2 ** k) ** 0.5 / (1 - beta1 ** k))
        d, step = estimate["d"].clone(), estimate["d"] * rate

        # The paper's numerator and denominator of d, summed over all weights.
        above: list[Tensor] = []
        below: list[Tensor] = []
        for group, (weights, grads) in zip(self.param_groups, gradients, strict=True):
            if not weights:
                continue
            beta1, beta2 = group["betas"]
            starts = [_state(self, p, "p0", p) for p in weights]
            distances = torch._foreach_sub(starts, weights)
            above += [torch.dot(g.flatten(), w.flatten())
                      for g, w in zip(grads, distances, strict=True)]
            means, squares, sums = ([_state(self, p, name) for p in weights]
                                    for name in ("exp_avg", "exp_avg_sq", "s"))
            _blend(means, beta1, grads, d * (1 - beta1))
            _blend(squares, beta2, torch._foreach_mul(grads, grads), d * d * (1 - beta2))
            _blend(sums, _beta3(group), grads,
                   d / first["d0"] * (d if group["safeguard_warmup"] else step))
            below += list(torch._foreach_norm(sums, 1))
        self._grow(first, estimate, d, torch.stack(above).sum() * step * d / first["d0"],
                   torch.stack(below).sum())

        for group, (weights, _) in zip(self.param_groups, gradients, strict=True):
            if weights:
                self._move(group, weights, step * (group["lr"] / largest_rate), estimate["d"])
            group["k"] += 1

    def _grow(self, group: dict[str, Any], estimate: dict[str, Tensor], d: Tensor, above: Tensor,
              below: Tensor) -> None:
        """Estimates d anew; it never shrinks."""
        # Without any gradient so far nothing is known, and all stays. Decided on the device.
        known = below > 0
        estimate["above"].copy_(torch.where(known, _beta3(group) * estimate["above"] + above,
                                        estimate["above"]))
        guess = group["d_coef"] * estimate["above"] / below.clamp(min=torch.finfo(below.dtype).tiny)
        guess = torch.where(known, guess, torch.zeros_like(guess))
        start = torch.where(d == torch.full_like(d, group["d0"]), torch.maximum(d, guess), d)
        estimate["d_max"].copy_(torch.maximum(estimate["d_max"], guess))
        estimate["d"].copy_(torch.minimum(estimate["d_max"], start * group["growth_rate"]))

    def _move(self, group: dict[str, Any], weights: list[Tensor], step: Tensor, d: Tensor
              ) -> None:
        """Adam's step, in units of d."""
        means, squares = ([_state(self, p, name) for p in weights]
                          for name in ("exp_avg", "exp_avg_sq"))
        roots = torch._foreach_sqrt(squares)
        # Divided by d instead of adding d * eps: adding a tensor would wait for its value.
        torch._foreach_mul_(roots, 1 / d)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        torch._foreach_mul_(updates, step / d)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["weight_decay"] * step)
        torch._foreach_sub_(weights, updates)


class Came(torch.optim.Optimizer):
    """CAME (Luo et al. 2023, arXiv 2307.02047, algorithm 2): Adafactor's factored moments, and
    smaller steps where the last ones differed from their mean."""

    def __init__(self, params: Iterable[Any], lr: float = 2e-4,
                 betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
                 eps: tuple[float, float] = (1e-30, 1e-16), clip_threshold: float = 1.0,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "clip_threshold": clip_threshold, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2, beta3 = group["betas"]
            eps1, eps2 = group["eps"]
            for weight, grad in zip(*_with_gradient(group), strict=True):
                update = grad * self._root(weight, "exp_avg_sq", beta2, grad.square() + eps1)
                size = torch.linalg.vector_norm(update) / update.numel() ** 0.5
                update.div_((size / group["clip_threshold"]).clamp_(min=1.0))
                mean = _state(self, weight, "exp_avg").lerp_(update, 1 - beta1)
                # A vector has no rows and columns to keep its instability in.
                if grad.ndim >= 2:
                    instability = (update - mean).square_().add_(eps2)
                    mean = mean * self._root(weight, "exp_avg_res", beta3, instability)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(mean, alpha=group["lr"])

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
    """The group's weights that have a gradient, and their gradients."""
    weights = [p for p in group["params"] if p.grad is not None]
    return weights, [p.grad for p in weights]


def _state(optimizer: torch.optim.Optimizer, weight: Tensor, name: str,
           like: Tensor | None = None, zero: bool = False) -> Tensor:
    """A weight's own tensor of that name; new ones are zero, or a copy of `like`."""
    state = optimizer.state[weight]
    if name not in state:
        state[name] = (torch.zeros_like(weight if like is None else like)
                       if zero or like is None else like.detach().clone())
    value: Tensor = state[name]
    return value


def _blend(into: list[Tensor], keep: float, more: Sequence[Tensor], share: Tensor) -> None:
    """into = keep * into + share * more, in place."""
    torch._foreach_mul_(into, keep)
    torch._foreach_add_(into, torch._foreach_mul(list(more), share))


def _beta3(group: dict[str, Any]) -> float:
    return float(group["beta3"] if group["beta3"] is not None else group["betas"][1] ** 0.5)
