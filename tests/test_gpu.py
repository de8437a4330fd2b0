"""NVML facts: calm without a card here, and with cards by pynvml's own types and errors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from core import gpu
from core.gpu import GpuInfo, GpuUser

MB = 2**20


def test_this_machine() -> None:
    report = gpu.report()
    assert not (report.gpus and report.problem)
    assert gpu.list_gpus() == report.gpus
    for card in report.gpus:
        assert 0 <= card.free_mb <= card.total_mb
        assert card.name


@pytest.mark.gpu
def test_real_card() -> None:
    import torch
    card = gpu.list_gpus()[0]
    assert card.capability >= (5, 0)
    assert card.driver.count(".") >= 1
    assert abs(card.total_mb - torch.cuda.mem_get_info(0)[1] / MB) < 0.1 * card.total_mb


def test_facts_are_frozen() -> None:
    info = GpuInfo(0, "x", "u", 1.0, 1.0, "580", (8, 6))
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "y"  # type: ignore[misc]


def no_such(*_: Any) -> Any:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two cards as pynvml would report them; the second knows little of itself."""
    def one(only: Any, value: Any) -> Any:
        return lambda card: value if card == "card0" else only(card)
    for name, value in {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06", "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: f"card{index}",
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=8192 * MB, free=7000 * MB),
        "nvmlDeviceGetName": lambda card: "GeForce", "nvmlDeviceGetUUID": lambda card: "GPU-1",
        "nvmlDeviceGetCudaComputeCapability": one(no_such, (8, 6)),
        "nvmlDeviceGetComputeRunningProcesses": one(no_such, [
            SimpleNamespace(pid=1, usedGpuMemory=700 * MB),
            SimpleNamespace(pid=2, usedGpuMemory=None)]),
    }.items():
        monkeypatch.setattr(pynvml, name, value)
    return monkeypatch


def test_two_cards(cards: pytest.MonkeyPatch) -> None:
    first, second = gpu.list_gpus()
    assert first == GpuInfo(0, "GeForce", "GPU-1", 8192, 7000, "580.65.06", (8, 6),
                            (GpuUser(1, 700), GpuUser(2, None)))
    assert (second.index, second.capability, second.users) == (1, (0, 0), ())


def test_a_lost_card_does_not_hide_the_other(cards: pytest.MonkeyPatch) -> None:
    def handle(index: int) -> str:
        return no_such() if index == 0 else "card0"
    cards.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    assert [card.index for card in gpu.list_gpus()] == [1]


@pytest.mark.parametrize("error", [
    pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED), OSError("nvml.dll"),
    AttributeError("nvmlInit"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")])
def test_any_failure_is_an_answer(cards: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error
    cards.setattr(pynvml, "nvmlSystemGetDriverVersion", fail)
    report = gpu.report()
    assert report.gpus == ()
    assert report.problem == str(error)
