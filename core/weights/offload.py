"""Block offload: a share of the frozen base waits in RAM and comes to the GPU block by block.

Only the large weights travel, and only towards the GPU: a frozen base needn't be copied back. A
block is fetched when its first layer is used, forward or backward, and the block that came next the
last time is fetched during the computation. At most two are there at once. Layers read their weight
anew in the backward pass (core/weights/quantization.py), so that nothing else keeps a block alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from core.weights.quantization import Frozen, freeze_, heavy_layers, repeated_blocks

# Bytes of pinned memory that are asked for at once; torch rounds them up to a power of two.
CHUNK = 2**28


@dataclass(frozen=True, slots=True)
class Offloaded:
    """What `offload_` did."""

    blocks: int                             # in RAM
    total: int                              # blocks of the model
    bytes: int                              # in RAM
    pinned: bool                            # all of it; copies from other memory are slower


@dataclass(slots=True)
class _Visit:
    """A block on the device, or on its way."""

    tensors: list[Tensor]
    arrived: torch.cuda.Event | None        # None: it is there


class BlockPrefetcher:
    """Holds the block on the device that is in use, and the next one.

    Which block is next is learnt: after (before, now) comes what came the last time, and the way
    there is also the way back. This works for UNets, whose order of use isn't the order of their
    modules, for the backward pass, with activation checkpointing and for previews.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[list[Tensor]] = []            # the weights in RAM
        self.fetched = 0                                # blocks copied so far
        self._here: dict[int, _Visit] = {}
        self._before = self._now = -1
        self._next: dict[tuple[int, int], int] = {}
        self._copy_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copy_stream = torch.cuda.Stream(device)   # type: ignore[no-untyped-call]

    def use(self, block: int, layer: int) -> Tensor:
        """Returns one layer's weight on the device, valid until another block is used."""
        if block != self._now:
            self._turn_to(block)
        return self._here[block].tensors[layer]

    def clear(self) -> None:
        """Frees the memory on the device; what was learnt stays."""
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
        if (ahead := self._next.get((now, block), -1)) >= 0:
            self._fetch(ahead)

    def _fetch(self, block: int) -> None:
        if block in self._here:
            return
        self.fetched += 1
        stream, waiting = self._copy_stream, self.blocks[block]
        tensors = [torch.empty_like(t, device=self.device) for t in waiting]
        # The memory belongs to the computing stream, which may still use what was there before: the
        # copy waits for it. The computation waits for the copy in turn (`_wait`).
        if stream:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        # not cuda.stream(None): it asks for the current card, which a CPU or a Mac has not
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for tensor, source in zip(tensors, waiting, strict=True):
                tensor.copy_(source, non_blocking=True)
        self._here[block] = _Visit(tensors, stream.record_event() if stream else None)

    def _wait(self, visit: _Visit) -> None:
        if visit.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(visit.arrived)
            visit.arrived = None

    def _drop(self, block: int) -> None:
        # If it was fetched in vain, its copy must be over before its memory is used again.
        self._wait(self._here.pop(block))


def offload_(model: nn.Module, share: float, device: torch.device) -> Offloaded:
    """Moves `share` (0 to 1, by bytes) of the blocks' weights to RAM, evenly over the model, so
    that resident blocks compute while others travel. The rest of the model is left where it is.

    It must be called after `quantize_`, so that fewer bytes travel. It may be called again with a
    larger share, with adapters attached or not, for a run that must take less memory from now on.
    Works on meta tensors and, for tests, with the CPU as `device`.
    """
    candidates = [layers for block in blocks(model) if (layers := list(heavy_layers(block)))]
    chosen, total, in_ram, to_move = [], 0, 0, 0
    for layers in candidates:
        size = sum(map(_size, layers))
        total += size
        if isinstance(layers[0], Frozen) and layers[0].fetch is not None:
            in_ram += size
        # Where the share of the blocks so far comes nearer to the wanted one with this block.
        elif share and in_ram + size / 2 <= share * total:
            in_ram, to_move = in_ram + size, to_move + size
            chosen.append(layers)
    stage, ram = stage_of(model) or BlockPrefetcher(device), _Ram(device, to_move)
    for layers in chosen:
        waiting: list[Tensor] = []
        for n, layer in enumerate(layers):
            frozen = layer if isinstance(layer, Frozen) else freeze_(layer, "same", stage.device)
            assert frozen.codes is not None
            waiting.append(ram.take(frozen.codes))
            frozen.codes, frozen.fetch = None, partial(stage.use, len(stage.blocks), n)
        stage.blocks.append(waiting)
    pinned = device.type == "cuda" and all(t.is_pinned() for b in stage.blocks for t in b)
    return Offloaded(len(stage.blocks), len(candidates), in_ram, pinned)


def _size(layer: nn.Linear | nn.Conv2d) -> int:
    """Bytes of a layer's weight, wherever it is."""
    stored: Tensor | None = layer.codes if isinstance(layer, Frozen) else layer.weight
    if isinstance(layer, Frozen) and isinstance(layer.fetch, partial):
        block, n = layer.fetch.args
        stored = layer.fetch.func.__self__.blocks[block][n]     # type: ignore[attr-defined]
    assert stored is not None
    return stored.numel() * stored.element_size()


def waiting(model: nn.Module) -> int:
    """Bytes of the model that wait in RAM."""
    stage = stage_of(model)
    return sum(t.numel() * t.element_size() for b in stage.blocks for t in b) if stage else 0


def stage_of(model: nn.Module) -> BlockPrefetcher | None:
    """The prefetcher of a model's blocks; None where all of the model is on the device."""
    fetches = (m.fetch for m in model.modules() if isinstance(m, Frozen))
    return next((fetch.func.__self__ for fetch in fetches       # type: ignore[attr-defined]
                 if isinstance(fetch, partial)), None)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The units that travel: the elements of a model's ModuleLists. An element that is made of
    such lists itself, as a UNet's levels and its transformers are, is taken apart."""
    for part in repeated_blocks(model):
        for element in part.children() if isinstance(part, nn.ModuleList) else _elements(part):
            yield from _smallest(element)


def _smallest(element: nn.Module) -> Iterator[nn.Module]:
    inner = list(_elements(element))
    for child in inner:
        yield from _smallest(child)
    if not inner:
        yield element


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the ModuleLists right below a module."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child.children()


class _Ram:
    """Memory for what waits. For a GPU it is pinned, so that copies run during the computation.
    It is taken in chunks of a power of two, since torch would round each tensor up to one."""

    def __init__(self, device: torch.device, total: int) -> None:
        self._is_gpu = self._can_pin = device.type == "cuda"
        self._left = total                              # bytes still to come
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to this memory and returns the copy."""
        if not self._is_gpu:
            return tensor
        size = tensor.numel() * tensor.element_size()
        if self._can_pin and self._used + size > self._chunk.numel():
            chunk = max(size, min(CHUNK, self._left))
            # Systems limit pinned memory; what exceeds it waits in ordinary RAM.
            try:
                self._chunk = torch.empty(2 ** (chunk - 1).bit_length(), dtype=torch.uint8,
                                          pin_memory=True)
                self._used = 0
            except RuntimeError:
                self._can_pin = False
        if not self._can_pin:
            return tensor.cpu()
        part = self._chunk[self._used:self._used + size].view(tensor.dtype)
        # The next tensor's dtype may be wider: it begins at a multiple of 64 bytes.
        self._used += -(-size // 64) * 64
        self._left -= size
        return torch.as_strided(part, tensor.shape, tensor.stride()).copy_(tensor)
