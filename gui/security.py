"""The door: loopback names only, this page's own requests only, this launch's token only.

Why each: a foreign site may resolve its name to 127.0.0.1 (DNS rebinding: Host), may post forms
and uploads to it (Origin, Sec-Fetch-Site), and other users and programs of this computer may
connect (token). The cookie is named by port, since cookies are shared by all ports of a host.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"), (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy",
     b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
     b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
     b"media-src 'self' blob:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
     b"frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; "
     b"frame-ancestors 'none'")]
_REFUSED = ("<!doctype html><meta charset=utf-8><title>LoRA Darkroom</title>"
            "<p>This window belongs to another start of LoRA Darkroom. Open the address that the "
            "app printed when it started.<p>此页面属于另一次启动。请打开程序启动时显示的地址。")


class Guard:
    """ASGI middleware; also knows how many pages are open (Gradio keeps one heartbeat each)."""

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app = app
        self.token = token
        self.cookie = f"darkroom_{port}"
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.origins = {f"http://{host}" for host in self.hosts}
        # Answers to paths that come before the app's own.
        self.answers: dict[str, Callable[[], bytes]] = {}
        self.pages = 0
        # When the last request ended: if `pages` is 0, no page is open since then.
        self.quiet_since = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            # 1008: a policy forbids it. Nothing here uses websockets.
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self._refusal(_headers(scope)):
            await answer(send, refusal, b"refused")
        elif scope["method"] == "GET" and self._is_token(dict(_query(scope)).get("token", "")):
            await self._hand_cookie(scope, send)
        elif not self._has_cookie(_headers(scope)):
            await answer(send, 403, _REFUSED.encode(), [(b"content-type", b"text/html")])
        elif (make_body := self.answers.get(scope["path"])) is not None:
            await answer(send, 200, await asyncio.to_thread(make_body))
        else:
            await self._serve(scope, receive, send)

    def _refusal(self, headers: dict[str, str]) -> int | None:
        """400 for a foreign host name, 403 for another site's request; None: it may pass."""
        if headers.get("host", "") not in self.hosts:
            return 400
        own_site = headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        own_origin = "origin" not in headers or headers["origin"] in self.origins
        return None if own_site and own_origin else 403

    def _has_cookie(self, headers: dict[str, str]) -> bool:
        try:
            jar: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        return self.cookie in jar and self._is_token(jar[self.cookie].value)

    def _is_token(self, given: str) -> bool:
        # In constant time: the time of a plain comparison tells how much of a guess is right.
        return secrets.compare_digest(given.encode(), self.token.encode())

    async def _hand_cookie(self, scope: Scope, send: Send) -> None:
        """Redirects to the same address without the token, which leaves the address bar at once."""
        rest = urlencode([(key, value) for key, value in _query(scope) if key != "token"])
        # "//host" would lead to another site.
        target = "/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else "")
        cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        await answer(send, 303, b"", [(b"location", target.encode("ascii", "ignore")),
                                       (b"set-cookie", cookie.encode())])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                ours = {name for name, _ in HEADERS}
                others = [pair for pair in message.get("headers", []) if pair[0] not in ours]
                message["headers"] = others + HEADERS
            await send(message)

        page = "/gradio_api/heartbeat/" in scope["path"]
        self.pages += page
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self.pages -= page
            self.quiet_since = time.monotonic()


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"))


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]}


async def answer(send: Send, status: int, body: bytes,
                 headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Sends a whole answer that no browser stores."""
    await send({"type": "http.response.start", "status": status,
                "headers": [*HEADERS, (b"cache-control", b"no-store"), *headers]})
    await send({"type": "http.response.body", "body": body})
