"""Previews by step: a row a prompt, a column a step, one seed, so that progress can be seen."""

from __future__ import annotations

from core.jobs.runs import JobView
from gui.html import esc, small
from gui.state.app_state import Context

# Columns: the first step, the last, and some evenly between.
MOST_STEPS = 8


def previews(ctx: Context, view: JobView) -> str:
    if not view.samples:
        return small(ctx.tr("no_previews"))
    steps = picked(sorted({sample.step for sample in view.samples}))
    rows = dict.fromkeys((sample.prompt, sample.seed) for sample in view.samples)
    numbers = {(sample.step, sample.prompt, sample.seed): number
               for number, sample in enumerate(view.samples)}
    head = "".join(f"<th>{esc(ctx.tr('step_n', step=step))}</th>" for step in steps)
    body = ""
    for prompt, seed in rows:
        cells = "".join(cell(ctx, view, numbers.get((step, prompt, seed)), step) for step in steps)
        body += (f'<tr>{cells}</tr><tr><td class="prompt" colspan="{len(steps)}">{esc(prompt)} '
                 f'<small>{esc(ctx.tr("seed"))} {seed}</small></td></tr>')
    return f'<div class="previews"><table><tr>{head}</tr>{body}</table></div>'


def picked(steps: list[int]) -> list[int]:
    """At most MOST_STEPS of them."""
    share = (len(steps) - 1) / (MOST_STEPS - 1)
    return steps if share <= 1 else [steps[round(i * share)] for i in range(MOST_STEPS)]


def cell(ctx: Context, view: JobView, number: int | None, step: int) -> str:
    """A preview in its column; `number` None: there is none of that step."""
    if number is None:
        return "<td></td>"
    address, alt = f"/picture/{esc(view.id)}/{number}", esc(ctx.tr("preview_at", step=step))
    return (f'<td><a href="{address}?full=1" target="_blank"><img src="{address}" alt="{alt}" '
            f'loading="lazy"></a></td>')
