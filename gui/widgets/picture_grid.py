"""A page of the folder's pictures, and one of them large with the frame that its crop keeps."""

from __future__ import annotations

from collections.abc import Sequence

from gui.html import acts, button, esc, small
from gui.state.app_state import Context
from gui.state.dataset import State
from gui.state.dataset_view import DatasetView

PER_PAGE = 60
FILTERS = ("all", "problems", "uncaptioned", "left_out")


# --- which pictures ---

def filtered(state: State, filter: str) -> tuple[str, ...]:
    """The names that a filter leaves, in the folder's order; copies of a group stand together."""
    if filter.startswith("finding:"):
        return of_finding(state, filter.removeprefix("finding:"))
    if filter == "uncaptioned":
        return tuple(name for name in state.training if not state.captions.get(name))
    if filter in ("problems", "left_out"):
        names = state.troubled if filter == "problems" else state.chosen.left_out
        return tuple(name for name in state.names if name in names)
    return state.names


def of_finding(state: State, code: str) -> tuple[str, ...]:
    """The pictures that findings of a code are about; copies of a group stand together."""
    findings = [finding for finding in (state.report.findings if state.report else ())
                if finding.code == code]
    names = [name for finding in findings for group in finding.groups for name in group]
    names = names or [subject.name for finding in findings for subject in finding.subjects]
    # A finding may be about a file that is no picture, or that was deleted since.
    here = frozenset(state.names)
    return tuple(name for name in dict.fromkeys(names) if name in here)


def page_of(count: int, page: int, size: int = PER_PAGE) -> tuple[int, int]:
    """-> the nearest page that exists, and how many pages there are."""
    pages = max(1, -(-count // size))
    return min(max(page, 0), pages - 1), pages


def neighbour(names: Sequence[str], current: str, by: int) -> int:
    """The place after (by 1) or before (by -1) the current name, which stays at the ends; the
    first where none is current."""
    at = names.index(current) if current in names else -by
    return min(max(at + by, 0), len(names) - 1)


# --- the page ---

def grid(ctx: Context, dataset: DatasetView) -> str:
    """Filters, the tiles of a page, and the way to the other pages."""
    tr, state, shown = ctx.tr, dataset.now, dataset.shown
    if not state.names:
        return ""
    filters = [*FILTERS, *[shown.filter] * shown.filter.startswith("finding:")]
    toggles = "".join(button(tr(f"tab_dataset.filter_{key.partition(':')[0]}"), "filter", key,
                             pressed=key == shown.filter) for key in filters)
    # picture_grid.js enables these while tiles are selected, and writes how many into <b>.
    why_not = esc(tr("tab_dataset.select_first"))
    selected = "".join(
        f'<button type="button" class="act" data-act="{act}" data-selected disabled data-whynot='
        f'"{why_not}" title="{why_not}">{esc(tr(f"tab_dataset.{act}"))}<b></b></button>'
        for act in ("leave_out", "take_in"))
    names = filtered(state, shown.filter)
    page, pages = page_of(len(names), shown.page)
    troubled = state.troubled
    tiles = "".join(_tile(ctx, dataset, name, name in troubled)
                    for name in names[page * PER_PAGE:][:PER_PAGE])
    empty = "" if tiles else f'<p class="none">{esc(tr("tab_dataset.none_here"))}</p>'
    return (f'<div class="tools">{toggles}<span class="spring"></span>{selected}</div>{empty}'
            f'<ul class="grid">{tiles}</ul>{pager(ctx, page, pages, len(names))}'
            + small(tr("tab_dataset.keys")))


def _tile(ctx: Context, dataset: DatasetView, name: str, troubled: bool) -> str:
    state, key = dataset.now, dataset.key(name)
    left_out = name in state.chosen.left_out
    uncaptioned = not left_out and not state.captions.get(name)
    marks = [(sign, ctx.tr(f"tab_dataset.{why}")) for shown, sign, why in (
        (troubled, "⚠", "has_finding"), (uncaptioned, "✎", "no_caption"),
        (left_out, "∅", "is_left_out"), (name in state.chosen.focus, "◎", "has_focus")) if shown]
    signs = "".join(f'<i title="{esc(text)}">{sign}</i>' for sign, text in marks)
    label = ", ".join([name, *(text for _, text in marks)])
    css = "tile" + " out" * left_out + " open" * (dataset.shown.open == name)
    return (f'<li class="{css}" data-key="{key}"><button type="button" data-act="open" '
            f'data-id="{key}" title="{esc(name)}" aria-label="{esc(label)}">'
            f'<img src="{address(dataset, name)}" alt="" loading="lazy">'
            f'<span>{esc(name)}</span></button>'
            f'<input type="checkbox" aria-label="{esc(ctx.tr("tab_dataset.select", name=name))}">'
            f'<span class="marks">{signs}</span></li>')


def pager(ctx: Context, page: int, pages: int, count: int) -> str:
    """Buttons to other pages of `count` things; `page` is the one that is shown, from 0."""
    tr = ctx.tr
    first = "" if page else tr("tab_dataset.first_page")
    last = "" if page + 1 < pages else tr("tab_dataset.last_page")

    def turn(name: str, to: int, why_not: str) -> str:
        return button(tr(f"tab_dataset.{name}"), "page", str(to), why_not=why_not)
    where = f'<span>{esc(tr("tab_dataset.page", page=page + 1, pages=pages, count=count))}</span>'
    html = turn("previous", page - 1, first) + where + turn("next", page + 1, last)
    if pages > 2:
        html = turn("first", 0, first) + html + turn("last", pages - 1, last)
    return f'<div class="tools">{html}</div>'


def address(dataset: DatasetView, name: str, view: bool = False) -> str:
    """Changes with each look at the folder, so that browsers may keep what they got; no file is
    asked here, which would wait for the threads that read them all."""
    return f"/dataset/{dataset.key(name)}?v={dataset.now.looked}" + ("&view=1" if view else "")


# --- one picture ---

def large(ctx: Context, dataset: DatasetView) -> str:
    """The opened picture with its crop, caption and buttons; empty where none is open."""
    state, name = dataset.now, dataset.shown.open
    if name not in state.names:
        return ""
    tr, key = ctx.tr, dataset.key(name)
    toggle = "take_in" if name in state.chosen.left_out else "leave_out"
    unfocus = [("clear_focus", "unfocus", key)] * (name in state.chosen.focus)
    buttons = acts(*(button(tr(f"tab_dataset.{label}"), act, id) for label, act, id in (
        ("previous_picture", "step", "-1"), ("next_picture", "step", "1"), (toggle, toggle, key),
        *unfocus, ("edit_caption", "edit", key), ("close", "close", ""))))
    planned, frame, facts = state.planned(name), "", tr("tab_dataset.not_planned")
    point = state.chosen.focus.get(name) or (planned.focus if planned else None)
    if planned:
        (width, height), (wide, high) = planned.size, planned.crop.size
        facts = tr("tab_dataset.cut_none" if planned.cut == 0 else "tab_dataset.cut_some",
                   width=width, height=height, wide=wide, high=high,
                   cut=f"{100 * planned.cut:.0f}", scale=f"{planned.scale:.2f}")
        if planned.cut > 0:
            frame = ('<i class="kept" style="left:{:.2f}%;top:{:.2f}%;width:{:.2f}%;'
                     'height:{:.2f}%"></i>').format(
                         *frame_of(planned.crop.source(planned.size), planned.size))
    dot = at = ""
    if point:
        dot = f'<i class="dot" style="left:{100 * point[0]:.2f}%;top:{100 * point[1]:.2f}%"></i>'
        at = f' data-x="{point[0]}" data-y="{point[1]}"'
    caption = state.captions.get(name) or tr("tab_dataset.no_caption")
    return (f'<section class="box"><h3>{esc(name)}</h3>'
            f'<div class="large aim" role="application" tabindex="0" data-key="{key}"{at} '
            f'aria-label="{esc(tr("tab_dataset.aim"))}"><img alt="{esc(name)}" '
            f'src="{address(dataset, name, view=True)}">{frame}{dot}</div>{small(facts)}'
            f'<p class="caption-of">{esc(caption)}</p>{buttons}'
            f'{small(tr("tab_dataset.aim_help"))}</section>')


def frame_of(source: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part that a crop keeps, in % of the picture: left, top, width, height."""
    (left, top, right, bottom), (width, height) = source, size
    return (100 * left / width, 100 * top / height, 100 * (right - left) / width,
            100 * (bottom - top) / height)
