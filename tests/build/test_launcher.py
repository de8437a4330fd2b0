"""launcher.py as a user starts it: a process of its own, from another folder."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import launcher
from core import __version__, i18n

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "train", "generate", "lora", "lora info", "lora verify", "selftest", "runs",
            "runs list", "runs show", "runs resume", "runs stop", "doctor", "test", "setup",
            "repair")


def start(*argv: str, cwd: Path = ROOT.parent, **more: str) -> subprocess.CompletedProcess[str]:
    # as after the restart: this environment is good enough, whatever its stamp says
    env = os.environ | {"DARKROOM_RESTARTED": str(ROOT / ".venv"), **more}
    return subprocess.run([sys.executable, ROOT / "launcher.py", *argv], env=env, cwd=cwd,
                          capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL,
                          timeout=120)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> Callable[..., tuple[int, str, str]]:
    """launcher.main in this process -> exit code, stdout, stderr."""
    def call(*argv: str, lang: str = "en") -> tuple[int, str, str]:
        monkeypatch.setenv("DARKROOM_RESTARTED", str(ROOT / ".venv"))
        monkeypatch.setenv("DARKROOM_LANG", lang)
        i18n.language.cache_clear()
        code = launcher.main(list(argv))
        return code, *capsys.readouterr()
    yield call
    i18n.language.cache_clear()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.usefixtures("ignored_sigint")
def test_sigterm_ends_the_tests_too(tmp_path: Path) -> None:
    """Under nohup there is no Ctrl+C; pytest would go on as an orphan."""
    (tmp_path / "test_long.py").write_text(
        "import pathlib, time\n"
        "def test_long():\n"
        f"    pathlib.Path({str(tmp_path / 'began')!r}).touch()\n"
        "    time.sleep(100)\n")
    process = subprocess.Popen(
        [sys.executable, ROOT / "launcher.py", "test", "-n", "0", "--rootdir", tmp_path,
         "-c", os.devnull, tmp_path / "test_long.py"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"DARKROOM_RESTARTED": str(ROOT / ".venv")})
    end = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    tests = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert psutil.wait_procs(tests, timeout=10)[1] == []


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("lang", ["en", "zh-CN"])
def test_every_command_has_help_with_an_example(command: str, lang: str, run: Any) -> None:
    code, out, err = run(*command.split(), "--help", lang=lang)
    assert (code, err) == (0, "")
    assert f"darkroom {command}".strip() in out
    line = out.split("example: " if lang == "en" else "示例：")[1].splitlines()[0]
    assert line.startswith(f"darkroom {command.split(' ')[0]}")
    assert "commands." not in out                       # a key without its sentence


def test_examples_are_understood(run: Any) -> None:
    """Each command's example passes its own parser."""
    parser = launcher._parser()
    for command in COMMANDS:
        line = run(*command.split(), "--help")[1].split("example: darkroom ")[1]
        given = shlex.split(line.splitlines()[0])
        if given[0] != "test":
            assert parser.parse_args(given).command == command.split()[0]


def test_train_help_lists_every_key(run: Any) -> None:
    from core.config import TrainConfig
    told = run("train", "--help")[1]
    assert all(f"    {key} " in told for key in TrainConfig.model_fields)


def test_help_answers_at_once_and_without_torch() -> None:
    code = ("import sys, launcher\n"
            "try: launcher._parser().parse_args(['--help'])\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'diffusers', 'pydantic', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    before = os.times()
    assert start("--help").returncode == 0
    after = os.times()
    used = (after.children_user + after.children_system
            - before.children_user - before.children_system)
    assert used < 0.8                   # s of CPU; 0.2 is usual, torch alone takes 2


def test_version() -> None:
    assert start("--version").stdout == f"LoRA Darkroom {__version__}\n"


@pytest.mark.parametrize("argv", [["bogus"], ["lora"], ["lora", "info"], ["--bogus"],
                                  ["runs", "show"], ["doctor", "--bogus"]])
def test_wrong_arguments(argv: list[str], run: Any) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert "usage: darkroom" in err


def test_train_asks_for_a_config_or_a_preset(run: Any) -> None:
    code, out, err = run("train")
    assert (code, out) == (2, "")
    assert "--config FILE" in err
    assert "--preset NAME" in err


def test_test_hands_all_arguments_to_pytest(tmp_path: Path) -> None:
    quick = ("-p", "no:hypothesispytest", "-p", "no:xdist", "-o", "addopts=", "--noconftest")
    done = start("--debug", "test", *quick, "-q", "--collect-only",
                 "-k", "test_version or bogus", "tests/build/test_launcher.py", cwd=tmp_path,
                 PYTEST_ADDOPTS="")
    assert done.returncode == 0, done.stderr
    assert "tests/build/test_launcher.py::test_version" in done.stdout
    missing = start("test", *quick, "tests/no_such_file.py", cwd=tmp_path)
    assert missing.returncode == 4      # pytest's own


def test_characters_that_the_pipe_lacks_do_no_harm() -> None:
    """A Windows pipe in code page 1252, told in Chinese: pipes get UTF-8."""
    done = start("runs", "list", PYTHONIOENCODING="latin-1", DARKROOM_LANG="zh-CN",
                 PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0
    assert "还没有训练任务" in done.stdout


def test_closed_pipe_is_no_error() -> None:
    command = f'"{sys.executable}" "{ROOT / "launcher.py"}" train --help | head -1'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True,
                          env=os.environ | {"DARKROOM_RESTARTED": str(ROOT / ".venv")})
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


@pytest.mark.parametrize(("argv", "command"), [
    ([], ""), (["test"], "test"), (["--debug", "test", "x"], "test"), (["-h"], ""),
    (["train", "test"], "train")])
def test_the_command_is_found(argv: list[str], command: str) -> None:
    assert launcher._command(argv) == command


def test_console_script_is_this_function() -> None:
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"]["darkroom"] == "launcher:main"
    assert callable(launcher.main)
