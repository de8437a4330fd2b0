"""A painted area whose buttons report what they are: <button data-act="resume" data-id="...">."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gui.html import ASSETS


def panel(name: str, js: str = "", dense: bool = False, **more: Any) -> gr.HTML:
    """An area of the page. `name`: its id. Its HTML comes through `Tab.paint` and
    gui/assets/live.js; clicks come through Page.on. `js`: a script of ASSETS with a
    function `fresh()` that is called after each painting; it takes the place of the plain script.
    `dense`: small buttons and rows."""
    body = (ASSETS / f"{js or 'panel'}.js").read_text("utf-8")
    after = ", fresh" if js else ""
    script = f"{body}\nwindow.darkroom.mount(element, {name!r}{after});"
    return gr.HTML("", elem_id=name, js_on_load=script, elem_classes=["panel", *["dense"] * dense],
                   **more)
