"""What the check of a folder found, in words, with answers in one click; and the bucket chart."""

from __future__ import annotations

from core.dataset.checks.findings import Finding
from core.dataset.checks.report import LEVELS
from gui.html import acts, bar, box, button, card, details, esc, small
from gui.state.app_state import Context
from gui.state.dataset import State
from gui.state.dataset_view import DatasetView
from gui.widgets.picture_grid import of_finding

SIGNS = {"error": "✖", "warning": "⚠", "note": "ⓘ"}
# Pictures that are named below a finding.
MOST_LINES = 8
MOST_BUCKETS = 10


def summary(ctx: Context, dataset: DatasetView) -> str:
    """How far the look at the folder is, or what it came to."""
    state, tr = dataset.now, ctx.tr
    if state.fault is not None:
        return card("fault", tr("tab_dataset.cannot"), ctx.error_text(state.fault))
    if state.folder is None and not state.doing:
        return card("info", tr("tab_dataset.begin"), tr("tab_dataset.begin_how"))
    if state.doing:
        text = tr(f"tab_dataset.doing_{state.doing}", done=state.done, total=state.total)
        progress = bar(state.done, state.total, text) if state.total else ""
        return f'<section class="box"><p>{esc(text)}</p>{progress}</section>'
    if state.report is None:
        return ""
    facts = state.report.facts
    sizes = {"width": facts.area[0], "height": facts.area[1], "step": facts.step,
             "limit": facts.token_limit}
    worst = min((LEVELS.index(finding.level) for finding in state.report.findings), default=2)
    key = ("has_errors", "has_warnings", "ready")[worst]
    html = card("good" if key == "ready" else "warning", tr(f"tab_dataset.{key}"), tr(
        "tab_dataset.counts", pictures=len(state.training), captioned=state.captioned,
        left_out=len(state.names) - len(state.training)))
    # Without a base whose sizes are known, others stand in for them: that is told.
    if facts.fault is not None:
        html += card("warning", tr("tab_dataset.assumed"),
                     f'{ctx.error_text(facts.fault)} {tr("checks.base_instead", **sizes)}')
    elif not facts.base:
        html += card("info", tr("tab_dataset.assumed"), tr("checks.base_assumed", **sizes))
    return html


def findings(ctx: Context, dataset: DatasetView) -> str:
    """The check's findings, each with what it is about and what helps."""
    if dataset.now.report is None:
        return ""
    items = "".join(_finding(ctx, dataset.now, finding) for finding in dataset.now.report.findings)
    items = items or f'<li>{esc(ctx.tr("tab_dataset.nothing_found"))}</li>'
    return box(ctx.tr("tab_dataset.findings"), f'<ul class="findings">{items}</ul>')


def _finding(ctx: Context, state: State, finding: Finding) -> str:
    tr, code, subjects = ctx.tr, finding.code, finding.subjects
    text = tr(code, **{"count": len(subjects), **finding.params})
    # tr returns the key where there is no sentence: not every finding has an advice, nor a
    # sentence for each of its pictures.
    advice, lines, more = tr(f"{code}_mend", **finding.params), [], ""
    advice = "" if advice.startswith(f"{code}_mend") else advice
    for subject in subjects[:MOST_LINES]:
        key = subject.code or f"{code}_one"
        line = tr(key, **{**subject.params, "file": subject.name})
        lines.append(subject.name if line.startswith(key) else line)
    if len(subjects) > MOST_LINES:
        lines.append(tr("tab_dataset.more", count=len(subjects) - MOST_LINES))
    if advice or lines:
        listed = "".join(f"<li>{esc(line)}</li>" for line in lines)
        more = details(tr("tab_dataset.what_to_do"), f"<p>{esc(advice)}</p><ul>{listed}</ul>")
    buttons = "".join(button(tr(f"tab_dataset.{label}"), act, id) for shown, label, act, id in (
        (of_finding(state, code), "compare" if finding.groups else "show", "finding", code),
        ("keep_one_of_group" in finding.actions, "keep_best", "keep_best", code),
        ("leave_out" in finding.actions, "leave_out", "leave_finding", code),
        ("focus" in finding.actions, "crop_subject", "crop_subject", ""),
        ("edit" in finding.actions and subjects, "open_captions", "captions", code)) if shown)
    level = tr(f"tab_dataset.level_{finding.level}")
    return (f'<li class="{finding.level}"><b title="{esc(level)}"><span aria-hidden="true">'
            f'{SIGNS[finding.level]}</span></b> {esc(text)}{acts(buttons)}{more}</li>')


def copies(state: State, code: str) -> list[str]:
    """All but the best of each group of copies."""
    return [name for finding in (state.report.findings if state.report else ())
            if finding.code == code for group in finding.groups for name in group[1:]]


def buckets(ctx: Context, state: State) -> str:
    """Bars by size, the fullest first."""
    if state.report is None or not state.report.buckets:
        return ""
    counts = list(state.report.buckets.items())
    most, more = max(state.report.buckets.values()), len(counts) - MOST_BUCKETS
    rows = "".join(f'<tr><td>{wide} × {high}</td><td><i style="width:{100 * count / most:.0f}%">'
                   f'</i></td><td>{count}</td></tr>'
                   for (wide, high), count in counts[:MOST_BUCKETS])
    rest = small(ctx.tr("tab_dataset.more_buckets", count=more)) if more > 0 else ""
    return box(ctx.tr("tab_dataset.buckets"), f'<table class="buckets">{rows}</table>{rest}'
               + small(ctx.tr("tab_dataset.buckets_help")))
