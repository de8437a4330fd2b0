"""Where files and whole folders are dropped, or chosen in the browser's own dialog."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import gradio as gr

from gui.html import ASSETS, button, esc
from gui.state.app_state import Context


def drop_zone(ctx: Context, name: str, suffixes: Iterable[str],
              subject: str = "tab_dataset", choose: Iterable[str] = ("files", "folder")) -> gr.HTML:
    """Its clicks tell ("dropped", paths as JSON): see `uploaded`. `subject`: whose words for what
    fits."""
    script = (ASSETS / "drop_zone.js").read_text("utf-8")
    return gr.HTML(html(ctx, suffixes, subject, choose), elem_id=name, js_on_load=script,
                   elem_classes=["panel", "dense"])


def html(ctx: Context, suffixes: Iterable[str], subject: str = "tab_dataset",
         choose: Iterable[str] = ("files", "folder")) -> str:
    tr = ctx.tr
    known = list(suffixes)
    fits = "(" + "|".join(re.escape(one) for one in known) + ")$"
    buttons = "".join(button(tr(f"tab_dataset.choose_{one}"), "").replace(
        'data-act=""', f'data-choose="{one}"') for one in choose)
    doing = tr("tab_dataset.uploading", done="DONE", total="TOTAL")
    return (f'<div class="drop" data-suffixes="{esc(fits)}" data-doing="{esc(doing)}" '
            f'data-none="{esc(tr(f"{subject}.none_fits"))}" '
            f'data-failed="{esc(tr("tab_dataset.upload_failed"))}"><p>'
            f'{esc(tr(f"{subject}.drop"))}</p><p class="acts">{buttons}</p>'
            f'<p class="said" role="status"></p>'
            f'<input type="file" name="files" multiple hidden accept="{",".join(known)}">'
            f'<input type="file" name="folder" webkitdirectory hidden></div>')


def uploaded(told: str) -> list[Path]:
    """The files that a page names, if they are uploads of Gradio's: nothing else is read."""
    try:
        found = json.loads(told)
    except ValueError:
        return []
    root = Path(os.environ.get("GRADIO_TEMP_DIR", "")).resolve()
    paths = [Path(one).resolve() for one in found if isinstance(one, str)] \
        if isinstance(found, list) else []
    return [path for path in paths if root != Path.cwd().resolve()
            and path.is_relative_to(root) and path.is_file()]
