"""The door, over real HTTP: who may ask, what can be read, what leaves the machine (nothing)."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import paths
from core.jobs import runs
from core.jobs.events import Checkpoint, Sample
from core.jobs.journal import Journal
from core.jobs.manager import JobManager
from gui import security, server
from gui.app import serve
from gui.server import Served
from gui.state.page import _carried
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
        sent["Cookie"] = f"{served.guard.cookie}={served.guard.secret}"
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    found = answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
    connection.close()
    return found


def door() -> Iterator[tuple[int, str, str, dict[str, str]]]:
    """(status, method, path, headers): all that may knock. {here} is our host and port, {port}
    our port, {cookie} our cookie; without a cookie named, the right one is shown."""
    ways = ("/en/", "/en/config", "/live.js", "/en/gradio_api/upload", "/en/live", "/focus")
    for path in ways:
        for host in ("evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}",
                     "127.0.0.1", "127.0.0.1:1", "localhost", "0.0.0.0:{port}", "[::1]:{port}",
                     "127.1:{port}", "2130706433:{port}", "127.0.0.1:{port}.", "LOCALHOST:{port}"):
            yield 400, "GET", path, {"Host": host}
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "https://{here}",
                       "http://localhost.evil.example:{port}", "http://{here}.evil.example",
                       "file://", "http://127.0.0.1"):
            yield 403, "POST", path, {"Origin": origin}
        for site in ("cross-site", "same-site", "nonsense"):
            yield 403, "GET", path, {"Sec-Fetch-Site": site}
        for cookie in ("", "x=y", "darkroom_{port}=", "darkroom_{port}=wrong",
                       "darkroom_1={secret}", "darkroom={secret}", "{cookie}x",
                       "darkroom_{port}=\xff", "\x01={secret}"):
            yield 403, "GET", path, {"Cookie": cookie}
        for token in ("", "wrong", "{secret}", "%00", "../"):       # the cookie's is no token
            yield 403, "GET", f"{path}?token={token}", {"Cookie": ""}
        yield 403, "POST", f"{path}?token={{secret}}", {"Cookie": ""}
    for path in ("/en/gradio_api/file=", "/en/file=", "/file=", "/zh-CN/gradio_api/file="):
        for file in ("/etc/passwd", "../../../../etc/passwd", "..%2f..%2fsettings.yaml", "~/.ssh",
                     "%2Fetc%2Fpasswd", "C:%5CWindows%5Cwin.ini", "//etc/passwd", "file:///etc/x",
                     "{home}/settings.yaml", "{home}/window.json", "{home}/runs",
                     "{root}/README.md", "http://127.0.0.1:{port}/focus", "."):
            yield 404, "GET", path + file, {}
    for path in ("/nothing", "/en/../etc", "/docs", "/openapi.json", "/redoc", "/en/docs",
                 "/en/gradio_api/runs", "/picture/../0",
                 "/lora/%2e%2e/0", "/picture/x/-1", "/language/xx", "/theme/pink",
                 "/en/gradio_api/proxy=https://evil.example"):
        yield 404, "GET", path, {}
    for path in ("/en/", "/zh-CN/", "/en/config", "/live.js", "/favicon.ico"):
        for good in ({}, {"Host": "localhost:{port}"}, {"Sec-Fetch-Site": "none"},
                     {"Sec-Fetch-Site": "same-origin", "Origin": "http://{here}"},
                     {"Cookie": "other=1; {cookie}; more=2"}):
            yield 200, "GET", path, good


def test_the_door(served: Served) -> None:
    (Path(os.environ["DARKROOM_HOME"]) / "settings.yaml").touch()
    names = {"here": f"127.0.0.1:{served.port}", "port": str(served.port),
             "secret": served.guard.secret, "home": quote(os.environ["DARKROOM_HOME"]),
             "cookie": f"{served.guard.cookie}={served.guard.secret}", "root": quote(str(ROOT))}
    wrong, checks = [], list(door())
    assert len(checks) >= 115
    for status, method, path, headers in checks:
        sent = {name.replace("-", "_"): value.format(**names) for name, value in headers.items()}
        found, body, told = ask(served, path.format(**names), method,
                                b"" if method == "POST" else None, **sent)
        # 403 and 404 both refuse a file; 422 a number that is none.
        fine = found == status or (status == 404 and found in (403, 405, 422, 400))
        if not fine or b"root:" in body or "content-security-policy" not in told or (
                status != 200 and "set-cookie" in told):
            wrong.append((status, found, method, path, headers))
    assert not wrong


@pytest.mark.parametrize("path", PAGES)
def test_nothing_answers_without_the_token(served: Served, path: str) -> None:
    assert ask(served, path, cookie=False)[0] == 403
    assert ask(served, path, cookie=False, Cookie=f"{served.guard.cookie}=wrong")[0] == 403
    assert ask(served, f"{path}?token=wrong", cookie=False)[0] == 403


def test_a_token_opens_the_door_once_and_leaves_the_address(served: Served) -> None:
    token = served.url.partition("token=")[2]
    status, _, headers = ask(served, f"/?a=1&token={token}", cookie=False)
    assert status == 303
    assert headers["location"] == "/?a=1"
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=Strict" in headers["set-cookie"]
    assert token not in headers["set-cookie"]
    assert ask(served, f"/?token={token}", cookie=False)[0] == 403
    # Once more from the same browser: its history, a terminal.
    status, _, headers = ask(served, f"/en/?token={token}")
    assert (status, headers["location"]) == (303, "/en/")
    assert ask(served, "/focus", "POST")[0] == 200


@pytest.mark.parametrize("path", ["//evil.example/", "///evil.example", "/\\\\evil.example/",
                                  "/%5C%5Cevil.example/", "/%2F%2Fevil.example/", "/@evil.example/",
                                  "/https:/evil.example/"])
def test_no_redirect_leaves_the_site(served: Served, path: str) -> None:
    target = ask(served, f"{path}?token={served.url.partition('token=')[2]}",
                 cookie=False)[2]["location"]
    assert re.match(r"/[^/\\\s]", target)
    assert "\\" not in target


@pytest.mark.parametrize("sign", ["%00", "%09", "%0A", "%0D", "%0D%0Aset-cookie:%20x=1", "%1B",
                                  "%7F"])
def test_control_characters_are_no_path(served: Served, sign: str) -> None:
    for path in (f"/{sign}", f"/{sign}/evil.example", f"/en/{sign}", f"/picture/{sign}/0"):
        assert ask(served, path)[0] == 400
        assert ask(served, f"{path}?token={served.url.partition('token=')[2]}",
                   cookie=False)[0] == 400


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells whose it is")
def test_a_browsers_command_line_opens_the_door_once_and_to_its_user_only(
        served: Served) -> None:
    shown = served.guard.address_to_show()
    assert shown == f"http://127.0.0.1:{served.port}/"
    for site in ("cross-site", "same-site"):            # a page elsewhere can't use it up
        assert ask(served, "/", cookie=False, Sec_Fetch_Site=site)[0] == 403
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(security, "_TRUSTED", {os.getuid() + 1})
        assert ask(served, "/", cookie=False)[0] == 403         # of another user
        assert ask(served, "/en/config")[0] == 403              # though the cookie be right
    assert ask(served, "/", "POST", cookie=False)[0] == 403
    assert ask(served, "/en/", cookie=False)[0] == 403
    status, _, headers = ask(served, "/", cookie=False)
    assert (status, headers["location"]) == (303, "/")
    assert served.guard.secret in headers["set-cookie"]
    assert ask(served, "/", cookie=False)[0] == 403
    served.guard.address_to_show()
    with pytest.MonkeyPatch.context() as patch:
        now = time.monotonic()
        patch.setattr(time, "monotonic", lambda: now + 61)      # no browser came
        assert ask(served, "/", cookie=False)[0] == 403


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells whose it is")
def test_whose_a_connection_is_by_both_whole_addresses() -> None:
    """Another user may hold the same port at another address of this computer."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        ours, theirs = client.getsockname(), listener.getsockname()
        assert security.user_of(ours, theirs) == os.getuid()
        assert security.user_of(("127.0.0.2", ours[1]), theirs) is None
        assert security.user_of(ours, ("127.0.0.2", theirs[1])) is None


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="another user is needed")
@pytest.mark.parametrize("family", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_another_user_is_refused_whatever_he_knows(served: Served, family: str) -> None:
    """By a socket of either address family."""
    code = ("import encodings.idna, http.client, os, sys\nos.setuid(65534)\n"
            "c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=20)\n"
            "c.request('GET', '/en/config', headers={'Host': '127.0.0.1:' + sys.argv[2], "
            "'Cookie': sys.argv[3]})\nprint(c.getresponse().status)")
    done = subprocess.run([sys.executable, "-c", code, family, str(served.port),
                           f"{served.guard.cookie}={served.guard.secret}"],
                          capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "403", done.stderr


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
    policy = headers["content-security-policy"].split("; ")
    scripts = next(line for line in policy if line.startswith("script-src"))
    assert re.fullmatch(r"script-src 'self' 'nonce-[\w-]{20,}' 'unsafe-eval'", scripts)
    assert ask(served, "/en/")[2]["content-security-policy"] != headers["content-security-policy"]
    assert "nonce" not in ask(served, "/en/config")[2]["content-security-policy"]
    assert headers["cache-control"] == "no-store"
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
c.request('GET', '/en/', headers={'Cookie': f'{server.guard.cookie}={server.guard.secret}'})
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




def test_the_page_asks_not_to_be_translated(served: Served) -> None:
    for path in ("/en/", "/zh-CN/"):
        page = ask(served, path)[1].decode()
        assert '<meta name="google" content="notranslate">' in page
        # First of all scripts, and with the page's nonce each.
        assert page.index("documentElement.translate = false") < page.index("gradio_config")
        assert len(re.findall(r"<script nonce=", page)) == page.count("<script") > 5


def test_half_a_request_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds connections would shut others out; a whole one is answered beside them."""
    monkeypatch.setattr(server, "HEADER_S", 0.3)
    place = "127.0.0.1", served.port
    halves = [b"", b"GET", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "]
    held = [socket.create_connection(place, timeout=20) for _ in range(40)]
    for number, one in enumerate(held):
        one.sendall(halves[number % len(halves)])
    assert ask(served, "/en/config")[0] == 200
    assert all(one.recv(100) == b"" for one in held)    # closed by the server
    for one in held:
        one.close()
    # Half of a second request on a connection that had one.
    with socket.create_connection(place, timeout=20) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT")
        answer = b""
        while part := one.recv(1000):
            answer += part
        assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("named", [True, False])
def test_records_are_for_their_owner_alone(tmp_path: Path, named: bool,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "nt":
        pytest.skip("Windows keeps users' folders apart itself")
    home = tmp_path / "home"
    if named:
        monkeypatch.setenv("DARKROOM_HOME", str(home))
    else:
        monkeypatch.delenv("DARKROOM_HOME")
        monkeypatch.setattr(paths, "data_dir", lambda: home)
        monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path / "cache")
        monkeypatch.setattr(paths, "log_dir", lambda: tmp_path / "log")
    (home / "runs").mkdir(parents=True, mode=0o755)
    home.chmod(0o755)
    paths.keep_private()
    modes = {folder.name: folder.stat().st_mode & 0o777 for folder in (home, home / "runs")}
    # A folder that the user named keeps its own rights.
    assert modes == ({"home": 0o755, "runs": 0o700} if named else {"home": 0o700, "runs": 0o755})
    private = home / "secret.json"
    with paths.atomic(private, private=True) as temporary:
        temporary.write_text("x")
    assert private.stat().st_mode & 0o777 == 0o600


@given(st.lists(st.fixed_dictionaries({
    "text": st.text(st.sampled_from("<>&'\"/ab\\\u2028\x00字")), "kind": st.just("info")}),
    max_size=3))
def test_messages_travel_as_no_tag(messages: list[dict[str, str]]) -> None:
    carried = _carried(messages)
    assert not set("<>&") & set(carried)
    assert json.loads(carried) == messages
