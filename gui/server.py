"""The server before its pages: something to see at once, then the pages, or why there are none.

Gradio's import takes seconds, so that nothing here may need it: a waiting page answers every
address from the first half second on, and asks itself whether the pages are there.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import uvicorn

from core import i18n
from gui.html import ASSETS
from gui.security import Guard, Receive, Scope, Send

if TYPE_CHECKING:
    from fastapi import FastAPI

    from gui.state.app_state import AppState

QUIET_S = 60.0                          # without a page and without a run: the app ends
FAREWELL_S = 2.0
WAITING = "x-darkroom"                  # a header of pages that are not the app's
_PAGE = ASSETS / "waiting.html"


class Front:
    """What answers until the pages are there, and where none will be: one page at each address."""

    def __init__(self) -> None:
        self.fault = ""                 # a sentence; "": it is only a matter of time
        self.seen = threading.Event()   # the fault was read by someone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = page(self.fault).encode("utf-8", "replace")
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/html; charset=utf-8"), (b"cache-control", b"no-store"),
            (WAITING.encode(), b"fault" if self.fault else b"waiting")]})
        await send({"type": "http.response.body", "body": body})
        if self.fault:
            self.seen.set()


def page(fault: str = "") -> str:
    """The same page as a file of its own where no server can be opened: see window.py."""
    told = [i18n.tr("window.waiting", lang=lang) for lang in i18n.LANGUAGES]
    said = fault.split("\n") if fault else told
    body = "".join(f"<p>{escape(line)}</p>" for line in said)
    return (_PAGE.read_text("utf-8").replace("{body}", body)
            .replace("{state}", "fault" if fault else "waiting"))


@dataclass(slots=True)
class Served:
    """A running server. `url` opens a page once; whoever has it has the token."""

    guard: Guard
    server: uvicorn.Server
    thread: threading.Thread
    port: int
    front: Front
    rooms: AppState | None = None          # None: the pages are not there yet
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _life: Any = None                   # the pages' own start and end, in the server's thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.guard.token}"

    @property
    def app_state(self) -> AppState:
        assert self.rooms is not None
        return self.rooms

    def move_in(self, app: FastAPI, app_state: AppState) -> None:
        """From now on the pages answer. Raises what their start raises."""
        begun = threading.Event()

        async def live() -> None:
            async with app.router.lifespan_context(app):
                self.rooms, self.guard.app = app_state, app
                begun.set()
                await self._ended.wait()

        loop = self.server.loop         # type: ignore[attr-defined]  # see _Server
        self._life = asyncio.run_coroutine_threadsafe(live(), loop)
        self._life.add_done_callback(lambda _: begun.set())
        begun.wait()
        if self._life.done():
            self._life.result()

    @property
    def left_alone(self) -> bool:
        """No page for a while, and nothing that runs or waits."""
        quiet = self.guard.pages == 0 and time.monotonic() - self.guard.quiet_since > QUIET_S
        return quiet and all(view.over for view in (self.rooms.jobs.views() if self.rooms else ()))

    def wait(self) -> None:
        """Until someone quits, nobody is left, the fault was read, or Ctrl+C."""
        over = threading.Event()
        while self.thread.is_alive() and not self.left_alone and not over.is_set():
            over = (self.front.seen if self.front.fault else
                    self.rooms.desktop.quit if self.rooms else over)
            over.wait(0.5)
        if over.is_set():
            time.sleep(FAREWELL_S)      # pages ask once a second: they get to show the end

    def close(self) -> None:
        """Runs that go on go on; their worker writes its own journal."""
        if self._life is not None and not self._life.done():
            self.server.loop.call_soon_threadsafe(self._ended.set)  # type: ignore[attr-defined]
        self.server.should_exit = True
        self.thread.join(6)             # open pages' heartbeats get 2 s
        self.server.force_exit = True
        if self.rooms:
            self.rooms.close()


class _Server(uvicorn.Server):
    """uvicorn that tells its loop."""

    loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def listen(port: int = 0, focus: Callable[[], bool] = bool) -> Served:
    """Starts the server in a thread, with the waiting page. `port` 0: a free one. `focus` brings
    the window forward, if there is one. Raises OSError where the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name != "nt":             # there it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
    except BaseException:
        listener.close()
        raise
    port, front = listener.getsockname()[1], Front()
    guard = Guard(front, secrets.token_urlsafe(32), port)
    guard.answers["/focus"] = lambda: json.dumps({"native": focus()}).encode()
    server = _Server(uvicorn.Config(
        guard, log_level="warning", access_log=False, timeout_graceful_shutdown=2,
        server_header=False, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True,
                              name="server")
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    return Served(guard, server, thread, port, front)
