"""build/bootstrap.py on fake checkouts: real interpreters, real venvs, real pip, no network.

A fake checkout has the real launcher and bootstrap, a core/ that only tells how it was started,
requirements that a folder of two hand-made wheels fulfils, and a lock with these wheels' hashes.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version

REAL = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REAL / "build"))
bootstrap, environment, install, messages, repair = map(
    importlib.import_module, ("bootstrap", "environment", "install", "messages", "repair"))
sys.path.remove(str(REAL / "build"))

HERE_PYTHON = environment.dotted(sys.version_info[:2])

CONSOLE = """
import json, sys
def guarded(call, argv, tell):
    import darkroom_dep
    print(json.dumps({"prefix": sys.prefix, "argv": sys.argv[1:], "dep": darkroom_dep.VERSION}))
    return int(argv[-1]) if argv and argv[-1].isdigit() else 0
"""

BACKEND = """
import os, time, zipfile
def get_requires_for_build_editable(settings=None): return []
def build_editable(folder, settings=None, metadata=None):
    if os.environ.get("SLOW_BUILD"):
        open("building", "w").close()
        time.sleep(60)
    name, info = "fake_darkroom-1.0-py3-none-any.whl", "fake_darkroom-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: fake-darkroom\\n"
                       "Version: 1.0\\nProvides-Extra: test\\nRequires-Dist: darkroom-dep>=1.2\\n"
                       "Requires-Dist: darkroom-extra; extra == 'test'\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nGenerator: fake\\n"
                       "Root-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return name
"""

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["backend"]

[project]
name = "fake-darkroom"
version = "1.0"
dependencies = [
    "darkroom-dep>=1.2",
]

[project.optional-dependencies]
test = [
    "darkroom-extra",
]
"""


DEP, EXTRA, LATER = ("darkroom_dep", "1.5"), ("darkroom_extra", "2.0"), ("darkroom_later", "1.0")


def lock(root: Path, **parts: list[tuple[Any, ...]]) -> None:
    """build/lock/*.txt with these packages; their wheels' hashes are those of make_wheel."""
    for part in ("base", "test", "build", "torch"):
        lines = [f"# {environment.asked_for(root)}\n"]
        for name, version, *more in parts.get(part, []):
            with tempfile.TemporaryDirectory() as folder:
                wheel = make_wheel(Path(folder), name, version, *more).read_bytes()
            lines.append(f"{name.replace('_', '-')}=={version} \\\n"
                         f"    --hash=sha256:{hashlib.sha256(wheel).hexdigest()}\n")
        path = root / "build" / "lock" / f"{part}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines), "utf-8")


def make_checkout(root: Path) -> Path:
    files = {"pyproject.toml": PYPROJECT, "backend/backend.py": BACKEND,
             "core/__init__.py": '__version__ = "1.0"\n', "core/cli/console.py": CONSOLE,
             "core/system/processes.py": "def run_inner(argv): return None\n"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    (root / "build").mkdir()
    lock(root, base=[DEP], test=[DEP, EXTRA])
    for name in ("launcher.py", "build/bootstrap.py", "build/environment.py",
                 "build/install.py", "build/messages.py", "build/repair.py",
                 "core/system/message_box.py", "core/system/surroundings.py",
                 "core/strings/en/bootstrap.yaml", "core/strings/zh-CN/bootstrap.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REAL / name, root / name)
    return root


def make_wheel(folder: Path, name: str, version: str, more: dict[str, str] | None = None
               ) -> Path:
    """The same bytes each time, so that a lock can know their hash."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {f"{name}.py": f'VERSION = "{version}"\n', **(more or {}),
             f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: fake\nRoot-Is-Purelib: true\n"
                              "Tag: py3-none-any\n"}
    record = "".join(f"{path},sha256={digest(text)},{len(text)}\n" for path, text in files.items())
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for inner, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(zipfile.ZipInfo(inner), text)
    return path


def digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, *DEP)
    make_wheel(folder, *EXTRA)
    return folder


def surroundings(wheels: Path, **more: str) -> dict[str, str]:
    """A user whose own pip configuration, by environment variables, knows one place only."""
    kept = {k: v for k, v in os.environ.items()
            if not k.startswith(("PIP_", "DARKROOM_", "UV_", "PYTHON"))}
    paths = [p for p in kept.get("PATH", "").split(os.pathsep)
             if not any((Path(p) / tool).exists() for tool in ("uv", "uv.exe", "nvidia-smi"))]
    return kept | {"PATH": os.pathsep.join(paths), "PIP_CONFIG_FILE": os.devnull,
                   "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "DARKROOM_LANG": "en",
                   **more}


def start(root: Path, env: dict[str, str], *argv: str, before: str = ""
          ) -> subprocess.CompletedProcess[str]:
    """The launcher as a user starts it, from another folder; `before`: Python run first."""
    script = str(root / "launcher.py")
    command = [sys.executable, script, *argv]
    if before:
        code = (f"import sys, runpy; sys.argv = {[script, *argv]!r}; {before}; "
                f"runpy.run_path({script!r}, run_name='__main__')")
        command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=root.parent, capture_output=True, text=True,
                          encoding="utf-8", timeout=200, stdin=subprocess.DEVNULL)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = done.stdout.strip().splitlines()
    assert lines, done.stderr
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def stamp(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / ".venv" / "darkroom.json").read_text("utf-8"))
    return found


def site(root: Path) -> Path:
    return Path(environment.site_packages(root / ".venv")[0])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheels: Path
              ) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A checkout after its first start, and what that start said."""
    root = make_checkout(tmp_path_factory.mktemp("home") / "my pictures 图片 é" / "darkroom")
    return root, start(root, surroundings(wheels), "echo", "two words", "学习", "--x=*", "7")


@pytest.fixture
def checkout(installed: tuple[Path, Any], wheels: Path) -> Iterator[Path]:
    """The installed checkout, whose .venv a test may spoil: it is complete again after."""
    root = installed[0]
    sound = (root / ".venv" / "darkroom.json").read_bytes()
    yield root
    (root / "pyproject.toml").write_text(PYPROJECT, "utf-8")
    lock(root, base=[DEP], test=[DEP, EXTRA])
    if stamp(root)["state"] == "ready":             # nothing is half done: no need to install
        (root / ".venv" / "darkroom.json").write_bytes(sound)
    elif not environment.is_current(root):
        assert start(root, surroundings(wheels), "0").returncode == 0


# --- the first start, and the next ones ---

def test_first_start_makes_the_environment_and_passes_all_on(installed: Any) -> None:
    root, first = installed
    assert first.returncode == 7, first.stderr
    told = answer(first)
    assert Path(told["prefix"]) == root / ".venv"
    assert told["argv"] == ["echo", "two words", "学习", "--x=*", "7"]
    assert told["dep"] == "1.5"
    assert "Making the environment" in first.stderr
    assert "darkroom" in first.stderr.split("Installing what")[1]        # pip's own progress
    assert len(first.stdout.splitlines()) == 1                          # stdout is for answers
    assert stamp(root) | {"wanted": ""} == {
        "state": "ready", "wanted": "", "python": HERE_PYTHON,
        "extras": [], "versions": "locked", "torch_index": "", "root": os.path.realpath(root)}


def test_second_start_only_starts(checkout: Path, wheels: Path) -> None:
    done = start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "3")
    assert (done.returncode, done.stderr) == (3, "")
    inside = subprocess.run([environment.python_of(checkout / ".venv"), "launcher.py", "4"],
                            env=surroundings(wheels), cwd=checkout, capture_output=True)
    assert (inside.returncode, inside.stderr) == (4, b"")


def test_extras_add_up(checkout: Path, wheels: Path) -> None:
    done = start(checkout, surroundings(wheels), "setup", "--test")
    assert done.returncode == 0, done.stderr
    assert (site(checkout) / "darkroom_extra.py").exists()
    assert stamp(checkout)["extras"] == ["test"]
    again = start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "test", "5")
    assert (again.returncode, again.stderr) == (0, "")                  # 5 is for pytest
    plain = start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "0")
    assert (plain.returncode, plain.stderr) == (0, "")


def test_changed_requirements_are_installed(checkout: Path, wheels: Path) -> None:
    extras = stamp(checkout)["extras"]
    text = PYPROJECT.replace("[project.optional", "[tool.x]\n[project.optional")
    (checkout / "pyproject.toml").write_text(text.replace("\n", "\r\n"), "utf-8", newline="")
    done = start(checkout, surroundings(wheels), "0")
    assert done.returncode == 0
    assert "Installed in" in done.stderr
    assert stamp(checkout)["extras"] == extras
    (checkout / "pyproject.toml").write_text(text, "utf-8")             # line ends are no change
    assert start(checkout, surroundings(wheels), "0").stderr == ""


# --- the lock, and ways around it ---

def own_index(folder: Path, **versions: str) -> str:
    """The address of a package index with these wheels, each of other bytes than make_wheel's."""
    for name, version in versions.items():
        page = folder / name / "index.html"
        wheel = make_wheel(page.parent, name, version, {"built.txt": "by another"})
        page.write_text(f"<!DOCTYPE html><a href='{wheel.name}'>{wheel.name}</a>", "utf-8")
    return folder.as_uri()


def version_of(root: Path, name: str) -> str:
    return (site(root) / f"{name}.py").read_text().split('"')[1]


def test_newest_is_taken_on_ones_word_and_left_again(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    make_wheel(tmp_path / "more", "darkroom_dep", "1.9")
    env = surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {tmp_path / 'more'}")
    away = surroundings(wheels, PIP_FIND_LINKS="/nowhere")
    assert start(root, env, "0").returncode == 0
    assert version_of(root, "darkroom_dep") == "1.5"            # though 1.9 is there
    newest = start(root, env, "setup", "--newest", "--test")
    assert newest.returncode == 0, newest.stderr
    assert messages.tr("installing_newest", tool="pip") in newest.stderr
    assert version_of(root, "darkroom_dep") == "1.9"
    assert (stamp(root)["versions"], stamp(root)["extras"]) == ("newest", ["test"])
    assert start(root, away, "0").stderr == ""                  # and stays, without asking again
    (root / "pyproject.toml").write_text(PYPROJECT + "\n", "utf-8")
    make_wheel(tmp_path / "more", "darkroom_dep", "1.10")
    assert start(root, env, "0").returncode == 0
    assert version_of(root, "darkroom_dep") == "1.10"           # newest also after an update
    back = start(root, env, "setup")
    assert back.returncode == 0, back.stderr
    assert version_of(root, "darkroom_dep") == "1.5"
    assert stamp(root)["versions"] == "locked"


def test_an_environment_of_before_the_lock_moves_over_with_one_sentence(
        checkout: Path, tmp_path: Path, wheels: Path) -> None:
    make_wheel(tmp_path / "old", "darkroom_dep", "1.3")
    python = environment.python_of(checkout / ".venv")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "darkroom-dep==1.3"], check=True,
                   env=surroundings(wheels, PIP_FIND_LINKS=str(tmp_path / "old")))
    path = checkout / ".venv" / "darkroom.json"
    old = {key: value for key, value in stamp(checkout).items()
           if key not in ("wanted", "versions")}
    path.write_text(json.dumps(old | {"pyproject": "0" * 64}), "utf-8")
    done = start(checkout, surroundings(wheels), "0")
    assert done.returncode == 0, done.stderr
    assert answer(done)["dep"] == "1.5"
    assert done.stderr.startswith(messages.tr("updating", tool="pip"))
    assert messages.tr("installing", tool="pip") not in done.stderr
    assert start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "0").stderr == ""


def test_a_changed_package_is_refused(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    wheel = make_wheel(tmp_path / "more", *DEP, {"more.py": "evil = True\n"})
    done = start(root, surroundings(wheels, PIP_FIND_LINKS=str(wheel.parent)), "0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == messages.tr(
        "failed_hash", package="darkroom-dep==1.5", file=wheel.as_uri())
    assert not (site(root) / "more.py").exists()
    assert start(root, surroundings(wheels), "0").returncode == 0


@pytest.mark.parametrize("reason", ["the folder is of another day", "a constraint of one's own"])
def test_where_the_lock_cannot_be_had_the_ranges_are_taken(tmp_path: Path, wheels: Path,
                                                           reason: str) -> None:
    root = make_checkout(tmp_path / "c")
    make_wheel(tmp_path / "offline", "darkroom_dep", "1.4")
    env = surroundings(wheels, PIP_FIND_LINKS=str(tmp_path / "offline"))
    if "constraint" in reason:
        (tmp_path / "constraints.txt").write_text("darkroom-dep<1.5\n")
        env = surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {tmp_path / 'offline'}",
                           PIP_CONSTRAINT=str(tmp_path / "constraints.txt"))
    done = start(root, env, "0")
    assert done.returncode == 0, done.stderr
    assert messages.tr("lock_lacking", package="darkroom-dep==1.5") in done.stderr
    assert version_of(root, "darkroom_dep") == "1.4"
    assert stamp(root)["versions"] == "ranges"
    assert start(root, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "0").stderr == ""
    assert start(root, surroundings(wheels), "setup").returncode == 0
    assert version_of(root, "darkroom_dep") == "1.5"


def test_a_lock_that_lacks_what_pyproject_asks_for_is_told(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    lock(root, base=[], test=[])
    done = start(root, surroundings(wheels), "0")
    assert done.returncode == 0, done.stderr
    assert messages.tr("lock_behind") in done.stderr
    assert (version_of(root, "darkroom_dep"), stamp(root)["versions"]) == ("1.5", "ranges")


def test_the_lock_of_other_requirements_is_not_installed(tmp_path: Path, wheels: Path) -> None:
    """pyproject.toml was changed, not the lock: told, and what it asks for is installed."""
    root = make_checkout(tmp_path / "c")
    make_wheel(tmp_path / "more", "darkroom_dep", "1.9")
    text = PYPROJECT.replace("darkroom-dep>=1.2", "darkroom-dep>=1.3")
    (root / "pyproject.toml").write_text(text, "utf-8")
    env = surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {tmp_path / 'more'}")
    done = start(root, env, "0")
    assert done.returncode == 0, done.stderr
    assert messages.tr("lock_behind") in done.stderr
    assert (version_of(root, "darkroom_dep"), stamp(root)["versions"]) == ("1.9", "ranges")


@pytest.mark.parametrize(("change", "same"), [
    (("darkroom-dep>=1.2", "darkroom-dep>=1.3"), False), (("darkroom-extra", "other"), False),
    (("test = [", "more = ["), False),
    (('darkroom-dep>=1.2",', 'darkroom-dep>=1.2",   # why'), True),
    (("[project]", "[tool.x]\nlines = [\n]\n[project]"), True), (("\n", "\r\n"), True)])
def test_requirements_are_told_apart_from_all_else(tmp_path: Path, change: tuple[str, str],
                                                   same: bool) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT, "utf-8")
    before = environment.asked_for(tmp_path)
    (tmp_path / "pyproject.toml").write_bytes(PYPROJECT.replace(*change).encode())
    assert (environment.asked_for(tmp_path) == before) is same


TORCH = ("torch", "2.14.1"), ("torchvision", "0.29.1")
CUDA = "cuda: Optional[str] = {!r}\nhip: Optional[str] = {!r}\n"


def checkout_with_torch(root: Path) -> Path:
    make_checkout(root)
    text = PYPROJECT.replace("darkroom-dep>=1.2", 'torch>=2.7,<3",\n    "darkroom-dep>=1.2')
    (root / "pyproject.toml").write_text(text, "utf-8")
    lock(root, base=[DEP], torch=[*TORCH])
    return root


def torch_of(root: Path) -> list[str]:
    return [f"{name}=={version}" for name in ("torch", "torchvision")
            if (version := environment.installed_version(root / ".venv", name))]


def test_torch_of_another_index_has_its_own_hashes(tmp_path: Path, wheels: Path) -> None:
    root = checkout_with_torch(tmp_path / "c")
    index = own_index(tmp_path / "cu126", torch="2.14.1+cu126", torchvision="0.29.1+cu126")
    env = surroundings(wheels, DARKROOM_TORCH_INDEX=index)
    del env["PIP_NO_INDEX"]
    env["PIP_INDEX_URL"] = own_index(tmp_path / "empty")
    done = start(root, env, "0")
    assert done.returncode == 0, done.stderr
    assert torch_of(root) == ["torch==2.14.1+cu126", "torchvision==0.29.1+cu126"]
    assert (version_of(root, "darkroom_dep"), stamp(root)["versions"]) == ("1.5", "locked")


def test_an_index_without_the_locked_torch_gives_its_newest(tmp_path: Path, wheels: Path) -> None:
    root = checkout_with_torch(tmp_path / "c")
    index = own_index(tmp_path / "cu126", torch="2.9.0+cu126")
    env = surroundings(wheels, DARKROOM_TORCH_INDEX=index)
    del env["PIP_NO_INDEX"]
    env["PIP_INDEX_URL"] = own_index(tmp_path / "empty")
    done = start(root, env, "0")
    assert done.returncode == 0, done.stderr
    assert messages.tr("torch_lacking", index=index,
                         versions="torch==2.14.1 torchvision==0.29.1") in done.stderr
    assert torch_of(root) == ["torch==2.9.0+cu126"]
    assert stamp(root)["versions"] == "locked"                  # all else is


@pytest.mark.parametrize("where", ["a folder", "an index"])
def test_a_build_of_torch_of_ones_own_is_taken_and_told(tmp_path: Path, wheels: Path,
                                                        where: str) -> None:
    """pip would pass over it in silence, since its hash is not the lock's."""
    root = checkout_with_torch(tmp_path / "c")
    for name, version in TORCH:
        make_wheel(tmp_path / "own", name, version + "+cpu", {"built.txt": "here"})
        make_wheel(tmp_path / "pypi", name, version)
    env = surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {tmp_path / 'own'} {tmp_path / 'pypi'}")
    if where == "an index":
        own = own_index(tmp_path / "nexus", torch="2.14.1+cpu", torchvision="0.29.1+cpu")
        env = surroundings(wheels, PIP_INDEX_URL=own_index(tmp_path / "empty"),
                           PIP_EXTRA_INDEX_URL=own,
                           PIP_FIND_LINKS=f"{wheels} {tmp_path / 'pypi'}")
        del env["PIP_NO_INDEX"]
    done = start(root, env, "0")
    assert done.returncode == 0, done.stderr
    assert messages.tr("torch_build", build="2.14.1+cpu") in done.stderr
    assert torch_of(root) == ["torch==2.14.1+cpu", "torchvision==0.29.1+cpu"]
    assert stamp(root)["versions"] == "locked"


def test_a_changed_torch_of_the_locked_name_is_refused(tmp_path: Path, wheels: Path) -> None:
    root = checkout_with_torch(tmp_path / "c")
    for name, version in TORCH:
        make_wheel(tmp_path / "own", name, version, {"built.txt": "here"})
    env = surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {tmp_path / 'own'}")
    done = start(root, env, "0")
    assert done.returncode == 1
    assert "torch==2.14.1 is not the file that LoRA Darkroom was tested with" in done.stderr
    assert torch_of(root) == []


def test_an_update_keeps_the_kind_of_torch(tmp_path: Path, wheels: Path) -> None:
    """Of an index that was named once. PyPI's would end a CPU's or an AMD card's environment."""
    root = checkout_with_torch(tmp_path / "c")
    env = surroundings(wheels, PIP_INDEX_URL=own_index(tmp_path / "empty"))
    del env["PIP_NO_INDEX"]
    index = own_index(tmp_path / "rocm", torch="2.14.1+rocm7.1", torchvision="0.29.1+rocm7.1")
    assert start(root, env | {"DARKROOM_TORCH_INDEX": index}, "0").returncode == 0
    make_wheel(tmp_path / "pypi", "torch", "2.15.0")
    own_index(tmp_path / "rocm", torch="2.15.0+rocm7.1", torchvision="0.30.0+rocm7.1")
    lock(root, base=[DEP], torch=[("torch", "2.15.0"), ("torchvision", "0.30.0")])
    (tmp_path / "bin").mkdir()                          # also beside a card that it can't use
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho '8.6, 591.44'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    done = start(root, env | {"PIP_FIND_LINKS": f"{wheels} {tmp_path / 'pypi'}"}, "0")
    assert done.returncode == 0, done.stderr
    assert messages.tr("torch_from", index=index) in done.stderr
    assert torch_of(root) == ["torch==2.15.0+rocm7.1", "torchvision==0.30.0+rocm7.1"]
    site_ = site(root)
    (site_ / "torch").mkdir()
    (site_ / "torch" / "version.py").write_text(CUDA.format(None, None))
    repaired = start(root, env, "repair")
    assert (repaired.returncode, repaired.stderr.splitlines()[-1]) == (0, messages.tr("sound"))


def test_a_torch_of_unknown_source_is_kept_and_told(tmp_path: Path, wheels: Path) -> None:
    root = checkout_with_torch(tmp_path / "c")
    env = surroundings(wheels, PIP_INDEX_URL=own_index(tmp_path / "empty"))
    del env["PIP_NO_INDEX"]
    index = own_index(tmp_path / "once", torch="2.13.0+git12")
    assert start(root, env | {"DARKROOM_TORCH_INDEX": index}, "0").returncode == 0
    for name, version in TORCH:
        make_wheel(tmp_path / "pypi", name, version)
    (root / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + "\n")
    done = start(root, env | {"DARKROOM_TORCH_INDEX": "",
                              "PIP_FIND_LINKS": f"{wheels} {tmp_path / 'pypi'}"}, "0")
    assert done.returncode == 0, done.stderr
    assert messages.tr("torch_kept", version="2.13.0+git12") in done.stderr
    assert torch_of(root) == ["torch==2.13.0+git12"]


def test_an_index_without_any_torch_is_named(tmp_path: Path, wheels: Path) -> None:
    root = checkout_with_torch(tmp_path / "c")
    index = own_index(tmp_path / "wrong")
    env = surroundings(wheels, DARKROOM_TORCH_INDEX=index)
    del env["PIP_NO_INDEX"]
    done = start(root, env, "0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == messages.tr("torch_nowhere", index=index)


def test_newest_keeps_the_cards_own_torch(tmp_path: Path, wheels: Path) -> None:
    root = checkout_with_torch(tmp_path / "c")
    index = own_index(tmp_path / "cu126", torch="2.9.0+cu126")
    env = surroundings(wheels, DARKROOM_TORCH_INDEX=index,
                       PIP_INDEX_URL=own_index(tmp_path / "other", torch="2.20.0"))
    del env["PIP_NO_INDEX"]
    assert start(root, env, "0").returncode == 0
    backend = root / "backend/backend.py"
    backend.write_text(BACKEND.replace("Requires-Dist: darkroom-dep>=1.2",
                                       "Requires-Dist: torch>=2.7"), "utf-8")
    done = start(root, env, "setup", "--newest")
    assert done.returncode == 0, done.stderr
    assert torch_of(root) == ["torch==2.9.0+cu126"]


def test_repair_compares_with_the_lock(checkout: Path, tmp_path: Path, wheels: Path) -> None:
    wheel = make_wheel(tmp_path / "more", *DEP, {"more.py": "evil = True\n"})
    (site(checkout) / "darkroom_dep.py").write_text('VERSION = "edited"\n')
    done = start(checkout, surroundings(wheels, PIP_FIND_LINKS=str(wheel.parent)), "repair")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == messages.tr(
        "failed_hash", package="darkroom-dep==1.5", file=wheel.as_uri())
    (site(checkout) / "darkroom_dep.py").write_text('VERSION = "1.5"\n')


@pytest.mark.parametrize("versions", ["newest", "ranges"])
def test_repair_keeps_the_versions_that_are_there(tmp_path: Path, wheels: Path, versions: str
                                                  ) -> None:
    root, folder = make_checkout(tmp_path / "c"), tmp_path / "more"
    make_wheel(folder, "darkroom_dep", "1.4")
    make_wheel(folder, *EXTRA)
    env = surroundings(wheels, PIP_FIND_LINKS=str(folder))
    command = ["setup", "--test", *(["--newest"] if versions == "newest" else [])]
    assert start(root, env, *command).returncode == 0
    before = stamp(root)
    assert before["versions"] == versions
    make_wheel(folder, "darkroom_extra", "9.0")
    make_wheel(folder, *DEP)
    (site(root) / "darkroom_dep.py").write_text("broken")
    done = start(root, env, "repair")
    assert done.returncode == 0, done.stderr
    assert messages.tr("continuing") not in done.stderr
    assert (version_of(root, "darkroom_dep"), version_of(root, "darkroom_extra")) == ("1.4", "2.0")
    assert stamp(root) == before


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for nvidia-smi")
def test_repair_finds_a_torch_for_the_card_where_the_locked_is_not(tmp_path: Path, wheels: Path
                                                                   ) -> None:
    root = checkout_with_torch(tmp_path / "c")
    for name, version in TORCH:
        make_wheel(tmp_path / "pypi", name, version)
    built = {"torch/version.py": CUDA.format("13.0", None)}
    wheel = make_wheel(tmp_path / "pypi", *TORCH[0], built)
    lock(root, base=[DEP], torch=[(*TORCH[0], built), TORCH[1]])
    env = surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {wheel.parent}")
    assert start(root, env, "0").returncode == 0
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '6.1, 580.65.06'\n")
    smi.chmod(0o755)
    index = own_index(tmp_path / "cu126", torch="2.9.0+cu126")
    old = {"PATH": f"{smi.parent}{os.pathsep}{env['PATH']}", "PIP_FIND_LINKS": str(wheels)}
    failed = start(root, env | old, "repair")           # no other torch is to be had
    assert failed.returncode == 1
    assert messages.tr("found_torch") in failed.stderr
    assert messages.tr("mended") not in failed.stderr
    online = {k: v for k, v in env.items() if k != "PIP_NO_INDEX"} | old
    before = f"import environment; environment.TORCH_CUDA_OLD = {index!r}"
    done = start(root, online, "repair", before=f"sys.path.insert(0, {str(root / 'build')!r}); "
                                                + before)
    assert done.returncode == 0, done.stderr
    assert torch_of(root)[0] == "torch==2.9.0+cu126"
    assert messages.tr("torch_lacking", index=index,
                       versions="torch==2.14.1 torchvision==0.29.1") in done.stderr


def test_an_update_that_cannot_be_fetched_does_not_stop_what_ran(tmp_path: Path, wheels: Path
                                                                 ) -> None:
    root, away = make_checkout(tmp_path / "c"), surroundings(wheels, PIP_FIND_LINKS="/nowhere")
    assert start(root, surroundings(wheels), "0").returncode == 0
    (root / "backend" / "backend.py").write_text(BACKEND.replace("darkroom-dep>", "nothing-yet>"))
    newest = start(root, away, "setup", "--newest")
    assert newest.returncode == 1                       # asked for, and not to be had
    assert start(root, away, "3").returncode == 3       # but nothing was taken away
    lock(root, base=[("darkroom_dep", "1.6")], test=[])
    (root / "build" / "lock" / "build.txt").write_text("pip==99\n    --hash=sha256:" + "0" * 64)
    (root / "pyproject.toml").write_text(PYPROJECT + "\n# changed\n", "utf-8")
    done = start(root, away, "4")
    assert done.returncode == 4
    assert done.stderr.strip().splitlines()[-1] == messages.tr("update_later")
    assert answer(done)["dep"] == "1.5"
    assert start(root, away, "5").stderr == ""          # told once
    assert start(root, away, "setup").returncode == 1   # and tried again on one's word


def test_a_folder_without_pip_itself_keeps_the_lock(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    lock(root, base=[DEP], build=[("darkroom_tool", "3.0")])
    make_wheel(tmp_path / "more", "darkroom_dep", "1.9")
    done = start(root, surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {tmp_path / 'more'}"), "0")
    assert done.returncode == 0, done.stderr
    assert (version_of(root, "darkroom_dep"), stamp(root)["versions"]) == ("1.5", "locked")


def test_settings_of_pip_that_lead_elsewhere_are_overruled(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    away = {f"PIP_{name}": str(tmp_path / name) for name in ("TARGET", "PREFIX", "ROOT")}
    env = surroundings(wheels, PIP_DRY_RUN="1", PIP_REQUIRE_HASHES="1", PIP_USER="1",
                       PIP_NO_DEPS="1", **away)
    done = start(root, env, "3")
    assert done.returncode == 3, done.stderr
    assert stamp(root)["versions"] == "locked"
    newest = start(root, env, "setup", "--newest", "--test")
    assert newest.returncode == 0, newest.stderr
    assert version_of(root, "darkroom_extra") == "2.0"
    assert not [name for name in away if Path(away[name]).exists()]


@pytest.mark.parametrize("lines", [
    ["user = true"], ["target = {away}"], ["prefix = {away}", "no-deps = true"],
    ["require-hashes = true", "dry-run = true", "root = {away}"],
    ["platform = win_amd64", "python = /usr/bin/false"]])
def test_files_of_pip_that_lead_elsewhere_are_overruled(tmp_path: Path, wheels: Path,
                                                        lines: list[str]) -> None:
    """Where its packages come from still counts."""
    root = make_checkout(tmp_path / "c")
    text = "\n".join(["[global]", "no-index = true", f"find-links =\n    {wheels}", "[install]",
                      *lines]).format(away=tmp_path / "away")
    (tmp_path / "pip.conf").write_text(text)
    env = surroundings(wheels, PIP_CONFIG_FILE=str(tmp_path / "pip.conf"), PIP_PYTHON="/nowhere",
                       PIP_PLATFORM="win_amd64", PIP_REQUIREMENT=str(tmp_path / "none.txt"))
    del env["PIP_FIND_LINKS"], env["PIP_NO_INDEX"]
    done = start(root, env, "3")
    assert done.returncode == 3, done.stderr
    assert version_of(root, "darkroom_dep") == "1.5"
    assert not (tmp_path / "away").exists()


def test_another_pythons_packages_dont_count_as_installed(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    info = tmp_path / "other" / "darkroom_dep-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: darkroom_dep\nVersion: 1.5\n")
    (tmp_path / "other" / "darkroom_dep.py").write_text("raise ImportError('of another Python')")
    for _ in range(2):
        done = start(root, surroundings(wheels, PYTHONPATH=str(tmp_path / "other")), "3")
        assert done.returncode == 3, done.stderr
    assert version_of(root, "darkroom_dep") == "1.5"
    assert done.stderr == ""                            # nothing is installed twice


def test_it_is_ready_when_all_is_there(tmp_path: Path, wheels: Path) -> None:
    """Not when the installer says so."""
    root = make_checkout(tmp_path / "c")
    install = root / "build" / "install.py"
    install.write_text(install.read_text("utf-8").replace(
        "def run(root", "def run(*_): pass\ndef really_run(root"), "utf-8")
    done = start(root, surroundings(wheels), "3")
    assert done.returncode == 1
    assert messages.tr("not_there", path=root / ".venv") in done.stderr
    assert "Installed in" not in done.stderr
    assert stamp(root)["state"] == "installing"


@pytest.mark.parametrize("given", [["--help"], ["--new"], ["--app", "--test"], ["--nonsense"]])
def test_a_setup_that_is_not_understood_installs_nothing(checkout: Path, wheels: Path,
                                                         given: list[str]) -> None:
    before = stamp(checkout) | {"versions": "newest"}
    (checkout / ".venv" / "darkroom.json").write_text(json.dumps(before), "utf-8")
    start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "setup", *given)
    assert stamp(checkout) == before
    parser = subprocess.run([sys.executable, REAL / "launcher.py", "setup", *given],
                            env=os.environ | {"DARKROOM_RESTARTED": str(REAL / ".venv")},
                            capture_output=True)
    assert parser.returncode == (0 if given == ["--help"] else 2)


def test_a_stamp_that_cannot_be_written_is_a_sentence(checkout: Path, wheels: Path) -> None:
    (checkout / ".venv" / "darkroom.tmp").mkdir()
    done = start(checkout, surroundings(wheels), "setup", "--newest")
    (checkout / ".venv" / "darkroom.tmp").rmdir()
    assert (done.returncode, one_sentence(done)) == (1, messages.tr("failed_rights",
                                                                    path=checkout))


def test_newest_in_an_environment_of_ones_own_is_told(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    own_dependencies(root, "pytest>=8", "x")
    done = start(root, surroundings(wheels), "setup", "--newest")
    assert done.returncode == 2
    assert one_sentence(done) == messages.tr("newest_own", python=sys.executable)
    venv(root)                                          # also where there is one that isn't used
    assert start(root, surroundings(wheels), "setup", "--newest").returncode == 2


# --- interrupted, broken, moved ---

@pytest.mark.skipif(os.name == "nt", reason="Ctrl+C of a process group needs POSIX")
@pytest.mark.parametrize(("number", "parent"), [(signal.SIGINT, "default_sigint"),
                                                (signal.SIGTERM, "ignored_sigint")])
def test_ctrl_c_while_installing_and_the_next_start_goes_on(
        checkout: Path, wheels: Path, number: int, parent: str,
        request: pytest.FixtureRequest) -> None:
    """Ctrl+C reaches the installer too; a SIGTERM, the launcher alone."""
    request.getfixturevalue(parent)
    path = checkout / ".venv" / "darkroom.json"
    path.write_text(json.dumps(stamp(checkout) | {"wanted": "old"}), "utf-8")
    process = subprocess.Popen(
        [sys.executable, checkout / "launcher.py", "0"], start_new_session=True, text=True,
        env=surroundings(wheels, SLOW_BUILD="1"), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_until((checkout / "building").exists)
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert psutil.wait_procs(children[:1], timeout=10)[1] == []         # pip ended with it
    (checkout / "building").unlink()
    assert process.returncode == 130, said
    assert said.strip().endswith("and the installation goes on.")
    assert "Traceback" not in said.split("Interrupted.")[1]
    assert stamp(checkout)["state"] == "installing"
    done = start(checkout, surroundings(wheels), "0")
    assert done.returncode == 0, done.stderr
    assert "it goes on now" in done.stderr
    assert stamp(checkout)["state"] == "ready"


@pytest.mark.skipif(os.name == "nt", reason="process groups")
def test_a_killed_pip_is_gone_on_with(checkout: Path, tmp_path: Path, wheels: Path) -> None:
    """Killed while it unpacks a package: half its files are there, and no list of them."""
    files = {f"darkroom_big/{n}.txt": str(n) for n in range(4000)}
    make_wheel(tmp_path / "more", "darkroom_big", "1.0", files)
    env = surroundings(wheels, PIP_FIND_LINKS=f"{wheels} {tmp_path / 'more'}")
    lock(checkout, base=[DEP, ("darkroom_big", "1.0", files)])
    process = subprocess.Popen([sys.executable, checkout / "launcher.py", "0"], env=env,
                               start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        wait_until((site(checkout) / "darkroom_big" / "9.txt").exists, step=0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list((site(checkout) / "darkroom_big").iterdir())) < 4000
        done = start(checkout, env, "0")
        assert done.returncode == 0, done.stderr
        assert "it goes on now" in done.stderr
        assert len(list((site(checkout) / "darkroom_big").iterdir())) == 4000
        assert not repair.broken(checkout / ".venv")
    finally:
        process.kill()


# --- repair ---

def test_repair_mends_what_is_broken_and_only_that(checkout: Path, wheels: Path) -> None:
    site_ = site(checkout)
    whole = start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "repair")
    assert (whole.returncode, whole.stdout) == (0, "")
    assert whole.stderr.splitlines()[-1] == "All packages are whole."
    pip_before = {path: path.stat().st_mtime_ns for path in (site_ / "pip").rglob("*.py")}
    (site_ / "darkroom_dep.py").write_text('VERSION = "9.9"\n')
    (site_ / "~arkroom_dep").mkdir()
    (site_ / "fake_darkroom-1.0.dist-info" / "INSTALLER").unlink()
    (checkout / "my.txt").write_text("mine")
    done = start(checkout, surroundings(wheels), "repair")
    assert done.returncode == 0, done.stderr
    assert "darkroom_dep 1.5 is damaged: darkroom_dep.py" in done.stderr
    assert "fake_darkroom 1.0 was never fully installed" in done.stderr
    assert done.stderr.splitlines()[-1] == "Mended: all packages are whole again."
    assert (site_ / "darkroom_dep.py").read_text() == 'VERSION = "1.5"\n'
    assert not (site_ / "~arkroom_dep").exists()
    assert {path: path.stat().st_mtime_ns for path in (site_ / "pip").rglob("*.py")} == pip_before
    assert (checkout / "my.txt").read_text() == "mine"


def test_repair_that_gets_no_packages_leaves_what_works(checkout: Path, wheels: Path) -> None:
    (site(checkout) / "darkroom_dep.py").write_text('VERSION = "edited"\n')
    done = start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "repair")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == messages.tr(
        "failed_lacking", package="darkroom-dep==1.5")
    assert start(checkout, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "3").returncode == 3
    (site(checkout) / "darkroom_dep.py").write_text('VERSION = "1.5"\n')


def test_an_environment_of_ones_own_is_only_told_about(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    own_dependencies(root, "pytest>=8", "x")
    folder = tmp_path / "own" / "lib" / "python3.11" / "site-packages" / "a_b-1.0.dist-info"
    folder.mkdir(parents=True)
    done = start(root, surroundings(wheels), "repair",
                 before=f"sys.prefix = {str(tmp_path)!r} + '/own'")
    assert done.returncode == 1
    assert "a_b==1.0" in done.stderr.splitlines()[-1]
    assert folder.exists()
    assert not (root / ".venv").exists()


def installed_package(site_: Path, name: str, rows: str = "", installer: bool = True) -> Path:
    info = site_ / f"{name}.dist-info"
    info.mkdir(parents=True)
    (info / "RECORD").write_text(rows or f"{name}.dist-info/RECORD,,\n")
    if installer:
        (info / "INSTALLER").write_text("pip\n")
    return info


@pytest.mark.parametrize(("rows", "why"), [
    ("a.py,sha256=ypeBEsobvcr6wjGzmiPcTaeG7_gUfE5yuYB3ha_uSLs,1\n", ""),
    ("a.py,sha256=ypeBEsobvcr6wjGzmiPcTaeG7_gUfE5yuYB3ha_uSLs,2\n", "file"),
    ("a.py,sha256=xpeBEsobvcr6wjGzmiPcTaeG7_gUfE5yuYB3ha_uSLs,1\n", "file"),
    ("gone.py,sha256=ypeBEsobvcr6wjGzmiPcTaeG7_gUfE5yuYB3ha_uSLs,1\n", "file"),
    ("gone.pyc,,\n", ""), ("a.py,unknown=xx,1\n", ""), ("half a row\n", "record"),
    ('"a,b.py",,\n', ""), ("\0\n", "record"), ("\n", "record")])
def test_files_are_compared_with_their_record(tmp_path: Path, rows: str, why: str) -> None:
    site_ = tmp_path / "lib" / "python3.11" / "site-packages"
    info = installed_package(site_, "x-1.0", rows)
    (site_ / "a.py").write_text("a")
    assert [one.why for one in repair.broken(tmp_path)] == ([why] if why else [])
    (info / "INSTALLER").unlink()
    assert [one.why for one in repair.broken(tmp_path)] == ["half"]


def test_two_versions_of_one_package_are_both_in_the_way(tmp_path: Path) -> None:
    site_ = tmp_path / "Lib" / "site-packages"
    for name in ("My_Pack-1.0", "my_pack-2.0", "other-1.0"):
        installed_package(site_, name)
    found = repair.broken(tmp_path)
    assert {one.version for one in found} == {"1.0", "2.0"}
    assert {one.why for one in found} == {"double"}
    repair.clear_away(tmp_path, found)
    assert [path.name for path in site_.iterdir()] == ["other-1.0.dist-info"]


@pytest.mark.parametrize(("cards", "built", "hip", "unfit"), [
    ([], None, None, False), ([(8.6, 591.4)], "13.0", None, False),
    ([(8.6, 591.4)], None, None, True),
    ([(6.1, 591.4)], "13.0", None, True), ([(6.1, 591.4)], "12.6", None, False),
    ([(8.9, 551.8)], "13.0", None, True), ([(12.0, 591.4)], "12.6", None, True),
    ([(12.0, 591.4)], "12.8", None, False), ([(8.6, 591.4)], None, "6.4", False)])
def test_a_torch_that_does_not_fit_the_card(tmp_path: Path, cards: list[tuple[float, float]],
                                            built: str | None, hip: str | None, unfit: bool,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DARKROOM_TORCH_INDEX", raising=False)
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text(CUDA.format(built, hip))
    assert repair.unfit_torch(tmp_path, cards) is unfit


@pytest.mark.parametrize(("version", "index"), [
    ("2.14.1", ""), ("2.9.1+cu126", environment.TORCH_CUDA_OLD), ("2.9.1+git1234", ""),
    ("2.9.1+cpu", "https://download.pytorch.org/whl/cpu")])
def test_a_damaged_torch_comes_from_where_it_came(version: str, index: str) -> None:
    assert repair.torch_source(version) == index


def wait_until(happened: Any, seconds: float = 60, step: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(step)


def test_copied_checkout_gets_its_own_once_by_two_starts(checkout: Path, tmp_path: Path,
                                                         wheels: Path) -> None:
    copy = tmp_path / "copy 副本"
    shutil.copytree(checkout, copy, symlinks=True)
    both = [subprocess.Popen([sys.executable, copy / "launcher.py", "0"], text=True,
                             env=surroundings(wheels), stderr=subprocess.PIPE,
                             stdout=subprocess.PIPE) for _ in range(2)]
    told = [process.communicate(timeout=200) for process in both]
    said = [errors for _, errors in told]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("was made at another place" in text for text in said) == 1
    assert sum("Making the environment" in text for text in said) == 1
    assert sum("waiting for it" in text for text in said) == 1
    assert {json.loads(out)["prefix"] for out, _ in told} == {str(copy / ".venv")}
    assert not list(copy.glob(".venv-old*"))


def test_half_made_environment_is_rebuilt(tmp_path: Path) -> None:
    root = make_checkout(tmp_path / "c")
    venv(root)
    environment.write_stamp(root, {"state": "making", "python": HERE_PYTHON})
    assert bootstrap._why_anew(root) == "broken"
    environment.write_stamp(root, {"state": "made", "python": HERE_PYTHON})
    assert bootstrap._why_anew(root) == ""
    environment.write_stamp(root, {"state": "ready", "python": "3.0"})     # Python was exchanged
    assert bootstrap._why_anew(root) == "broken"
    environment.write_stamp(root, {"state": "ready", "python": HERE_PYTHON})
    python = environment.python_of(root / ".venv")
    python.unlink()
    python.symlink_to(root / "gone")                                    # or uninstalled
    assert bootstrap._why_anew(root) == "broken"


def test_file_in_the_way(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    (root / ".venv").write_text("mine")
    done = start(root, surroundings(wheels), "0")
    assert done.returncode == 2
    assert one_sentence(done) == (f"{root / '.venv'} is in the way: it should be a folder; "
                                  "move or delete it, then start again.")
    assert (root / ".venv").read_text() == "mine"


# --- environments of the user's own ---

def venv(root: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)


def own_dependencies(root: Path, base: str, extra: str) -> None:
    text = PYPROJECT.replace("darkroom-dep>=1.2", base).replace("darkroom-extra", extra)
    (root / "pyproject.toml").write_text(text, "utf-8")
    (root / "core/cli/console.py").write_text(CONSOLE.replace("import darkroom_dep", "").replace(
        "darkroom_dep.VERSION", "'none'"), "utf-8")


def test_active_environment_that_has_all_is_used(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    own_dependencies(root, "pytest>=8", "PyYAML>=6.0.2,<7")
    for command in ("6", "test"):
        done = start(root, surroundings(wheels), command)
        assert done.stderr == ""
        assert Path(answer(done)["prefix"]) == Path(sys.prefix)
    assert not (root / ".venv").exists()


def test_active_environment_without_the_tests_packages(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    own_dependencies(root, "pytest>=8", "darkroom-extra")
    assert start(root, surroundings(wheels), "0").returncode == 0
    done = start(root, surroundings(wheels), "test")
    assert done.returncode == 2
    assert "(darkroom-extra)" in one_sentence(done)
    assert not (root / ".venv").exists()


def test_environment_made_by_hand_is_used_offline(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c")
    venv(root)
    environment.write_stamp(root, {"state": "ready", "python": "3.0"})
    (root / ".venv/darkroom.json").unlink()
    with zipfile.ZipFile(next(wheels.glob("darkroom_dep*"))) as wheel:
        wheel.extractall(site(root))
    done = start(root, surroundings(wheels, PIP_FIND_LINKS="/nowhere"), "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(answer(done)["prefix"]) == root / ".venv"
    inside = subprocess.run([environment.python_of(root / ".venv"), root / "launcher.py", "4"],
                            env=surroundings(wheels), capture_output=True)
    assert (inside.returncode, inside.stderr) == (4, b"")


def test_missing_sees_names_and_versions(tmp_path: Path) -> None:
    root = make_checkout(tmp_path / "c")
    own_dependencies(root, 'pytest>=999", "no-such-thing", "PyYAML<1", "pytest>8,<999', "x-y-z")
    assert environment.missing(root) == ["pytest>=999", "no-such-thing", "PyYAML<1"]
    assert environment.missing(root, "test")[-1] == "x-y-z"


# --- sentences ---

def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    return lines[0]


def test_python_without_ensurepip(tmp_path: Path, wheels: Path) -> None:
    """Debian's Python without its python3.X-venv package."""
    root = make_checkout(tmp_path / "c")
    done = start(root, surroundings(wheels), "0", before="sys.modules['ensurepip'] = None")
    package = f"python{HERE_PYTHON}-venv"
    assert done.returncode == 2
    assert f"sudo apt install {package}" in one_sentence(done)
    assert not (root / ".venv").exists()


def old_pythons() -> list[str]:
    """Interpreters before 3.11 that are installed here and run."""
    found = []
    for minor in range(8, 11):
        name = f"python3.{minor}"
        for path in [shutil.which(name), *map(str, Path.home().glob(
                f".pyenv/versions/3.{minor}.*/bin/{name}"))]:
            if path and environment.version_of(path):
                found.append(path)
                break
    return found


@pytest.mark.parametrize("lang", ["en", "zh-CN"])
def test_too_old_python(tmp_path: Path, wheels: Path, lang: str) -> None:
    root = make_checkout(tmp_path / "c")
    env = surroundings(wheels, DARKROOM_LANG=lang)
    told = start(root, env, "0", before="sys.version_info = (3, 9, 1)")
    assert told.returncode == 2
    wanted = {"en": "needs Python 3.11 or newer, and this is Python 3.9",
              "zh-CN": "需要 Python 3.11"}
    assert wanted[lang] in one_sentence(told)
    for python in old_pythons() if lang == "en" else ():
        done = subprocess.run([python, root / "launcher.py", "demo"], env=env, text=True,
                              encoding="utf-8", capture_output=True)
        assert done.returncode == 2
        assert wanted[lang].split(",")[0] in one_sentence(done)
        helped = subprocess.run([python, root / "launcher.py", "--help"], env=env, text=True,
                                encoding="utf-8", capture_output=True)
        assert helped.returncode == 0
        assert "launcher.py demo" in helped.stdout
    assert not (root / ".venv").exists()


def test_old_python_uses_an_environment_that_is_there(checkout: Path, wheels: Path) -> None:
    for python in old_pythons():
        done = subprocess.run([python, checkout / "launcher.py", "4"], env=surroundings(wheels),
                              capture_output=True)
        assert (done.returncode, done.stderr) == (4, b"")


@pytest.mark.parametrize("name", ["launcher.py", "build/bootstrap.py", "build/environment.py",
                                  "build/install.py", "build/messages.py", "build/repair.py",
                                  "core/system/message_box.py",
                                  "core/system/surroundings.py"])
def test_old_pythons_can_read_it(name: str) -> None:
    tree = ast.parse((REAL / name).read_text("utf-8"), feature_version=(3, 8))
    assert not [node for node in ast.walk(tree) if type(node).__name__ == "Match"]
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    allowed = sys.stdlib_module_names | {"environment", "install", "messages", "repair", "core"}
    assert not [module for module in modules
                if module.startswith("core") and module not in ("core.system", "core")]
    assert not {module.split(".")[0] for module in modules} - allowed
    assert "tomllib" not in modules


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_before_the_install_installs_nothing(tmp_path: Path, wheels: Path, flag: str) -> None:
    root = make_checkout(tmp_path / "c")
    done = start(root, surroundings(wheels), flag)
    assert done.returncode == 0
    assert "LoRA Darkroom 1.0" in done.stdout
    assert not (root / ".venv").exists()


def test_failed_install_says_why_and_goes_on_later(checkout: Path, tmp_path: Path,
                                                   wheels: Path) -> None:
    """Of what the lock names and, where that is not to be had, of what pyproject.toml allows."""
    text = PYPROJECT.replace("darkroom-dep>=1.2", "darkroom-dep>=1.2\", \"darkroom-later")
    (checkout / "pyproject.toml").write_text(text, "utf-8")
    lock(checkout, base=[DEP, LATER])
    backend = checkout / "backend/backend.py"
    backend.write_text(BACKEND.replace("Requires-Dist: darkroom-dep>=1.2",
                                       "Requires-Dist: darkroom-later"), "utf-8")
    try:
        done = start(checkout, surroundings(wheels), "0")
        assert done.returncode == 1
        assert "What pip said last:" in done.stderr
        assert messages.tr("lock_lacking", package="darkroom-later==1.0") in done.stderr
        assert "  ERROR: No matching distribution found for darkroom-later" in done.stderr
        assert done.stderr.strip().splitlines()[-1] == messages.tr(
            "failed_lacking", package="darkroom-later")
        assert stamp(checkout)["state"] == "installing"
        make_wheel(tmp_path / "more", *LATER)
        both = f"{wheels} {tmp_path / 'more'}"
        again = start(checkout, surroundings(wheels, PIP_FIND_LINKS=both), "0")
        assert again.returncode == 0, again.stderr
        assert stamp(checkout)["versions"] == "locked"
    finally:
        backend.write_text(BACKEND, "utf-8")


PIP_MISMATCH = """\
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated ...
    torch==2.14.1 from https://x.org/torch-2.14.1%2Bcpu-cp311.whl (from -r torch.txt (line 1)):
        Expected sha256 00
        Expected     or 11
             Got        22
"""


@pytest.mark.parametrize(("said", "key", "words"), [
    ("OSError: [Errno 28] No space left on device", "failed_disk", {}),
    ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'",
     "failed_rights", {}),
    ("[WinError 5] Access is denied: 'C:\\\\x'", "failed_rights", {}),
    ("Failed to establish a new connection: [Errno -2] Name or service not known\n"
     "ERROR: No matching distribution found for x==1", "failed_network", {}),
    ("error: Request failed after 3 retries: dns error", "failed_network", {}),
    ("ReadTimeoutError: Read timed out.", "failed_network", {}),
    # a retry that helped
    ("WARNING: Retrying (...) after ReadTimeoutError: Read timed out.\n" + PIP_MISMATCH,
     "failed_hash", {"package": "torch==2.14.1",
                     "file": "https://x.org/torch-2.14.1+cpu-cp311.whl"}),
    ("WARNING: Retrying (...) after ReadTimeoutError: Read timed out.\nERROR: Could not find a "
     "version that satisfies the requirement x==2 (from versions: 1.0, 1.1)\n"
     "ERROR: No matching distribution found for x==2", "failed_lacking", {"package": "x==2"}),
    ("ERROR: Wheel 'torch' located at /tmp/torch-2.9.whl is invalid.", "failed_network", {}),
    ("error: subprocess-exited-with-error", "failed", {}),
    ("ERROR: Could not find a version that satisfies the requirement x==1 (from versions: none)\n"
     "ERROR: No matching distribution found for x==1", "failed_lacking", {"package": "x==1"}),
    ("ERROR: Cannot install x==2 and y==1 because these package versions have conflicting "
     "dependencies.", "failed_lacking", {"package": "x==2"}),
    ("Because there is no version of x==1 and you require x==1, ...", "failed_lacking",
     {"package": "x==1"}),
    (PIP_MISMATCH, "failed_hash", {"package": "torch==2.14.1",
                                   "file": "https://x.org/torch-2.14.1+cpu-cp311.whl"}),
    ("  Caused by: Hash mismatch for `x==1`", "failed_hash", {"package": "x==1", "file": "x==1"}),
])
def test_reasons_are_recognised(said: str, key: str, words: dict[str, str], tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    stop = install.failure(tmp_path, "pip", 1, ["line before", *said.splitlines()])
    assert str(stop) == messages.tr(key, **{"tool": "pip", "code": 1, "path": tmp_path} | words)
    assert stop.exit_code == 1
    assert f"  {said.splitlines()[-1]}" in capsys.readouterr().err


def test_texts_are_yaml_and_the_same_in_both_languages() -> None:
    english, chinese = (messages.texts(lang) for lang in ("en", "zh-CN"))
    assert english.keys() == chinese.keys()
    for lang, texts in (("en", english), ("zh-CN", chinese)):
        path = REAL / "core/strings" / lang / "bootstrap.yaml"
        assert yaml.safe_load(path.read_text("utf-8")) == texts


def test_every_text_is_there_and_used() -> None:
    source = "".join((REAL / name).read_text("utf-8") for name in (
        "launcher.py", "build/bootstrap.py", "build/install.py", "build/repair.py"))
    assert not [key for key in messages.texts("en") if f'"{key}"' not in source
                and f"'{key}'" not in source and not key.startswith("found_")]


# --- which torch ---

@pytest.mark.parametrize(("cards", "system", "index"), [
    ([], "nt", ""),
    ([], "posix", ""),
    ([(8.6, 591.44)], "nt", environment.TORCH_CUDA),
    ([(0.0, 0.0)], "nt", environment.TORCH_CUDA),               # nvcuda.dll, but no nvidia-smi
    ([(8.6, 591.44)], "posix", ""),                             # PyPI's has CUDA 13 there
    ([(6.1, 591.44)], "nt", environment.TORCH_CUDA_OLD),        # Pascal
    ([(6.1, 580.65)], "posix", environment.TORCH_CUDA_OLD),
    ([(8.9, 551.86)], "posix", environment.TORCH_CUDA_OLD),     # driver before CUDA 13
    ([(12.0, 572.16)], "nt", environment.TORCH_CUDA),           # Blackwell needs CUDA 12.8 on
])
def test_torch_for_the_card(monkeypatch: pytest.MonkeyPatch, cards: list[tuple[float, float]],
                            system: str, index: str) -> None:
    monkeypatch.delenv("DARKROOM_TORCH_INDEX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert environment.torch_index(cards, system) == index
    monkeypatch.setenv("DARKROOM_TORCH_INDEX", "")
    assert environment.torch_index(cards, system) == ""


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for nvidia-smi")
def test_cards_are_asked_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '8.6, 580.65.06'\necho '12.0, 580.65.06'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.nvidia_cards() == [(8.6, 580.65), (12.0, 580.65)]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert environment.nvidia_cards() == []


@pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in for nvidia-smi and uv")
def test_old_card_gets_its_torch_from_its_index_by_uv(tmp_path: Path, wheels: Path) -> None:
    """The card's index is asked for torch, and only for torch, after all else is there."""
    root = make_checkout(tmp_path / "c")
    own_dependencies(root, 'torch>=2.7,<3",   # heavy\n    "nothing-yet', "darkroom-extra")
    lock(root, torch=[("torch", "2.14.1"), ("torchvision", "0.29.1"), ("triton", "3")])
    tools, log = tmp_path / "bin", tmp_path / "uv.log"
    tools.mkdir()
    for name, line in (("nvidia-smi", "echo '6.1, 580.65.06'"), ("uv", f'echo "$@" >> "{log}"')):
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    env = surroundings(wheels)
    env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
    done = start(root, env, "0", before="sys.modules['ensurepip'] = None")  # uv needs no pip
    assert done.returncode == 0, done.stderr
    assert messages.tr("torch_from", index=environment.TORCH_CUDA_OLD) in done.stderr
    command = f"pip install --python {environment.python_of(root / '.venv')}"
    hashed = f"{command} --require-hashes --no-deps --requirement build/lock"
    assert log.read_text().splitlines() == [
        f"{hashed}/build.txt", f"{hashed}/base.txt",
        f"{command} --default-index {environment.TORCH_CUDA_OLD} torch==2.14.1 torchvision==0.29.1",
        f"{command} --no-deps -e .",        # isolated: there is no setuptools
        # this uv installed nothing, so that the lock seems not to hold what pyproject.toml asks for
        f"{command} --default-index {environment.TORCH_CUDA_OLD} torch>=2.7,<3",
        f"{command} -e ."]


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for uv")
def test_pip_steps_in_where_uv_fails_in_a_new_environment(tmp_path: Path, wheels: Path) -> None:
    """Made for uv it has no pip of its own yet."""
    root, uv = make_checkout(tmp_path / "c"), tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text("#!/bin/sh\necho 'error: no mirror known' >&2\nexit 2\n")
    uv.chmod(0o755)
    env = surroundings(wheels)
    done = start(root, env | {"PATH": f"{uv.parent}{os.pathsep}{env['PATH']}"}, "3")
    assert done.returncode == 3, done.stderr
    assert stamp(root)["versions"] == "locked"


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for uv")
def test_pip_steps_in_where_uv_fails(checkout: Path, tmp_path: Path, wheels: Path) -> None:
    path = checkout / ".venv" / "darkroom.json"
    path.write_text(json.dumps(stamp(checkout) | {"wanted": "old"}), "utf-8")
    (tmp_path / "uv").write_text("#!/bin/sh\necho 'error: no mirror known' >&2\nexit 2\n")
    (tmp_path / "uv").chmod(0o755)
    env = surroundings(wheels)
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    done = start(checkout, env, "0")
    assert done.returncode == 0, done.stderr
    assert "  error: no mirror known" in done.stderr
    assert "pip tries now" in done.stderr


def test_torch_lines_of_the_project() -> None:
    names = [line.split(">")[0] for line in environment.torch_lines(REAL)]
    assert names == ["torch", "torchvision"]


UV = shutil.which("uv", path=os.path.dirname(sys.executable)) or shutil.which("uv")


@pytest.mark.skipif(not UV, reason="uv is not installed here")
def test_real_uv(tmp_path: Path, wheels: Path) -> None:
    root = make_checkout(tmp_path / "c 学")
    (tmp_path / "bin").mkdir()
    shutil.copy(str(UV), tmp_path / "bin")
    env = surroundings(wheels, UV_NO_INDEX="1", UV_FIND_LINKS=str(wheels), UV_OFFLINE="1")
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    done = start(root, env, "3")
    assert done.returncode == 3, done.stderr
    assert answer(done)["dep"] == "1.5"
    assert stamp(root)["versions"] == "locked"
    assert not (site(root) / "pip").exists()
    assert stamp(root)["state"] == "ready"


# --- versions ---

releases = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(
    lambda parts: ".".join(map(str, parts)))


@given(found=releases, local=st.sampled_from(["", "+cu130", "+cpu"]),
       low=releases, high=releases)
def test_bounds_agree_with_packaging(found: str, local: str, low: str, high: str) -> None:
    name, limits = environment.parsed(f"some-thing[x]>={low},<{high} ; python_version > '3'")
    assert name == "some-thing"
    assert environment.within(found + local, limits) == SpecifierSet(
        f">={low},<{high}").contains(Version(found + local))


@given(st.text("0123456789.+abc -", max_size=20))
def test_numbers_never_fail(text: str) -> None:
    assert all(isinstance(n, int) for n in environment.numbers(text))
