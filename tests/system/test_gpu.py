"""NVML facts by pynvml's real ctypes path against a stub of the driver's library (nvml_stub.c),
against its absence, and on this machine; facts beside NVML from files as the system writes them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pynvml
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core import i18n
from core.system import gpu, machine
from core.system.gpu import GpuInfo, GpuReport, GpuState, GpuUser, Reader
from tests import nvml_stub
from tests.nvml_stub import Card, Fail, Process

ROOT = Path(__file__).resolve().parents[2]
TELL = ("import json; from core.system import gpu; r = gpu.report(); c = gpu.chosen(r); "
        "print(json.dumps([r.state, r.problem, r.lost, "
        "[[g.index, g.name, g.total_mb] for g in r.gpus], c and c.uuid]))")
NOT_SUPPORTED = pynvml.NVML_ERROR_NOT_SUPPORTED


def told_elsewhere(env: dict[str, str]) -> Any:
    done = subprocess.run([sys.executable, "-c", TELL], cwd=ROOT, env=env, capture_output=True,
                          text=True, check=True)
    return json.loads(done.stdout)


def info(index: int = 0, **more: Any) -> GpuInfo:
    facts = {"name": "GeForce", "uuid": f"GPU-{index}", "total_mb": 8192.0, "free_mb": 7000.0,
             "driver": "580", "capability": (8, 6)} | more
    return GpuInfo(index=index, **facts)


# --- found by the loader, in a process of its own ---

@pytest.mark.parametrize("gb", [4, 8, 12, 24, 48, 80])
def test_a_card_is_found_by_the_loader(gb: int) -> None:
    card = Card.of(gb)
    assert told_elsewhere(nvml_stub.environment([card])) == [
        "ok", "", [], [[0, card.name, gb * 1024 - 4]], card.uuid]


def test_the_library_is_absent() -> None:
    env = nvml_stub.environment([Card.of(8)]) | {"LD_LIBRARY_PATH": ""}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pynvml, "nvmlLib", None)
        if gpu.report().state != "no_library":
            pytest.skip("a real driver is installed here")
    assert told_elsewhere(env) == ["no_library", "NVML Shared Library Not Found", [], [], None]


def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / nvml_stub.NAME).write_bytes(b"not an ELF file")
    env = nvml_stub.environment([]) | {"LD_LIBRARY_PATH": str(tmp_path)}
    state, problem, *_ = told_elsewhere(env)
    assert (state, bool(problem)) == ("no_library", True)


def test_pynvml_is_absent() -> None:
    code = "import sys; sys.modules['pynvml'] = None; " + TELL
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout)[0] == "no_library"


# --- facts ---

def test_all_facts() -> None:
    card = Card.of(8, temperature=71, reasons=0x20 | 0x08,
                   processes=(Process(1, 700), Process(1, 700, "G"), Process(2, None, "G")))
    with nvml_stub.loaded([card, Card.of(24, 1, name="NVIDIA GeForce RTX 4090")], cuda=12040,
                          driver="551.86"):
        first, second = gpu.report().gpus
    assert first == GpuInfo(
        0, card.name, card.uuid, 8188, 7188, "551.86", (8, 9), (GpuUser(1, 700), GpuUser(2, None)),
        "12.4", 71, ("thermal", "hw_slowdown"), False, 3072 * 2370)
    assert (first.laptop, second.laptop) == (True, False)
    assert (second.index, second.free_mb, second.users) == (1, 24572 - 300, ())


def test_a_card_that_knows_little() -> None:
    """Every question but the handle's and the memory's is refused, in turn and together."""
    questions = [name for name in (
        "nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetNumGpuCores", "nvmlDeviceGetTemperature", "nvmlDeviceGetMaxClockInfo",
        "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3",
        "nvmlDeviceGetMigMode", "nvmlSystemGetCudaDriverVersion_v2")]
    for codes in ((NOT_SUPPORTED,), (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,), (999,)):
        fails = [Fail(name, codes[0]) for name in questions]
        with nvml_stub.loaded([Card.of(8)], *fails) as stub:
            (card,) = gpu.report().gpus
            assert card == GpuInfo(0, "NVIDIA", "", 8188, 7888, "580.65.06", (0, 0))
            for fail in fails:
                stub.write([Card.of(8)], fail)
                assert gpu.report().state == "ok", fail


def test_older_drivers_know_throttling_by_its_older_name() -> None:
    missing = Fail("nvmlDeviceGetCurrentClocksEventReasons", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    with nvml_stub.loaded([Card.of(8, reasons=0x40)], missing):
        assert gpu.report().gpus[0].throttled == ("thermal",)


@pytest.mark.parametrize(("bits", "reasons"), [
    (0, ()), (0x1, ()), (0x4, ("power",)), (0x80, ("power",)), (0x20, ("thermal",)),
    (0x48, ("thermal", "hw_slowdown")), (0x1ff, ("thermal", "power", "hw_slowdown"))])
def test_throttling(bits: int, reasons: tuple[str, ...]) -> None:
    with nvml_stub.loaded([Card.of(8, reasons=bits)]), Reader() as reader:
        assert gpu.report().gpus[0].throttled == reasons == reader.poll(0).throttled


def test_shared_memory_is_the_computers() -> None:
    with nvml_stub.loaded([Card.of(8, name="NVIDIA GB10")],
                          Fail("nvmlDeviceGetMemoryInfo", NOT_SUPPORTED)):
        (card,) = gpu.report().gpus
    assert card.total_mb == pytest.approx(machine.ram()[0])


@pytest.mark.parametrize(("name", "laptop"), [
    ("NVIDIA GeForce RTX 4060 Laptop GPU", True), ("GeForce RTX 2080 with Max-Q Design", True),
    ("NVIDIA GeForce GTX 970M", True), ("GeForce 940MX", True), ("NVIDIA GeForce MX450", True),
    ("Quadro M2000M", True), ("Quadro T2000 Mobile", True), ("NVIDIA GeForce RTX 3090", False),
    ("NVIDIA H100 80GB HBM3", False), ("NVIDIA A100-SXM4-40GB", False), ("Tesla M10", False),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", False)])
def test_laptops(name: str, laptop: bool) -> None:
    assert info(name=name).laptop == laptop


def test_mig_instances_are_devices_of_their_own() -> None:
    parts = tuple(Card(name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", uuid=f"MIG-{number}-a",
                       total_mb=4864, free_mb=4800 - number, processes=(Process(7, 20),))
                  for number in range(3))
    card = Card.of(40, name="NVIDIA A100-SXM4-40GB", mig=1, parts=parts, temperature=66)
    with nvml_stub.loaded([card, Card.of(40, 1, name="NVIDIA A100-SXM4-40GB", mig=0)]):
        report = gpu.report()
        with Reader() as reader:
            state = reader.poll("MIG-1-a")
    assert [(one.index, one.uuid, one.mig) for one in report.gpus] == [
        (0, "MIG-0-a", True), (0, "MIG-1-a", True), (0, "MIG-2-a", True),
        (1, "GPU-00000001-0280-4000-8000-000000000000", False)]
    assert report.gpus[0].total_mb == 4864
    assert report.gpus[0].users == (GpuUser(7, 20),)
    assert (state.free_mb, state.total_mb, state.temperature_c) == (4799, 4864, 66)


def test_mig_without_an_instance() -> None:
    with nvml_stub.loaded([Card.of(40, mig=1)]):
        report = gpu.report()
    assert (report.state, report.lost, report.gpus) == ("no_cards", (0,), ())


# --- states ---

@pytest.mark.parametrize(("code", "state"), [
    (4, "no_permission"), (9, "no_driver"), (18, "mismatch"), (15, "broken"), (17, "broken"),
    (999, "broken"), (12345, "broken")])
@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2",
                                      "nvmlDeviceGetMemoryInfo"])
def test_states(function: str, code: int, state: str) -> None:
    with nvml_stub.loaded([Card.of(8)], Fail(function, code)):
        report = gpu.report()
    assert (report.state, report.gpus) == (state, ())
    assert report.problem
    assert report.lost == ((0,) if function == "nvmlDeviceGetMemoryInfo" else ())


def test_no_cards() -> None:
    with nvml_stub.loaded([]):
        assert gpu.report().state == "no_cards"


@pytest.mark.parametrize("value", ["", "-1", "7", "GPU-ffff", "none"])
def test_hidden(value: str) -> None:
    with nvml_stub.loaded([Card.of(8), Card.of(8, 1)]):
        report = gpu.report({"CUDA_VISIBLE_DEVICES": value})
    assert (report.state, len(report.gpus)) == ("hidden", 2)
    assert f'"{value}"' in report.problem
    assert gpu.chosen(report, {"CUDA_VISIBLE_DEVICES": value}) is None


def test_a_lost_card_does_not_hide_the_others() -> None:
    cards = [Card.of(8, number) for number in range(8)]
    with nvml_stub.loaded(cards, Fail("nvmlDeviceGetHandleByIndex_v2", 15, card=2),
                          Fail("nvmlDeviceGetMemoryInfo", 999, card=5)):
        report = gpu.report()
    assert [card.index for card in report.gpus] == [0, 1, 3, 4, 6, 7]
    assert (report.state, report.lost) == ("ok", (2, 5))


@pytest.mark.parametrize("error", [OSError("nvml.dll"), AttributeError("nvmlInit"),
                                   UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), ValueError()])
def test_any_failure_is_an_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    report = gpu.report()
    assert (report.gpus, report.state) == ((), "broken")
    assert report.problem == (str(error) or "ValueError")


@pytest.mark.parametrize("state", [state for state in gpu.State.__args__ if state != "ok"])
def test_every_state_says_what_it_is_and_what_to_do(state: gpu.State) -> None:
    for lang in i18n.LANGUAGES:
        known = i18n.catalogue(lang)
        assert f"gpu.{state}" in known
        assert f"gpu.{state}_mend" in known
    assert "{" not in i18n.tr(f"gpu.{state}", {"reason": "x"})


# --- what CUDA sees ---

CARDS = tuple(info(number, uuid=uuid) for number, uuid in enumerate(
    ("GPU-aa11", "GPU-aa22", "GPU-bb11", "GPU-cc")))


@pytest.mark.parametrize(("wanted", "seen"), [
    (None, [0, 1, 2, 3]), ("2", [2]), ("3,0", [3, 0]), (" 1 , 2 ", [1, 2]), ("0,-1,2", [0]),
    ("1,9,0", [1]), ("0,0", []), ("", []), ("1gpu,2x", [1, 2]), ("x", []), ("GPU-bb", [2]),
    ("GPU-cc,GPU-aa1", [3, 0]), ("GPU-aa", []), ("GPU-cc,GPU-zz,GPU-bb", [3]), ("+1", [1]),
    ("GPU-cc,1", [3]), ("1,GPU-cc", [1]), ("GPU-c,GPU-cc", []), ("MIG-x", [])])
def test_visible_cards(wanted: str | None, seen: list[int]) -> None:
    environ = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    report = GpuReport(CARDS)
    assert [card.index for card in gpu.visible(report, environ)] == seen
    first = gpu.chosen(report, environ)
    assert (first.index if first else None) == (seen[0] if seen else None)


entry = st.one_of(st.integers(-2, 9).map(str), st.sampled_from([c.uuid[:6] for c in CARDS]),
                  st.sampled_from([c.uuid for c in CARDS]), st.text("GPU-01a ,+x", max_size=6))


@given(st.lists(entry, max_size=5).map(",".join), st.integers(1, 4))
def test_visible_cards_are_those_that_torch_counts(wanted: str, count: int) -> None:
    from torch import cuda
    cards = CARDS[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", wanted)
        try:
            listed: list[Any] = cuda._parse_visible_devices()
        except ValueError:              # torch itself stumbles over "-"
            assume(False)
    if listed and isinstance(listed[0], str):
        assume(not wanted.startswith("MIG-"))
        numbers = cuda._transform_uuid_to_ordinals(listed, [card.uuid for card in cards])
    else:
        numbers = []
        for number in listed:
            if number >= count:
                break
            numbers.append(number)
    environ = {"CUDA_VISIBLE_DEVICES": wanted, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert [card.index for card in gpu.visible(GpuReport(cards), environ)] == numbers


@given(st.text(max_size=20))
def test_any_value_is_read(wanted: str) -> None:
    assert set(gpu.visible(GpuReport(CARDS), {"CUDA_VISIBLE_DEVICES": wanted})) <= set(CARDS)


def test_fastest_first_unless_told_otherwise() -> None:
    report = GpuReport((info(0, name="GTX 1650", speed=1e6), info(1, name="RTX 3090", speed=9e6)))
    assert gpu.chosen(report, {}) is report.gpus[1]
    assert gpu.chosen(report, {"CUDA_VISIBLE_DEVICES": "1"}) is report.gpus[0]
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert gpu.chosen(report, by_bus) is report.gpus[0]
    assert gpu.order_assumed(report, {})
    assert not gpu.order_assumed(report, by_bus)
    assert not gpu.order_assumed(GpuReport(CARDS), {})


def test_one_mig_instance_a_process() -> None:
    parts = tuple(info(0, uuid=f"MIG-{n}", mig=True, total_mb=4864.0 * (n + 1)) for n in range(2))
    report = GpuReport(parts)
    assert gpu.visible(report, {}) == parts[:1]
    assert gpu.visible(report, {"CUDA_VISIBLE_DEVICES": "0"}) == parts[:1]
    assert gpu.visible(report, {"CUDA_VISIBLE_DEVICES": "1"}) == ()
    assert gpu.visible(report, {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-0"}) == parts[1:]


# --- again and again ---

def test_reader_follows_the_card() -> None:
    with nvml_stub.loaded([Card.of(8)]) as stub, Reader() as reader:
        assert reader.poll(0) == GpuState(7888, 8188, None, (), 45)
        mine = Process(os.getpid(), 2000)
        stub.write([Card.of(8, temperature=80, processes=(mine, Process(1, 900)))])
        state = reader.poll(0)
        assert (state.free_mb, state.ours_mb) == (4988, 2000)
        assert (state.temperature_c, len(state.users)) == (80, 2)
        assert reader.poll(Card.of(8).uuid) == state


def test_children_are_ours_and_strangers_are_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        users = (Process(child.pid, 500), Process(os.getpid(), 100), Process(os.getppid(), 70),
                 Process(2**22 + 1, 30))
        with nvml_stub.loaded([Card.of(8, processes=users)]), Reader() as reader:
            assert reader.poll(0).ours_mb == 600
            with Reader(root=child.pid) as inner:
                assert inner.poll(0).ours_mb == 500
    finally:
        child.communicate(b"\n")


def test_what_we_hold_is_not_told() -> None:
    """Windows gives no numbers; in a container our own numbers are others."""
    for process in (Process(os.getpid(), None), Process(2**22 + 1, 900)):
        with (nvml_stub.loaded([Card.of(8, free_mb=5000, processes=(process,))]),
              Reader() as reader):
            state = reader.poll(0)
            assert state.ours_mb is None


@pytest.mark.parametrize(("code", "lost"), [(15, True), (16, True), (28, True), (999, False),
                                            (10, False), (1, False)])
def test_a_card_vanishes_while_polled_and_the_other_stays(code: int, lost: bool) -> None:
    cards = [Card.of(8), Card.of(8, 1)]
    with (nvml_stub.loaded(cards, Fail("nvmlDeviceGetMemoryInfo", code, card=1, after=3)) as stub,
          Reader() as reader):
        assert [reader.poll(1).free_mb for _ in range(4)] == [7888, 7888, 7888, None]
        assert reader.poll(1) == GpuState(lost=lost)
        assert reader.poll(0).free_mb == 7888
        stub.write(cards)
        assert reader.poll(1).free_mb == 7888
        stub.write(cards[:1])
        assert reader.poll(1).free_mb is None


def test_reader_without_a_driver() -> None:
    with nvml_stub.loaded([Card.of(8)], Fail("nvmlInitWithFlags", 9)), Reader() as reader:
        assert reader.poll(0) == GpuState()
    assert Reader().poll("GPU-1") == GpuState()


def test_reader_is_shared_by_threads_and_closed_among_them() -> None:
    with nvml_stub.loaded([Card.of(8), Card.of(12, 1)]):
        reader, wrong = Reader().open(), []
        until = time.monotonic() + 0.3

        def poll(which: int, free: float) -> None:
            while time.monotonic() < until:
                if reader.poll(which).free_mb not in (free, None):
                    wrong.append(which)
        threads = [threading.Thread(target=poll, args=args)
                   for args in ((0, 7888), (1, 12284 - 300), (0, 7888))]
        for thread in threads:
            thread.start()
        for _ in range(50):
            reader.close()
            reader.open()
        for thread in threads:
            thread.join()
        assert not wrong
        assert reader.poll(0).free_mb == 7888
        reader.close()
        assert reader.poll(0) == GpuState()
        with pytest.raises(pynvml.NVMLError):        # every init was given back
            pynvml.nvmlDeviceGetCount()


# --- this machine ---

def test_this_machine() -> None:
    report = gpu.report({})
    assert (report.state == "ok") == bool(report.gpus) == (not report.problem)
    for card in report.gpus:
        assert 0 <= card.free_mb <= card.total_mb
        assert card.name


@pytest.mark.gpu
def test_real_card() -> None:
    import torch
    card = gpu.chosen(gpu.report())
    assert card is not None
    assert card.capability == torch.cuda.get_device_capability(0)
    assert card.driver.count(".") >= 1
    assert abs(card.total_mb - torch.cuda.mem_get_info(0)[1] / gpu.MB) < 0.1 * card.total_mb
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    with Reader() as reader:
        state = reader.poll(card.uuid)
    assert state.ours_mb is None or state.ours_mb >= 256


def test_facts_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        info().name = "y"  # type: ignore[misc]


def test_beside_nvml(tmp_path: Path) -> None:
    assert machine.cpu_name()
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    total, free = machine.ram()
    assert 0 < free <= total <= psutil.virtual_memory().total / gpu.MB
    room = machine.disk_free(tmp_path / "not" / "yet" / "there")
    assert room is not None
    assert room > 0


def test_other_makers_cards(tmp_path: Path) -> None:
    def card(number: int, vendor: str, uevent: str = "", product: str = "") -> None:
        device = tmp_path / f"card{number}" / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor)
        if uevent:
            (device / "uevent").write_text(uevent)
        if product:
            (device / "product_name").write_text(product)
    card(0, "0x1002\n", "DRIVER=amdgpu\nPCI_CLASS=30000\nPCI_ID=1002:744C\n")
    card(1, "0x8086\n")
    card(2, "0x1002\n", product="AMD Instinct MI210\n")
    card(3, "0x1af4\n", "PCI_ID=1AF4:1050\n")               # a virtual screen
    card(4, "nonsense")
    (tmp_path / "card0-HDMI-A-1" / "device").mkdir(parents=True)
    (tmp_path / "card0-HDMI-A-1" / "device" / "vendor").write_text("0x1002\n")
    found = list(machine._linux(tmp_path))
    assert [(one.name, one.vendor, one.support) for one in found] == [
        ("AMD GPU (1002:744C)", "amd", "none"), ("Intel GPU", "intel", "none"),
        ("AMD Instinct MI210", "amd", "none")]
    assert machine.Accelerator("Apple M2 GPU", "apple").support == "mps"


@pytest.mark.parametrize(("names", "cache"), [
    (("memory.max", "memory.current"), "inactive_file"),
    (("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file")])
def test_a_containers_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             names: tuple[str, str], cache: str) -> None:
    limit, used = names
    (tmp_path / limit).write_text(f"{512 * gpu.MB}\n")
    (tmp_path / used).write_text(f"{200 * gpu.MB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cache} {50 * gpu.MB}\n")
    monkeypatch.setattr(machine, "_groups", lambda: iter([tmp_path]))
    machine._limited.cache_clear()
    try:
        assert machine.ram() == (512, 512 - 150)
        (tmp_path / used).write_text(f"{300 * gpu.MB}\n")
        assert machine.ram() == (512, 512 - 250)
        (tmp_path / limit).write_text("max\n")
        machine._limited.cache_clear()
        assert machine.ram()[0] == psutil.virtual_memory().total / gpu.MB
    finally:
        machine._limited.cache_clear()
