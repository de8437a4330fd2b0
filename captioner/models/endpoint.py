"""Sentences from any OpenAI-compatible server: Ollama, LM Studio, llama.cpp, vLLM.

POST {endpoint}/chat/completions with the picture as a JPEG in a data URL. The address is on this
machine unless the user writes another one; then a note tells so. Redirects are never followed, so
pictures go nowhere else. If a server needs a key, it is read from DARKROOM_ENDPOINT_KEY.
Source of the format: the OpenAI API reference, chat completions.
"""

from __future__ import annotations

import base64
import contextlib
import io
import ipaddress
import json
import os
import re
import ssl
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx
from PIL import Image

from captioner.base import Description
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
# Tokens: thinking models need many before they answer.
LENGTH = 1024
# Characters; a longer text is a model that repeats itself.
LONGEST = 4000
# Bytes: more than any answer has, little enough to hold in memory.
LARGEST = 4_000_000
LONGEST_REASON = 20_000          # bytes of an error's own page
AT_ONCE = 4                             # requests; servers queue those that they can't serve
TRIES = 4
BACKOFF_S = 0.5                         # doubles with each try; a Retry-After header replaces it
LONGEST_WAIT_S = 30.0
# HTTP status codes that may pass: timeout, too early, too many requests, errors of the server.
BUSY = {408, 425, 429, 500, 502, 503, 504}
# By their names, as servers don't tell which models see.
VISION_MODELS = re.compile(
    r"vl\b|vision|llava|bakllava|moondream|minicpm-?v|gemma-?3|pixtral|internvl|joycaption|"
    r"idefics|smolvlm|florence|molmo|cogvlm|qwen[\d.]*-?vl|llama-?4", re.IGNORECASE)
TEXT_MODELS = re.compile(r"embed|bge-|rerank|whisper|tts|nomic|all-minilm", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PreparedPicture:
    """A picture as a JPEG in base64, and what its prompt may name."""

    jpeg: str
    caption: str = ""
    tags: str = ""


class Endpoint:
    title: ClassVar[str] = "Local server"
    # Faults of one picture: the next one may well succeed.
    of_one_picture: ClassVar[frozenset[str]] = frozenset({
        "endpoint.empty", "endpoint.thinking", "endpoint.too_long", "endpoint.refused",
        "endpoint.html"})

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.address = address_of(config.endpoint)
        self.model = config.models.get("endpoint") or "auto"
        self.prompt = config.prompt or PROMPT
        # A template that can't work is reported before any picture is read.
        _fill_template(self.prompt, {})
        self.length = config.max_tokens or LENGTH
        # The system's proxy, but none for this machine: pictures would leave it.
        parts = urlsplit(self.address)
        host = parts.hostname or ""
        self.proxy = (None if is_here(host) or urllib.request.proxy_bypass(parts.netloc)
                      else urllib.request.getproxies().get(parts.scheme))
        # Many write the variable without a scheme, which httpx refuses.
        if self.proxy and "://" not in self.proxy:
            self.proxy = f"http://{self.proxy}"
        # The certificates of the system, not httpx's own: a home server may have a private one.
        self.certificates = ssl.create_default_context()
        key = os.environ.get(KEY, "")
        if not key.isascii() or not key.isprintable():
            raise UserError("endpoint.bad_key", variable=KEY)

    def load(self) -> None:
        """Asks the server for its models, and checks or chooses the one to use."""
        host = urlsplit(self.address).hostname or ""
        # The runner shows these after `load`.
        self.notes = [] if is_here(host) else [Note(key="endpoint.leaves", params={"host": host})]
        listed = self._call("models").get("data")
        known = [str(row["id"]) for row in (listed if isinstance(listed, list) else [])
                 if isinstance(row, dict) and row.get("id")]
        if self.model == "auto":
            if not known:
                raise UserError("endpoint.no_models", address=self.address)
            self.model = best_of(known)
            self.notes.append(Note(key="endpoint.chosen", params={"model": self.model}))
        elif known and self.model not in known and f"{self.model}:latest" not in known:
            raise UserError("endpoint.no_model", model=self.model, known=", ".join(known[:8]))

    def prepare(self, image: Image.Image) -> PreparedPicture:
        """Scales the picture down. The runner puts what it knows of it into image.info."""
        known = image.info.get(CONTEXT)
        known = known if isinstance(known, dict) else {}
        # JPEG has no transparency.
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=QUALITY)
        return PreparedPicture(base64.b64encode(buffer.getvalue()).decode("ascii"),
                               str(known.get("caption", "")), str(known.get("tags", "")))

    def describe(self, batch: Sequence[PreparedPicture]) -> list[Description]:
        """Sends a few requests at once; the first fault of the batch is raised."""
        # Ctrl+C ends a single request at once; leaving a pool would wait for it.
        if len(batch) == 1:
            return [Description(sentence=self._describe_one(batch[0]))]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [Description(sentence=text) for text in pool.map(self._describe_one, batch)]

    def identity(self) -> str:
        config = self.config
        return f"endpoint|{self.address}|{self.model}|{self.prompt}|{config.trigger_word}|" \
               f"{self.length}|{SIDE}|{config.sample}|{config.temperature}|{config.top_p}|" \
               f"{config.seed}"

    def _describe_one(self, picture: PreparedPicture) -> str:
        text = _fill_template(self.prompt, {"trigger": self.config.trigger_word,
                                            "caption": picture.caption, "tags": picture.tags})
        content = [{"type": "text", "text": text},
                   {"type": "image_url",
                    "image_url": {"url": f"data:image/jpeg;base64,{picture.jpeg}"}}]
        sampling = ({"temperature": self.config.temperature, "top_p": self.config.top_p}
                    if self.config.sample else {"temperature": 0.0})
        answer = self._call("chat/completions", {
            "model": self.model, "messages": [{"role": "user", "content": content}],
            "max_tokens": self.length, "seed": self.config.seed, "stream": False, **sampling})
        return caption_of(answer, self.length)

    # --- requests ---

    def _call(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the JSON object of the answer. Tries again where the server is busy or the
        connection breaks. Raises UserError."""
        for attempt in range(TRIES):
            try:
                return _parse(self._request(route, body), self.address)
            except _Retry as retry:
                if attempt == TRIES - 1:
                    raise retry.fault from None
                time.sleep(min(retry.wait_s or BACKOFF_S * 2 ** attempt, LONGEST_WAIT_S))
        raise AssertionError("unreachable")

    def _request(self, route: str, body: dict[str, Any] | None) -> bytes:
        key, timeout_s = os.environ.get(KEY), self.config.timeout_s
        # Not packed: a few bytes could unpack to more than the memory holds.
        headers = {"Accept-Encoding": "identity"} | (
            {"Authorization": f"Bearer {key}"} if key else {})
        data = b""
        # httpx limits the time of each read; the deadline is for the whole, dripping answer.
        deadline = time.monotonic() + timeout_s
        try:
            with httpx.stream("POST" if body else "GET", f"{self.address}/{route}", json=body,
                              headers=headers, timeout=timeout_s, proxy=self.proxy,
                              trust_env=False, verify=self.certificates) as response:
                if not response.is_success:
                    raise self._status_fault(response, deadline)
                if (packed := response.headers.get("Content-Encoding", "identity")) != "identity":
                    raise UserError("endpoint.not_json", address=self.address, answer=packed)
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > LARGEST:
                        raise UserError("endpoint.huge", most=LARGEST // 1_000_000)
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("")
        except httpx.TimeoutException:
            # Not tried again: who has waited two minutes needn't wait eight.
            raise UserError("endpoint.slow", address=self.address, seconds=timeout_s) from None
        # ImportError: a SOCKS proxy, for which httpx wants another package.
        except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:
            raise _Retry(UserError("endpoint.down", address=self.address,
                                   reason=str(error) or type(error).__name__)) from None
        return data

    def _status_fault(self, response: httpx.Response, deadline: float) -> Exception:
        """The fault that an unsuccessful HTTP status stands for."""
        data = b""
        # The status decides. A body that is cut, slow or long leaves the reason short.
        with contextlib.suppress(httpx.HTTPError):
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > LONGEST_REASON or time.monotonic() > deadline:
                    break
        status = response.status_code
        reason = data[:LONGEST_REASON].decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            reason = _error_message(json.loads(reason))
        reason = " ".join(re.sub(r"<[^>]*>", " ", reason).split())[:200] or "?"
        if status in BUSY:
            code = "endpoint.too_busy" if status == 429 else "endpoint.fails"
            wait = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", response.headers.get("Retry-After", ""))
            return _Retry(UserError(code, address=self.address, status=status, reason=reason),
                          float(wait[1]) if wait else 0.0)
        if 300 <= status < 400:
            return UserError("endpoint.redirects", address=self.address,
                             target=response.headers.get("Location", "?"))
        if status in (401, 403):
            return UserError("endpoint.key", address=self.address, variable=KEY)
        if status in (404, 405):
            return UserError("endpoint.no_route", address=self.address, model=self.model,
                             reason=reason)
        return UserError("endpoint.refuses", address=self.address, model=self.model,
                         status=status, reason=reason)


class _Retry(Exception):
    """A fault that may pass; it is raised as `fault` when all tries have failed."""

    def __init__(self, fault: UserError, wait_s: float = 0.0) -> None:
        super().__init__(fault.code)
        self.fault, self.wait_s = fault, wait_s


# --- addresses and models ---

def address_of(text: str) -> str:
    """`localhost:1234` -> `http://localhost:1234/v1`; a path that the user wrote stays.

    Raises UserError `endpoint.bad_address`.
    """
    address = text.strip() if "://" in text else f"http://{text.strip()}"
    address = address.rstrip("/").removesuffix("/chat/completions")
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or re.search(r"[\s@?#]", address):
        raise UserError("endpoint.bad_address", address=text)
    return address if parts.path else f"{address}/v1"


def is_here(host: str) -> bool:
    """Whether the host is this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def best_of(models: Sequence[str]) -> str:
    """The first model whose name says that it sees, else the first that isn't for text alone."""
    others = [name for name in models if not TEXT_MODELS.search(name)]
    seeing = [name for name in others if VISION_MODELS.search(name)]
    return [*seeing, *others, *models][0]


def _fill_template(template: str, values: dict[str, str]) -> str:
    """Fills {trigger}, {caption} and {tags}. Braces around more than one word stay as they are."""
    for name in re.findall(r"\{(\w+)\}", template):
        if name not in ("trigger", "caption", "tags"):
            raise UserError("endpoint.placeholder", name=name)
    return re.sub(r"\{(trigger|caption|tags)\}", lambda match: values.get(match[1], ""), template)


# --- answers ---

def caption_of(answer: dict[str, Any], length: int) -> str:
    """The caption in a chat completion. Raises UserError where the answer holds none."""
    try:
        choice = answer["choices"][0]
        content, finish_reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError("endpoint.other_format", answer=json.dumps(answer)[:200]) from None
    # Some servers answer in parts.
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    raw = content if isinstance(content, str) else ""
    text = clean(raw)
    if not text:
        # Thoughts used up the tokens: unfinished in the answer, or in a field of their own.
        thinking = "think" in raw or (finish_reason == "length" and not raw.strip())
        raise UserError("endpoint.thinking" if thinking else "endpoint.empty", tokens=length)
    if is_refusal(text):
        raise UserError("endpoint.refused", answer=text[:100])
    if re.match(r"<!doctype|<html", text, re.IGNORECASE):
        raise UserError("endpoint.html", answer=text[:60])
    if len(text) > LONGEST:
        raise UserError("endpoint.too_long", count=len(text), most=LONGEST)
    return whole_sentences(text) if finish_reason == "length" else text


def _parse(data: bytes, address: str) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        start = data[:60].decode("utf-8", "replace").strip()
        page = re.match(r"\s*(<!doctype|<html)", start, re.IGNORECASE)
        raise UserError("endpoint.web_page" if page else "endpoint.not_json", address=address,
                        answer=start) from None
    if not isinstance(answer, dict):
        raise UserError("endpoint.other_format", answer=str(answer)[:200])
    # Some servers report an error with status 200.
    if answer.get("error") and "choices" not in answer:
        raise UserError("endpoint.refuses", address=address, model="", status=200,
                        reason=_error_message(answer))
    return answer


def _error_message(answer: Any) -> str:
    """{"error": {"message": "..."}} -> the message; servers leave out either level."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)
