"""The question when the app is to be closed while something runs; the one modal of this window."""

from __future__ import annotations

from gui.html import bar, button, esc
from gui.state.app_state import Context, Snapshot


def close_dialog(ctx: Context, snap: Snapshot) -> str:
    """A <dialog> that live.js opens; Escape presses the button of data-cancel."""
    tr, active = ctx.tr, snap.active
    if not snap.closing:
        return ""
    if snap.closing == "closed":
        return _dialog("info", tr("close.closed"), f'<p>{esc(tr("close.closed_about"))}</p>')
    name = active.name if active else ""
    stay = button(tr("close.stay"), "stay").replace("<button", "<button data-cancel", 1)
    if snap.closing == "stopping":
        said = tr("close.stopping", name=name)
        return _dialog("stopping", said, f'{bar(1.0, said, "busy")}<p class="acts">{stay}</p>')
    waits = tr("close.waits", count=len(snap.queued)) if snap.queued else ""
    choices = "".join(
        f'<p>{button(tr(f"close.{one}"), f"{one}_run", kind=kind)}'
        f'<br><small>{esc(tr(f"close.{one}_about", name=name))}</small></p>'
        for one, kind in (("keep", "primary"), ("stop", "")))
    more = f'<p class="small">{esc(waits)}</p>' if waits else ""
    return _dialog("asked", tr("close.question"), f'{choices}{more}<p class="acts">{stay}</p>')


def _dialog(key: str, title: str, body: str) -> str:
    return (f'<dialog data-key="{key}" aria-labelledby="close-title"><h3 id="close-title">'
            f"{esc(title)}</h3>{body}</dialog>")
