"""Sentences from any OpenAI-compatible server: Ollama, LM Studio, llama.cpp, vLLM.

POST {endpoint}/chat/completions with the picture as a JPEG in a data URL. The address is this
machine's unless the user writes another one, which a note says; redirects are never followed,
so pictures go nowhere else. A key, where a server wants one, is read from DARKROOM_ENDPOINT_KEY.
Source of the format: the OpenAI API reference, chat completions.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from PIL import Image

from captioner.base import CaptionerSpec, Description
from captioner.config import CaptionConfig
from captioner.models.sentences import clean, is_refusal, whole_sentences
from captioner.pipeline import CONTEXT
from core.errors import UserError
from core.jobs.events import Note

PROMPT = ("Describe this picture in one to three sentences for training an image model: subject, "
          "setting, style, colours, light and composition. Only what can be seen, no "
          "introduction.")
KEY = "DARKROOM_ENDPOINT_KEY"
SIDE = 1024                             # px; longer sides are scaled down to it
QUALITY = 90                            # of the JPEG
LENGTH = 1024                           # tokens: thinking models need many before they answer
LONGEST = 4000                          # characters of a caption that makes sense
LARGEST = 4_000_000                     # bytes of an answer that is read
AT_ONCE = 4                             # requests; servers queue what they can't do at once
TRIES = 4
BACKOFF_S = 0.5                         # doubles; a Retry-After header goes before it
LONGEST_WAIT_S = 30.0
BUSY = {408, 425, 429, 500, 502, 503, 504}
SEES = re.compile(r"vl\b|vision|llava|bakllava|moondream|minicpm-?v|gemma-?3|pixtral|internvl|"
                  r"joycaption|idefics|smolvlm|florence|molmo|cogvlm|qwen[\d.]*-?vl|llama-?4",
                  re.IGNORECASE)
SEES_NOT = re.compile(r"embed|bge-|rerank|whisper|tts|nomic|all-minilm", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Ask:
    """A prepared picture: its JPEG in base64, and what is known of it."""

    jpeg: str
    caption: str = ""
    tags: str = ""


class Endpoint:
    spec: ClassVar[CaptionerSpec] = CaptionerSpec(
        id="endpoint", title="Local server", makes="sentence", default_model="auto",
        models=("auto",))
    of_one_picture: ClassVar[frozenset[str]] = frozenset(
        {"endpoint.empty", "endpoint.thinking", "endpoint.too_long", "endpoint.refused",
         "endpoint.html"})              # faults after which the next picture may well succeed

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.address = address_of(config.endpoint)
        self.model = config.models.get("endpoint") or "auto"
        self.prompt = config.prompt or PROMPT
        _filled(self.prompt, {})        # a template that can't work is told now
        default = CaptionConfig.model_fields["max_tokens"].default
        self.length = LENGTH if config.max_tokens in (None, default) else config.max_tokens
        self.notes: list[Note] = []     # for the runner to tell, after `load`
        self._wait = threading.Event()
        self._opener = _opener(self.address)

    def load(self) -> None:
        """Asks for the models: the server is there, and has the one that is wanted."""
        host = urlsplit(self.address).hostname or ""
        self.notes = [] if is_here(host) else [
            Note(key="endpoint.leaves", params={"host": host})]
        known = self._models()
        if self.model == "auto":
            if not known:
                raise UserError("endpoint.no_models", address=self.address)
            self.model = best_of(known)
            self.notes.append(Note(key="endpoint.chosen", params={"model": self.model}))
        elif known and self.model not in known and f"{self.model}:latest" not in known:
            raise UserError("endpoint.no_model", model=self.model, known=", ".join(known[:8]))

    def prepare(self, image: Image.Image) -> Ask:
        """The runner may lay what it knows of the picture into image.info["darkroom"]."""
        known = image.info.get(CONTEXT)
        known = known if isinstance(known, dict) else {}
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=QUALITY)
        return Ask(base64.b64encode(buffer.getvalue()).decode("ascii"),
                   str(known.get("caption", "")), str(known.get("tags", "")))

    def describe(self, batch: Sequence[Ask]) -> list[Description]:
        """A few requests at once; the first fault of the batch is raised."""
        if len(batch) < 2:
            return [Description(sentence=self._asked(ask)) for ask in batch]
        with ThreadPoolExecutor(min(AT_ONCE, len(batch))) as pool:
            return [Description(sentence=text) for text in pool.map(self._asked, batch)]

    def identity(self) -> str:
        config = self.config
        return f"endpoint|{self.address}|{self.model}|{self.prompt}|{config.trigger_word}|" \
               f"{self.length}|{SIDE}|{config.sample}|{config.temperature}|{config.top_p}|" \
               f"{config.seed}"

    # --- one picture ---

    def _asked(self, ask: Ask) -> str:
        return caption_of(self._call("chat/completions", self._body(ask)), self.length)

    def _body(self, ask: Ask) -> dict[str, Any]:
        text = _filled(self.prompt, {"trigger": self.config.trigger_word,
                                     "caption": ask.caption, "tags": ask.tags})
        content = [{"type": "text", "text": text},
                   {"type": "image_url",
                    "image_url": {"url": f"data:image/jpeg;base64,{ask.jpeg}"}}]
        drawn = ({"temperature": self.config.temperature, "top_p": self.config.top_p}
                 if self.config.sample else {"temperature": 0.0})
        return {"model": self.model, "messages": [{"role": "user", "content": content}],
                "max_tokens": self.length, "seed": self.config.seed, "stream": False, **drawn}

    # --- the wire ---

    def _models(self) -> list[str]:
        answer = self._call("models")
        rows = answer.get("data") if isinstance(answer.get("data"), list) else []
        return [str(row["id"]) for row in rows or [] if isinstance(row, dict) and row.get("id")]

    def _call(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers; busy and broken lines are tried again."""
        for attempt in range(TRIES):
            try:
                return _parsed(self._sent(route, body), self.address)
            except _Again as again:
                if attempt == TRIES - 1:
                    raise again.fault from None
                self._wait.wait(min(again.wait_s or BACKOFF_S * 2 ** attempt, LONGEST_WAIT_S))
        raise AssertionError("unreachable")

    def _sent(self, route: str, body: dict[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.address}/{route}", headers=headers,
                                         data=json.dumps(body).encode() if body else None)
        until = time.monotonic() + self.config.timeout_s
        try:
            with self._opener.open(request, timeout=self.config.timeout_s) as response:
                return _read(response, until)
        except urllib.error.HTTPError as error:
            with error:
                raise self._answered(error) from None
        except TimeoutError:
            raise self._slow() from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None

    def _answered(self, error: urllib.error.HTTPError) -> Exception:
        """Another status than 200."""
        reason = _reason(error)
        if error.code in BUSY:
            code = "endpoint.too_busy" if error.code == 429 else "endpoint.fails"
            return _Again(UserError(code, address=self.address, status=error.code, reason=reason),
                          _seconds(error.headers.get("Retry-After")))
        if 300 <= error.code < 400:
            return UserError("endpoint.redirects", address=self.address,
                             target=error.headers.get("Location", "?"))
        if error.code in (401, 403):
            return UserError("endpoint.key", address=self.address, variable=KEY)
        if error.code in (404, 405):
            return UserError("endpoint.no_route", address=self.address, model=self.model,
                             reason=reason)
        return UserError("endpoint.refuses", address=self.address, model=self.model,
                         status=error.code, reason=reason)

    def _broken(self, error: Exception) -> Exception:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return self._slow()
        return _Again(UserError("endpoint.down", address=self.address, reason=str(reason)
                                or type(reason).__name__))

    def _slow(self) -> UserError:
        """Not tried again: whoever waits two minutes needn't wait eight."""
        return UserError("endpoint.slow", address=self.address, seconds=self.config.timeout_s)


class _Again(Exception):
    """Worth another try; `fault` is told when all have failed."""

    def __init__(self, fault: UserError, wait_s: float = 0.0) -> None:
        super().__init__(fault.code)
        self.fault, self.wait_s = fault, wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


# --- addresses and models ---

def address_of(text: str) -> str:
    """`localhost:1234` -> `http://localhost:1234/v1`; a path that is written stays.

    Raises UserError `endpoint.bad_address`.
    """
    written = text.strip()
    address = written if "://" in written else f"http://{written}"
    address = address.rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(address)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or re.search(r"[\s@?#]", address):
        raise UserError("endpoint.bad_address", address=text)
    return address if parts.path else f"{address}/v1"


def is_here(host: str) -> bool:
    """Does the address stay on this machine?"""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def best_of(models: Sequence[str]) -> str:
    """The first that looks as if it could see, else the first that isn't for texts alone."""
    seeing = [name for name in models if SEES.search(name) and not SEES_NOT.search(name)]
    others = [name for name in models if not SEES_NOT.search(name)]
    return [*seeing, *others, *models][0]


def _opener(address: str) -> urllib.request.OpenerDirector:
    """A proxy of the environment must not get what stays on this machine."""
    proxies: dict[str, str] | None = {} if is_here(urlsplit(address).hostname or "") else None
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect)


def _filled(template: str, values: dict[str, str]) -> str:
    """{trigger}, {caption} and {tags}; other braces are the user's own."""
    unknown = re.findall(r"\{(\w+)\}", template)
    for name in unknown:
        if name not in ("trigger", "caption", "tags"):
            raise UserError("endpoint.placeholder", name=name)
    return re.sub(r"\{(trigger|caption|tags)\}", lambda found: values.get(found[1], ""), template)


# --- answers ---

def caption_of(answer: dict[str, Any], length: int) -> str:
    """The caption in a chat completion. Raises UserError where the answer can't be one."""
    try:
        choice = answer["choices"][0]
        content, ended = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError("endpoint.other_format", answer=json.dumps(answer)[:200]) from None
    if isinstance(content, list):       # some servers answer in parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    raw = content if isinstance(content, str) else ""
    text = clean(raw)
    if not text:
        thought = "think" in raw or (ended == "length" and not raw.strip())
        raise UserError("endpoint.thinking" if thought else "endpoint.empty", tokens=length)
    if is_refusal(text):
        raise UserError("endpoint.refused", answer=text[:100])
    if re.match(r"<!doctype|<html", text, re.IGNORECASE):
        raise UserError("endpoint.html", answer=text[:60])
    if len(text) > LONGEST:
        raise UserError("endpoint.too_long", count=len(text), most=LONGEST)
    return whole_sentences(text) if ended == "length" else text


def _parsed(data: bytes, address: str) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        start = data[:60].decode("utf-8", "replace").strip()
        page = re.match(r"\s*(<!doctype|<html)", start, re.IGNORECASE)
        raise UserError("endpoint.web_page" if page else "endpoint.not_json", address=address,
                        answer=start) from None
    if not isinstance(answer, dict):
        raise UserError("endpoint.other_format", answer=str(answer)[:200])
    if answer.get("error") and "choices" not in answer:         # some say it with status 200
        raise UserError("endpoint.refuses", address=address, model="", status=200,
                        reason=_message(answer))
    return answer


def _read(response: Any, until: float) -> bytes:
    """The whole answer within the time, however slowly it drips."""
    data = b""
    while chunk := response.read1(65536):
        data += chunk
        if len(data) > LARGEST:
            raise UserError("endpoint.huge", most=LARGEST // 1_000_000)
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:                 # http.client tells a cut body only by this
        raise http.client.IncompleteRead(data, response.length)
    return data


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says about it, in one short line."""
    try:
        text = error.read(20_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "?"
    with contextlib.suppress(ValueError):
        text = _message(json.loads(text))
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())[:200] or "?"


def _message(answer: Any) -> str:
    found = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(found.get("message", found) if isinstance(found, dict) else found)


def _seconds(text: str | None) -> float:
    return float(text) if text and re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) else 0.0
