"""Where files and whole folders are dropped, or chosen in the browser's own dialog."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import gradio as gr

from core.serialization import json_of
from gui.html import ASSETS, acts, button, esc
from gui.state.app_state import Context


def drop_zone(ctx: Context, name: str, suffixes: Iterable[str],
              subject: str = "tab_dataset", choose: Iterable[str] = ("files", "folder")) -> gr.HTML:
    """Its clicks tell ("dropped", paths as JSON): see `uploaded`. `subject`: whose sentences tell
    which files fit. `choose`: the buttons, files | folder."""
    tr, known = ctx.tr, list(suffixes)
    pattern = f"({'|'.join(map(re.escape, known))})$"
    # These buttons open a dialog in the page (drop_zone.js) and report nothing by themselves.
    buttons = acts(*(button(tr(f"tab_dataset.choose_{kind}"), "").replace(
        'data-act=""', f'data-choose="{kind}"') for kind in choose))
    progress = tr("tab_dataset.uploading", done="DONE", total="TOTAL")
    html = (f'<div class="drop" data-suffixes="{esc(pattern)}" data-doing="{esc(progress)}" '
            f'data-none="{esc(tr(f"{subject}.none_fits"))}" '
            f'data-failed="{esc(tr("tab_dataset.upload_failed"))}"><p>'
            f'{esc(tr(f"{subject}.drop"))}</p>{buttons}<p class="said" role="status"></p>'
            f'<input type="file" name="files" multiple hidden accept="{",".join(known)}">'
            f'<input type="file" name="folder" webkitdirectory hidden></div>')
    return gr.HTML(html, elem_id=name, elem_classes=["panel", "dense"],
                   js_on_load=(ASSETS / "drop_zone.js").read_text("utf-8"))


def uploaded(message: str) -> list[Path]:
    """The files that a page names, if they are uploads of Gradio's: nothing else is read."""
    root = Path(os.environ.get("GRADIO_TEMP_DIR", "")).resolve()
    # Without a folder of uploads the root would be the working folder.
    if root == Path.cwd().resolve():
        return []
    paths = [Path(name).resolve() for name in json_of(message, list) if isinstance(name, str)]
    return [path for path in paths if path.is_relative_to(root) and path.is_file()]
