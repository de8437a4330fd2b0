"""The queue and the runs so far, newest first."""

from __future__ import annotations

from core.runs import JobView
from gui.context import Context, Snapshot
from gui.html import button, clock, duration, esc

MOST = 20
SIGNS = {"done": "✓", "failed": "✖", "interrupted": "⚠", "stopped": "■", "queued": "○"}


def history(ctx: Context, snap: Snapshot) -> str:
    """Trainings only: pictures stand in the Inference tab."""
    views = [view for view in snap.runs if view.job == "train"][:MOST]
    if not views:
        return ""
    rows = "".join(_row(ctx, view, snap) for view in views)
    return (f'<section class="box"><h3>{esc(ctx.say("history"))}</h3>'
            f'<table class="history">{rows}</table></section>')


def _row(ctx: Context, view: JobView, snap: Snapshot) -> str:
    sign = SIGNS.get(view.state, "●")
    loss = f"{view.losses[-1][1]:.4f}" if view.losses else ""
    steps = ctx.say("step_of", step=view.step, total=view.total) if view.total else ""
    took = duration(ctx, view.ended - view.started) if view.ended and view.started else ""
    shown = snap.shown is not None and snap.shown.id == view.id
    acts = [button(ctx.say("show"), "show", view.id,
                   why_not=ctx.say("is_shown") if shown else "")]
    if view.state == "queued":
        acts.append(button(ctx.say("leave_queue"), "leave", view.id))
    if view.over:
        acts.append(button(ctx.say("reload_settings"), "reload", view.id))
        if view.state in ("interrupted", "stopped", "failed"):
            acts.append(button(ctx.say("resume"), "resume", view.id, once=True, why_not=""
                               if view.checkpoints else ctx.say("no_checkpoint")))
    cells = (f'<td class="{view.state}">{sign} {esc(ctx.say(f"state_{view.state}"))}</td>'
             f"<td><b>{esc(view.name)}</b></td><td>{clock(view.created)}</td>"
             f"<td>{esc(steps)}</td><td>{esc(took)}</td>"
             f"<td>{esc(ctx.say('loss'))} {loss or '–'}</td>")
    return f'<tr>{cells}<td class="acts">{"".join(acts)}</td></tr>'
