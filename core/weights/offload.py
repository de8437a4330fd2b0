"""Block offload: a share of the frozen base waits in RAM and comes to the GPU block by block.

Only the large weights travel, and only towards the GPU: a frozen base never comes back. A block
is fetched when its first layer is used, forward or backward, and the one that came next the last
time is fetched beside the computation. At most two are there at once. Layers read their weight
anew in the backward pass (core/weights/quantization.py), so that nothing else keeps a block alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from core.weights.quantization import Frozen, freeze_, heavy_layers, repeated_blocks

CHUNK = 2**28                               # bytes; torch rounds pinned memory up to powers of two


@dataclass(frozen=True, slots=True)
class Offloaded:
    """What `offload_` did."""

    blocks: int
    total: int                              # blocks of the model
    bytes: int                              # in RAM
    pinned: bool                            # else copies wait for the processor: slower


@dataclass(slots=True)
class _Visit:
    """A block on the device, or on its way."""

    tensors: list[Tensor]
    arrived: torch.cuda.Event | None        # None: it is there


class BlockPrefetcher:
    """The place on the device where one block works and the next gets ready.

    What comes next is learnt: after (before, now) comes what came the last time, and a way there
    is a way back. So it holds for UNets, whose order of use isn't the order of their modules, for
    the backward pass, with activation checkpointing and for previews.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[list[Tensor]] = []            # the weights in RAM
        self.fetched = 0                                # blocks copied so far
        self._here: dict[int, _Visit] = {}
        self._before = self._now = -1
        self._next: dict[tuple[int, int], int] = {}
        self._beside: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._beside = torch.cuda.Stream(device)    # type: ignore[no-untyped-call]

    def use(self, block: int, layer: int) -> Tensor:
        """One layer's weight on the device, good until another block is used."""
        if block != self._now:
            self._turn_to(block)
        return self._here[block].tensors[layer]

    def clear(self) -> None:
        """Leaves the device; what was learnt stays."""
        for block in list(self._here):
            self._drop(block)
        self._before = self._now = -1

    def _turn_to(self, block: int) -> None:
        before, now = self._before, self._now
        self._next[before, now] = block
        self._next.setdefault((block, now), before)
        self._before, self._now = now, block
        for other in [i for i in self._here if i != block]:
            self._drop(other)
        self._fetch(block)
        self._wait(self._here[block])
        ahead = self._next.get((now, block), -1)
        if ahead >= 0:
            self._fetch(ahead)

    def _fetch(self, block: int) -> None:
        """Memory belongs to the computing stream, which the copy waits for first: what was there
        before is done with. The computation waits for the copy in turn (`_wait`)."""
        if block in self._here:
            return
        self.fetched += 1
        waiting = self.blocks[block]
        tensors = [torch.empty_like(t, device=self.device) for t in waiting]
        if self._beside is None:
            _copy(tensors, waiting)
            self._here[block] = _Visit(tensors, None)
            return
        self._beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._beside):
            _copy(tensors, waiting)
        self._here[block] = _Visit(tensors, self._beside.record_event())

    def _wait(self, visit: _Visit) -> None:
        if visit.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(visit.arrived)
            visit.arrived = None

    def _drop(self, block: int) -> None:
        """Also one that was fetched in vain: its copy must be over before its memory is reused."""
        self._wait(self._here.pop(block))


def _copy(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for tensor, source in zip(tensors, sources, strict=True):
        tensor.copy_(source, non_blocking=True)


def offload_(model: nn.Module, share: float, device: torch.device) -> Offloaded:
    """Moves `share` (0 to 1, by bytes) of the blocks' weights to RAM, evenly over the model, so
    that resident blocks compute while others travel. The rest of the model is left where it is.

    After `quantize_`, so that fewer bytes travel; again with a larger share, adapters attached or
    not, for a run that must hold less from now on. Works on meta tensors and, for tests, with the
    CPU as `device`.
    """
    found = [layers for block in blocks(model) if (layers := list(heavy_layers(block)))]
    before = stage_of(model)
    chosen, total, gone, going = [], 0, 0, 0
    for layers in found:
        size = sum(map(_size, layers))
        total += size
        if _waits(layers[0]):
            gone += size
        elif share and gone + size / 2 <= share * total:
            gone, going = gone + size, going + size
            chosen.append(layers)
    stage, ram = before or BlockPrefetcher(device), _Ram(device, going)
    for layers in chosen:
        stage.blocks.append([_away(layer, stage, n, ram) for n, layer in enumerate(layers)])
    pinned = device.type == "cuda" and all(t.is_pinned() for b in stage.blocks for t in b)
    return Offloaded(len(stage.blocks), len(found), gone, pinned)


def _away(layer: nn.Linear | nn.Conv2d, stage: BlockPrefetcher, place: int, ram: _Ram) -> Tensor:
    frozen = layer if isinstance(layer, Frozen) else freeze_(layer, "same", stage.device)
    assert frozen.codes is not None
    waiting = ram.take(frozen.codes)
    frozen.codes, frozen.away = None, partial(stage.use, len(stage.blocks), place)
    return waiting


def _waits(layer: nn.Linear | nn.Conv2d) -> bool:
    return isinstance(layer, Frozen) and layer.away is not None


def _size(layer: nn.Linear | nn.Conv2d) -> int:
    held: Tensor | None = layer.codes if isinstance(layer, Frozen) else layer.weight
    if isinstance(layer, Frozen) and isinstance(layer.away, partial):
        block, place = layer.away.args
        held = layer.away.func.__self__.blocks[block][place]    # type: ignore[attr-defined]
    assert held is not None
    return held.numel() * held.element_size()


def waiting(model: nn.Module) -> int:
    """Bytes of the model that wait in RAM."""
    stage = stage_of(model)
    return sum(t.numel() * t.element_size() for b in stage.blocks for t in b) if stage else 0


def stage_of(model: nn.Module) -> BlockPrefetcher | None:
    """None: nothing of the model is away."""
    ways = (m.away for m in model.modules() if isinstance(m, Frozen))
    return next((way.func.__self__ for way in ways      # type: ignore[attr-defined]
                 if isinstance(way, partial)), None)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The units that travel: elements of its ModuleLists; an element that is made of such
    lists itself (a UNet's levels, its transformers) is taken apart."""
    for part in repeated_blocks(model):
        elements = part.children() if isinstance(part, nn.ModuleList) else _elements(part)
        for element in elements:
            yield from _parts(element)


def _parts(element: nn.Module) -> Iterator[nn.Module]:
    inner = list(_elements(element))
    if not inner:
        yield element
    for one in inner:
        yield from _parts(one)


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child.children()


class _Ram:
    """Memory for what waits: pinned where the device is a GPU, so that copies run beside the
    computation; in chunks of a power of two, since torch would round each tensor up to one."""

    def __init__(self, device: torch.device, total: int) -> None:
        self._gpu = self.pinned = device.type == "cuda"
        self._left = total                              # bytes still to come
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, tensor: Tensor) -> Tensor:
        if not self._gpu:
            return tensor
        size = tensor.numel() * tensor.element_size()
        if not self.pinned or (self._used + size > self._chunk.numel() and not self._more(size)):
            return tensor.cpu()
        part = self._chunk[self._used:self._used + size].view(tensor.dtype)
        self._used += -(-size // 64) * 64
        self._left -= size
        return torch.as_strided(part, tensor.shape, tensor.stride()).copy_(tensor)

    def _more(self, size: int) -> bool:
        """Systems limit pinned memory; what exceeds it waits in ordinary RAM."""
        wanted = max(size, min(CHUNK, self._left))
        with contextlib.suppress(RuntimeError):
            self._chunk = torch.empty(2 ** (wanted - 1).bit_length(), dtype=torch.uint8,
                                      pin_memory=True)
            self._used = 0
            return True
        self.pinned = False
        return False
