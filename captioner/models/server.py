"""Requests to an OpenAI-compatible server: what is sent, tried again, waited for and read.

Redirects are never followed, so pictures go nowhere else. Which faults may pass is decided here;
whether one belongs to its picture or to the whole job, by the captioner.
"""

from __future__ import annotations

import contextlib
import email.utils
import ipaddress
import os
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from core.errors import UserError
from core.jobs.events import Note
from core.serialization import from_json

KEY = "DARKROOM_ENDPOINT_KEY"
# Bytes: more than any answer has, little enough to hold in memory.
LARGEST = 4_000_000
LONGEST_REASON = 20_000          # bytes of an error's own page
TRIES = 4
BACKOFF_S = 0.5                         # doubles with each try
LONGEST_BACKOFF_S = 30.0
# Seconds that a request waits in all: where the server names the time, and where it doesn't.
PATIENCE_S, BLIND_PATIENCE_S = 900.0, 90.0
TELL_S = 5.0                            # a wait of so long is told
# HTTP status codes that may pass: timeout, too early, too many requests, errors of the server.
BUSY = {408, 425, 429, 500, 502, 503, 504, 529}
_FILTERED = re.compile(r"content.?(?:filter|policy|management)|responsibleai|data.?inspection|"
                       r"moderation|flagged|inappropriate|prohibited.?content|safety (?:system|"
                       r"filter|settings|reasons)|sensitive (?:content|info)|"
                       r"敏感|违规", re.IGNORECASE)
_CONTEXT = re.compile(r"context (?:size|length|window)|exceed_context|maximum context|"
                      r"too many tokens|prompt (?:is )?too long|num_ctx|max_model_len",
                      re.IGNORECASE)
_UNPAID = re.compile(r"insufficient.?(?:quota|balance|credit|funds)|billing|credit "
                     r"balance|余额|欠费", re.IGNORECASE)
_NO_FIELD = re.compile(r"unexpected keyword|unsupported (?:param|value)|unknown (?:field|param)|"
                       r"unrecognized|not permitted|extra (?:inputs|fields)", re.IGNORECASE)


class Refused(UserError):
    """The server's answer to a request that it doesn't take as it is."""

    def __init__(self, code: str, answer: str, **params: Any) -> None:
        super().__init__(code, **params)
        self.answer = answer                # its error, whole


class Server:
    def __init__(self, address: str, timeout_s: float) -> None:
        """`address`: of `address_of`. Raises UserError for a key that no header can hold."""
        self.address, self.timeout_s = address_of(address), timeout_s
        parts = urlsplit(self.address)
        self.host = parts.hostname or ""
        # The system's proxy, but none for this machine: pictures would leave it.
        self.proxy = (None if is_here(self.host) or urllib.request.proxy_bypass(parts.netloc)
                      else urllib.request.getproxies().get(parts.scheme))
        # Many write the variable without a scheme, which httpx refuses.
        if self.proxy and "://" not in self.proxy:
            self.proxy = f"http://{self.proxy}"
        # The certificates of the system, not httpx's own: a home server may have a private one.
        self.certificates = ssl.create_default_context()
        key = os.environ.get(KEY, "")
        if not key.isascii() or not key.isprintable():
            raise UserError("endpoint.bad_key", variable=KEY)
        self.tell: Callable[[Note], None] = lambda note: None
        self.given_up: Callable[[], bool] = lambda: False
        self._not_before = 0.0              # time.monotonic(); a limit is for all requests
        self._lock = threading.Lock()

    def call(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of the answer. Waits where the server wants it, tries again where the
        connection breaks or it fails. Raises UserError."""
        attempt, waited = 0, 0.0
        while True:
            try:
                return self._parsed(self._request(f"{self.address}/{route}", body, self.timeout_s))
            except _Retry as retry:
                attempt += 1
                pause = retry.wait_s or min(BACKOFF_S * 2 ** (attempt - 1), LONGEST_BACKOFF_S)
                patience = PATIENCE_S if retry.wait_s else BLIND_PATIENCE_S
                waited += pause
                if waited > patience if retry.limited else attempt == TRIES:
                    raise retry.fault from None
                self._sleep(pause, retry)

    def ask(self, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A route of the server's own, above /v1, which it may not have: tried once."""
        root = re.sub(r"/v1$", "", self.address)
        try:
            return self._parsed(self._request(f"{root}/{route}", body, min(self.timeout_s, 5.0)))
        except _Retry as retry:
            raise retry.fault from None

    def _sleep(self, pause: float, retry: _Retry) -> None:
        """Until the pause is over or the job is stopped; a limit holds all other requests too."""
        until = time.monotonic() + pause
        if retry.limited:
            with self._lock:
                if until > self._not_before + 1 and pause >= TELL_S:
                    self.tell(Note(key="endpoint.waits", params={"seconds": round(pause),
                                                                 "host": self.host}))
                self._not_before = max(self._not_before, until)
        while (left := until - time.monotonic()) > 0:
            if self.given_up():
                raise retry.fault
            time.sleep(min(left, 0.2))

    def _request(self, url: str, body: dict[str, Any] | None, timeout_s: float) -> bytes:
        while (left := self._not_before - time.monotonic()) > 0 and not self.given_up():
            time.sleep(min(left, 0.2))
        key = os.environ.get(KEY)
        # Not packed: a few bytes could unpack to more than the memory holds.
        headers = {"Accept-Encoding": "identity"} | (
            {"Authorization": f"Bearer {key}"} if key else {})
        data = b""
        # httpx limits the time of each read; the deadline is for the whole, dripping answer.
        deadline = time.monotonic() + timeout_s
        try:
            with httpx.stream("POST" if body else "GET", url, json=body, headers=headers,
                              timeout=timeout_s, proxy=self.proxy, trust_env=False,
                              verify=self.certificates) as response:
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
            # A server that broke off may be there for the next picture.
            broke = isinstance(error, httpx.ReadError | httpx.WriteError | httpx.ProtocolError)
            raise _Retry(UserError("endpoint.breaks" if broke else "endpoint.down",
                                   address=self.address,
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
        answer = reason = data[:LONGEST_REASON].decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            reason = _error_message(from_json(reason))
        reason = " ".join(re.sub(r"<[^>]*>", " ", reason).split())[:200] or "?"
        told: dict[str, Any] = {"address": self.address, "status": status, "reason": reason}
        if status == 402 or (status in (400, 403, 429) and _UNPAID.search(answer)):
            return UserError("endpoint.unpaid", **told)
        if status in BUSY and not (status == 500 and _NO_FIELD.search(answer)):
            limited = status in (429, 503, 529)
            code = "endpoint.too_busy" if status == 429 else "endpoint.fails"
            return _Retry(UserError(code, **told), wait_of(response.headers, answer) if limited
                          else 0.0, limited)
        if 300 <= status < 400:
            return UserError("endpoint.redirects", address=self.address,
                             target=response.headers.get("Location", "?"))
        if status in (400, 403, 422, 451) and _FILTERED.search(answer):
            return UserError("endpoint.filtered", reason=reason)
        if status in (401, 403):
            return UserError("endpoint.key", variable=KEY, **told)
        code = ("endpoint.no_route" if status in (404, 405) else
                "endpoint.context" if _CONTEXT.search(answer) else "endpoint.refuses")
        return Refused(code, answer, model="", **told)

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            answer = _streamed(data, self.address) if _STREAM.match(data) else from_json(data)
        except ValueError:
            start = data[:60].decode("utf-8", "replace").strip()
            page = re.match(r"\s*(<!doctype|<html)", start, re.IGNORECASE)
            raise UserError("endpoint.web_page" if page else "endpoint.not_json",
                            address=self.address, answer=start) from None
        if isinstance(answer, list) and answer and isinstance(answer[0], dict):
            answer = {"data": answer, **answer[0]} if "error" in answer[0] else {"data": answer}
        if not isinstance(answer, dict):
            raise UserError("endpoint.other_format", answer=str(answer)[:200])
        # Some servers report an error with status 200.
        if answer.get("error") and not answer.get("choices"):
            reason = _error_message(answer)
            if _FILTERED.search(reason):
                raise UserError("endpoint.filtered", reason=reason)
            raise Refused("endpoint.context" if _CONTEXT.search(reason) else "endpoint.refuses",
                          reason, address=self.address, model="", status=200, reason=reason)
        return answer


class _Retry(Exception):
    """A fault that may pass; it is raised as `fault` when all tries have failed."""

    def __init__(self, fault: UserError, wait_s: float = 0.0, limited: bool = False) -> None:
        super().__init__(fault.code)
        self.fault, self.wait_s, self.limited = fault, wait_s, limited


_STREAM = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")


def _streamed(data: bytes, address: str) -> dict[str, Any]:
    """Server-sent events of a chat completion, unasked for, as the answer that they make up."""
    parts, thoughts, finish = [], "", "stop" if b"[DONE]" in data else None
    # By line ends alone: a text may hold other signs that Python splits lines at.
    for line in re.split(r"\r\n|\r|\n", data.decode("utf-8", "replace")):
        if not line.startswith("data:") or (event := line[5:].strip()) in ("", "[DONE]"):
            continue
        one = from_json(event)
        if not isinstance(one, dict) or one.get("error"):
            return one if isinstance(one, dict) else {}
        for choice in (one.get("choices") or [])[:1]:
            said = choice.get("delta") or choice.get("message") or {}
            parts.append(said.get("content") or "")
            thoughts += said.get("reasoning_content") or said.get("reasoning") or ""
            finish = choice.get("finish_reason") or finish
    if finish is None:
        raise _Retry(UserError("endpoint.breaks", address=address, reason="no end"))
    text = "".join(map(joined, parts))
    return {"choices": [{"finish_reason": finish, "message": {"content": text,
                                                              "reasoning_content": thoughts}}]}


def joined(content: Any) -> str:
    """The text of a message; some servers answer in parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _error_message(answer: Any) -> str:
    """{"error": {"message": "..."}} -> the message; servers leave out either level."""
    answer = answer[0] if isinstance(answer, list) and answer else answer
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


def wait_of(headers: Any, answer: str) -> float:
    """Seconds that a server wants to be left alone: its Retry-After, a number or a date, else what
    its words say ("try again in 1m12.5s"); 0: it doesn't say."""
    told = str(headers.get("Retry-After", "")).strip()
    if re.fullmatch(r"\d+(?:\.\d+)?", told):
        return float(told)
    with contextlib.suppress(ValueError, TypeError):
        # By the server's own clock, where it tells it: this machine's may be wrong.
        until = email.utils.parsedate_to_datetime(told).timestamp()
        now = time.time()
        with contextlib.suppress(ValueError, TypeError):
            now = email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp()
        return max(until - now, 0.0)
    if re.fullmatch(r"\d+", ms := str(headers.get("retry-after-ms", ""))):
        return float(ms) / 1000
    found = re.search(r"(?:again|retry|wait)[^.\d]{0,30}?(?=\d)(?:(\d+) ?h(?:ours?)?)? ?"
                      r"(?:(\d+) ?m(?:in(?:utes?)?)?(?!s))? ?"
                      r"(?:(\d+(?:\.\d+)?) ?(ms|s(?:ec(?:ond)?s?)?))?\b", answer, re.IGNORECASE)
    if found is None:
        return 0.0
    hours, minutes, seconds, unit = found.groups()
    return (int(hours or 0) * 3600 + int(minutes or 0) * 60
            + float(seconds or 0) / (1000 if unit and unit.lower() == "ms" else 1))


# --- addresses --------------------------------------------------------------------------------

def address_of(text: str) -> str:
    """`localhost:1234` -> `http://localhost:1234/v1`; a path that the user wrote stays.

    Raises UserError `endpoint.bad_address`.
    """
    address = text.strip() if "://" in text else f"http://{text.strip()}"
    address = re.sub(r"/(?:(?:chat/)?completions|models|responses)/*$", "", address).rstrip("/")
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
