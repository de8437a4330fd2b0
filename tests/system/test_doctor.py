"""Findings on this machine, and on machines made up from facts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import i18n, paths
from core.system import doctor, gpu, machine
from core.system.doctor import Finding
from core.system.gpu import GpuInfo, GpuReport, GpuUser
from core.system.machine import Accelerator
from tests import nvml_stub
from tests.nvml_stub import Card, Fail

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


def card(capability: tuple[int, int] = (8, 6), **more: Any) -> GpuReport:
    facts = {"name": "GeForce RTX", "uuid": "GPU-1", "total_mb": 8192.0, "free_mb": 7000.0,
             "driver": "580.65.06"} | more
    return GpuReport((GpuInfo(index=0, capability=capability, **facts),))


def build(**more: Any) -> dict[str, Any]:
    return {"version": "2.14.0+cu130", "cuda": "13.0", "hip": "", "available": True,
            "archs": CU130, "mps": False} | more


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture(scope="module")
def this_torch() -> dict[str, Any]:
    return doctor.torch_facts()         # once: importing torch takes its time


def test_this_machine_is_examined_without_a_traceback(
        this_torch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "torch_facts", lambda: this_torch)
    findings = doctor.examine()
    keys = [finding.key for finding in findings]
    assert "python" in keys
    assert "packages" in keys
    assert "unknown" not in keys
    assert "torch_broken" not in keys
    assert {"memory", "memory_low"} & set(keys)
    assert {"folder", "disk_low"} & set(keys)
    for finding in findings:
        assert "{" not in finding.text + finding.mend
        assert not finding.text.startswith("doctor.")


def test_torch_is_asked_elsewhere(this_torch: dict[str, Any]) -> None:
    import torch
    assert this_torch["version"] == torch.__version__
    assert this_torch["available"] == torch.cuda.is_available()


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
@pytest.mark.parametrize(("script", "reason"), [
    ("echo 'OSError: libcudart.so: bad' >&2; exit 1", "OSError: libcudart.so: bad"),
    ("kill -SEGV $$", "exit code -11"), ("exit 3", "exit code 3")])
def test_a_torch_that_takes_its_process_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             script: str, reason: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    finding = only(doctor.torch(doctor.torch_facts(), GpuReport()))
    assert (finding.key, finding.level) == ("torch_broken", "error")
    assert reason in finding.text
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    assert "FileNotFoundError" in doctor.torch_facts()["error"]


@pytest.mark.parametrize(("facts", "report", "key"), [
    (build(available=False), GpuReport(), "torch_cpu"),
    (build(cuda="", available=False, mps=True, archs=[]), GpuReport(), "torch_mps"),
    (build(), card(), "torch_cuda"),
    (build(cuda="", available=False, archs=[]), card(), "torch_without_cuda"),
    (build(available=False), card(driver="551.86"), "torch_no_contact"),
    (build(available=False), card(cuda_version="12.4"), "driver_old"),
    (build(available=False, cuda="12.8"), card(cuda_version="12.4"), "torch_no_contact"),
    (build(available=False), card((12, 0), cuda_version="12.8"), "driver_old_new_card"),
    (build(available=True), card(cuda_version="12.4"), "torch_cuda"),   # CUDA's compat package
    (build(), card((6, 1)), "torch_too_new"),
    (build(archs=CU126, cuda="12.6"), card((12, 0)), "torch_too_old"),
    (build(cuda="", hip="7.0"), card(), "torch_cuda"),
    (build(), card((0, 0)), "torch_cuda"),
])
def test_torch_and_card(facts: dict[str, Any], report: GpuReport, key: str) -> None:
    finding = next(doctor.torch(facts, report))
    assert finding.key == key
    assert (finding.level == "error") == (finding.mend != "")
    for lang in i18n.LANGUAGES:
        for text in (f"doctor.{key}", f"doctor.{key}_mend")[:1 + (finding.level == "error")]:
            assert "{" not in i18n.tr(text, finding.params, lang)


def test_old_card_is_sent_to_an_old_cuda() -> None:
    finding = only(doctor.torch(build(cuda="", archs=[]), card((6, 1))))
    assert finding.mend.endswith(doctor.TORCH_INDEX_OLD)
    assert only(doctor.torch(build(), card((6, 1)))).mend.endswith(doctor.TORCH_INDEX_OLD)


@pytest.mark.parametrize(("capability", "archs", "runs"), [
    ((8, 6), CU130, True), ((8, 9), CU130, True),        # sm_86 code runs on 8.9
    ((7, 0), CU130, False), ((12, 1), CU130, True), ((13, 0), CU130, True),     # by PTX
    ((12, 0), CU126, False), ((9, 0), ["sm_90a"], True), ((8, 0), ["sm_86"], False),
    ((8, 6), [], True), ((8, 6), ["gfx90a"], False)])
def test_which_code_runs_where(capability: tuple[int, int], archs: list[str], runs: bool) -> None:
    assert doctor.runs_on(capability, archs) == runs


@given(st.tuples(st.integers(3, 13), st.integers(0, 9)), st.lists(st.text(max_size=9)))
def test_arch_lists_never_fail(capability: tuple[int, int], archs: list[str]) -> None:
    assert doctor.runs_on(capability, archs) in (True, False)


def test_constants_are_those_of_the_bootstrap() -> None:
    text = (paths.ROOT / "build" / "environment.py").read_text("utf-8")
    assert f'TORCH_CUDA = "{doctor.TORCH_INDEX}"' in text
    assert f'TORCH_CUDA_OLD = "{doctor.TORCH_INDEX_OLD}"' in text


def test_a_card_in_use() -> None:
    users = (GpuUser(os.getpid(), 4000.0), GpuUser(os.getppid(), 600.0), GpuUser(1, None))
    told = list(doctor.cards(card(users=users)))
    assert [finding.key for finding in told] == ["card", "card_busy"]
    assert "(600 MB)" in told[1].text
    assert "4000" not in told[1].text
    assert "5.9" not in told[0].text
    assert "6.8 of 8.0 GB free" in told[0].text


def test_minor_versions_of_cuda_run_on_one_driver() -> None:
    ran, told = doctor.torch(build(cuda="12.8"), card(cuda_version="12.4"))
    assert (ran.key, told.key, told.level) == ("torch_cuda", "driver_minor", "ok")
    assert len(list(doctor.torch(build(), card(cuda_version="13.1")))) == 1


def test_the_driver_that_is_needed() -> None:
    told = only(doctor.torch(build(available=False), card(cuda_version="12.4")))
    assert "580" in told.mend
    told = only(doctor.torch(build(available=False, cuda="12.8"), card(cuda_version="11.8")))
    assert "525.60" in told.mend


def test_a_hidden_card_is_no_fault_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with nvml_stub.loaded([Card.of(8)]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        report = gpu.report()
        keys = [finding.key for finding in doctor.cards(report)]
        assert keys == ["hidden", "card"]
        assert only(doctor.torch(build(available=False), report)).key == "torch_cpu"


@pytest.mark.parametrize(("more", "key"), [
    ({"temperature": 91}, "card_hot"), ({"reasons": 0x40}, "card_throttled"),
    ({"reasons": 0x08}, "card_throttled"), ({"free_mb": 900}, "card_full"), ({"reasons": 0x05}, ""),
    ({"temperature": -1}, ""), ({"processes": (nvml_stub.Process(1, 3000),)}, "card_busy")])
def test_strain(more: dict[str, Any], key: str) -> None:
    with nvml_stub.loaded([Card.of(8, **more)]):
        first, *rest = doctor.cards(gpu.report())
    assert (first.key, [finding.key for finding in rest]) == ("card", [key] if key else [])
    assert all(finding.mend for finding in rest)


def test_several_cards_of_which_one_is_lost() -> None:
    cards = [Card.of(4, name="GTX 1650"), Card.of(24, 1, name="RTX 4090", cores=16384),
             Card.of(8, 2)]
    with nvml_stub.loaded(cards, Fail("nvmlDeviceGetMemoryInfo", 15, card=2)):
        told = list(doctor.cards(gpu.report()))
    assert [finding.key for finding in told] == ["card", "card", "card_lost", "order_assumed"]
    assert "number 2" in told[2].text
    assert cards[1].uuid in told[3].mend


@pytest.mark.parametrize(("code", "state", "level"), [
    (9, "no_driver", "warning"), (18, "mismatch", "error"), (4, "no_permission", "error"),
    (999, "broken", "error"), (12, "no_library", "ok"), (28, "no_cards", "warning")])
def test_states_of_the_driver(code: int, state: str, level: str,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerators", lambda: ())
    with nvml_stub.loaded([Card.of(8)], Fail("nvmlInitWithFlags", code)):
        finding = only(doctor.cards(gpu.report()))
    assert (finding.key, finding.level) == (state, level)
    assert finding.text == i18n.tr(f"gpu.{state}", finding.params)
    assert bool(finding.mend) == (level != "ok")


def test_a_card_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "accelerators", lambda: (
        Accelerator("NVIDIA GPU (10DE:2684)", "nvidia"), Accelerator("AMD GPU", "amd")))
    report = GpuReport(state="no_library", problem="x")
    assert only(doctor.cards(report)).level == "warning"
    assert only(doctor.graphics(report)).text.startswith("AMD GPU: training there is not")


def test_on_battery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "on_battery", lambda: True)
    assert only(doctor.power()).key == "on_battery"
    for plugged in (False, None):
        monkeypatch.setattr(machine, "on_battery", lambda plugged=plugged: plugged)
        assert list(doctor.power()) == []


# --- the chosen base ---

def safetensors(path: Path, size: int = 64) -> Path:
    head = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(size))
    return path


def test_a_whole_base(base: Path, tmp_path: Path) -> None:
    assert only(doctor.weights(base)).key == "base"
    assert only(doctor.weights(safetensors(tmp_path / "图" / "a.safetensors"))).key == "base"
    assert list(doctor.weights(None)) == []


def test_a_base_that_cannot_be_used(tmp_path: Path) -> None:
    empty, pickled = tmp_path / "empty", tmp_path / "pickled" / "unet"
    empty.mkdir()
    pickled.mkdir(parents=True)
    (pickled / "model.bin").write_bytes(b"PK\x03\x04")
    (tmp_path / "old.ckpt").write_bytes(b"PK\x03\x04pickle")
    torn = safetensors(tmp_path / "torn.safetensors")
    torn.write_bytes(torn.read_bytes()[:-9])
    for path, key in ((tmp_path / "gone", "base_missing"), (empty, "base_empty"),
                      (pickled.parent, "base_pickled"), (tmp_path / "old.ckpt", "base_broken"),
                      (torn, "base_broken")):
        finding = only(doctor.weights(path))
        assert (finding.key, finding.level) == (key, "error")
        assert path.name in finding.text
        assert finding.mend


def test_parts_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("all.safetensors", "unet/m-00001-of-00002.safetensors",
                 "unet/m-00002-of-00002.safetensors", "vae/v.safetensors"):
        safetensors(tmp_path / name)
    found = doctor.weight_files(tmp_path)
    assert {name: len(files) for name, files in found.items()} == {
        "unet/m.safetensors": 2, "vae/v.safetensors": 1}


def test_a_base_that_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = safetensors(tmp_path / "big.safetensors", 3 * 2**20)
    monkeypatch.setattr(machine, "ram", lambda: (100.0, 2.0))
    monkeypatch.setattr(machine, "disk_free", lambda folder: 1.0)
    keys = [finding.key for finding in doctor.weights(file)]
    assert keys[0] == "base_ram"
    assert set(keys[1:]) == {"base_disk"}


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pytest>=8", "no-such-thing>=2", "PyYAML<1", '
        '"gone; python_version < \'3\'"]\n')
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    found, unfit = doctor.packages()
    assert found.text.startswith("Packages: pytest ")
    assert unfit.level == "error"
    assert unfit.mend == f'Run: {sys.executable} -m pip install "no-such-thing>=2" "PyYAML<1"'


def test_folders(tmp_path: Path) -> None:
    good, blocked = tmp_path / "a" / "数据", tmp_path / "file" / "b"
    (tmp_path / "file").write_text("x")
    first, second = doctor.folders([good, blocked])
    assert first.key in ("folder", "disk_low")
    assert str(good) in first.text
    assert (second.key, second.level) == ("folder_locked", "error")
    assert list(good.iterdir()) == []


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[Finding]:
        raise RuntimeError("no /proc")
    monkeypatch.setattr(doctor, "memory", fail)
    monkeypatch.setattr(doctor, "torch_facts", lambda: {"error": "x"})
    findings = doctor.examine()
    assert "A check failed: RuntimeError: no /proc." in [finding.text for finding in findings]
    assert findings[-1].key != "unknown"


def test_trouble_with_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor.encoding()) == []
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "cp1252")
    monkeypatch.setattr(paths, "ROOT", Path("/x/caf\udce9"))
    assert [finding.key for finding in doctor.encoding()] == ["encoding", "path_broken"]
    for finding in doctor.encoding():
        assert "\n".join(doctor.lines(finding)).encode("utf-8")


def test_every_finding_has_its_words() -> None:
    source = Path(doctor.__file__).read_text("utf-8")
    known = i18n.catalogue("en")
    assert set(re.findall(r'Finding\("(\w+)"', source)) <= {
        key.removeprefix("doctor.") for key in known}
    for key in (key.removeprefix("doctor.") for key in known if key.startswith("doctor.")):
        if f'"doctor.{key}"' in source:             # said in another's place
            continue
        name = key.removesuffix("_mend")
        assert f'"{name}"' in source, name
        assert f"doctor.{name}" in known


def test_lines() -> None:
    assert doctor.lines(Finding("torch_cpu", params={"version": "2"})) == ["[ok] PyTorch 2"]
    told = doctor.lines(Finding("unknown", "warning", {"reason": "x"}))
    assert told[0].startswith("[ !] ")
    assert told[1].startswith("     -> ")


def test_the_command_finds_a_card_by_the_loader() -> None:
    code = ("from core.system import doctor, gpu; "
            "print([f.key for f in doctor.cards(gpu.report())])")
    env = nvml_stub.environment([Card.of(12, temperature=95)])
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, env=env, text=True,
                          capture_output=True)
    assert done.stdout.strip() == "['card', 'card_hot']", done.stderr


def test_the_frozen_app_is_not_mended_by_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("torch_broken", "error", {"error": "x", "python": "p"})
    assert "pip install" in finding.mend
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "pip" not in finding.mend
    assert "PyTorch" in finding.mend
    assert Finding("memory_low", "warning", {"free": "1"}).mend != finding.mend
