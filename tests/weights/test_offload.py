from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.adapters import lora
from core.config import TrainConfig
from core.families.sd15.model import StableDiffusion1
from core.memory.meta_tensors import DeviceEmulation, StorageTracker, size_of, traced
from core.weights.offload import BlockPrefetcher, Offloaded, blocks, offload_, stage_of, waiting
from core.weights.quantization import Frozen, Quantization, heavy_layers, quantize_
from tests import tiny

CPU = torch.device("cpu")


def model_of(kind: Quantization = "same", share: float = 0.0, device: torch.device = CPU,
             checkpointing: bool = False) -> tuple[Any, Offloaded]:
    torch.manual_seed(5)
    model = tiny.tiny_unet().requires_grad_(False).eval().to(memory_format=torch.channels_last)
    quantize_(model, kind)
    done = offload_(model, share, device)
    model.to(device)
    lora.attach(model, TrainConfig(target_modules="all-linear", lora_rank=4),
                StableDiffusion1.spec)
    for n, parameter in enumerate(lora.trainable(model)):       # B starts at zero: no gradient in A
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n),
                                     ).to(device) * 0.1
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model, done


def step(model: Any) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    where = next(model.parameters()).device
    x, text = (torch.randn(shape, generator=generator).to(where)
               for shape in ((2, 4, 8, 8), (2, 5, 32)))
    out = model(x, torch.tensor([3, 700], device=where), text, return_dict=False)[0]
    out.square().mean().backward()
    gradients = [p.grad.clone() for p in lora.trainable(model)]
    for parameter in lora.trainable(model):
        parameter.grad = None
    return out.detach(), gradients


def test_a_copy_without_a_card_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac torch would look for its current device and find no such function."""
    def current_device() -> int:
        raise AttributeError("module 'torch.mps' has no attribute 'current_device'")
    monkeypatch.setattr(torch.accelerator, "current_device_index", current_device)
    monkeypatch.setattr(torch.cuda, "current_device", current_device)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: current_device())
    model, done = model_of("same", 1.0)
    step(model)
    assert done.blocks > 0


class Chain(nn.Module):
    """A transformer as far as offload looks at it."""

    def __init__(self, length: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(length))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("kind", ["same", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_equals_resident_to_the_bit(kind: Quantization, checkpointing: bool) -> None:
    resident, _ = model_of(kind, 0.0, CPU, checkpointing)
    for share in (0.4, 1.0):
        away, done = model_of(kind, share, CPU, checkpointing)
        assert done.blocks > 0
        for _ in range(3):                                      # unlearnt, learnt, learnt
            (out, grads), (expected, expected_grads) = step(away), step(resident)
            assert torch.equal(out, expected)
            assert len(grads) == len(expected_grads) > 0
            assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_unet_is_taken_apart_into_what_is_called() -> None:
    model = tiny.tiny_unet()
    names = {id(m): n for n, m in model.named_modules()}
    found = [names[id(block)] for block in blocks(model)]
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in found
    assert {"down_blocks.0.resnets.0", "mid_block.resnets.1", "up_blocks.0.upsamplers.0"} <= set(
        found)
    assert len(found) == len(set(found))
    assert not any(a != b and a.startswith(b + ".") for a in found for b in found)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_share_is_met_and_spread(share: float) -> None:
    model = Chain(16)
    done = offload_(model, share, CPU)
    assert done.total == 16
    assert done.blocks == share * 16
    assert done.bytes == waiting(model) == done.blocks * 128 * 128 * 4
    gone = [isinstance(layer, Frozen) for layer in model.layers]
    quarters = [sum(gone[i:i + 4]) for i in range(0, 16, 4)]
    assert max(quarters) - min(quarters) <= 1


def test_at_most_two_blocks_are_there() -> None:
    model = Chain(8, 256)
    offload_(model, 1.0, CPU)
    weight = 256 * 256 * 4
    x = torch.randn(1, 256, requires_grad=True)
    model(x).sum().backward()
    stage = stage_of(model)
    assert stage is not None
    stage.clear()
    tally = StorageTracker("cpu", [model])
    with tally:
        model(x).sum().backward()
    assert 2 * weight <= tally.peak < 2.2 * weight


def test_each_block_comes_once_a_pass_and_ahead_of_its_use() -> None:
    """Forward 8, backward 7 (the last is still there): nothing is fetched in vain once learnt."""
    model = Chain(8)
    offload_(model, 1.0, CPU)
    stage = stage_of(model)
    assert stage is not None
    x = torch.randn(1, 128, requires_grad=True)
    for _ in range(2):
        model(x).sum().backward()
    before = stage.fetched
    late: list[int] = []
    fetch = BlockPrefetcher._fetch

    def spy(self: BlockPrefetcher, block: int) -> None:
        if block == self._now and block not in self._here:
            late.append(block)
        fetch(self, block)
    BlockPrefetcher._fetch = spy                                          # type: ignore[method-assign]
    try:
        model(x).sum().backward()
    finally:
        BlockPrefetcher._fetch = fetch                                    # type: ignore[method-assign]
    assert stage.fetched - before == 14
    assert late == []


def test_the_way_forward_teaches_the_way_back() -> None:
    """What the plan relies on: after one pass the backward one already has two blocks there."""
    model = Chain(6, 256)
    offload_(model, 1.0, CPU)
    stage = stage_of(model)
    assert stage is not None
    with torch.no_grad():
        model(torch.randn(1, 256))
    stage.clear()
    out = model(torch.randn(1, 256, requires_grad=True))
    there = []
    turn = BlockPrefetcher._turn_to

    def spy(self: BlockPrefetcher, block: int) -> None:
        there.append((block, block in self._here))
        turn(self, block)
    BlockPrefetcher._turn_to = spy                                        # type: ignore[method-assign]
    try:
        out.sum().backward()
    finally:
        BlockPrefetcher._turn_to = turn                                   # type: ignore[method-assign]
    assert there == [(4, False), (3, True), (2, True), (1, True), (0, True)]


def test_nothing_of_a_block_is_left_on_the_device() -> None:
    with torch.device("meta"):
        model = tiny.tiny_unet().requires_grad_(False)
        plain = tiny.tiny_unet().requires_grad_(False)
    done = offload_(model, 1.0, torch.device("meta"))
    assert size_of(model) + done.bytes == size_of(plain)
    assert done.bytes == sum(m.weight.numel() * 4 for block in blocks(plain)
                             for m in heavy_layers(block))


def test_trace_sees_the_visitors() -> None:
    model = Chain(6, 256)
    offload_(model, 1.0, CPU)
    with torch.no_grad(), traced(DeviceEmulation("cpu", torch.float32), [model]) as tally:
        model(torch.randn(1, 256))
    assert tally.peak >= 256 * 256 * 4


def test_more_blocks_leave_in_mid_run() -> None:
    """A run that needs room sends blocks away with its adapters on: the same step."""
    model, _ = model_of()
    out, grads = step(model)
    done = [offload_(model, share, CPU) for share in (0.5, 1.0)]
    assert 0 < done[0].blocks < done[1].blocks == done[1].total
    assert 0 < done[0].bytes < done[1].bytes == waiting(model)
    again, same = step(model)
    torch.testing.assert_close(again, out)
    for a, b in zip(grads, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    stage = stage_of(model)
    assert stage
    assert stage.fetched


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["same", "int8", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gpu_offload_equals_resident(kind: Quantization, checkpointing: bool) -> None:
    """Weights are exact copies, so that only the order of sums in the kernels may differ."""
    cuda = torch.device("cuda:0")
    resident, _ = model_of(kind, 0.0, cuda, checkpointing)
    away, done = model_of(kind, 1.0, cuda, checkpointing)
    assert done.pinned
    for _ in range(20):                     # a copy that came too late would show in one of them
        (out, grads), (expected, expected_grads) = step(away), step(resident)
        torch.testing.assert_close(out, expected)
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_gpu_memory_is_two_blocks() -> None:
    cuda = torch.device("cuda:0")
    model = Chain(24, 2048)
    offload_(model, 1.0, cuda)
    model.to(cuda)
    x = torch.randn(1, 2048, device=cuda, requires_grad=True)
    model(x).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    model(x).sum().backward()
    assert torch.cuda.max_memory_allocated() - start < 3 * 2048 * 2048 * 4
