"""Every command that the documents print is run here, or marked as not run with its reason."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher
from core import paths

ROOT = paths.ROOT
DOCS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
# How a command of a bash block begins, and why it is not run here.
NOT_RUN = {
    "python3 launcher.py demo": "tests/inference/test_demo_world.py runs it, minutes",
    "python3 launcher.py test": "these are the tests",
    "python3 launcher.py repair": "tests/build/test_bootstrap.py, on environments of its own",
    "python3 launcher.py setup": "tests/build/test_bootstrap.py, on environments of its own",
    "python3 launcher.py": "tests/browser opens the window",
    "bash .ci/run": "it runs these tests",
    "ruff check .": ".ci/run runs it", "mypy ": ".ci/run runs it", "pytest": "these are the tests",
    "npm pack": "fetches from the network", "python build/make_demo_world.py": "trains for hours",
    "python build/make.py": "builds the app: pytest -m frozen",
    "source .venv": "of a shell", "export ": "of a shell",
    "python build/release.py": "tests/build/test_release.py runs each on a small app",
    "try/darkroom/": "needs a built app: pytest -m frozen",
    ".venv/bin/python build/lock.py": "asks package registries: tests/build/test_lock.py",
}


def blocks(path: Path) -> Iterator[str]:
    """The commands of a file's bash blocks, whole where a line goes on, without comments."""
    for block in re.findall(r"^```bash\n(.*?)^```", path.read_text("utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if command := re.sub(r"\s+#.*", "", line).strip():
                yield command


def commands() -> dict[str, list[str]]:
    """All of them, each with the files in which it stands."""
    found: dict[str, list[str]] = {}
    for path in DOCS:
        for command in blocks(path):
            found.setdefault(command, []).append(path.name)
    return found


def test_every_command_is_run_or_has_its_reason() -> None:
    left = {command: files for command, files in commands().items()
            if not command.startswith(("darkroom ", *NOT_RUN))}
    assert not left
    assert not [start for start in NOT_RUN if not any(c.startswith(start) for c in commands())]


def test_both_readmes_print_the_same_commands() -> None:
    english, chinese = (list(blocks(ROOT / name)) for name in ("README.md", "README.zh-CN.md"))
    assert english == chinese
    assert len(english) > 10


def test_commands_within_sentences_have_their_options() -> None:
    """`darkroom train --config X.yaml` in a text: that command is there, and has that option."""
    by_name: dict[str, argparse.ArgumentParser] = {}

    def collect(parser: argparse.ArgumentParser, name: str) -> None:
        by_name[name] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, inner in action.choices.items():
                    collect(inner, f"{name} {word}".strip())

    collect(launcher._parser(), "")
    checked, wrong = 0, []
    for path in DOCS:
        text = "" if path.name == "CHANGELOG.md" else path.read_text("utf-8")
        for line in re.findall(r"`darkroom ([a-z][^`]*)`", text):
            words = line.split()
            name = " ".join(words[:2]) if " ".join(words[:2]) in by_name else words[0]
            parser = by_name.get(name)
            options = {one for action in parser._actions for one in action.option_strings
                       } if parser else set()
            checked += 1
            if parser is None or {w for w in words if w.startswith("--")} - options:
                wrong.append(f"{path.name}: darkroom {line}")
    assert checked > 10
    assert not wrong


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_the_readmes_commands_run_as_printed(tmp_path: Path) -> None:
    """In their order, in one folder: the demo's pictures as the data, the demo base and its preset
    for the names that stand for one's own, and 2 epochs instead of 100."""
    shutil.copytree(paths.DEMO / "pictures", tmp_path / "data" / "style_train")
    text = (ROOT / "README.md").read_text("utf-8")
    config = text.split("```yaml\n")[1].split("```")[0]
    base = "./models/Stable-diffusion/v1-5-pruned.safetensors"
    assert base in config
    (tmp_path / "my_style.yaml").write_text(
        config.replace(base, "demo").replace("epochs: 100", "epochs: 2"), "utf-8")
    stands_for = {"MODEL": str(paths.DEMO / "base"), "8GB laptop": "CPU"}
    own = [command for path in DOCS for command in blocks(path) if command.startswith("darkroom ")]
    for command in dict.fromkeys(own):
        words = [stands_for.get(word, word) for word in shlex.split(command)[1:]]
        done = subprocess.run([sys.executable, ROOT / "launcher.py", *words], cwd=tmp_path,
                              capture_output=True, text=True, timeout=600, check=False,
                              env=os.environ | {"DARKROOM_RESTARTED": str(ROOT / ".venv")})
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert sorted(path.name for path in (tmp_path / "output/my_style_lora").glob("*.safetensors"))
