"""The queue and the runs so far, newest first, a page at a time; two of them side by side."""

from __future__ import annotations

from core.jobs import history as records
from core.jobs.runs import JobView
from gui.html import acts, box, button, clock, duration, esc
from gui.state.app_state import Context, Snapshot
from gui.widgets.fault_card import folder
from gui.widgets.picture_grid import page_of

PER_PAGE = 10
SIGNS = {"done": "✓", "unproven": "⚠", "failed": "✖", "interrupted": "⚠", "stopped": "■",
         "queued": "○"}


def history(ctx: Context, snap: Snapshot) -> str:
    """The queue, and the trainings; drawings stand in the Inference tab."""
    tr = ctx.tr
    # a damaged record tells no job, and can be removed here
    views = [view for view in snap.runs if view.job in ("train", "") and view.state != "queued"]
    state = snap.project.state("runs", removed="", page=0, compare=[])
    removed, undo = state["removed"], ""
    if records.can_restore(removed):
        undo = (f'<p class="small" role="status">{esc(tr("run_history.removed"))} '
                f'{button(tr("run_history.undo"), "restore", removed, kind="link")}</p>')
    if not views:
        return _queue(ctx, snap) + undo
    page, pages = page_of(len(views), state["page"], PER_PAGE)
    compared = [str(id) for id in state["compare"]]
    rows = "".join(_row(ctx, view, snap, compared) for view in views[page * PER_PAGE:][:PER_PAGE])
    pager = ""
    if pages > 1:
        newer, older = (
            button(sign, "page", str(to), hint=tr(f"run_history.{key}"),
                   why_not="" if 0 <= to < pages else tr(f"run_history.no_{key}"))
            for sign, to, key in (("‹", page - 1, "newer"), ("›", page + 1, "older")))
        where = tr("run_history.page", page=page + 1, pages=pages)
        pager = acts(newer, f'<span class="small">{esc(where)}</span>', older)
    return _queue(ctx, snap) + box(tr("run_history.title"),
                                   f'<table class="history">{rows}</table>{pager}{undo}')


def _queue(ctx: Context, snap: Snapshot) -> str:
    """All that waits, pictures and captions too: they take the machine as well."""
    tr, rows = ctx.tr, ""
    for number, view in enumerate(snap.queued, 1):
        first = tr("run_history.is_first") if number == 1 else ""
        buttons = (button(f"↑ {tr('run_history.move_up')}", "up", view.id, why_not=first)
                   + (button(tr("show"), "show", view.id) if view.job == "train" else "")
                   + button(tr("leave_queue"), "leave", view.id))
        rows += (f'<tr><td>{number}.</td><td><b>{esc(view.name)}</b></td>'
                 f'<td>{esc(tr(f"doing_{view.job}"))}</td><td>{clock(view.created)}</td>'
                 f'<td class="acts">{buttons}</td></tr>')
    return box(tr("run_history.queue"), f'<table class="history">{rows}</table>') if rows else ""


def _row(ctx: Context, view: JobView, snap: Snapshot, compared: list[str]) -> str:
    tr = ctx.tr
    shown = snap.shown is not None and snap.shown.id == view.id
    buttons = (button(tr("show"), "show", view.id, why_not=tr("is_shown") if shown else "")
               + button("✓ " * (view.id in compared) + tr("run_history.compare"), "compare",
                        view.id, hint=tr("run_history.compare_hint")))
    if view.over:
        buttons += button(tr("reload_settings"), "reload", view.id)
    if view.state in ("interrupted", "stopped", "failed"):
        buttons += button(tr("resume"), "resume", view.id, once=True,
                          why_not="" if view.checkpoints else tr("no_checkpoint"))
    buttons += folder(ctx, view)
    if view.over:
        buttons += button("×", "remove", view.id, hint=tr("run_history.remove"))
    loss = f"{view.losses[-1][1]:.4f}" if view.losses else "–"
    steps = tr("step_of", step=view.step, total=view.total) if view.total else ""
    took = duration(ctx, view.ended - view.started) if view.ended and view.started else ""
    return (f'<tr data-key="{esc(view.id)}"><td class="{view.state}">'
            f'{SIGNS.get(view.state, "●")} {esc(tr(f"state_{view.state}"))}</td>'
            f"<td><b>{esc(view.name)}</b></td><td>{clock(view.created)}</td>"
            f"<td>{esc(steps)}</td><td>{esc(took)}</td><td>{esc(tr('loss'))} {loss}</td>"
            f'<td class="acts">{buttons}</td></tr>')
