"""The question when the app is to be closed while something runs; the one modal of this window."""

from __future__ import annotations

from gui.html import acts, bar, button, esc, small
from gui.state.app_state import Context, Snapshot


def close_dialog(ctx: Context, snap: Snapshot) -> str:
    """A <dialog> that live.js opens; Escape presses the button of data-cancel."""
    tr, active = ctx.tr, snap.active
    if not snap.closing:
        return ""
    if snap.closing == "closed":
        return _dialog("info", tr("close.closed"), f'<p>{esc(tr("close.closed_about"))}</p>')
    name = active.name if active else ""
    stay = acts(button(tr("close.stay"), "stay").replace("<button", "<button data-cancel", 1))
    if snap.closing == "stopping":
        text = tr("close.stopping", name=name)
        return _dialog("stopping", text, bar(1, 1, text, "busy") + stay)
    choices = "".join(
        f'<p>{button(tr(f"close.{choice}"), f"{choice}_run", kind=kind)}'
        f'<br><small>{esc(tr(f"close.{choice}_about", name=name))}</small></p>'
        for choice, kind in (("keep", "primary"), ("stop", "")))
    waits = small(tr("close.waits", count=len(snap.queued)) if snap.queued else "")
    return _dialog("asked", tr("close.question"), choices + waits + stay)


def _dialog(key: str, title: str, html: str) -> str:
    return (f'<dialog data-key="{key}" aria-labelledby="close-title"><h3 id="close-title">'
            f"{esc(title)}</h3>{html}</dialog>")
