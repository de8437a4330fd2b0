"""The window's pages in all languages over one AppState, for the server of gui/server.py.

Gradio's analytics must be off before it is imported, which is why nothing else imports it first.
"""

from __future__ import annotations

import os

from gui.html import ASSETS

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import json
import threading
from collections.abc import Callable

import gradio as gr
from fastapi import FastAPI

from core import i18n, paths
from core.dataset import thumbnails
from core.jobs.manager import JobManager
from gui.dataset_routes import add_dataset_routes
from gui.header import Header
from gui.routes import add_live_route, add_routes
from gui.server import Served, listen
from gui.state.app_state import AppState, Context, Tab, pictures_folder
from gui.state.page import Page
from gui.state.plan_client import Planning
from gui.tabs.captioning import CaptioningTab
from gui.tabs.dataset import DatasetTab
from gui.tabs.inference import Inference
from gui.tabs.parameters import Parameters
from gui.tabs.settings import SettingsTab
from gui.theme import HEAD, theme

# In their order on the page.
TABS: dict[str, Callable[[Context], Tab]] = {
    "dataset": DatasetTab, "captioning": CaptioningTab, "parameters": Parameters,
    "inference": Inference, "settings": SettingsTab}
# The first page comes first: what is likely to be wanted next begins after so many seconds.
WARM_AFTER_S = 3.0


def build(ctx: Context, page: Page) -> gr.Blocks:
    """The page in one language."""
    with gr.Blocks(title="LoRA Darkroom", fill_width=True, analytics_enabled=False,
                   delete_cache=(3600, 86_400)) as blocks:
        page.header = Header(ctx)
        with gr.Tabs(elem_id="tabs", selected="parameters") as page.frame:
            for name, tab in TABS.items():
                with gr.Tab(ctx.tr(f"tab_{name}"), id=name, elem_id=f"tab-{name}"):
                    page.tabs.append((name, tab(ctx)))
        page.wire(ctx, blocks.load)
    # Our handlers bypass Gradio's queue, whose loops look for work a thousand times a second.
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = 0.2
    return blocks


def application(app_state: AppState, heads: dict[str, str]) -> FastAPI:
    """All pages and routes; every argument to Gradio stands here. `heads` gets what comes first
    into each page's <head>, where Gradio's own would come late, and by a script."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    add_routes(app, app_state)
    add_dataset_routes(app, app_state)
    for language in i18n.LANGUAGES:
        page = Page()
        ctx = Context(app_state, language, page)
        add_live_route(app, ctx, page)
        heads[f"/{language}/"] = HEAD.replace("LANGUAGE", language).replace(
            "LOST", json.dumps(ctx.tr("lost")))
        gr.mount_gradio_app(
            app, build(ctx, page), path=f"/{language}",
            server_name="127.0.0.1", footer_links=[], run_history=False, show_error=False,
            allowed_paths=[str(pictures_folder())],
            blocked_paths=[str(paths.data_dir() / "settings.yaml")],
            max_file_size="2gb", ssr_mode=False, enable_monitoring=False, pwa=False,
            mcp_server=False, theme=theme(),
            css_paths=[ASSETS / "style.css", ASSETS / "panels.css"],
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None})
    return app


def serve(port: int = 0, jobs: JobManager | None = None, planning: Planning | None = None,
          warm: bool = True) -> Served:
    """A server whose pages are there. `port` 0: a free one. Raises OSError where it is taken."""
    served = listen(port)
    add_pages(served, jobs, planning, warm)
    return served


def add_pages(served: Served, jobs: JobManager | None = None, planning: Planning | None = None,
              warm: bool = True) -> None:
    """Pages for a server that shows the waiting page. `warm`: start a worker and look for base
    models soon, since they are likely to be wanted. Raises OSError for folders of ours that can't
    be written."""
    # The working folder changes below: what was relative to it is made absolute before.
    if home := os.environ.get("DARKROOM_HOME"):
        os.environ["DARKROOM_HOME"] = os.path.abspath(home)
    # Gradio serves what lies in the working folder and in its temporary one: both are our own.
    empty, temporary = paths.cache_dir() / "empty", paths.cache_dir() / "gradio"
    for folder in (empty, temporary, pictures_folder()):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.chdir(empty)

    app_state = AppState(jobs or JobManager(), planning)
    served.attach(application(app_state, served.guard.heads), app_state)

    def warm_up() -> None:
        app_state.jobs.warm()
        thumbnails.prune()
        app_state.bases.look(tuple(app_state.settings.now.model_folders))
    if warm:
        timer = threading.Timer(WARM_AFTER_S, warm_up)
        timer.daemon = True
        timer.start()
