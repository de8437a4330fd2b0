"""The queue and the runs so far, newest first, a page at a time; two of them side by side."""

from __future__ import annotations

from core.jobs import history as records
from core.jobs.runs import JobView
from gui.html import button, clock, duration, esc
from gui.state.app_state import Context, Snapshot

PAGE = 10
SIGNS = {"done": "✓", "unproven": "⚠", "failed": "✖", "interrupted": "⚠", "stopped": "■",
         "queued": "○"}


def history(ctx: Context, snap: Snapshot) -> str:
    """Trainings only: pictures stand in the Inference tab."""
    views = [view for view in snap.runs if view.job == "train" and view.state != "queued"]
    state = snap.project.tabs.get("runs", {})
    undo = _undo(ctx, str(state.get("removed", "")))
    if not views:
        return _queue(ctx, snap) + undo
    pages = -(-len(views) // PAGE)
    page = max(0, min(int(state.get("page", 0)), pages - 1))
    chosen = [str(one) for one in state.get("compare", [])]
    rows = "".join(_row(ctx, view, snap, chosen) for view in views[page * PAGE:][:PAGE])
    return (f'{_queue(ctx, snap)}<section class="box"><h3>{esc(ctx.tr("run_history.title"))}'
            f'</h3><table class="history">{rows}</table>{_pager(ctx, page, pages)}{undo}'
            '</section>')


def _queue(ctx: Context, snap: Snapshot) -> str:
    """All that waits, pictures and captions too: they take the machine as well."""
    if not snap.queued:
        return ""
    rows = "".join(_waiting(ctx, view, number) for number, view in enumerate(snap.queued))
    return (f'<section class="box"><h3>{esc(ctx.tr("run_history.queue"))}</h3>'
            f'<table class="history">{rows}</table></section>')


def _waiting(ctx: Context, view: JobView, number: int) -> str:
    first = ctx.tr("run_history.is_first") if number == 0 else ""
    acts = (button(f"↑ {ctx.tr('run_history.move_up')}", "up", view.id, why_not=first)
            + (button(ctx.tr("show"), "show", view.id) if view.job == "train" else "")
            + button(ctx.tr("leave_queue"), "leave", view.id))
    return (f'<tr><td>{number + 1}.</td><td><b>{esc(view.name)}</b></td>'
            f'<td>{esc(ctx.tr(f"doing_{view.job}"))}</td><td>{clock(view.created)}</td>'
            f'<td class="acts">{acts}</td></tr>')


def _row(ctx: Context, view: JobView, snap: Snapshot, chosen: list[str]) -> str:
    sign = SIGNS.get(view.state, "●")
    loss = f"{view.losses[-1][1]:.4f}" if view.losses else "–"
    steps = ctx.tr("step_of", step=view.step, total=view.total) if view.total else ""
    took = duration(ctx, view.ended - view.started) if view.ended and view.started else ""
    cells = (f'<td class="{view.state}">{sign} {esc(ctx.tr(f"state_{view.state}"))}</td>'
             f"<td><b>{esc(view.name)}</b></td><td>{clock(view.created)}</td>"
             f"<td>{esc(steps)}</td><td>{esc(took)}</td>"
             f"<td>{esc(ctx.tr('loss'))} {loss}</td>")
    return (f'<tr data-key="{esc(view.id)}">{cells}'
            f'<td class="acts">{_acts(ctx, view, snap, chosen)}</td></tr>')


def _acts(ctx: Context, view: JobView, snap: Snapshot, chosen: list[str]) -> str:
    tr = ctx.tr
    shown = snap.shown is not None and snap.shown.id == view.id
    acts = [button(tr("show"), "show", view.id, why_not=tr("is_shown") if shown else ""),
            button(("✓ " if view.id in chosen else "") + tr("run_history.compare"), "compare",
                   view.id, hint=tr("run_history.compare_hint"))]
    if view.over:
        acts.append(button(tr("reload_settings"), "reload", view.id))
        if view.state in ("interrupted", "stopped", "failed"):
            acts.append(button(tr("resume"), "resume", view.id, once=True, why_not=""
                               if view.checkpoints else tr("no_checkpoint")))
    acts.append(button(tr("close.open_folder"), "folder", view.id, hint=view.output_dir))
    if view.over:
        acts.append(button("×", "remove", view.id, hint=tr("run_history.remove")))
    return "".join(acts)


def _pager(ctx: Context, page: int, pages: int) -> str:
    if pages < 2:
        return ""
    def turn(sign: str, to: int, key: str) -> str:
        return button(sign, "page", str(to), hint=ctx.tr(f"run_history.{key}"),
                      why_not="" if 0 <= to < pages else ctx.tr(f"run_history.no_{key}"))
    said = esc(ctx.tr("run_history.page", page=page + 1, pages=pages))
    return (f'<p class="acts">{turn("‹", page - 1, "newer")}<span class="small">{said}</span>'
            f'{turn("›", page + 1, "older")}</p>')


def _undo(ctx: Context, run_id: str) -> str:
    """Of the record that was removed last."""
    if not records.can_restore(run_id):
        return ""
    return (f'<p class="small" role="status">{esc(ctx.tr("run_history.removed"))} '
            f'{button(ctx.tr("run_history.undo"), "restore", run_id, kind="link")}</p>')
