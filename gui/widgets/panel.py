"""A painted area whose buttons report what they are: <button data-act="resume" data-id="...">."""

from __future__ import annotations

from typing import Any

import gradio as gr

# One listener on the area itself: what is painted anew needs none.
_DELEGATE = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (!button || button.disabled || !element.contains(button)) return;
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


def panel(name: str, value: str = "", **more: Any) -> gr.HTML:
    """`name`: its id on the page. Clicks come through Page.on_panel."""
    return gr.HTML(value, elem_id=name, js_on_load=_DELEGATE, elem_classes=["panel"], **more)
