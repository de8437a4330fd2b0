"""Previews by step: a row a prompt, a column a step, one seed, so that progress can be seen."""

from __future__ import annotations

from core.jobs.runs import JobView
from gui.html import esc
from gui.state.app_state import Context

MOST_STEPS = 8                          # columns: first, last, and evenly between


def previews(ctx: Context, view: JobView) -> str:
    if not view.samples:
        return f'<p class="small">{esc(ctx.tr("no_previews"))}</p>'
    steps = sorted({sample.step for sample in view.samples})
    steps = picked(steps)
    rows = list(dict.fromkeys((sample.prompt, sample.seed) for sample in view.samples))
    numbers = {(s.step, s.prompt, s.seed): n for n, s in enumerate(view.samples)}
    head = "".join(f"<th>{esc(ctx.tr('step_n', step=step))}</th>" for step in steps)
    body = "".join(
        f"<tr>{''.join(cell(ctx, view, numbers.get((step, *row)), step) for step in steps)}</tr>"
        f'<tr><td class="prompt" colspan="{len(steps)}">{esc(row[0])} '
        f'<small>{esc(ctx.tr("seed"))} {row[1]}</small></td></tr>' for row in rows)
    return f'<div class="previews"><table><tr>{head}</tr>{body}</table></div>'


def picked(steps: list[int]) -> list[int]:
    if len(steps) <= MOST_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(i * last / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]


def cell(ctx: Context, view: JobView, number: int | None, step: int) -> str:
    if number is None:
        return "<td></td>"
    address = f"/picture/{esc(view.id)}/{number}"
    alt = esc(ctx.tr("preview_at", step=step))
    return (f'<td><a href="{address}?full=1" target="_blank"><img src="{address}" alt="{alt}" '
            f'loading="lazy"></a></td>')
