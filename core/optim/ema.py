"""The moving average of the adapter, for previews, validation and the files that are saved.

The decay is that of diffusers.training_utils.EMAModel. That class is not used here: its first step
only copies the weights, it copies both ways where pointers can be swapped, and it can neither
settle a part of the parameters nor read the checkpoints of this program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

PREFIX = "ema."


class Ema:
    """average = d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) at update n
    (from 0): the small d of the first updates makes it forget the untrained start soon."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Called after update `number`. One kernel for all tensors, without waiting for it."""
        share = 1 - min(self.decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(self.averages, [p.data for p in self.parameters], share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters are their averages: pointers are swapped, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives these parameters their averages for good, since they stop learning: what stays in
        memory is then what is saved."""
        chosen = {id(p) for p in parameters}
        for number, parameter in enumerate(self.parameters):
            if id(parameter) in chosen:
                self.averages[number] = self.averages[number].to(parameter.device)
                parameter.data.copy_(self.averages[number])

    def state(self) -> dict[str, Tensor]:
        """The averages for a checkpoint, by PREFIX and number."""
        return {f"{PREFIX}{n}": average.detach().cpu().clone()
                for n, average in enumerate(self.averages)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts `state` back. Where a checkpoint has no averages, they begin at its weights."""
        for number, parameter in enumerate(self.parameters):
            average = tensors.get(f"{PREFIX}{number}", parameter.data)
            self.averages[number] = average.to(parameter.device, parameter.dtype, copy=True)

    def _swap(self) -> None:
        for number, parameter in enumerate(self.parameters):
            parameter.data, self.averages[number] = self.averages[number], parameter.data
