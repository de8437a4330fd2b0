"""A painted area whose buttons report what they are: <button data-act="resume" data-id="...">."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gui.html import ASSETS
from gui.state.page import READY

# One listener on the area itself: what is painted anew needs none.
_DELEGATE = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (!button || button.disabled || !element.contains(button) || button.matches('form')) return;
  event.preventDefault();
  if (button.dataset.once !== undefined) button.disabled = true;
  trigger('click', {act: button.dataset.act, id: button.dataset.id || ''});
});
element.addEventListener('submit', event => {
  const form = event.target.closest('form[data-act]');
  if (!form) return;
  event.preventDefault();
  trigger('click', {act: form.dataset.act, id: form.querySelector('input').value});
});
"""


def panel(name: str, js: str = "", dense: bool = False, **more: Any) -> gr.HTML:
    """An area of the page. `name`: its id. Its HTML comes through `Tab.paint` and
    gui/assets/live.js; clicks come through Page.on_panel. `js`: a script of ASSETS with a
    function `fresh()` that is called after each painting; it takes the place of the plain script.
    `dense`: small buttons and rows."""
    body = (ASSETS / f"{js}.js").read_text("utf-8") if js else _DELEGATE
    after = ", fresh" if js else ""
    script = f"{body}\n{READY}\nready(() => window.darkroom.mount(element, {name!r}{after}));"
    return gr.HTML("", elem_id=name, js_on_load=script, elem_classes=["panel", *["dense"] * dense],
                   **more)
