"""The server before its pages: something to see at once, then the pages, or why there are none.

Gradio's import takes seconds, so that nothing here may need it: a waiting page answers every
address from the first half second on, and asks itself whether the pages are there.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from core import i18n
from gui.html import ASSETS
from gui.security import Guard, Receive, Scope, Send, answer_page, user_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from gui.state.app_state import AppState

# Without a page and without a run for so many seconds the app ends.
QUIET_S = 60.0
# A request's first lines come at once: from this machine.
HEADER_S = 20.0
# Pages ask once a second: they get to show the end.
FAREWELL_S = 2.0
# A header of pages that are not the app's; its value: waiting | fault.
WAITING = "x-darkroom"


class Front:
    """Answers every address with the waiting page, or with the reason why there are no pages."""

    def __init__(self) -> None:
        # Why there will be no pages, in a sentence; "": it is only a matter of time.
        self.fault = ""
        # Set once a browser has fetched the fault.
        self.seen = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await answer_page(send, page(self.fault), headers=[
            (b"content-type", b"text/html; charset=utf-8"),
            (WAITING.encode(), b"fault" if self.fault else b"waiting")])
        if self.fault:
            self.seen.set()


def page(fault: str = "") -> str:
    """The waiting page, or the one that tells a fault; complete, with its own styles."""
    # Nothing is known of the user's language yet: it is said in all of them.
    lines = fault.split("\n") if fault else [
        i18n.tr("window.waiting", lang=language) for language in i18n.LANGUAGES]
    body = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return ((ASSETS / "waiting.html").read_text("utf-8").replace("{body}", body)
            .replace("{state}", "fault" if fault else "waiting"))


@dataclass(slots=True)
class Served:
    """A running server."""

    guard: Guard
    server: _Server
    thread: threading.Thread
    port: int
    front: Front
    # None: the pages are not there yet.
    state: AppState | None = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    # The pages' own start and end, in the server's thread.
    _lifespan: Any = None

    @property
    def url(self) -> str:
        """An address that opens a page once: another one each time."""
        return self.guard.address()

    @property
    def app_state(self) -> AppState:
        """The state of the pages, for callers that know that the pages are there."""
        assert self.state is not None
        return self.state

    def attach(self, app: FastAPI, app_state: AppState) -> None:
        """Serves the pages from now on. Raises what their start raises."""
        begun = threading.Event()

        async def live() -> None:
            async with app.router.lifespan_context(app):
                self.state, self.guard.app = app_state, app
                begun.set()
                await self._ended.wait()

        # uvicorn runs in a thread, and an app that comes later has no lifespan of its own there.
        self._lifespan = asyncio.run_coroutine_threadsafe(live(), self.server.loop)
        self._lifespan.add_done_callback(lambda _: begun.set())
        begun.wait()
        if self._lifespan.done():
            self._lifespan.result()

    @property
    def left_alone(self) -> bool:
        """Whether no page has been open for QUIET_S, and no run goes on or waits."""
        quiet = self.guard.pages == 0 and time.monotonic() - self.guard.quiet_since > QUIET_S
        return quiet and all(view.over for view in (self.state.jobs.views() if self.state else ()))

    def wait(self) -> None:
        """Blocks until someone quits, nobody is left, the fault was read, or Ctrl+C is pressed."""
        over = threading.Event()
        while self.thread.is_alive() and not self.left_alone and not over.is_set():
            # Which of these can end it changes while the pages are made.
            if self.front.fault:
                over = self.front.seen
            elif self.state:
                over = self.state.desktop.quit
            over.wait(0.5)
        if over.is_set():
            time.sleep(FAREWELL_S)

    def close(self) -> None:
        """Ends the server. A run goes on: its worker writes its own journal."""
        if self._lifespan and not self._lifespan.done():
            self.server.loop.call_soon_threadsafe(self._ended.set)
        self.server.should_exit = True
        # The heartbeats of open pages get 2 s by timeout_graceful_shutdown.
        self.thread.join(6)
        self.server.force_exit = True
        if self.state:
            self.state.close()


class _Patient(H11Protocol):
    """uvicorn's connection, which is closed where a request isn't told of within HEADER_S: whoever
    sends halves of requests would hold as many connections as there can be."""

    _giving_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Once a connection: the tables of sockets are long, and no other user gets into one.
        client, server = (transport.get_extra_info(name) for name in ("peername", "sockname"))
        self.app_state = {**self.app_state, "user": user_of(client, server) if client else None}
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        asked = self.cycle is not None and not self.cycle.response_complete
        if asked and self._giving_up:
            self._giving_up.cancel()
            self._giving_up = None
        elif not asked and not self._giving_up:
            self._giving_up = self.loop.call_later(HEADER_S, self.transport.close)


class _Server(uvicorn.Server):
    """uvicorn's server, which remembers the event loop that it runs in."""

    loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)


def listen(port: int = 0, focus: Callable[[], bool] = bool) -> Served:
    """Starts the server in a thread, with the waiting page. `port` 0: a free one. `focus` brings
    the window forward, if there is one. Raises OSError where the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # On Windows this option would let two servers share a port.
        if os.name != "nt":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
    except BaseException:
        listener.close()
        raise
    port, front = listener.getsockname()[1], Front()
    guard = Guard(front, port)
    # A second start shows our window, or a page in the browser, whose command line all can read.
    def told_of_focus() -> bytes:
        native = focus()
        # an address for a browser only where one will be opened: it is good for anyone a while
        return json.dumps({"native": native, "url": guard.address(),
                           "shown": "" if native else guard.address_to_show()}).encode()

    guard.answers["/focus"] = told_of_focus
    server = _Server(uvicorn.Config(
        guard, http=_Patient, log_level="warning", access_log=False, timeout_graceful_shutdown=2,
        server_header=False, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, args=[[listener]], daemon=True, name="server")
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    return Served(guard, server, thread, port, front)
