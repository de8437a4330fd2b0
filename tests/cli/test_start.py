"""Start and stop as users meet them: real processes, and everything that can be in the way. The
starts that fail do so before Gradio is imported, which makes them quick."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from core import paths
from core.errors import UserError
from core.jobs import runs
from core.system import logs, message_box
from gui import window
from gui.server import WAITING, page

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in for desktop programs")


def until(happened: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


class Desk:
    """A user's desktop: a browser and a message box that keep what they are given."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        self.browsed, self.told = folder / "browsed", folder / "told"
        self.env = {**os.environ, "DARKROOM_HOME": str(home), "PYTHONPATH": str(ROOT),
                    "DARKROOM_RESTARTED": str(ROOT / ".venv"), "DISPLAY": ":9",
                    "PYTHONUNBUFFERED": "1", "PATH": str(folder),
                    "BROWSER": str(self.tool("browser", f'echo "$1" >> "{self.browsed}"'))}
        self.tool("zenity", f'for last; do :; done; echo "$last" > "{self.told}.new"; '
                            f'/bin/mv "{self.told}.new" "{self.told}"')

    def tool(self, name: str, script: str) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def start(self, *argv: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, str(ROOT / "launcher.py"), *argv], text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=self.folder,
                                stderr=subprocess.PIPE, env=self.env | env)

    def broken(self, **packages: str) -> subprocess.Popen[str]:
        """A start that finds these packages broken."""
        for name, code in packages.items():
            (self.folder / "shadow" / name).mkdir(parents=True)
            (self.folder / "shadow" / name / "__init__.py").write_text(code)
        code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(self.folder / 'shadow')!r}]; "
                "import launcher; sys.exit(launcher.main([]))")
        return subprocess.Popen([sys.executable, "-c", code], text=True, cwd=self.folder,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=self.env)

    def ended(self, *argv: str, **env: str) -> tuple[int, str, str]:
        """-> exit code, stdout, stderr, which never shows a traceback."""
        process = self.start(*argv, **env)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in out + err
        return process.returncode, out, err

    def page(self) -> str:
        """The address that the browser was given."""
        return until(lambda: self.browsed.exists() and self.browsed.read_text()).split()[0]


@pytest.fixture
def desk(tmp_path: Path, own_home: Path) -> Desk:
    return Desk(tmp_path, own_home)


class Browser:
    """Keeps the cookie."""

    def __init__(self) -> None:
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())

    def fetch(self, url: str) -> tuple[str, str]:
        """-> what sort of page, its text."""
        with self.opener.open(url, timeout=30) as answer:
            return answer.headers.get(WAITING, ""), answer.read().decode("utf-8")

    def live(self, url: str) -> str:
        """All that the page's panels show."""
        question = urllib.request.Request(url.split("?")[0] + "en/live", b"{}",
                                          {"content-type": "application/json"})
        with self.opener.open(question, timeout=30) as answer:
            return str(answer.read().decode("utf-8"))


# --- one start from its first page to its violent end ---

@pytest.mark.thorough
@posix
def test_a_start_shows_something_at_once_and_a_killed_one_leaves_nothing_but_its_run(
        desk: Desk) -> None:
    (desk.home / "settings.yaml").write_text("theme: {")
    run = runs.create_run("train", "base_model: demo\n", "goes-on", queued=False)
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    runs.claim(run, trainer.pid, dedicated=True)
    first = desk.start()
    try:
        url, browser = desk.page(), Browser()
        # All users can read a browser's command line.
        assert "token" not in url
        kind, text = browser.fetch(url)
        assert kind == "waiting"
        assert "starting" in text
        assert "正在启动" in text
        assert psutil.Process(first.pid).cpu_times().user < 2.0       # 0.5 s is usual
        with pytest.raises(urllib.error.HTTPError):
            Browser().fetch(url)                                # it was open once
        known = json.loads((desk.home / "window.json").read_text())
        assert known["pid"] == first.pid
        assert (desk.home / "window.json").stat().st_mode & 0o077 == 0

        assert first.stdout is not None
        told = first.stdout.readline().split()[-1]              # when the pages are there
        assert told.startswith(url + "?token=")
        kind, text = browser.fetch(url)
        assert kind == ""
        assert "gradio" in text
        told = browser.live(url)
        assert "settings.yaml.broken" in told
        assert "goes-on" in told
        code, out, _ = desk.ended()
        assert code == 0
        assert desk.browsed.read_text().split() == [url, url]
        assert "gradio" in Browser().fetch(out.split()[-1])[1]  # the address that it told
        children = until(lambda: psutil.Process(first.pid).children(recursive=True))
    finally:
        first.kill()
        first.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert trainer.poll() is None                               # the run goes on
    trainer.kill()
    trainer.wait()
    with until(window._lock):                                   # and the way is free again
        assert "LoRA Darkroom 0." in (desk.home / "logs" / "app.log").read_text()


# --- what can be in the way ---

# What pywebview does where the system lacks a web view.
NO_VIEW = """
class Event:
    def __iadd__(self, handler): return self
class Events: initialized = closing = shown = Event()
class Window: events = Events()
settings = {}
def create_window(*a, **k): return Window()
def start(**k): raise RuntimeError("You must have either QT or GTK installed")
"""


@posix
def test_a_broken_package_is_told_in_the_window(desk: Desk) -> None:
    """Of no web view either: the browser takes over, and shows what is wrong."""
    desk.env["DARKROOM_LANG"] = "zh-CN"
    process = desk.broken(gradio="raise ImportError('DLL load failed')", webview=NO_VIEW)
    url, browser = desk.page(), Browser()
    text = until(lambda: (found := browser.fetch(url))[0] == "fault" and found)[1]
    assert "launcher.py repair" in text
    assert "DLL load failed" in text
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "QT or GTK" in out
    assert "无法启动" in err
    assert "Traceback" not in err
    assert "DLL load failed" in (desk.home / "logs" / "app.log").read_text()


@posix
@pytest.mark.parametrize(("number", "parent"), [(signal.SIGINT, "default_sigint"),
                                                (signal.SIGTERM, "ignored_sigint")])
def test_no_browser_is_told_with_the_address(desk: Desk, number: int, parent: str,
                                             request: pytest.FixtureRequest) -> None:
    """And no web view; signals end it all the same."""
    request.getfixturevalue(parent)
    del desk.env["BROWSER"]
    desk.tool("xdg-open", "exit 3")
    process = desk.broken(gradio="import time; time.sleep(60)", webview=NO_VIEW)
    told = until(lambda: desk.told.exists() and desk.told.read_text())
    assert Browser().fetch(told.split(": ")[1].strip())[0] == "waiting"
    process.send_signal(number)                     # while the pages are being made, too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert not (desk.home / "window.json").exists()
    assert told.strip() in out


ON_A_DISK = """
import os, subprocess, sys
home, how = sys.argv[1:3]
os.makedirs(home, exist_ok=True)
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", home]).returncode:
    sys.exit(77)
if how == "full":
    try: open(home + "/filler", "wb").write(bytes(10**6))
    except OSError: pass
else:
    subprocess.run(["mount", "-o", "remount,ro", home], check=True)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


@posix
@pytest.mark.parametrize(("what", "said"), [
    ("file", ("can't write to", "DARKROOM_HOME")), ("lock", ("window.lock", "Delete it"))])
def test_what_is_in_the_way_is_told_in_a_box(desk: Desk, what: str, said: tuple[str, ...]) -> None:
    if what == "file":
        (desk.home / "x").write_text("mine")
        desk.env["DARKROOM_HOME"] = str(desk.home / "x")
    else:
        (desk.home / "window.lock").mkdir()
    code, _, err = desk.ended()
    assert code == 2
    assert desk.told.read_text() == err
    assert all(word in err for word in said)
    desk.told.unlink()
    assert desk.ended("gui")[0] == 2                # a command's words stay in its terminal
    assert not desk.told.exists()


@posix
@pytest.mark.parametrize(("how", "said"), [("full", "is full"), ("read-only", "can't write to")])
def test_a_real_disk_that_takes_nothing(desk: Desk, how: str, said: str) -> None:
    if not (unshare := shutil.which("unshare")):
        pytest.skip("no namespaces here")
    apart = [unshare, "-m"] if os.getuid() == 0 else [unshare, "-rm"]
    done = subprocess.run([*apart, sys.executable, "-c", ON_A_DISK, str(desk.home), how,
                           str(ROOT / "launcher.py")], capture_output=True, text=True, timeout=60,
                          env=desk.env | {"PATH": f"{desk.folder}:{os.environ['PATH']}"})
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 2
    assert done.stderr == desk.told.read_text()
    assert said in done.stderr
    assert str(desk.home) in done.stderr


@posix
def test_without_a_message_box_a_page_tells_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk.folder / "zenity").unlink()
    for name in ("PATH", "DISPLAY", "BROWSER"):
        monkeypatch.setenv(name, desk.env[name])
    assert message_box.show("磁盘 <full>\nsecond line")
    shown = Path(urllib.request.url2pathname(desk.page().removeprefix("file://")))
    assert "磁盘 &lt;full&gt;<p>second line" in shown.read_text("utf-8")
    desk.tool("browser", "exit 1")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("BROWSER")
    assert not message_box.show("nobody sees it")


def test_a_port_that_is_taken_is_named(own_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError) as caught:
        window.open_window(taken.getsockname()[1], show=False)
    assert caught.value.code == "window.port_taken"
    assert not (own_home / "window.json").exists()


@pytest.mark.parametrize("known", ["", "{torn", "[]", "7",
                                   '{"url": "http://x:1/", "cookie": "x", "pid": 999999999}',
                                   '{"url": 7, "cookie": "x", "pid": 1}', '{"pid": "x"}',
                                   '{"url": "http://x:y/", "cookie": "x", "pid": 1}'])
def test_a_first_start_without_an_address(own_home: Path, known: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "PATIENCE_S", 0.3)
    (own_home / "window.json").write_text(known)
    held = window._lock()
    assert held is not None
    with held, pytest.raises(UserError) as caught:
        window.open_window()
    assert caught.value.code == "window.starting"


def test_a_first_start_that_hangs_is_named(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "PATIENCE_S", 0.3)
    held = window._lock()
    assert held is not None
    with held, socket.create_server(("127.0.0.1", 0)) as deaf:
        known = {"url": f"http://127.0.0.1:{deaf.getsockname()[1]}/", "cookie": "x",
                 "pid": os.getpid()}
        (own_home / "window.json").write_text(json.dumps(known))
        with pytest.raises(UserError) as caught:
            window.open_window()
    assert caught.value.code == "window.hangs"


# --- words and logs ---

def test_the_page_shows_what_it_is_given_as_text() -> None:
    assert "<script>x" not in page("<script>x</script>\nsecond")
    assert 'class="fault"' in page("x")
    assert 'class="waiting"' in page()


@pytest.fixture(autouse=True)
def own_log(own_home: Path) -> Iterator[Path]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield paths.log_dir()
    for handler in [one for one in root.handlers if one not in before]:
        root.removeHandler(handler)
        handler.close()


def test_logs_rotate_and_take_what_has_no_console(own_log: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    monkeypatch.setattr(logs, "LARGEST", 2000)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    logs.to_file()
    print("学习 half a line", end="")
    assert not sys.stdout.isatty()
    print(", and the rest", file=sys.stdout)
    for number in range(300):
        print(f"line {number}", file=sys.stderr)
    assert "line 299" in logs.tail(1)
    files = sorted(path.name for path in own_log.iterdir() if path.suffix != ".crash")
    assert files == ["app.log", *(f"app.log.{n}" for n in range(1, 5))]
    assert all((own_log / name).stat().st_size <= 2000 for name in files)


@posix
def test_a_start_without_any_stream(own_home: Path) -> None:
    """As a double click starts it: handles 0 to 2 must not become the next files."""
    code = ("import os, subprocess; from core.system import logs; logs.to_file(); print('学习')\n"
            "os.write(2, b'from C'); subprocess.run(['/bin/sh', '-c', 'echo child']); "
            "print(*(os.readlink(f'/proc/self/fd/{n}') for n in range(3)))")
    subprocess.run(["/bin/sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code],
                   cwd=ROOT, check=True)
    said = (own_home / "logs" / "app.log").read_text("utf-8")
    assert "学习" in said
    assert (own_home / "logs" / "app.crash").read_text() == "from Cchild\n"
    if sys.platform == "linux":
        assert "/dev/null" in said.splitlines()[-1]


def test_a_log_that_can_not_be_written_harms_nobody(own_home: Path, own_log: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    own_log.write_text("a file where the folder should be")
    monkeypatch.setattr(sys, "stdout", None)
    logs.to_file()
    print("x")
    assert logs.tail(5) == ""


def test_the_log_is_part_of_the_diagnostics(own_log: Path, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    from core.jobs import bug_report
    from core.system import doctor
    monkeypatch.setattr(doctor, "examine", list)
    logs.begin()
    logging.getLogger("x").warning("cannot open %s", Path.home() / "secret.yaml")
    assert "cannot open ~" in bug_report.text()
