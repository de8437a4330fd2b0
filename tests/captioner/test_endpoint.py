"""captioner/models/endpoint.py against a real HTTP server process: tests/servers/chat.py."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner.config import CaptionConfig
from captioner.models import endpoint
from captioner.models import server as client
from core.errors import UserError
from tests.calls import ROOT, serving


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    yield from serving("tests.servers.chat")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(client, "PATIENCE_S", 0.1)
    monkeypatch.setattr(client, "BLIND_PATIENCE_S", 0.1)


def opened(server: str, mode: str = "good", **options: Any) -> endpoint.Endpoint:
    captioner = endpoint.Endpoint(CaptionConfig(folder="", endpoint=f"{server}/{mode}/v1",
                                                **{"timeout_s": 20, **options}))
    captioner.load()
    return captioner


def plain(colour: str = "red", size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def described(captioner: endpoint.Endpoint, *colours: str) -> list[str]:
    return [one.sentence for one in
            captioner.describe([captioner.prepare(plain(colour)) for colour in colours])]


def ask(server: str, route: str) -> Any:
    with urllib.request.urlopen(f"{server}/{route}") as answer:
        return json.load(answer)


def posts(server: str, mode: str) -> list[dict[str, Any]]:
    return [one for one in ask(server, "log") if one["path"].startswith(f"/{mode}/")
            and "body" in one]


def code(call: object) -> str:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    assert "{" not in str(caught.value).replace('{"', "")
    return caught.value.code


# --- what is sent, what comes back ---

def test_a_batch_in_order_and_a_few_at_once(server: str) -> None:
    captioner = opened(server)
    colours = ["red", "blue"] * 4
    assert described(captioner, *colours) == [f"A {colour} picture." for colour in colours]
    assert 2 <= ask(server, "most") <= endpoint.AT_ONCE
    assert described(captioner, "blue") == ["A blue picture."]
    assert captioner.describe([]) == []


def test_the_request(server: str) -> None:
    captioner = opened(server, "request", prompt="Say {trigger} first. {caption} / {tags} / {x y}",
                       trigger_word="sks", max_tokens=77, seed=5)
    image = plain("blue", (4096, 1024))
    image.info["darkroom"] = {"caption": "old {tags}", "tags": "a, b"}
    captioner.describe([captioner.prepare(image)])
    sent = posts(server, "request")[-1]
    assert sent["picture"] == "1024x256 JPEG"
    body = sent["body"]
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "Say sks first. old {tags} / a, b / {x y}"}]
    assert body["model"] == "tiny-vl"
    assert (body["max_tokens"], body["seed"], body["stream"]) == (77, 5, False)
    assert body["temperature"] == 0.0
    drawn = opened(server, "request", sample=True, temperature=0.7, top_p=0.5)
    described(drawn, "red")
    body = posts(server, "request")[-1]["body"]
    assert (body["temperature"], body["top_p"]) == (0.7, 0.5)
    assert body["max_tokens"] == endpoint.LENGTH


def test_small_pictures_stay_small(server: str) -> None:
    described(opened(server, "small"), "red")
    assert posts(server, "small")[-1]["picture"] == "64x48 JPEG"


@pytest.mark.parametrize("mode", ["think", "chatty", "parts", "busy", "hangup", "half"])
def test_still_a_caption(server: str, mode: str) -> None:
    assert described(opened(server, mode), "red") == ["A red picture."]


def test_a_cut_answer_ends_at_a_sentence(server: str) -> None:
    assert described(opened(server, "cut"), "red") == ["A red picture."]


def test_key_comes_from_the_environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code(lambda: opened(server, "secret")) == "endpoint.key"
    monkeypatch.setenv(client.KEY, "open")
    assert described(opened(server, "secret"), "red") == ["A red picture."]
    assert posts(server, "secret")[-1]["key"] == "Bearer open"


@pytest.mark.parametrize("key", ["sk-1\n", "clé", "a\x00b"])
def test_a_key_that_no_header_can_hold_is_told(server: str, monkeypatch: pytest.MonkeyPatch,
                                               key: str) -> None:
    if "\x00" in key:                   # the environment can't hold it either
        monkeypatch.setattr(client.os, "environ", {client.KEY: key})
    else:
        monkeypatch.setenv(client.KEY, key)
    with pytest.raises(UserError) as caught:
        endpoint.Endpoint(CaptionConfig(folder="", endpoint=server))
    assert caught.value.code == "endpoint.bad_key"
    assert key.strip() not in str(caught.value)


def test_no_proxy_heeds_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "nas:11434")
    proxies = [endpoint.Endpoint(CaptionConfig(folder="", endpoint=f"http://nas:{port}")).server.proxy
               for port in (11434, 8080)]
    assert proxies == [None, "http://127.0.0.1:9"]


def test_no_proxy_gets_what_stays_here(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert described(opened(server), "red") == ["A red picture."]


# --- models ---

def test_model_is_chosen_among_those_that_see(server: str) -> None:
    assert opened(server, "many").model == "qwen2.5vl:7b"
    assert opened(server, "texts").model == "llama3.2:3b"
    captioner = opened(server, "many", models={"endpoint": "llava:13b"})
    assert captioner.model == "llava:13b"
    assert captioner.notes == []
    assert [note.key for note in opened(server, "many").notes] == ["endpoint.chosen"]


def test_models_that_are_not_there(server: str) -> None:
    assert code(lambda: opened(server, "none")) == "endpoint.no_models"
    assert code(lambda: opened(server, "many", models={"endpoint": "gpt"})) == "endpoint.no_model"
    assert opened(server, "many", models={"endpoint": "nomic-embed-text"}).model


# --- what goes wrong ---

@pytest.mark.parametrize(("mode", "fault"), [
    ("page", "endpoint.web_page"), ("words", "endpoint.not_json"),
    ("list", "endpoint.other_format"), ("moved", "endpoint.redirects")])
def test_not_a_model_server(server: str, mode: str, fault: str) -> None:
    assert code(lambda: opened(server, mode)) == fault


def test_the_status_counts_where_its_page_breaks_off(server: str) -> None:
    assert code(lambda: described(opened(server, "tornpage"), "red")) == "endpoint.no_route"
    assert len(posts(server, "tornpage")) == 1


def test_a_packed_answer_is_not_unpacked(server: str) -> None:
    assert code(lambda: described(opened(server, "packed"), "red")) == "endpoint.not_json"


def test_wrong_path(server: str) -> None:
    captioner = endpoint.Endpoint(CaptionConfig(folder="", endpoint=f"{server}/good/v2"))
    assert code(captioner.load) == "endpoint.no_route"


@pytest.mark.parametrize(("mode", "fault"), [
    ("empty", "endpoint.empty"), ("thinkonly", "endpoint.thinking"),
    ("reasoning", "endpoint.thinking"), ("huge", "endpoint.too_long"),
    ("html", "endpoint.html"), ("refuses", "endpoint.refused"), ("other", "endpoint.other_format"),
    ("error200", "endpoint.refuses"), ("blind", "endpoint.refuses"), ("flood", "endpoint.huge"),
    ("always429", "endpoint.too_busy"), ("broken", "endpoint.fails")])
def test_one_clear_fault_each(server: str, mode: str, fault: str) -> None:
    captioner = opened(server, mode)
    assert code(lambda: described(captioner, "red")) == fault


def test_the_servers_own_reason_is_told(server: str) -> None:
    with pytest.raises(UserError, match="CUDA out of memory"):
        described(opened(server, "broken"), "red")
    assert len(posts(server, "broken")) % client.TRIES == 0
    with pytest.raises(UserError, match="does not support images"):
        described(opened(server, "blind"), "red")


@pytest.mark.parametrize("mode", ["silent", "drip"])
def test_slow_servers(server: str, mode: str) -> None:
    captioner = opened(server, mode, timeout_s=0.4)
    assert code(lambda: described(captioner, "red")) == "endpoint.slow"
    assert len(posts(server, mode)) == 1                # not asked again


def test_nobody_listens() -> None:
    captioner = endpoint.Endpoint(CaptionConfig(folder="", endpoint="127.0.0.1:9"))
    assert code(captioner.load) == "endpoint.down"


def test_server_that_dies_in_between() -> None:
    process = subprocess.Popen([sys.executable, "-m", "tests.servers.chat"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None
    captioner = opened(f"http://127.0.0.1:{int(process.stdout.readline())}")
    assert described(captioner, "red") == ["A red picture."]
    process.kill()
    process.wait()
    assert code(lambda: described(captioner, "red", "blue")) == "endpoint.down"


def test_faults_of_one_picture_are_named() -> None:
    from core import i18n
    assert all(name in i18n.catalogue("en") for name in endpoint.Endpoint.of_one_picture)


# --- addresses, prompts ---

@pytest.mark.parametrize(("written", "address"), [
    ("localhost:1234", "http://localhost:1234/v1"),
    ("http://127.0.0.1:11434/", "http://127.0.0.1:11434/v1"),
    ("http://127.0.0.1:8080/v1/chat/completions", "http://127.0.0.1:8080/v1"),
    ("http://127.0.0.1:8080/v1/models/", "http://127.0.0.1:8080/v1"),
    ("https://box.lan/openai/v1", "https://box.lan/openai/v1"),
    ("[::1]:80", "http://[::1]:80/v1")])
def test_addresses(written: str, address: str) -> None:
    assert client.address_of(written) == address


@pytest.mark.parametrize("written", ["", "ftp://x/v1", "http://", "http://a b", "http://u:p@h/v1",
                                     "http://h:99999/", "http://h/v1?x=1", "file:///etc/passwd"])
def test_bad_addresses(written: str) -> None:
    assert code(lambda: client.address_of(written)) == "endpoint.bad_address"


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_fault(text: str) -> None:
    with contextlib.suppress(UserError):
        address = client.address_of(text)
        assert address.startswith(("http://", "https://"))
        assert not any(sign.isspace() for sign in address)


@pytest.mark.parametrize(("host", "here"), [
    ("localhost", True), ("127.0.0.1", True), ("127.8.0.1", True), ("::1", True),
    ("192.0.2.7", False), ("localhost.example.com", False), ("0.0.0.0", False)])
def test_what_stays_on_this_machine(host: str, here: bool) -> None:
    assert client.is_here(host) is here


def test_pictures_that_leave_are_told_of(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = opened(server)
    assert "endpoint.leaves" not in [note.key for note in captioner.notes]
    monkeypatch.setattr(endpoint, "is_here", lambda host: False)
    captioner = opened(server)
    assert captioner.notes[0].key == "endpoint.leaves"
    assert captioner.notes[0].params == {"host": "127.0.0.1"}


def test_default_address_is_this_machine() -> None:
    captioner = endpoint.Endpoint(CaptionConfig(folder=""))
    assert captioner.address == "http://127.0.0.1:11434/v1"


def test_unknown_placeholder() -> None:
    with pytest.raises(UserError, match=r"\{trigger\}, \{caption\} and \{tags\}"):
        endpoint.Endpoint(CaptionConfig(folder="", prompt="Say {triger}"))


def test_identity_follows_the_options(server: str) -> None:
    first = opened(server).identity()
    assert first == opened(server).identity()
    for options in ({"prompt": "What?"}, {"seed": 1}, {"max_tokens": 9}):
        assert opened(server, **options).identity() != first


def test_takes_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c",
         "import sys, captioner.models.endpoint; print('torch' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
