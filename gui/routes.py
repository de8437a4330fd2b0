"""Addresses beside Gradio's: language, theme, and the pictures and files of runs, by number only.

No address holds a path: a file is the n-th of what a run has told of itself.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel, Field

from core import i18n
from core.dataset import thumbnails
from core.errors import UserError
from core.jobs import bug_report
from core.jobs.runs import JobView
from gui.dataset_routes import CACHED
from gui.html import ASSETS
from gui.state.app_state import AppState, Context
from gui.state.page import Page
from gui.state.run_files import lora_file

THUMB_PX = 320
# Bytes: a smaller file is sent as it is.
SMALL = 60_000


class Shown(BaseModel):
    """What a page tells of itself: the version that it shows, and a mark for each panel."""

    version: str = Field("", max_length=100)
    marks: dict[str, str] = Field({}, max_length=200)


def add_routes(app: FastAPI, app_state: AppState) -> None:
    @app.get("/")
    def home() -> RedirectResponse:
        return _to(app_state)

    @app.get("/language/{language}")
    def language(language: str) -> RedirectResponse:
        if language not in i18n.LANGUAGES:
            raise HTTPException(404)
        app_state.settings.change(language=language)
        return _to(app_state)

    @app.get("/theme/{theme}")
    def theme(theme: str) -> RedirectResponse:
        if theme not in ("auto", "light", "dark"):
            raise HTTPException(404)
        app_state.settings.change(theme=theme)
        return _to(app_state)

    @app.get("/picture/{run_id}/{number}")
    def picture(run_id: str, number: int, full: bool = False) -> FileResponse:
        path = _file([Path(sample.path) for sample in _run(app_state, run_id).samples], number)
        # A small file stays as it is, pixel for pixel; so does one that can't be read.
        with contextlib.suppress(UserError, OSError):
            if not full and path.stat().st_size >= SMALL:
                path = thumbnails.thumbnail(path, THUMB_PX)
        return FileResponse(path, headers=CACHED)

    @app.get("/lora/{run_id}/{number}")
    def lora(run_id: str, number: int) -> FileResponse:
        points = _run(app_state, run_id).checkpoints
        path = _file([lora_file(point) for point in points], number)
        return FileResponse(path, filename=path.name, media_type="application/octet-stream")

    @app.get("/diagnostics")
    @app.get("/diagnostics/{run_id}")
    def report(run_id: str = "") -> PlainTextResponse:
        return PlainTextResponse(bug_report.text(_run(app_state, run_id) if run_id else None))

    @app.get("/live.js")
    def script() -> FileResponse:
        return FileResponse(ASSETS / "live.js", media_type="text/javascript",
                            headers={"cache-control": "no-store"})

    @app.get("/favicon.ico")
    def favicon() -> FileResponse:
        return FileResponse(ASSETS / "icon.svg", media_type="image/svg+xml")


def add_live_route(app: FastAPI, ctx: Context, page: Page) -> None:
    """What the pages of one language poll; see gui/assets/live.js. Before Gradio's mount, which
    would take every address below it."""
    @app.post(f"/{ctx.language}/live")
    def live(shown: Shown) -> Response:
        if news := page.live(ctx, shown.version, shown.marks):
            body = json.dumps(news, ensure_ascii=False).encode("utf-8", "replace")
            return Response(body, media_type="application/json")
        return Response(status_code=204)


def _to(app_state: AppState) -> RedirectResponse:
    settings = app_state.settings.now
    look = "" if settings.theme == "auto" else f"?__theme={settings.theme}"
    return RedirectResponse(f"/{settings.spoken}/{look}", 303, {"cache-control": "no-store"})


def _run(app_state: AppState, run_id: str) -> JobView:
    view = app_state.snapshot().run(run_id)
    if view is None:
        raise HTTPException(404)
    return view


def _file(files: list[Path], number: int) -> Path:
    if not 0 <= number < len(files) or not os.path.isfile(files[number]):
        raise HTTPException(404)
    return files[number]

