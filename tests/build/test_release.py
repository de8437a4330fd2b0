"""build/release.py on real folders, and the workflows: every script and option they name exists."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build"))
release = importlib.import_module("release")
sys.path.remove(str(ROOT / "build"))

posix = pytest.mark.skipif(os.name == "nt", reason="links and rights of POSIX")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "my 图片" / "darkroom"
    (folder / "app" / "empty").mkdir(parents=True)
    (folder / "darkroom-cli").write_bytes(b"#!/bin/sh\n")
    (folder / "darkroom-cli").chmod(0o755)
    (folder / "app" / "lib.so.1").write_bytes(os.urandom(5000))
    (folder / "app" / "说明.txt").write_text("学习", "utf-8")
    if os.name != "nt":
        (folder / "app" / "lib.so").symlink_to("lib.so.1")
    return folder


def tree(folder: Path) -> dict[str, Any]:
    return {path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else
            (path.read_bytes(), path.stat().st_mode & stat.S_IXUSR) if path.is_file() else None
            for path in folder.rglob("*")}


@posix
@pytest.mark.parametrize(("largest", "parts"), [(2**20, 1), (1000, 6)])
def test_an_archive_gives_the_same_app_back(bundle: Path, tmp_path: Path, largest: int,
                                            parts: int) -> None:
    files = release.pack(bundle, tmp_path / "out", "x-linux", largest)
    assert len(files) == parts
    assert all(path.stat().st_size <= largest for path in files)
    assert sorted((tmp_path / "out").iterdir()) == files
    before = [path.read_bytes() for path in files]
    release.unpack(files[0], tmp_path / "new")
    assert tree(tmp_path / "new") == {"darkroom": None} | {
        f"darkroom/{name}": what for name, what in tree(bundle).items()}
    os.utime(bundle / "darkroom-cli", (1, 1))
    again = release.pack(bundle, tmp_path / "out", "x-linux", largest)
    assert [path.read_bytes() for path in again] == before
    if parts > 1:
        joined = tmp_path / "joined.tar.gz"         # as the documents tell: cat parts > whole
        joined.write_bytes(b"".join(before))
        listed = subprocess.run(["tar", "-tzf", joined], capture_output=True, check=True)
        assert b"darkroom/darkroom-cli" in listed.stdout


def test_windows_gets_a_zip(bundle: Path, tmp_path: Path) -> None:
    files = release.pack(bundle, tmp_path / "out", "x-windows", 2000)
    assert [path.name for path in files] == [
        f"x-windows.zip.00{number}" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    release.unpack(files[0], tmp_path / "new")
    assert (tmp_path / "new/darkroom/app/说明.txt").read_text("utf-8") == "学习"


def test_what_is_wrong_with_a_release_is_named(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second, *_ = release.pack(bundle, out, "x-linux", 1000)
    release.sums(out)
    assert release.verify(out) == []
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    (out / "new").touch()
    third = out / "x-linux.tar.gz.003"
    third.unlink()
    assert release.verify(out) == ["new: not listed", f"{second.name}: other bytes than when it "
                                   "was packed", f"{third.name}: missing"]
    with pytest.raises(SystemExit, match="a part is missing"):
        release.unpack(first, tmp_path / "new")
    with pytest.raises(SystemExit, match="missing"):
        release.main(["verify", str(out)])


@settings(max_examples=40)
@given(pieces=st.lists(st.binary(max_size=50), max_size=8), largest=st.integers(1, 40),
       reads=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), max_size=6))
def test_parts_are_one_file(pieces: list[bytes], largest: int, reads: list[tuple[int, int]]
                            ) -> None:
    whole = b"".join(pieces)
    with tempfile.TemporaryDirectory() as holder:
        with release.Parts(Path(holder) / "x", largest) as parts:
            for piece in pieces:
                assert parts.write(piece) == len(piece)
        assert b"".join(path.read_bytes() for path in parts.files) == whole
        with release._Joined(parts.files) as joined:
            for at, count in reads:
                joined.seek(at)
                assert whole[at:at + count].startswith(joined.read(count) or b"")
            joined.seek(0)
            assert joined.readall() == whole


@posix
@pytest.mark.parametrize("notary", [True, False])
def test_signing_is_skipped_with_a_sentence_or_done(tmp_path: Path, notary: bool,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*release.WINDOWS_SIGNING, *release.MACOS_SIGNING, *release.MACOS_NOTARY):
        monkeypatch.delenv(name, raising=False)
    for system in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        assert release.sign(tmp_path).startswith("Not signed: ")
    for tool in ("codesign", "ditto", "xcrun"):
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >> "{tmp_path}/log"\n')
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in release.MACOS_SIGNING + (release.MACOS_NOTARY if notary else ()):
        monkeypatch.setenv(name, "x")
    app = tmp_path / "A.app"
    app.mkdir()
    (app / "l.dylib").touch()
    assert release.sign(app).startswith("Signed and notarised" if notary else "Signed, not")
    said = (tmp_path / "log").read_text()
    assert said.index("l.dylib") < said.index("--sign x " + str(app) + "\n")
    assert ("notarytool submit" in said) is notary


def test_names_and_notes() -> None:
    assert re.fullmatch(r"LoRA-Darkroom-\d+\.\d+\.\d+-(linux|macos|windows)-\w+-cpu",
                        release.name("cpu"))
    assert "launcher.py demo" in release.notes(f"v{release.version()}")
    with pytest.raises(SystemExit):
        release.notes("99")


# --- the workflows ---

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
        assert job["runs-on"]
        yield from job["steps"]


def scripts(path: Path) -> Iterator[list[str]]:
    """Every command of a workflow that is a program of ours: words, expressions as EXPRESSION."""
    for step in steps(path):
        text = re.sub(r"\$\{\{.*?\}\}", "EXPRESSION", step.get("run", ""))
        for line in text.splitlines():
            words = shlex.split(line.split(" > ")[0])
            if words[:1] in (["python"], ["bash"]) and words[1] != "-m":
                yield words[1:]


def test_workflows_are_there_for_three_systems() -> None:
    assert [path.name for path in WORKFLOWS] == ["release.yml", "test.yml"]
    for path in WORKFLOWS:
        text = path.read_text("utf-8")
        assert all(system in text for system in ("ubuntu", "windows", "macos"))
        assert all(("run" in step) != ("uses" in step) for step in steps(path))
        assert len(list(scripts(path))) >= 4


@pytest.mark.parametrize("words", [words for path in WORKFLOWS for words in scripts(path)],
                         ids=lambda words: " ".join(words)[:50])
def test_every_script_and_option_of_a_workflow_exists(words: list[str]) -> None:
    script = ROOT / words[0]
    if words[0] == "build/make.py" and not script.exists():
        pytest.skip("the app is built elsewhere yet")
    assert script.is_file()
    if script.suffix == ".py":
        env = os.environ | {"DARKROOM_RESTARTED": str(ROOT / ".venv")}
        command = words[1:2]
        helped = subprocess.run([sys.executable, script, *command, "--help"], env=env, text=True,
                                capture_output=True)
        assert helped.returncode == 0, helped.stderr
        assert all(word in helped.stdout for word in words[2:]
                   if word.startswith("--") and command != ["test"])


def test_flavours_and_secrets_are_documented() -> None:
    told = (ROOT / "docs" / "releasing.md").read_text("utf-8")
    named = set(re.findall(r"secrets\.(\w+)", (WORKFLOWS[0]).read_text("utf-8")))
    assert named == {*release.WINDOWS_SIGNING, *release.MACOS_SIGNING, *release.MACOS_NOTARY}
    assert all(f"`{name}`" in told for name in named)
