"""uv.lock and build/lock/*.txt: in step with pyproject.toml and each other; their renewal."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.build.test_bootstrap import make_wheel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build"))
lock = importlib.import_module("lock")
sys.path.remove(str(ROOT / "build"))

PARTS = ("base", "test", "app", "torch", "build")
SYSTEMS = [{"sys_platform": system, "platform_machine": machine, "python_full_version": python,
            "python_version": python[:4], "platform_python_implementation": "CPython"}
           for system, machine in (("linux", "x86_64"), ("win32", "AMD64"), ("darwin", "arm64"))
           for python in ("3.11.7", "3.12.1", "3.13.1", "3.14.0")]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def text_of(part: str) -> str:
    return (ROOT / "build" / "lock" / f"{part}.txt").read_text("utf-8")


def requirements(text: str) -> list[tuple[Requirement, set[str]]]:
    """(name==version ; marker, hashes) of one part."""
    found = []
    for block in re.split(r"\n(?=\S)", text.strip()):
        if not block.startswith("#"):
            line, *hashes = block.replace("\\\n", "\n").splitlines()
            found.append((Requirement(line), {word.strip() for word in hashes}))
    return found


def chosen(text: str, system: dict[str, str]) -> dict[str, tuple[str, set[str]]]:
    """Package -> version and hashes, on one system."""
    return {one.name: (str(one.specifier)[2:], hashes) for one, hashes in requirements(text)
            if one.marker is None or one.marker.evaluate({**system, "extra": ""})}


def test_parts_are_what_uv_lock_says() -> None:
    """Made anew from uv.lock, without a network; each uv writes the same markers in its own way."""
    made = lock.parts()
    assert set(made) == set(PARTS)
    for part, text in made.items():
        for system in SYSTEMS:
            assert chosen(text_of(part), system) == chosen(text, system)


def test_uv_lock_is_of_this_pyproject() -> None:
    """What it asks for is what was resolved: `python build/lock.py renew` after a change."""
    found = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))
    own = next(one for one in found["package"] if one["name"] == "lora-darkroom")
    locked = {(canonicalize_name(one["name"]), one.get("marker", ""),
               SpecifierSet(one.get("specifier", ""))) for one in own["metadata"]["requires-dist"]}
    asked = {(canonicalize_name(line.name), marker, line.specifier)
             for extra, lines in {"": project()["project"]["dependencies"],
                                  **project()["project"]["optional-dependencies"]}.items()
             for line in map(Requirement, lines)
             for marker in [f"extra == '{extra}'" if extra else ""]}
    assert locked == asked
    assert found["requires-python"] == project()["project"]["requires-python"]
    assert lock.asked_for(ROOT) in text_of("base")


def test_every_locked_package_has_hashes_and_comes_from_pypi() -> None:
    found = tomllib.loads((ROOT / "uv.lock").read_text("utf-8"))
    assert {str(one["source"]) for one in found["package"]} == {
        str({"registry": "https://pypi.org/simple"}), str({"editable": "."})}
    for part in PARTS:
        for requirement, hashes in requirements(text_of(part)):
            assert hashes, requirement
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes)
            assert re.fullmatch(r"==[^=*]+", str(requirement.specifier))


@pytest.mark.parametrize("system", SYSTEMS,
                         ids=lambda one: f"{one['sys_platform']}-{one['python_version']}")
def test_each_system_gets_one_version_of_all_that_is_asked_for(system: dict[str, str]) -> None:
    """Of every direct dependency, one that its range allows; torch only from its part."""
    def versions(*parts: str) -> dict[str, str]:
        got: dict[str, str] = {}
        for part in parts:
            names = [one.name for one, _ in requirements(text_of(part))
                     if one.marker is None or one.marker.evaluate({**system, "extra": ""})]
            assert len(names) == len(set(names))
            for name, (version, _) in chosen(text_of(part), system).items():
                assert got.setdefault(name, version) == version
        return got

    extras = project()["project"]["optional-dependencies"]
    for part, lines in (("base", []), ("test", extras["test"]), ("app", extras["app"])):
        got = versions("build", part, "torch")
        for line in map(Requirement, [*project()["project"]["dependencies"], *lines]):
            assert line.specifier.contains(got[canonicalize_name(line.name)])
        assert not {"torch", "torchvision"} & versions(part).keys()
    for line in map(Requirement, project()["dependency-groups"]["build"]):
        assert line.specifier.contains(versions("build")[line.name])


def test_nothing_of_cuda_stands_apart_from_torch() -> None:
    """Else a CPU torch of another index would come with gigabytes that only PyPI's needs."""
    for part in ("base", "test", "app"):
        assert [one.name for one, _ in requirements(text_of(part))
                if one.name.startswith(("nvidia-", "cuda-", "triton"))] == ["nvidia-ml-py"]


TINY = """
[project]
name = "tiny"
version = "1.0"
requires-python = ">=3.11"
dependencies = ["darkroom-dep>=1.2", "torch>=1"]

[project.optional-dependencies]
test = ["darkroom-extra"]
app = []

[dependency-groups]
build = ["darkroom-tool"]
"""


def test_renewal_says_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capfd: pytest.CaptureFixture[str]) -> None:
    wheels, root = tmp_path / "wheels", tmp_path / "my project"
    for name, version in (("darkroom_dep", "1.5"), ("darkroom_extra", "2.0"), ("torch", "1.0"),
                          ("darkroom_tool", "3.0")):
        make_wheel(wheels, name, version)
    (root / "build").mkdir(parents=True)
    (root / "pyproject.toml").write_text(TINY)
    monkeypatch.setattr(lock, "ROOT", root)
    monkeypatch.setattr(lock, "FOLDER", root / "build" / "lock")
    for name, value in (("FIND_LINKS", wheels), ("CACHE_DIR", tmp_path / "cache"), ("OFFLINE", 1)):
        monkeypatch.setenv(f"UV_{name}", str(value))
    assert lock.main(["renew"]) == 0
    names = {path.stem: re.findall(r"^\w\S*", path.read_text(), re.MULTILINE)
             for path in (root / "build" / "lock").iterdir()}
    assert names == {"base": ["darkroom-dep==1.5"], "torch": ["torch==1.0"],
                     "test": ["darkroom-dep==1.5", "darkroom-extra==2.0"],
                     "app": ["darkroom-dep==1.5"], "build": ["darkroom-tool==3.0"]}
    make_wheel(wheels, "darkroom_dep", "1.9")
    make_wheel(wheels, "darkroom_extra", "2.1")
    capfd.readouterr()
    assert lock.main(["renew", "darkroom-extra==2.0"]) == 0
    told = capfd.readouterr().err
    assert "Updated darkroom-dep v1.5 -> v1.9" in told
    assert "darkroom-extra" not in told
    assert "darkroom-dep==1.9" in (root / "build" / "lock" / "test.txt").read_text()
    assert lock.main(["renew", "darkroom-extra==2.0"]) == 0
    assert "Updated" not in capfd.readouterr().err


@pytest.mark.parametrize(("listed", "told"), [
    ("darkroom-dep==1.2\nDarkroom_extra==2.0.0", []),
    ("darkroom-dep==1.3\ndarkroom-extra==2.0", ["darkroom-dep>=1.2"])])
def test_bounds_that_nothing_can_have_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                listed: str, told: list[str]) -> None:
    text = TINY.replace(', "torch>=1"', "").replace('"darkroom-extra"', '"darkroom-extra>=2"')
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    assert lock.bounds_out_of_reach(listed) == told
