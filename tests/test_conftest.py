"""What the tests' own conftest.py adds to a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SOME = """
import pytest
@pytest.mark.network
@pytest.mark.parametrize("n", [1, 2])
def test_hub(n): pass
@pytest.mark.slow
def test_slow(): pass
def test_runs(): pass
"""


@pytest.mark.thorough
def test_skipped_tests_are_listed_by_reason(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SOME)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    network: x\n    slow: x\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = [line for line in done.stdout.splitlines() if line]
    at = next(number for number, line in enumerate(lines) if " 3 skipped " in line)
    assert lines[at + 1:at + 3] == [
        "   2 no model hub can be reached in this suite (test_some.py 2)",
        "   1 takes minutes: pytest -m slow (test_some.py 1)"]
    assert "1 passed, 3 skipped" in lines[-1]


@pytest.mark.thorough
@pytest.mark.parametrize(("given", "passed"), [
    ([], 1), (["-n", "2"], 1), (["--all"], 2), (["-n", "2", "--all"], 2), (["test_some.py"], 2),
    (["-m", "thorough"], 1)])
def test_the_everyday_run_leaves_the_thorough_ones_out(tmp_path: Path, given: list[str],
                                                       passed: int) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.thorough\ndef test_long(): pass\ndef test_short(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = .\nmarkers =\n    thorough: x\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "tests.conftest", *given],
                          cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert f"{passed} passed" in done.stdout, done.stdout + done.stderr
    assert ("were left out" in done.stdout) == (given in ([], ["-n", "2"]))
