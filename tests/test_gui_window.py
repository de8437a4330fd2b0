"""`darkroom gui` as a process: it prints an address that opens, a second start finds the first,
and Ctrl+C ends it without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START = "from gui import window; window.open_window(0, show=False)"


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_a_start_prints_its_address_and_ends_cleanly(own_home: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen([sys.executable, "-c", START], env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", line)
        assert url, line
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(url[0], timeout=30) as answer:
            assert answer.url.endswith("/en/")
            assert b"LoRA Darkroom" in answer.read()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url[0].split("?")[0], timeout=30)
        if os.name != "nt":
            assert (own_home / "window.json").stat().st_mode & 0o077 == 0
        assert json.loads((own_home / "window.json").read_text())["pid"] == child.pid
        second = subprocess.run([sys.executable, "-c", START], env=env, capture_output=True,
                                text=True, timeout=60)
        assert url[0] in second.stdout
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=40)
        assert child.returncode == 0, errors
        assert "Traceback" not in errors
        assert not (own_home / "window.json").exists()
    finally:
        child.kill()
        child.wait()
