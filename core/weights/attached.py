"""LoRAs on a frozen model while a run learns: they are added to outputs, never to weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Attached:
    """The LoRAs that a run's denoiser has besides the adapter in training."""

    on: bool = True
    labels: list[str] = field(default_factory=list)     # "name:weight:hash" of each file

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Switches them on or off for a while."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def add(self, layer: Any, down: Tensor, up: Tensor) -> None:
        """Adds one LoRA to a layer; `up` has the scale in it. As a hook it stays on the layer when
        peft wraps that in an adapter's layer."""
        layer.register_forward_hook(partial(self._plus, down, up))

    def _plus(self, down: Tensor, up: Tensor, layer: Any, given: tuple[Any, ...], out: Tensor
              ) -> Tensor:
        if not self.on:
            return out
        from torch.nn import functional as F
        x = given[0].to(down.dtype)
        if down.ndim == 2:
            return out + F.linear(F.linear(x, down), up).to(out.dtype)
        inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        return out + F.conv2d(inner, up).to(out.dtype)
