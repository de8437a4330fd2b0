"""The double-click helpers, run for real where a shell is: paths with spaces, Chinese, quotes."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build"))
desktop_files = importlib.import_module("desktop_files")
sys.path.remove(str(ROOT / "build"))

posix = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
LAUNCHER = "import os, sys; print(os.path.abspath(__file__), sys.argv[1:]); sys.exit({code})"


def command_of(entry: str) -> list[str]:
    """Exec as the specification reads it: the value's escapes, then its quoting, then %%."""
    line = next(line for line in entry.split("\n") if line.startswith("Exec="))
    value = re.sub(r"\\(.)", r"\1", line.removeprefix("Exec="))
    program, quoted = value.split(" ", 1)
    assert re.fullmatch(r'"(?:[^"`$\\]|\\["`$\\])*"', quoted)
    return [program, re.sub(r"\\(.)", r"\1", quoted[1:-1]).replace("%%", "%")]


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"],
                             include_characters="\\\"'`$% é图"), min_size=1))
def test_any_path_survives_the_desktop_entry(name: str) -> None:
    folder = Path("/") / name.replace("/", "_")
    assert command_of(desktop_files.desktop_entry(folder)) == [
        "/bin/sh", str(folder / "LoRA Darkroom.command")]


@posix
def test_the_helpers_start_the_launcher_wherever_it_lies(tmp_path: Path) -> None:
    checkout = tmp_path / "my \"LoRAs\" 图片 $HOME 100% `x`"
    checkout.mkdir()
    (checkout / "launcher.py").write_text(LAUNCHER.format(code=7))
    entry, script = desktop_files.write(tmp_path / "desktop", "linux", checkout)
    assert script.stat().st_mode & stat.S_IXUSR
    done = subprocess.run(command_of(entry.read_text("utf-8")), cwd=tmp_path, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 7
    assert done.stdout == f"{checkout / 'launcher.py'} []\n"
    moved = shutil.move(checkout, tmp_path / "moved 副本")         # the script needs no new writing
    done = subprocess.run([Path(moved) / script.name, "gui", "two words"], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.endswith("['gui', 'two words']\n")


@posix
def test_without_a_fitting_python_it_says_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    for name in ("dirname", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    [script] = desktop_files.write(tmp_path, "darwin")
    done = subprocess.run([script], env={"PATH": str(tmp_path)}, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.splitlines() == list(desktop_files.NO_PYTHON)


@posix
def test_a_terminal_stays_open_when_it_failed(tmp_path: Path) -> None:
    import pty
    (tmp_path / "launcher.py").write_text(LAUNCHER.format(code=3))
    [script] = desktop_files.write(tmp_path, "darwin")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([script], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while "⏎".encode() not in said:
        said += os.read(ours, 1000)
    assert process.poll() is None
    os.write(ours, b"\n")
    assert process.wait(20) == 3
    os.close(ours)


def test_the_files_of_the_checkout_are_those_that_are_made(tmp_path: Path) -> None:
    for system in ("win32", "darwin"):
        [made] = desktop_files.write(tmp_path, system)
        assert (ROOT / made.name).read_bytes() == made.read_bytes()
    batch = (tmp_path / "LoRA Darkroom.bat").read_bytes()
    assert batch.count(b"\n") == batch.count(b"\r\n") > 10
    assert b'"%~dp0launcher.py"' in batch           # quoted: spaces, &, parentheses
    said = [line for line in batch.splitlines() if not line.isascii()]
    assert all(line.startswith(b"if not defined PYTHON echo ") for line in said)
