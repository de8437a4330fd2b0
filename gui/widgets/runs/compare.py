"""Two runs side by side: their losses in one chart, what differs in their settings, previews by
step."""

from __future__ import annotations

from collections.abc import Sequence

from core.config import TrainConfig
from core.jobs.runs import JobView
from gui.html import button, esc
from gui.state.app_state import Context, Snapshot
from gui.state.form import label
from gui.widgets.runs.loss_chart import Curve, curves, ema
from gui.widgets.runs.previews import cell, picked
from gui.widgets.suggestion import value_text

NAMES = ("A", "B")                      # as the chart's legend and the table call them


def compare(ctx: Context, snap: Snapshot) -> str:
    """Empty until two runs are chosen that are still there."""
    chosen = [snap.run(str(one)) for one in snap.project.tabs.get("runs", {}).get("compare", [])]
    views = [view for view in chosen if view is not None]
    if len(views) < 2:
        return (f'<p class="small" role="status">{esc(ctx.tr("run_history.one_more"))}</p>'
                if views else "")
    shown = " · ".join(f"{name}: {view.name}" for name, view in zip(NAMES, views, strict=False))
    stop = button(ctx.tr("run_history.stop_comparing"), "compare", "")
    return (f'<section class="box" id="compared"><h3>{esc(ctx.tr("run_history.compared"))} '
            f'{esc(shown)}</h3>{_losses(ctx, views)}{_differences(ctx, views)}'
            f'{_previews(ctx, views)}<p class="acts">{stop}</p></section>')


def _losses(ctx: Context, views: Sequence[JobView]) -> str:
    """Smoothed: two raw curves hide each other."""
    lines = [Curve(kind, f"{name} {view.name}", tuple(ema(view.losses)))
             for name, kind, view in zip(NAMES, ("smooth", "other"), views, strict=False)
             if len(view.losses) > 1]
    return curves(ctx, lines, max((view.total for view in views), default=0)) if lines else (
        f'<p class="small">{esc(ctx.tr("no_loss_yet"))}</p>')


def differences(one: JobView, two: JobView) -> list[tuple[str, object, object]]:
    """(key, value, value) of each setting that differs; what is not named has its default."""
    usual = TrainConfig().model_dump()
    mine, other = usual | one.config, usual | two.config
    return [(key, mine[key], other[key]) for key in usual
            if key not in ("resume", "output_name", "output_dir") and mine[key] != other[key]]


def _differences(ctx: Context, views: Sequence[JobView]) -> str:
    found = differences(views[0], views[1])
    if not found:
        return f'<p class="small">{esc(ctx.tr("run_history.same_settings"))}</p>'
    rows = "".join(f"<tr><th>{esc(label(ctx, key))}</th><td>{esc(_text(ctx, one))}</td>"
                   f"<td>{esc(_text(ctx, two))}</td></tr>" for key, one, two in found)
    return (f'<table class="differs"><tr><th>{esc(ctx.tr("run_history.differs"))}</th>'
            f"<th>{NAMES[0]}</th><th>{NAMES[1]}</th></tr>{rows}</table>")


def _text(ctx: Context, value: object) -> str:
    return "–" if value in ("", None, []) else value_text(ctx, value)


def _previews(ctx: Context, views: Sequence[JobView]) -> str:
    """A row a run and prompt, a column a step; the same prompts stand below each other."""
    steps = picked(sorted({sample.step for view in views for sample in view.samples}))
    prompts = dict.fromkeys(sample.prompt for view in views for sample in view.samples)
    if not steps:
        return f'<p class="small">{esc(ctx.tr("run_history.no_previews"))}</p>'
    head = "".join(f"<th>{esc(ctx.tr('step_n', step=step))}</th>" for step in steps)
    body = ""
    for prompt in prompts:
        for name, view in zip(NAMES, views, strict=False):
            numbers = {one.step: n for n, one in enumerate(view.samples) if one.prompt == prompt}
            cells = "".join(cell(ctx, view, numbers.get(step), step) for step in steps)
            body += f"<tr><th>{name}</th>{cells}</tr>"
        body += f'<tr><td></td><td class="prompt" colspan="{len(steps)}">{esc(prompt)}</td></tr>'
    return f'<div class="previews"><table><tr><th></th>{head}</tr>{body}</table></div>'
