"""The standalone app as far as it needs no build: what the spec names exists, what it finds out is
true, and the program starts its own processes rightly, frozen or not. The rest: test_frozen.py."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import launcher
from core import paths
from core.system import processes

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SPEC = BUILD / "darkroom.spec"


@pytest.fixture(scope="module")
def make() -> Any:
    spec = importlib.util.spec_from_file_location("darkroom_make", BUILD / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def literals() -> dict[str, list[str]]:
    tree = ast.parse(SPEC.read_text("utf-8"), str(SPEC))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id.isupper() and isinstance(node.value, ast.List)}


def exists(name: str) -> bool:
    """Whether a module can be found, without importing the packages it lies in."""
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not inner:
        return spec is not None
    return any(found for place in spec.submodule_search_locations or []
               for found in (*Path(place, *inner[:-1]).glob(f"{inner[-1]}.*"),
                             *Path(place, *inner).glob("__init__.py")))


# --- the spec ---

def test_what_the_spec_names_exists() -> None:
    named = literals()
    assert {"ROOMS", "DATA", "HIDDEN", "WHOLE", "EXCLUDED", "UNUSED"} <= named.keys()
    assert not [name for name in named["DATA"] if not (ROOT / name).exists()]
    assert not [name for name in (*named["HIDDEN"], *named["WHOLE"]) if not exists(name)]
    assert not exists("gradio.no_such_module")
    for path in (*(BUILD / "hooks").iterdir(), *(BUILD / "runtime_hooks").iterdir()):
        if path.suffix == ".py":
            compile(path.read_text("utf-8"), str(path), "exec")


def test_nothing_that_the_program_imports_is_excluded() -> None:
    excluded = literals()["EXCLUDED"]
    for room in ("core", "captioner", "gui"):
        for path in (ROOT / room).rglob("*.py"):
            named = re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text("utf-8"), re.M)
            assert not [one for one in named for name in excluded
                        if one == name or one.startswith(f"{name}.")], path


def test_everything_beside_the_code_goes_in(make: Any) -> None:
    placed = {Path(place) / Path(file).name
              for file, place in make.data_of_rooms(literals()["ROOMS"])}
    assert {Path("gui/assets/live.js"), Path("core/base_models/models.yaml"),
            Path("core/strings/zh-CN/gui.yaml"),
            next((ROOT / "captioner/models/vocabulary").iterdir()).relative_to(ROOT)} <= placed
    assert len([path for path in placed if path.match("core/families/*/configs/**/*.json")]) > 10
    assert {Path("core/families/tokenizers") / kind / "tokenizer.json" for kind in ("qwen2", "t5")
            } <= placed
    assert not [path for path in placed if path.suffix in (".py", ".pyc")]


def test_what_is_found_out_of_the_environment(make: Any) -> None:
    needed = make.requirements(["gradio>=6", "no-such-package", 'pytest; extra == "test"'])
    assert {"gradio", "pandas", "numpy"} <= needed
    assert not needed & {"pytest", "no-such-package"}
    modules = set(make.all_modules(["open_clip", "no_such_package"]))
    assert {"open_clip", "open_clip.factory"} <= modules
    library = make.standard_library(["tkinter"])
    assert {"csv", "sqlite3"} <= set(library)
    assert not {"tkinter", "antigravity", "_json"} & set(library)
    entries = [("torch/include/a.h", "", "DATA"), ("torch/lib/b.so", "", "BINARY")]
    assert make.without(entries, ["torch/include/*"]) == entries[1:]


def test_sizes_by_package(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in {"darkroom": 1, "app/torch/lib/a.so": 8, "app/nvidia/cudnn/lib/b.so": 16,
                       "app/numpy.libs/c.so": 2, "app/numpy/d.py": 2,
                       "app/rich-14.0.dist-info/METADATA": 4}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert dict(make.by_package(tmp_path)) == {
        "darkroom": 1, "torch": 8, "nvidia/cudnn": 16, "numpy": 4, "metadata": 4}
    make.show_sizes(type("Options", (), {"app": tmp_path}))
    assert "| whole | 0 |" in capsys.readouterr().out


def test_icons(make: Any, tmp_path: Path) -> None:
    assert Path(make.icon(tmp_path)).is_file()
    with Image.open(tmp_path / "darkroom.ico") as image:
        assert {(16, 16), (256, 256)} <= set(image.info["sizes"])
    with Image.open(tmp_path / "darkroom.icns") as image:
        assert (512, 512, 2) in image.info["sizes"]
    with Image.open(tmp_path / "darkroom.png") as image:
        assert image.getpixel((512, 512)) == (0xFF, 0xD9, 0xA8, 255)
        assert image.getpixel((2, 2))[3] == 0


def test_version_resource_is_one(make: Any, tmp_path: Path) -> None:
    """PyInstaller evaluates it, on Windows only; here what it calls tells what it was given."""
    names = ("VSVersionInfo", "FixedFileInfo", "StringFileInfo", "StringTable", "StringStruct",
             "VarFileInfo", "VarStruct")
    called = {name: lambda *given, _name=name, **more: (_name, *given, more) for name in names}
    text = Path(make.version_resource(tmp_path, "darkroom")).read_text("utf-8")
    kind, told = eval(text, {"__builtins__": {}}, called)
    assert kind == "VSVersionInfo"
    assert told["ffi"][1]["filevers"][:3] == tuple(map(int, make.version().split(".")))
    assert ("StringStruct", "ProductName", "LoRA Darkroom", {}) in told["kids"][0][1][0][2]


# --- processes of its own ---

@pytest.mark.parametrize("name", processes.INNER)
def test_inner_commands_exist(name: str) -> None:
    module, _, function = processes.INNER[name].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_launcher_runs_inner_commands(monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"config": {"lora_rank": -1}}\n'))
    assert launcher.run(["plan-service"]) == 0
    assert json.loads(capsys.readouterr().out)["fault"]["code"] == "gui.plan_failed"
    assert processes.run_inner(["train", "worker"]) is None
    assert processes.run_inner([]) is None


@pytest.mark.parametrize("suffix", ["", ".exe"])
def test_the_frozen_app_starts_its_console_program(suffix: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / f"darkroom{suffix}"))
    assert processes.command("worker", "train") == [
        str(tmp_path / f"darkroom-cli{suffix}"), "worker", "train"]


def test_from_source_it_starts_this_python() -> None:
    command = processes.command("lora", "info", "x")
    assert command[0] == sys.executable
    assert command[-3:] == ["lora", "info", "x"]
    assert str(paths.ROOT) in processes.environment()["PYTHONPATH"]


# --- selftest ---

def test_selftest_tells_what_is_broken(own_home: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    from gui import selftest

    def stub(name: str, facts: dict[str, Any] | None) -> None:
        def part(bench: selftest.Bench) -> dict[str, Any]:
            assert paths.data_dir() == bench.home != own_home
            if facts is None:
                raise RuntimeError("no such luck")
            return facts
        part.__name__ = name
        monkeypatch.setattr(selftest, name, part)
    for name in ("torch", "modules", "plan", "verify", "convert", "caption", "window"):
        stub(name, {"seen": name})
    stub("train", None)
    monkeypatch.setenv("DARKROOM_RESTARTED", str(ROOT / ".venv"))
    assert launcher.main(["selftest", "--json", str(tmp_path / "report.json")]) == 1
    said = capsys.readouterr().out
    assert "[ x]" in said
    assert "no such luck" in said
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert not report["ok"]
    assert {part["part"]: part["ok"] for part in report["parts"]} == {
        "folders": True, "card": True, "torch": True, "modules": True, "plan": True,
        "train": False, "verify": True, "convert": True, "caption": True, "window": True}
    assert paths.data_dir() == own_home
    assert not list((own_home / "runs").glob("*")) if (own_home / "runs").exists() else True


@pytest.mark.thorough
def test_selftest_from_source() -> None:
    import subprocess
    done = subprocess.run(processes.command("selftest"), env=processes.environment(),
                          capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout
    assert "[ x]" not in done.stdout
