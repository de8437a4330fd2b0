"""The door: loopback names only, this page's own requests only, this launch's cookie only.

Why each: a foreign site may resolve its name to 127.0.0.1 (DNS rebinding: Host), may post forms
and uploads to it (Origin, Sec-Fetch-Site), and other users and programs of this computer may
connect. An address with a token opens the door once and gets the cookie, another secret. Browsers
send cookies to all ports of a host, and command lines are seen by all users: where the system
tells whose a connection is (Linux), other users are refused whatever they know.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"), (b"cross-origin-resource-policy", b"same-origin")]
# Scripts of files of ours, and those that stood in the page when it left; Gradio compiles what
# gr.HTML is given as `js_on_load`, which needs 'unsafe-eval'.
_POLICY = ("default-src 'self'; script-src 'self'{nonce} 'unsafe-eval'; "
           "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
           "media-src 'self' blob:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
           "frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
           "frame-ancestors 'none'")
# Where Linux tells whose a connection is.
_SOCKETS = ("/proc/net/tcp", "/proc/net/tcp6")
# A browser that starts for the first time takes its time.
_EXPECTED_S = 60.0
# Addresses that may be open at a time: each start of the app beside this one takes one.
_TOKENS = 16
_REFUSED = ("<!doctype html><meta charset=utf-8><title>LoRA Darkroom</title>"
            "<p>This address has been used already, or belongs to another start of LoRA Darkroom. "
            "Start LoRA Darkroom once more: it opens a new page of the one that runs."
            "<p>此地址已经用过，或属于另一次启动。请再启动一次 LoRA Darkroom，"
            "它会为正在运行的程序打开新页面。")


class Guard:
    """ASGI middleware; also knows how many pages are open (Gradio keeps one heartbeat each)."""

    def __init__(self, app: Any, port: int) -> None:
        self.app = app
        self.port = port
        # Whoever shows it is let in: the cookie of pages, and of a second start of the app.
        self.secret = secrets.token_urlsafe(32)
        self.cookie = f"darkroom_{port}"
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.origins = {f"http://{host}" for host in self.hosts}
        # Answers to paths that come before the app's own.
        self.answers: dict[str, Callable[[], bytes]] = {}
        # What goes first into a page's <head>, by its path.
        self.heads: dict[str, str] = {}
        self.pages = 0
        # When the last request ended: if `pages` is 0, no page is open since then.
        self.quiet_since = time.monotonic()
        self._tokens: list[str] = []
        # Until when the browser that was just opened may come without a token; time.monotonic().
        self._expected_until = 0.0

    def address(self) -> str:
        """An address that opens a page once, wherever it is opened."""
        self._tokens = [*self._tokens[1 - _TOKENS:], secrets.token_urlsafe(32)]
        return f"http://127.0.0.1:{self.port}/?token={self._tokens[-1]}"

    def address_to_show(self) -> str:
        """An address for a browser's command line, which all users of the computer can read: it
        holds no secret where the system tells whose a connection is."""
        if not any(os.access(table, os.R_OK) for table in _SOCKETS):
            return self.address()
        self._expected_until = time.monotonic() + _EXPECTED_S
        return f"http://127.0.0.1:{self.port}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            # 1008: a policy forbids it. Nothing here uses websockets.
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self._refusal(scope, _headers(scope)):
            await answer(send, refusal, b"refused")
        elif scope["method"] == "GET" and self._takes_token(scope):
            await self._hand_cookie(scope, send)
        elif not self._has_cookie(_headers(scope)):
            await answer(send, 403, _REFUSED.encode(), [(b"content-type", b"text/html")])
        elif (make_body := self.answers.get(scope["path"])) is not None:
            await answer(send, 200, await asyncio.to_thread(make_body))
        elif scope["method"] == "GET" and "token" in dict(_query(scope)):
            # Opened once more, from a terminal or the browser's history.
            await self._hand_cookie(scope, send)
        else:
            await self._serve(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> int | None:
        """400 for a foreign host name or a path that is none, 403 for a request of another site or
        of another user; None: it may pass."""
        if headers.get("host", "") not in self.hosts or re.search(r"[\x00-\x1f\x7f]",
                                                                  scope["path"]):
            return 400
        own_site = headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        own_origin = "origin" not in headers or headers["origin"] in self.origins
        own_user = _user_of(scope) in _TRUSTED
        return None if own_site and own_origin and own_user else 403

    def _has_cookie(self, headers: dict[str, str]) -> bool:
        try:
            jar: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        return self.cookie in jar and _same(jar[self.cookie].value, self.secret)

    def _takes_token(self, scope: Scope) -> bool:
        """Whether the address opens the door, which it does no second time."""
        given = dict(_query(scope)).get("token", "")
        found = next((token for token in self._tokens if _same(given, token)), None)
        if found:
            self._tokens.remove(found)
        elif (time.monotonic() < self._expected_until and scope["path"] == "/"
              and _user_of(scope) is not None and not self._has_cookie(_headers(scope))):
            self._expected_until = 0.0
            return True
        return found is not None

    async def _hand_cookie(self, scope: Scope, send: Send) -> None:
        """Redirects to the same address without the token, which leaves the address bar at once."""
        rest = urlencode([(key, value) for key, value in _query(scope) if key != "token"])
        # "//host" would lead to another site.
        target = "/" + quote(scope["path"].lstrip("/\\")) + (f"?{rest}" if rest else "")
        cookie = f"{self.cookie}={self.secret}; Path=/; HttpOnly; SameSite=Strict"
        await answer(send, 303, b"", [(b"location", target.encode()),
                                       (b"set-cookie", cookie.encode())])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = self.heads.get(scope["path"])
        if head is not None:
            # As it is, to be completed here: packed bytes can't be.
            plain = [pair for pair in scope["headers"] if pair[0].lower() != b"accept-encoding"]
            scope, send = {**scope, "headers": plain}, _completed(head, send)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                ours = _headers_of_ours()
                names = {name for name, _ in ours}
                others = [pair for pair in message.get("headers", []) if pair[0] not in names]
                message["headers"] = others + ours
            await send(message)

        page = "/gradio_api/heartbeat/" in scope["path"]
        self.pages += page
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self.pages -= page
            self.quiet_since = time.monotonic()


# Users by their ids; None: the system doesn't tell. Root may read all anyway; Windows' browser
# counts as root where we run in its Linux.
_TRUSTED = {None, 0, os.getuid() if hasattr(os, "getuid") else None}


def _user_of(scope: Scope) -> int | None:
    """The id of the user whose program sent a request, as its connection tells (gui/server.py)."""
    user: int | None = scope.get("state", {}).get("user")
    return user


def user_of(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """The id of the user whose program holds the end `client` of a connection to us; None: the
    system doesn't tell. Both ends are compared whole: another user may have the same port at
    another address of this computer."""
    ends = tuple(f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
                 for host, port in (client, server))
    # Programs of both address families reach us: their sockets stand in the second table, with
    # the same address at its end.
    for table in _SOCKETS:
        try:
            rows = Path(table).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, remote, _, _, _, _, user, *_ = row.split()
            if local.endswith(ends[0]) and remote.endswith(ends[1]):
                return int(user)
    return None


def _same(given: str, secret: str) -> bool:
    # In constant time: the time of a plain comparison tells how much of a guess is right.
    return secrets.compare_digest(given.encode(), secret.encode())


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"))


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]}


def _headers_of_ours(nonce: str = "") -> list[tuple[bytes, bytes]]:
    policy = _POLICY.format(nonce=f" 'nonce-{nonce}'" if nonce else "")
    return [*HEADERS, (b"content-security-policy", policy.encode())]


def _completed(head: str, send: Send) -> Send:
    """Sends a page with `head` first in its <head>, and lets the scripts run that it holds: text
    that comes into it later can't add one."""
    start: MutableMapping[str, Any] = {}
    body = b""

    async def send_whole(message: MutableMapping[str, Any]) -> None:
        nonlocal start, body
        if message["type"] == "http.response.start":
            start = message
            return
        body += message.get("body", b"")
        if message.get("more_body"):
            return
        html = re.sub(r"<head[^>]*>", lambda tag: tag[0] + head, body.decode(), count=1)
        await answer_page(send, html, start["status"], [
            pair for pair in start["headers"] if pair[0] in (b"content-type", b"set-cookie")])
    return send_whole


async def answer_page(send: Send, html: str, status: int = 200,
                      headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Sends a page, all of whose scripts may run."""
    nonce = secrets.token_urlsafe(16)
    body = re.sub(r"<script(?=[\s>])", f'<script nonce="{nonce}"', html)
    await answer(send, status, body.encode("utf-8", "replace"), headers, nonce)


async def answer(send: Send, status: int, body: bytes,
                 headers: Iterable[tuple[bytes, bytes]] = (), nonce: str = "") -> None:
    """Sends a whole answer that no browser stores."""
    await send({"type": "http.response.start", "status": status,
                "headers": [*_headers_of_ours(nonce), (b"cache-control", b"no-store"), *headers]})
    await send({"type": "http.response.body", "body": body})
