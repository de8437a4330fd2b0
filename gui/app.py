"""The window's server: pages of all languages over one house, behind one door.

Gradio's analytics must be off before it is imported, which is why nothing else imports it first.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import importlib
import importlib.util
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI

from core import paths, thumbnails, words
from core.jobs import JobManager
from gui.album_routes import add_album_routes
from gui.context import Context, House, pictures_folder
from gui.header import Header
from gui.page import Page
from gui.planning import Planning
from gui.routes import add_live_route, add_routes
from gui.security import Guard
from gui.theme import HEAD, theme

TABS = ("dataset", "captioning", "parameters", "inference", "settings")     # files in gui/tabs
STYLES = [Path(__file__).parent / name for name in ("style.css", "panels.css")]
QUIET_S = 60.0                          # without a page and without a run: the app ends
WARM_AFTER_S = 3.0
FAREWELL_S = 2.0


def build(ctx: Context) -> gr.Blocks:
    """The page in one language."""
    page = ctx.page
    with gr.Blocks(title="LoRA Darkroom", fill_width=True, analytics_enabled=False,
                   delete_cache=(3600, 86_400)) as blocks:
        page.header = Header(ctx)
        with gr.Tabs(elem_id="tabs", selected="parameters") as page.frame:
            for name in TABS:
                if importlib.util.find_spec(f"gui.tabs.{name}") is None:
                    continue
                with gr.Tab(ctx.say(f"tab_{name}"), id=name, elem_id=f"tab-{name}"):
                    page.tabs.append((name, importlib.import_module(f"gui.tabs.{name}")
                                      .build(ctx)))
        page.wire(ctx, blocks.load)
    # Our handlers bypass Gradio's queue, whose loops look for work a thousand times a second.
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = 0.2
    return blocks


def application(house: House) -> FastAPI:
    """All pages and routes; every argument to Gradio stands here."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_routes(app, house)
    add_album_routes(app, house)
    for language in words.LANGUAGES:
        ctx = Context(house, language, Page())
        add_live_route(app, ctx)
        gr.mount_gradio_app(
            app, build(ctx), path=f"/{language}",
            server_name="127.0.0.1", footer_links=[], run_history=False, show_error=False,
            allowed_paths=[str(pictures_folder())],
            blocked_paths=[str(paths.data_dir() / "settings.yaml")],
            max_file_size="2gb", ssr_mode=False, enable_monitoring=False, pwa=False,
            mcp_server=False, theme=theme(), css_paths=STYLES,
            head=HEAD.replace("LANGUAGE", language).replace("LOST", ctx.say("lost")),
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None})
    return app


@dataclass(slots=True)
class Served:
    """A running server. `url` opens a page once; whoever has it has the token."""

    house: House
    guard: Guard
    server: uvicorn.Server
    thread: threading.Thread
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.guard.token}"

    @property
    def left_alone(self) -> bool:
        """No page for a while, and nothing that runs or waits."""
        quiet = self.guard.pages == 0 and time.monotonic() - self.guard.quiet_since > QUIET_S
        return quiet and all(view.over for view in self.house.jobs.views())

    def wait(self) -> None:
        """Until someone quits, nobody is left, or Ctrl+C."""
        quit = self.house.desktop.quit
        while self.thread.is_alive() and not self.left_alone and not quit.wait(1.0):
            pass
        if quit.is_set():
            time.sleep(FAREWELL_S)      # pages ask once a second: they get to show the end

    def close(self) -> None:
        """Runs that go on go on; their worker writes its own journal."""
        self.server.should_exit = True
        self.thread.join(6)             # open pages' heartbeats get 2 s
        self.server.force_exit = True
        self.house.close()


def serve(port: int = 0, jobs: JobManager | None = None, planning: Planning | None = None,
          warm: bool = True) -> Served:
    """Starts the server in a thread. `port` 0: a free one. Raises OSError where it is taken."""
    _settle()
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name != "nt":                 # there it would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    port = listener.getsockname()[1]
    house = House(jobs or JobManager(), planning)
    guard = Guard(application(house), secrets.token_urlsafe(32), port)
    server = uvicorn.Server(uvicorn.Config(
        guard, log_level="warning", access_log=False, timeout_graceful_shutdown=2,
        server_header=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True,
                              name="server")
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.02)
    if warm:
        timer = threading.Timer(WARM_AFTER_S, _warm, [house])
        timer.daemon = True
        timer.start()
    return Served(house, guard, server, thread, port)


def _warm(house: House) -> None:
    """What is likely to be wanted next: a worker, and the bases that lie on this machine."""
    house.jobs.warm()
    thumbnails.prune()
    house.bases.look(tuple(house.settings.now.model_folders))


def _settle() -> None:
    """Gradio serves what lies in the working folder and its temporary one: both are our own.
    Paths that were relative to the old working folder are made absolute before."""
    if home := os.environ.get("DARKROOM_HOME"):
        os.environ["DARKROOM_HOME"] = os.path.abspath(home)
    empty, temporary = paths.cache_dir() / "empty", paths.cache_dir() / "gradio"
    for folder in (empty, temporary, pictures_folder()):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.chdir(empty)
