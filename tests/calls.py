"""Commands as the launcher runs them, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import launcher
from core import i18n

ROOT = Path(__file__).resolve().parent.parent


class Told(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


Run = Callable[..., Told]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        tmp_path: Path) -> Iterator[Run]:
    def call(*argv: str | Path, lang: str = "en") -> Told:
        monkeypatch.setenv("DARKROOM_RESTARTED", str(ROOT / ".venv"))
        monkeypatch.setenv("DARKROOM_LANG", lang)
        i18n.language.cache_clear()
        code = launcher.main([str(word) for word in argv])
        return Told(code, *capsys.readouterr())
    monkeypatch.chdir(tmp_path)
    yield call
    i18n.language.cache_clear()


def serving(module: str) -> Iterator[str]:
    """A server of the tests in a process of its own; -> its address."""
    with subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()
