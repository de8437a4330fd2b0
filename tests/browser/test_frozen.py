"""The standalone app as a user gets it: in a folder with blanks and Chinese in its name that can't
be written, an empty home, no Python, no network; its selftest, and its window by the short way.

    pytest -n 0 -m frozen tests/browser/test_frozen.py      DARKROOM_APP=dist/darkroom: this one
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.browser.test_short_way import step_of, tab, until

ROOT = Path(__file__).resolve().parent.parent.parent
SUFFIX = ".exe" if os.name == "nt" else ""
pytestmark = [pytest.mark.frozen, pytest.mark.timeout(5400)]

# In namespaces of its own: only the loopback is up, and the app's folder is mounted read-only.
WALLED = """
ip link set lo up || exit 90
mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 91
shift; exec "$@"
"""


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy by links: what the app writes into its folder doesn't reach the original's."""
    given = os.environ.get("DARKROOM_APP")
    if not given:
        subprocess.run([sys.executable, ROOT / "build" / "make.py", "app"], check=True, cwd=ROOT)
    built = Path(given or ROOT / "dist" / "darkroom").absolute()
    folder = built.parent / "照片 与 app (test)"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(built, folder, symlinks=True, copy_function=os.link)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Nothing of this machine's: an empty home, no program on PATH."""
    for name in ("home", "empty"):
        (tmp_path / name).mkdir()
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "TEMP", "TMP") if name in os.environ}
    return {**kept, "HOME": str(tmp_path / "home"), "LOCALAPPDATA": str(tmp_path / "home"),
            "USERPROFILE": str(tmp_path / "home"), "PATH": str(tmp_path / "empty"),
            "DARKROOM_LANG": "en", "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9"}


def walled(app: Path, command: list[str]) -> list[str]:
    """The command where there is no network and the app's folder is read-only, as far as this
    system has such places."""
    unshare = shutil.which("unshare")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    spaces = ["-n", "-m"] if root else ["-r", "-n", "-m"]
    if not unshare or subprocess.run([unshare, *spaces, "true"], capture_output=True).returncode:
        return command
    inner = WALLED.replace("ip ", f"{shutil.which('ip', path=PLACES)} ", 1).replace(
        "mount ", f"{shutil.which('mount')} ")
    return [unshare, *spaces, "/bin/sh", "-c", inner, "walled", str(app), *command]


PLACES = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def state(app: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in app.rglob("*")}


def test_selftest(app: Path, bare: dict[str, str], tmp_path: Path) -> None:
    before = state(app)
    report = tmp_path / "report.json"
    command = [str(app / f"darkroom-cli{SUFFIX}"), "selftest", "--json", str(report)]
    done = subprocess.run(walled(app, command), env=bare, cwd=tmp_path, capture_output=True,
                          text=True, encoding="utf-8", timeout=3600)
    told = done.stdout + done.stderr
    print(told)
    assert done.returncode == 0, told
    found = json.loads(report.read_text("utf-8"))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    assert found["ok"]
    assert found["frozen"]
    assert {part["part"] for part in found["parts"]} >= {
        "folders", "card", "modules", "train", "verify", "caption", "window"}
    assert state(app) == before
    written = {path.relative_to(tmp_path / "home").as_posix()
               for path in (tmp_path / "home").rglob("*")}
    assert [name for name in written if name.endswith("LoRA Darkroom")]     # the platform's own


def test_the_network_is_really_refused(app: Path) -> None:
    """Else the test above would show nothing."""
    ask = "import socket; socket.create_connection(('192.0.2.1', 80), 3)"
    for command, refusal in (([sys.executable, "-c", ask], "unreachable"),
                             (["/bin/sh", "-c", 'echo > "$0/x"', str(app)], "ead-only")):
        if walled(app, command) == command:
            pytest.skip("no namespaces here")
        done = subprocess.run(walled(app, command), capture_output=True, text=True)
        assert refusal in done.stderr


@contextlib.contextmanager
def window_of(app: Path, bare: dict[str, str], log: Path) -> Iterator[str]:
    """The window's program without streams, as a double click starts it; -> its address."""
    home = Path(bare["HOME"])
    start = [str(app / f"darkroom{SUFFIX}"), "gui", "--no-window"]
    if os.name != "nt":
        start = ["/bin/sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *start]
    child = subprocess.Popen(start, env=bare, cwd=home)
    try:
        found = until(lambda: next(home.rglob("window.json"), None), 300)
        yield json.loads(found.read_text("utf-8"))["url"]
    finally:
        family = [child, *psutil.Process(child.pid).children(recursive=True)]
        child.terminate()
        child.wait(60)
        for one in family[1:]:
            with contextlib.suppress(psutil.Error):
                one.kill()


def test_the_short_way(app: Path, bare: dict[str, str], browser: Any, tmp_path: Path) -> None:
    with window_of(app, bare, tmp_path) as url:
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        outside: list[str] = []
        page.on("request", lambda request: outside.append(request.url)
                if not request.url.startswith((url.split("?")[0], "data:", "blob:")) else None)
        page.set_default_timeout(120_000)
        page.goto(url)
        page.wait_for_selector("#header .header")
        page.get_by_role("button", name=re.compile("demo world")).click()
        page.wait_for_function("!document.querySelector('#start').disabled", timeout=300_000)
        page.locator("#start").click()
        page.wait_for_selector("#run-head .title")
        until(lambda: step_of(page) > 1, 600)
        page.get_by_role("button", name="Stop and save").click()
        page.get_by_role("button", name="Try it: Inference").click(timeout=300_000)
        weight = page.locator("#loras input[type=number]")
        weight.wait_for(state="visible")
        assert weight.input_value() == "0.8"
        page.locator("#draw-acts [data-act=compare]").click()
        page.locator("#draw-large .compare img").nth(1).wait_for(state="visible", timeout=600_000)
        sizes = page.locator("#draw-large .compare img").evaluate_all(
            "images => Promise.all(images.map(i => i.decode().then(() => i.naturalWidth)))")
        assert sizes == [64, 64]
        tab(page, "parameters")
        page.close()
        assert not outside
    log = next(Path(bare["HOME"]).rglob("app.log")).read_text("utf-8")
    assert "LoRA Darkroom is open at" in log
    assert "Traceback" not in log
