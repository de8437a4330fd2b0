"""Addresses of the pictures of the project's folder, by a key that holds no path."""

from __future__ import annotations

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, Response

from core.dataset import thumbnails
from core.errors import UserError
from gui.state.app_state import AppState
from gui.state.dataset_view import DatasetView

# A picture that changes gets another address: browsers may keep what they have.
CACHED = {"cache-control": "private, max-age=86400, immutable"}
# A grey square with a cross, for a picture that can't be read.
TORN = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="64" '
        'fill="#d8d8de"/><path d="M20 20 44 44M44 20 20 44" stroke="#86868f" stroke-width="4"/>'
        '</svg>')


def add_dataset_routes(app: FastAPI, app_state: AppState) -> None:
    @app.get("/dataset/{key}")
    def picture(key: str, view: bool = False) -> Response:
        dataset = app_state.shared(DatasetView)
        try:
            path = dataset.path(dataset.named(key))
        except UserError:
            raise HTTPException(404) from None
        try:
            side = thumbnails.VIEW if view else thumbnails.SIDE
            return FileResponse(thumbnails.thumbnail(path, side), media_type="image/webp",
                                headers=CACHED)
        # Torn, gone, a full disk: the check of the folder says so in words.
        except (UserError, OSError):
            return Response(TORN, media_type="image/svg+xml", headers={"cache-control": "no-store"})
