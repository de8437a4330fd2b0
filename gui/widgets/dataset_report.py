"""What the check of a folder found, in words, with answers in one click; and the bucket chart."""

from __future__ import annotations

from core.dataset.checks.findings import Finding
from core.dataset.checks.report import LEVELS
from gui.html import bar, button, card, esc
from gui.state.app_state import Context
from gui.state.dataset import State
from gui.state.dataset_view import DatasetView
from gui.widgets.picture_grid import of_finding

SIGNS = {"error": "✖", "warning": "⚠", "note": "ⓘ"}
MOST_LINES = 8                  # pictures named below a finding
MOST_BUCKETS = 10


def summary(ctx: Context, album: DatasetView) -> str:
    """How far the look at the folder is, or what it came to."""
    state, tr = album.now, ctx.tr
    if state.fault is not None:
        return card("fault", tr("tab_dataset.cannot"), ctx.told(state.fault))
    if state.folder is None and not state.doing:
        return card("info", tr("tab_dataset.begin"), tr("tab_dataset.begin_how"))
    if state.doing:
        share = state.done / state.total if state.total else 0.0
        text = tr(f"tab_dataset.doing_{state.doing}", done=state.done, total=state.total)
        progress = bar(share, text) if state.total else ""
        return f'<section class="box"><p>{esc(text)}</p>{progress}</section>'
    if state.report is None:
        return ""
    facts = state.report.facts
    sizes = {"width": facts.area[0], "height": facts.area[1], "step": facts.step,
             "limit": facts.token_limit}
    judged = "" if facts.base else card("info", tr("tab_dataset.assumed"), tr(
        "checks.base_assumed", **sizes))
    if facts.fault is not None:
        judged = card("warning", tr("tab_dataset.assumed"), " ".join(
            (ctx.told(facts.fault), tr("checks.base_instead", **sizes))))
    worst = min((LEVELS.index(one.level) for one in state.report.findings), default=2)
    kind = {0: "fault", 1: "warning", 2: "good"}[worst]
    key = {0: "has_errors", 1: "has_warnings", 2: "ready"}[worst]
    return card("warning" if kind == "fault" else kind, tr(f"tab_dataset.{key}"), tr(
        "tab_dataset.counts", pictures=len(state.training), captioned=state.captioned,
        left_out=len(state.chosen.left_out & set(state.names)))) + judged


def findings(ctx: Context, album: DatasetView) -> str:
    state = album.now
    if state.report is None:
        return ""
    told = "".join(_finding(ctx, state, one) for one in state.report.findings)
    body = told or f'<li>{esc(ctx.tr("tab_dataset.nothing_found"))}</li>'
    return (f'<section class="box"><h3>{esc(ctx.tr("tab_dataset.findings"))}</h3>'
            f'<ul class="findings">{body}</ul></section>')


def _finding(ctx: Context, state: State, one: Finding) -> str:
    text = ctx.tr(one.code, **{"count": len(one.subjects), **_shown(one)})
    mend = ctx.tr(f"{one.code}_mend", **_shown(one))
    mend = "" if mend.startswith(f"{one.code}_mend") else mend
    lines = [_line(ctx, one, number) for number in range(min(len(one.subjects), MOST_LINES))]
    more = len(one.subjects) - len(lines)
    if more > 0:
        lines.append(ctx.tr("tab_dataset.more", count=more))
    details = (f'<details><summary>{esc(ctx.tr("tab_dataset.what_to_do"))}</summary>'
               f'<p>{esc(mend)}</p><ul>{"".join(f"<li>{esc(line)}</li>" for line in lines)}</ul>'
               f'</details>' if mend or lines else "")
    level = ctx.tr(f"tab_dataset.level_{one.level}")
    return (f'<li class="{one.level}"><b title="{esc(level)}"><span aria-hidden="true">'
            f'{SIGNS[one.level]}</span></b> {esc(text)}{_answers(ctx, state, one)}{details}</li>')


def _answers(ctx: Context, state: State, one: Finding) -> str:
    tr, made = ctx.tr, []
    if of_finding(state, one.code):
        made.append(button(tr("tab_dataset.compare" if one.groups else "tab_dataset.show"),
                           "finding", one.code))
    if "keep_one_of_group" in one.actions:
        made.append(button(tr("tab_dataset.keep_best"), "keep_best", one.code))
    if "leave_out" in one.actions:
        made.append(button(tr("tab_dataset.leave_out"), "leave_finding", one.code))
    if "focus" in one.actions:
        made.append(button(tr("tab_dataset.crop_subject"), "crop_subject"))
    if "edit" in one.actions and one.subjects:
        made.append(button(tr("tab_dataset.open_captions"), "captions", one.code))
    return f'<p class="acts">{"".join(made)}</p>' if made else ""


def _line(ctx: Context, one: Finding, number: int) -> str:
    subject = one.subjects[number]
    key = subject.code or f"{one.code}_one"
    told = ctx.tr(key, file=subject.name, **{k: v for k, v in subject.params.items()
                                             if k != "file"})
    return subject.name if told.startswith(key) else told


def _shown(one: Finding) -> dict[str, object]:
    return {key: value for key, value in one.params.items() if key != "key"}


def copies(state: State, code: str) -> list[str]:
    """All but the best of each group of copies."""
    return [name for one in (state.report.findings if state.report else ()) if one.code == code
            for group in one.groups for name in group[1:]]


def buckets(ctx: Context, state: State) -> str:
    """Bars by size, the fullest first."""
    if state.report is None or not state.report.buckets:
        return ""
    found = list(state.report.buckets.items())
    most = max(count for _, count in found)
    rows = "".join(f'<tr><td>{wide} × {high}</td><td><i style="width:{100 * count / most:.0f}%">'
                   f'</i></td><td>{count}</td></tr>'
                   for (wide, high), count in found[:MOST_BUCKETS])
    more = len(found) - MOST_BUCKETS
    rest = f'<p class="small">{esc(ctx.tr("tab_dataset.more_buckets", count=more))}</p>' \
        if more > 0 else ""
    return (f'<section class="box"><h3>{esc(ctx.tr("tab_dataset.buckets"))}</h3>'
            f'<table class="buckets">{rows}</table>{rest}'
            f'<p class="small">{esc(ctx.tr("tab_dataset.buckets_help"))}</p></section>')
