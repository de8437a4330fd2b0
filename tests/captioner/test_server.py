"""Captioning a folder by a server with troubles: tests/servers/scripted.py, in a thread."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioner import job
from captioner.config import CaptionConfig
from captioner.models import endpoint, server, sight
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from tests.servers.scripted import Script, chat, scripted

RED = (200, 0, 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BACKOFF_S", 0.01)
    monkeypatch.setattr(server, "PATIENCE_S", 5.0)
    monkeypatch.setattr(server, "BLIND_PATIENCE_S", 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, the third of them red."""
    for n in range(6):
        Image.new("RGB", (16, 16), "red" if n == 2 else "blue").save(tmp_path / f"{n}.png")
    return tmp_path


class Ran:
    def __init__(self, script: Script, folder: Path, control: Control | None = None,
                 listen: Callable[[Event], None] | None = None, **keys: Any) -> None:
        self.events: list[Event] = []

        def emit(event: Event) -> None:
            self.events.append(event)
            if listen:
                listen(event)

        config = CaptionConfig(folder=str(folder), **{
            "captioner": "endpoint", "endpoint": script.address, "timeout_s": 10, **keys})
        self.result = job.caption(config, emit, control or Control())

    @property
    def notes(self) -> list[Note]:
        return [event for event in self.events if isinstance(event, Note)]


def captioned(folder: Path) -> list[int]:
    return [n for n in range(6) if (folder / f"{n}.txt").is_file()]


def error(status: int, message: str, **more: Any) -> tuple[int, Any]:
    return status, {"error": {"message": message, **more}}


# --- faults of one picture --------------------------------------------------------------------

@pytest.mark.parametrize(("told", "code"), [
    (error(400, "The response was filtered due to content policy.", code="content_filter"),
     "endpoint.filtered"),
    (error(403, "Your chosen model requires moderation and your input was flagged"),
     "endpoint.filtered"),
    (error(200, "data_inspection_failed: may contain inappropriate content"),
     "endpoint.filtered"),
    (error(400, "request (5000 tokens) exceeds the available context size (4096 tokens)"),
     "endpoint.context"),
    (error(400, "could not decode image"), "endpoint.refuses"),
    (error(400, "names are case-sensitive"), "endpoint.refuses"),
    (error(413, "too large"), "endpoint.refuses"), (error(404, "none"), "endpoint.no_route"),
    (error(500, "CUDA error"), "endpoint.fails"), ((0, b""), "endpoint.breaks"),
    ((200, b"{"), "endpoint.not_json"), ((200, b"<html>a page"), "endpoint.web_page"),
    (chat("", "content_filter"), "endpoint.filtered"),
    ((200, {"choices": [{"finish_reason": "content_filter: PROHIBITED_CONTENT",
                         "message": {"role": "assistant"}}]}), "endpoint.filtered"),
    (chat("A red", "content_filter"), "endpoint.filtered"), (chat(None), "endpoint.empty"),
    (chat(None, refusal="I can't help."), "endpoint.refused"),
    (chat("", reasoning_content="The user wants"), "endpoint.unclear"),
    (chat("", "length", reasoning_content="The user wants"), "endpoint.thinking"),
    (chat("I’m sorry, but I can’t assist with that."), "endpoint.refused"),
    (chat('{"a": "b", "c": "d"}'), "endpoint.unclear"), (chat("word " * 900), "endpoint.unclear"),
    ({"choices": []}, "endpoint.other_format"), ((200, b"null"), "endpoint.other_format")])
def test_a_fault_belongs_to_its_picture(folder: Path, told: Any, code: str) -> None:
    with scripted(lambda body, colour, n: told if colour > RED else "A picture.") as script:
        ran = Ran(script, folder)
        assert captioned(folder) == [0, 1, 3, 4, 5]
        assert [(one["picture"], one["code"]) for one in ran.result["failed"]] == [("2.png", code)]
        # Told with its picture's name and what the server said.
        note, = [note for note in ran.notes if note.key == "runner.failed"]
        assert note.params["picture"] == "2.png"
        assert note.params["reason"]["say"] == code
        json.dumps(ran.result)
        # The others are not asked again for one that failed.
        tries = server.TRIES if code in ("endpoint.fails", "endpoint.breaks") else 1
        assert len(script.asked) == 5 + tries


def test_the_same_job_again_asks_for_what_failed_only(folder: Path) -> None:
    healed = False

    def answer(body: Any, colour: Any, n: int) -> Any:
        return "A picture." if healed or colour < RED else chat("I can't see it.")

    with scripted(answer) as script:
        ran = Ran(script, folder, existing="replace")
        assert ran.result["failed"][0]["params"]["answer"] == "I can't see it."
        healed, asked = True, len(script.asked)
        again = Ran(script, folder, existing="replace")
    assert len(script.asked) == asked + 1
    assert (again.result["captioned"], again.result["resumed"]) == (1, 5)
    assert captioned(folder) == [*range(6)]
    assert again.result["failed"] == []


def test_a_picture_that_hangs_keeps_none_of_the_others_waiting(folder: Path) -> None:
    others_have_come = threading.Event()

    def answer(body: Any, colour: Any, n: int) -> str:
        if colour > RED:
            assert others_have_come.wait(8)
        return "A picture."

    def look_later() -> None:
        """Once the job waits for the last one, the others' captions are there."""
        until = time.monotonic() + 6
        while captioned(folder) != [0, 1, 3, 4, 5] and time.monotonic() < until:
            time.sleep(0.02)
        if captioned(folder) == [0, 1, 3, 4, 5]:
            others_have_come.set()

    def look(event: Event) -> None:
        if isinstance(event, Phase) and event.done == 5:
            threading.Thread(target=look_later).start()

    with scripted(answer) as script:
        assert Ran(script, folder, listen=look).result["captioned"] == 6


def test_a_picture_that_takes_too_long(folder: Path) -> None:
    def answer(body: Any, colour: Any, n: int) -> str:
        time.sleep(1.5 if colour > RED else 0)
        return "A picture."

    with scripted(answer) as script:
        ran = Ran(script, folder, timeout_s=0.7)
    assert captioned(folder) == [0, 1, 3, 4, 5]
    assert ran.result["failed"][0]["code"] == "endpoint.slow"


@pytest.mark.parametrize(("said", "written"), [
    ("A red\0 circle.", "A red circle."), ("\x1b[31mA red\x1b[0m circle.\ufeff", "A red circle."),
    ("A \ud83d red circle.", "A red circle."), ("A red\u202e circle.\r\n", "A red circle.")])
def test_signs_that_no_file_takes(folder: Path, said: str, written: str) -> None:
    with scripted(lambda *_: said) as script:
        Ran(script, folder)
    assert (folder / "0.txt").read_text("utf-8") == written


# --- faults of the job ------------------------------------------------------------------------

@pytest.mark.parametrize(("told", "code"), [
    (error(401, "no key"), "endpoint.key"), (error(403, "forbidden"), "endpoint.key"),
    (error(402, "pay"), "endpoint.unpaid"),
    (error(429, "You exceeded your current quota", code="insufficient_quota"), "endpoint.unpaid"),
    ((307, b"", {"Location": "http://example.com/"}), "endpoint.redirects"),
    ((429, b"", {"Retry-After": "86400"}), "endpoint.too_busy"),
    (error(429, "slow down"), "endpoint.too_busy")])
def test_what_ends_a_job(folder: Path, told: Any, code: str) -> None:
    turns, told_fine = iter([told, *["A picture."] * 3, *[told] * 50]), 0

    def answer(*_: Any) -> Any:
        nonlocal told_fine
        turn = next(turns)
        told_fine += turn == "A picture."
        return turn

    with scripted(answer) as script, pytest.raises(UserError) as caught:
        Ran(script, folder)
    assert caught.value.code == code
    # What was under way is written.
    assert len(captioned(folder)) == told_fine


def test_a_server_that_goes_away_ends_the_job() -> None:
    with scripted() as script:
        captioner = endpoint.Endpoint(CaptionConfig(folder="", endpoint=script.address))
        captioner.load()
    assert "endpoint.down" not in captioner.of_one_picture | captioner.may_pass
    with pytest.raises(UserError) as caught:
        captioner.describe([captioner.prepare(Image.new("RGB", (8, 8)))])
    assert caught.value.code == "endpoint.down"


def test_several_in_a_row_end_it_and_some_in_between_do_not(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "AT_ONCE", 1)
    for n in range(30):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n:02}.png")
    with scripted(lambda *_: error(400, "no images, please")) as script:
        with pytest.raises(UserError) as caught:
            Ran(script, tmp_path)
        assert caught.value.code == "endpoint.refuses"
        assert len(script.asked) in (5, 6)          # one may be under way
    with scripted(lambda body, colour, n: error(400, "no") if n % 2 else "A picture.") as script:
        assert len(Ran(script, tmp_path).result["failed"]) == 15
    # What a model won't say never ends it: the next picture may be fine.
    with scripted(lambda *_: "I'm sorry, I can't.") as script:
        assert len(Ran(script, tmp_path, existing="replace").result["failed"]) == 30


# --- limits, by the clock ---------------------------------------------------------------------

def date(seconds: float, zone: bool = True) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=zone)


@pytest.mark.parametrize(("headers", "words", "seconds"), [
    ({"Retry-After": "12"}, "", 12), ({"Retry-After": " 1.5 "}, "", 1.5),
    ({"Retry-After": "0"}, "try again in 9s", 0), ({"retry-after-ms": "250"}, "", 0.25),
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}, "",
     30), ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "", 0),
    ({"Retry-After": "soon"}, "Please try again in 12s.", 12), ({}, "try again in 500ms", 0.5),
    ({}, "Limit 3, Used 3. Please try again in 1m12.5s. Visit", 72.5),
    ({}, "try again in 6m0s", 360),
    ({}, "Please retry after 20 seconds.", 20), ({}, "Try again in 2 minutes", 120),
    ({}, "try again in 1h2m3s", 3723), ({}, '"retryDelay": "34s"', 34), ({}, "slow down, 429", 0),
    ({}, "please try again later", 0), ({}, "", 0)])
def test_how_long_a_server_wants_peace(headers: dict[str, str], words: str, seconds: float) -> None:
    import httpx
    assert server.wait_of(httpx.Headers(headers), words) == pytest.approx(seconds)


def test_a_date_is_waited_for(folder: Path) -> None:
    assert 28 < server.wait_of({"Retry-After": date(30)}, "") <= 30


@pytest.mark.parametrize("told", [
    (429, b"", {"Retry-After": "0.3"}), error(429, "Please try again in 300ms."),
    (503, b"loading", {"Retry-After": "0.3"})])
def test_a_limit_holds_until_its_time_for_all(folder: Path, told: Any) -> None:
    until = 0.0
    early = 0

    def answer(body: Any, colour: Any, n: int) -> Any:
        nonlocal until, early
        until = until or time.monotonic() + 0.3
        early += time.monotonic() < until
        return told if time.monotonic() < until else "A picture."

    with scripted(answer) as script:
        assert Ran(script, folder).result["captioned"] == 6
    assert early <= endpoint.AT_ONCE                # those that were under way


def test_a_long_wait_is_told_and_a_stop_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch
                                                ) -> None:
    monkeypatch.setattr(server, "PATIENCE_S", 100.0)
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, Note) and event.key == "endpoint.waits":
            assert event.params["seconds"] == 60
            control.ask("stop")

    with scripted(lambda *_: (429, b"", {"Retry-After": "60"})) as script:
        ran = Ran(script, folder, control, stop)
    assert ran.result["state"] == "stopped"
    assert ran.result["failed"] == []


# --- what a server doesn't take ---------------------------------------------------------------

def strict(*names: str, status: int = 400, words: str = "Unsupported parameter: '{}'",
           **more: Any) -> Callable[..., Any]:
    def answer(body: dict[str, Any], colour: Any, n: int) -> Any:
        for name in names:
            if name in body:
                return error(status, words.format(name), **more)
        return "A picture."
    return answer


@pytest.mark.parametrize(("answer", "left", "told"), [
    (strict("max_tokens", words="'{}' is not supported. Use 'max_completion_tokens' instead."),
     {"max_completion_tokens", "seed", "stream", "temperature"}, []),
    (strict("max_tokens", "max_completion_tokens"), {"seed", "stream", "temperature"},
     ["max_completion_tokens"]),
    (strict("temperature", "seed"), {"max_tokens", "stream"}, ["temperature", "seed"]),
    (strict("seed", status=422), {"max_tokens", "stream", "temperature"}, ["seed"]),
    (strict("seed", status=500, words="got an unexpected keyword argument '{}'"),
     {"max_tokens", "stream", "temperature"}, ["seed"]),
    (strict("stream", words="Unknown field: {}"), {"max_tokens", "seed", "temperature"}, []),
    (strict("temperature", words="Use max_tokens or seed instead.", param="temperature"),
     {"max_tokens", "seed", "stream"}, ["temperature"])])
def test_refused_fields_are_left_out_for_the_job(folder: Path, answer: Any, left: set[str],
                                                 told: list[str]) -> None:
    with scripted(answer) as script:
        ran = Ran(script, folder)
    assert ran.result["captioned"] == 6
    assert script.asked[-1].keys() - {"model", "messages"} == left
    assert [note.params["name"] for note in ran.notes
            if note.key == "endpoint.left_out"] == told
    # Found out once, not for each picture.
    assert len(script.asked) <= 6 + 3 * endpoint.AT_ONCE


def test_a_server_that_streams_only(folder: Path) -> None:
    def answer(body: dict[str, Any], colour: Any, n: int) -> Any:
        if not body["stream"]:
            return error(400, "This model only supports stream mode, enable the stream parameter.")
        return 200, streamed("A ", "pic", "ture."), {"Content-Type": "text/event-stream"}

    with scripted(answer) as script:
        assert Ran(script, folder).result["captioned"] == 6
    assert (folder / "0.txt").read_text() == "A picture."


# --- answers of other forms -------------------------------------------------------------------

def streamed(*parts: str, finish: str | None = "stop", end: str = "data: [DONE]\n\n") -> bytes:
    rows = [{"choices": [{"delta": {"role": "assistant", "reasoning_content": "hm"}}]},
            *({"choices": [{"delta": {"content": part}}]} for part in parts),
            {"choices": [{"delta": {}, "finish_reason": finish}]}, {"choices": [], "usage": {}}]
    lines = "".join(f"data: {json.dumps(row, ensure_ascii=False)}\n\n" for row in rows)
    return (": keep-alive\n\n" + lines + end).encode()


@pytest.mark.parametrize(("body", "caption"), [
    (streamed("A red", " disc."), "A red disc."), (streamed("A disc.", end=""), "A disc."),
    (streamed("一个", "圆\u2028盘。", finish=None), "一个圆 盘。"),
    (streamed("A disc. It li", finish="length"), "A disc."),
    (b"\xef\xbb\xbf" + streamed("A disc.").replace(b"\n", b"\r\n"), "A disc."),
    (b"\xef\xbb\xbf" + json.dumps(chat("A disc.")).encode(), "A disc."),
    (json.dumps({"choices": [{"text": "A disc.", "finish_reason": "stop"}]}).encode(), "A disc."),
    (json.dumps(chat("red, disc, pap", "length")).encode(), "red, disc")])
def test_answers_of_other_forms(folder: Path, body: bytes, caption: str) -> None:
    with scripted(lambda *_: (200, body)) as script:
        Ran(script, folder, only=["0.png"])
    assert (folder / "0.txt").read_text("utf-8") == caption


def test_a_stream_that_breaks_off_is_asked_for_again(folder: Path) -> None:
    with scripted(lambda body, colour, n: (200, streamed("A dis", finish=None, end="")) if n == 1
                  else (200, streamed("A disc."))) as script:
        Ran(script, folder, only=["0.png"])
    assert (folder / "0.txt").read_text("utf-8") == "A disc."


# --- which model sees -------------------------------------------------------------------------

def loaded(script: Script, model: str = "auto") -> endpoint.Endpoint:
    captioner = endpoint.Endpoint(CaptionConfig(
        folder="", endpoint=script.address, models={"endpoint": model}, timeout_s=10))
    captioner.load()
    return captioner


@pytest.mark.parametrize(("blind", "seeing"), [
    ("llama3.2:3b", "gemma4:e4b"), ("mistral:7b", "qwen3.5:9b"), ("glm-4.6", "glm-4.6v"),
    ("codestral:22b", "mistral-small3.2:24b"), ("gpt-3.5-turbo", "gpt-4o"), ("dall-e-3", "gpt-4o"),
    ("llama3.2:3b", "qwen2.5vl:7b"), ("gemma3:1b", "gemma3:4b"), ("qwen3:8b", "qwen3-vl:8b"),
    ("o3-mini", "o4-mini"), ("phi4", "phi-4-multimodal"), ("deepseek-r1", "moondream:1.8b"),
    ("gpt-4o-audio-preview", "gpt-4.1-mini"), ("nomic-embed-vision", "llava:7b"),
    ("minicpm4", "minicpm-v:8b"), ("glm4:9b", "InternVL3-8B"), ("mixtral", "pixtral-12b")])
def test_names_tell_where_a_server_does_not(blind: str, seeing: str) -> None:
    assert sight.by_name([blind, seeing])[0] == seeing


@pytest.mark.parametrize(("row", "said"), [
    ({"architecture": {"input_modalities": ["text", "image"]}}, True),
    ({"architecture": {"input_modalities": ["text"]}}, False),
    ({"architecture": {"modality": "text+image->text"}}, True),
    ({"architecture": {"modality": "text->text+image"}}, False),
    ({"type": "vlm"}, True), ({"type": "llm"}, False), ({"type": "embeddings"}, False),
    ({"type": "llm", "capabilities": {"vision": True}}, True),
    ({"capabilities": ["completion", "vision"]}, True), ({"capabilities": ["completion"]}, False),
    ({"capabilities": ["completion", "multimodal"]}, True), ({"supports_image_in": False}, False),
    ({"capabilities": {"completion_chat": True, "vision": False}}, False), ({}, None),
    ({"type": "chat", "object": "model", "capabilities": []}, None)])
def test_what_a_row_says(row: dict[str, Any], said: bool | None) -> None:
    assert sight.sees(row) is said


def test_a_server_is_asked_before_names_are_read() -> None:
    """Names that say the opposite: in the list, LM Studio's list, Ollama's route."""
    rows = {"fine-vl": False, "my-model": True}
    studio = {"data": [{"id": name, "type": "vlm" if sees else "llm"}
                       for name, sees in rows.items()]}
    models = (*rows,)
    with scripted(get=lambda path: (200, {"data": [
            {"id": name, "architecture": {"input_modalities": ["image"] if sees else ["text"]}}
            for name, sees in rows.items()]})) as script:
        assert loaded(script).model == "my-model"
        assert script.paths == ["/v1/models"]
    with scripted(models=models, get=lambda path: (200, studio) if path == "/api/v0/models"
                  else None) as script:
        assert loaded(script).model == "my-model"
    with scripted(models=models, post=lambda path, body: (
            200, {"capabilities": ["completion", *["vision"] * rows[body["model"]]]})
            if path == "/api/show" else None) as script:
        assert loaded(script).model == "my-model"
        assert script.asked == []
        assert [note.key for note in loaded(script, "fine-vl").notes] == ["endpoint.may_be_blind"]
        assert loaded(script, "my-model").notes == []


def test_a_server_whose_models_are_all_blind() -> None:
    with scripted(get=lambda path: (200, {"data": [{"id": "tiny-vl", "type": "llm"}]})) as script:
        with pytest.raises(UserError, match="tiny-vl"):
            loaded(script)
        # A name counts more than what the server says, but is warned of.
        assert [note.key for note in loaded(script, "tiny-vl").notes] == ["endpoint.may_be_blind"]


def test_a_list_of_models_without_an_object_around_it() -> None:
    with scripted(get=lambda path: (200, [{"id": "a-vl"}])) as script:
        assert loaded(script).model == "a-vl"


def test_of_loaded_models_in_lm_studio_the_first_that_sees() -> None:
    rows = [{"id": "a-vl", "type": "vlm", "state": "not-loaded"},
            {"id": "b-vl", "type": "vlm", "state": "loaded"}]
    with scripted(models=("a-vl", "b-vl"), get=lambda path: (200, {"data": rows})
                  if path == "/api/v0/models" else None) as script:
        assert loaded(script).model == "b-vl"


def test_else_a_red_picture_is_tried() -> None:
    def answer(body: dict[str, Any], colour: tuple[int, int, int], n: int) -> Any:
        assert colour > RED
        return {"one": error(400, "no images"), "two": "Blue, I guess.",
                "three": "<think>It is green?</think> Red."}[body["model"]]

    with scripted(answer, models=("one", "two", "three")) as script:
        assert loaded(script).model == "three"
    with scripted(answer, models=("one", "two")) as script:
        assert loaded(script).model == "two"
    with scripted(lambda *_: error(400, "no images"), models=("one", "two")) as script, \
            pytest.raises(UserError) as caught:
        loaded(script)
    assert caught.value.code == "endpoint.blind"


@pytest.mark.parametrize("told", [(404, b"no"), (501, b"no"), (200, b"<html>"), (401, b""),
                                  (403, b"missing scopes"), (500, b""), (200, b"[]")])
def test_a_named_model_needs_no_list(folder: Path, told: Any) -> None:
    with scripted(get=lambda path: told) as script:
        ran = Ran(script, folder, models={"endpoint": "tiny-vl"})
        assert ran.result["captioned"] == 6
        with pytest.raises(UserError):
            loaded(script)


def test_a_name_that_is_not_listed_is_tried() -> None:
    known = {"tiny-vl", "alias"}
    with scripted(lambda body, *_: "Red." if body["model"] in known else error(404, "not found")
                  ) as script:
        assert loaded(script, "alias").model == "alias"
        assert loaded(script, "TINY-VL").model == "TINY-VL"
        assert len(script.asked) == 1
        with pytest.raises(UserError, match="tiny-vl"):
            loaded(script, "tiny-lv")
