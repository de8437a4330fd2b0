"""Average of the adapter over steps, for previews, validation and the files that are saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

PREFIX = "ema."


class Ema:
    """average = d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n
    (from 0), so that the untrained start is forgotten soon."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """After update `number`; one kernel for all tensors, nothing waits for the device."""
        share = 1 - min(self.decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(self.averages, [p.data for p in self.parameters], share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the parameters are their averages: pointers are swapped, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """These take their averages for good: what rests from now on is what is saved."""
        chosen = {id(p) for p in parameters}
        for number, parameter in enumerate(self.parameters):
            if id(parameter) in chosen:
                self.averages[number] = self.averages[number].to(parameter.device)
                parameter.data.copy_(self.averages[number])

    def state(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{n}": average.detach().cpu().clone()
                for n, average in enumerate(self.averages)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """A checkpoint without averages: they begin at its weights."""
        for number, parameter in enumerate(self.parameters):
            found = tensors.get(f"{PREFIX}{number}", parameter.data)
            self.averages[number] = found.to(parameter.device, parameter.dtype, copy=True)

    def _swap(self) -> None:
        for number, parameter in enumerate(self.parameters):
            parameter.data, self.averages[number] = self.averages[number], parameter.data
