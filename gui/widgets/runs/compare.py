"""Two runs side by side: their losses in one chart, what differs in their settings, previews by
step."""

from __future__ import annotations

from collections.abc import Sequence

from core.config import TrainConfig
from core.jobs.runs import JobView
from gui.html import acts, button, esc, small
from gui.state.app_state import Context, Snapshot
from gui.state.form import label
from gui.widgets.runs.loss_chart import Curve, curves, ema
from gui.widgets.runs.previews import cell, picked
from gui.widgets.suggestion import value_text

# As the chart's legend and the table call the two runs.
NAMES = ("A", "B")


def compare(ctx: Context, snap: Snapshot) -> str:
    """Empty until two runs are chosen that are still there."""
    tr = ctx.tr
    chosen = snap.project.state("runs", compare=[])["compare"]
    views = list(filter(None, (snap.run(str(id)) for id in chosen)))
    if len(views) < 2:
        return small(tr("run_history.one_more") if views else "", status=True)
    names = " · ".join(f"{name}: {view.name}" for name, view in zip(NAMES, views, strict=False))
    # Smoothed alone: two raw curves hide each other.
    lines = [Curve(kind, f"{name} {view.name}", tuple(ema(view.losses)))
             for name, kind, view in zip(NAMES, ("smooth", "other"), views, strict=False)
             if len(view.losses) > 1]
    losses = (curves(ctx, lines, max(view.total for view in views)) if lines
              else small(tr("no_loss_yet")))
    stop = acts(button(tr("run_history.stop_comparing"), "compare"))
    return (f'<section class="box" id="compared"><h3>{esc(tr("run_history.compared"))} {esc(names)}'
            f'</h3>{losses}{_settings(ctx, views)}{_previews(ctx, views)}{stop}</section>')


def differences(first: JobView, second: JobView) -> list[tuple[str, object, object]]:
    """(key, value, value) of each setting that differs; what is not named has its default."""
    usual = TrainConfig().model_dump()
    left, right = usual | first.config, usual | second.config
    return [(key, left[key], right[key]) for key in usual
            if key not in ("resume", "output_name", "output_dir") and left[key] != right[key]]


def _settings(ctx: Context, views: Sequence[JobView]) -> str:
    rows = ""
    for key, *values in differences(views[0], views[1]):
        texts = ["–" if value in ("", None, []) else value_text(ctx, value) for value in values]
        cells = "".join(f"<td>{esc(text)}</td>" for text in texts)
        rows += f"<tr><th>{esc(label(ctx, key))}</th>{cells}</tr>"
    if not rows:
        return small(ctx.tr("run_history.same_settings"))
    return (f'<table class="differs"><tr><th>{esc(ctx.tr("run_history.differs"))}</th>'
            f"<th>{NAMES[0]}</th><th>{NAMES[1]}</th></tr>{rows}</table>")


def _previews(ctx: Context, views: Sequence[JobView]) -> str:
    """A row a run and prompt, a column a step; the same prompts stand below each other."""
    samples = [sample for view in views for sample in view.samples]
    if not samples:
        return small(ctx.tr("run_history.no_previews"))
    steps = picked(sorted({sample.step for sample in samples}))
    head = "".join(f"<th>{esc(ctx.tr('step_n', step=step))}</th>" for step in steps)
    body = ""
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        for name, view in zip(NAMES, views, strict=False):
            numbers = {sample.step: number for number, sample in enumerate(view.samples)
                       if sample.prompt == prompt}
            cells = "".join(cell(ctx, view, numbers.get(step), step) for step in steps)
            body += f"<tr><th>{name}</th>{cells}</tr>"
        body += f'<tr><td></td><td class="prompt" colspan="{len(steps)}">{esc(prompt)}</td></tr>'
    return f'<div class="previews"><table><tr><th></th>{head}</tr>{body}</table></div>'
