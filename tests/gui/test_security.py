"""The door, over real HTTP: who may ask, what can be read, what leaves the machine (nothing)."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from core.jobs import runs
from core.jobs.events import Checkpoint, Sample
from core.jobs.journal import Journal
from core.jobs.manager import JobManager
from gui import server
from gui.app import serve
from gui.server import Served
from gui.state.plan_client import Planning

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("/", "/en/", "/zh-CN/", "/en/config", "/en/gradio_api/info", "/language/zh-CN",
         "/theme/dark", "/picture/x/0", "/lora/x/0", "/favicon.ico", "/en/theme.css",
         "/en/gradio_api/startup-events", "/nothing")


class Silent(Planning):
    def _loop(self) -> None:
        return


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all, with a home of its own: own_home is made anew for each test."""
    before, home = os.getcwd(), tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKROOM_HOME", str(home))
        running = serve(jobs=JobManager(dispatch=False), planning=Silent(), warm=False)
        yield running
        running.close()
        os.chdir(before)


@pytest.fixture(autouse=True)
def same_home(served: Served, monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(Path(os.getcwd()).parents[1]))


def ask(served: Served, path: str, method: str = "GET", body: bytes | None = None,
        cookie: bool = True, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    sent = {"Host": f"127.0.0.1:{served.port}"}
    if cookie:
        sent["Cookie"] = f"{served.guard.cookie}={served.guard.token}"
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    found = answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
    connection.close()
    return found


@pytest.mark.parametrize("path", PAGES)
def test_nothing_answers_without_the_token(served: Served, path: str) -> None:
    assert ask(served, path, cookie=False)[0] == 403
    assert ask(served, path, cookie=False, Cookie=f"{served.guard.cookie}=wrong")[0] == 403
    assert ask(served, f"{path}?token=wrong", cookie=False)[0] == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(served: Served) -> None:
    status, _, headers = ask(served, f"/?a=1&token={served.guard.token}", cookie=False)
    assert status == 303
    assert headers["location"] == "/?a=1"
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=Strict" in headers["set-cookie"]
    evil = ask(served, f"//evil.example/?token={served.guard.token}", cookie=False)[2]
    assert evil["location"].startswith("/evil.example")      # a path here, not a host elsewhere


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "127.0.0.1:1",
                                  "localhost", "0.0.0.0"])
def test_other_names_are_refused(served: Served, host: str) -> None:
    """DNS rebinding: a foreign name that resolves to this machine."""
    assert ask(served, "/en/", Host=host)[0] == 400


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1",
                                    "http://localhost.evil.example"])
@pytest.mark.parametrize("path", ["/en/gradio_api/upload", "/en/gradio_api/queue/join",
                                  "/en/gradio_api/run/predict", "/en/"])
def test_cross_origin_posts_and_uploads_are_refused(served: Served, path: str,
                                                    origin: str) -> None:
    before = uploads()
    body = (b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.txt"\r\n\r\nevil'
            b"\r\n--b--\r\n")
    assert ask(served, path, "POST", body, Origin=origin,
               Content_Type="multipart/form-data; boundary=b")[0] == 403
    assert uploads() == before


def uploads() -> int:
    return sum(1 for _ in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.txt"))


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_and_other_ports_are_refused(served: Served, site: str) -> None:
    assert ask(served, "/en/config", Sec_Fetch_Site=site)[0] == 403
    assert ask(served, "/en/config", Sec_Fetch_Site="same-origin")[0] == 200


def test_own_uploads_work(served: Served) -> None:
    body = (b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.txt"\r\n\r\nmine'
            b"\r\n--b--\r\n")
    status, answer, _ = ask(served, "/en/gradio_api/upload", "POST", body,
                            Origin=f"http://127.0.0.1:{served.port}",
                            Content_Type="multipart/form-data; boundary=b")
    assert status == 200
    assert Path(json.loads(answer)[0]).read_bytes() == b"mine"


def test_only_loopback_listens(served: Served) -> None:
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None,
                                                        socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        if not address.startswith("127."):
            with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
                socket.create_connection((address, served.port), timeout=2)


def test_answers_forbid_what_a_page_does_not_need(served: Served) -> None:
    headers = ask(served, "/en/")[2]
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert ask(served, "/en/gradio_api/runs")[0] == 404
    assert ask(served, "/en/monitoring")[0] in (403, 404)


@pytest.mark.parametrize("path", [
    "/etc/passwd", "../../../../etc/passwd", "settings.yaml", "..%2f..%2fsettings.yaml",
    "C:\\Windows\\win.ini", "//etc/passwd", "....//etc/passwd"])
def test_files_elsewhere_are_not_served(served: Served, path: str) -> None:
    home = Path(os.environ["DARKROOM_HOME"])
    (home / "settings.yaml").touch()
    for tried in (path, str(home / "settings.yaml"), str(home / "window.json"),
                  str(ROOT / "pyproject.toml")):
        for route in ("/en/gradio_api/file=", "/en/file="):
            status, body, _ = ask(served, route + quote(tried, safe="/%:"))
            assert status in (403, 404), (route, tried)
            assert b"root:" not in body


def make_run(name: str, picture: Path, lora: Path) -> str:
    folder = runs.create_run("train", "base_model: demo\n", name)
    with Journal(folder) as journal:
        journal.append(Sample(step=1, path=str(picture), prompt="p", seed=1))
        journal.append(Checkpoint(step=1, path=str(lora), final=True))
    return folder.name


def test_pictures_and_files_of_runs_by_number_only(served: Served, tmp_path: Path) -> None:
    from PIL import Image
    Image.effect_noise((900, 700), 60).convert("RGB").save(tmp_path / "p.png")
    (tmp_path / "l.safetensors").write_bytes(b"weights")
    run_id = make_run("mia", tmp_path / "p.png", tmp_path / "l.safetensors")
    deadline = time.monotonic() + 5
    while served.app_state.snapshot().run(run_id) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    status, body, headers = ask(served, f"/picture/{run_id}/0")
    assert (status, headers["content-type"]) == (200, "image/webp")
    assert body[8:12] == b"WEBP"
    assert ask(served, f"/picture/{run_id}/0?full=1")[1] == (tmp_path / "p.png").read_bytes()
    status, body, headers = ask(served, f"/lora/{run_id}/0")
    assert (status, body) == (200, b"weights")
    assert "l.safetensors" in headers["content-disposition"]
    for path in (f"/picture/{run_id}/1", f"/picture/{run_id}/-1", f"/picture/{run_id}/..",
                 "/picture/../0", "/picture/%2e%2e/0", f"/lora/{run_id}/9", f"/picture/{run_id}/x"):
        assert ask(served, path)[0] in (404, 422), path


def test_settings_change_only_to_what_exists(served: Served) -> None:
    assert ask(served, "/language/zh-CN")[2]["location"] == "/zh-CN/"
    assert served.app_state.settings.now.language == "zh-CN"
    assert ask(served, "/theme/dark")[2]["location"] == "/zh-CN/?__theme=dark"
    assert ask(served, "/language/../../x")[0] == 404
    assert ask(served, "/language/xx")[0] == 404
    assert ask(served, "/theme/pink")[0] == 404
    ask(served, "/theme/auto")
    ask(served, "/language/en")


def test_each_language_is_a_page_of_its_own(served: Served) -> None:
    for path, word in (("/en/config", "Start training"), ("/zh-CN/config", "开始训练")):
        config = json.loads(ask(served, path)[1])
        assert word in json.dumps(config, ensure_ascii=False)
        assert config["analytics_enabled"] is False


def test_the_server_knows_when_it_is_left_alone(served: Served,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    served.guard.quiet_since = time.monotonic()
    assert not served.left_alone
    served.guard.quiet_since -= server.QUIET_S + 1
    monkeypatch.setattr(served.app_state.jobs, "views", list)
    assert served.left_alone
    served.guard.pages = 1
    assert not served.left_alone
    served.guard.pages = 0


def test_the_window_takes_no_torch_and_calls_nobody() -> None:
    """A start with sockets watched: only loopback is spoken to, and torch stays out."""
    code = """
import socket, sys
real, seen = socket.socket.connect, []
def connect(self, address):
    seen.append(address)
    return real(self, address)
socket.socket.connect = connect
from gui.app import serve
from core.jobs.manager import JobManager
from gui.state.plan_client import Planning
from gui.server import Served
class Silent(Planning):
    def _loop(self): return
server = serve(jobs=JobManager(dispatch=False), planning=Silent(), warm=False)
import http.client
c = http.client.HTTPConnection('127.0.0.1', server.port, timeout=20)
c.request('GET', '/en/', headers={'Cookie': f'{server.guard.cookie}={server.guard.token}'})
assert c.getresponse().status == 200
server.close()
heavy = {'torch', 'diffusers', 'transformers', 'peft', 'torchvision'} & set(sys.modules)
others = [a for a in seen if isinstance(a, tuple) and a[0] not in ('127.0.0.1', '::1')]
print(sorted(heavy), others)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.split("\n")[-2:] == ["[] []", ""], done.stderr


def test_the_port_that_is_wanted_is_taken_or_named(served: Served) -> None:
    from core.errors import UserError
    from gui import window
    with pytest.raises(UserError) as caught:
        window._serve(served.port, show=False)
    assert caught.value.code == "window.port_taken"


