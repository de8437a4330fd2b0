"""A page of the folder's pictures, and one of them large with the frame that its crop keeps."""

from __future__ import annotations

from collections.abc import Sequence

from gui.html import button, esc
from gui.state.app_state import Context
from gui.state.dataset import Shown, State
from gui.state.dataset_view import DatasetView

PER_PAGE = 60
FILTERS = ("all", "problems", "uncaptioned", "left_out")


# --- which pictures ---

def filtered(state: State, filter: str) -> tuple[str, ...]:
    """The names that a filter leaves, in the folder's order; copies of a group stand together."""
    match filter.partition(":"):
        case ("problems", _, _):
            return tuple(name for name in state.names if name in state.troubled)
        case ("uncaptioned", _, _):
            return tuple(name for name in state.training if not state.captions.get(name))
        case ("left_out", _, _):
            return tuple(name for name in state.names if name in state.chosen.left_out)
        case ("finding", _, code):
            return of_finding(state, code)
    return state.names


def of_finding(state: State, code: str) -> tuple[str, ...]:
    found = [one for one in (state.report.findings if state.report else ()) if one.code == code]
    names = [name for one in found for group in one.groups for name in group]
    names = names or [subject.name for one in found for subject in one.subjects]
    here = frozenset(state.names)
    return tuple(name for name in dict.fromkeys(names) if name in here)


def page_of(count: int, page: int, size: int = PER_PAGE) -> tuple[int, int]:
    """-> the page that is there, how many there are."""
    pages = max(1, -(-count // size))
    return min(max(page, 0), pages - 1), pages


# --- the page ---

def grid(ctx: Context, album: DatasetView) -> str:
    state, shown = album.now, album.shown
    if not state.names:
        return ""
    names = filtered(state, shown.filter)
    page, pages = page_of(len(names), shown.page)
    troubled = state.troubled
    tiles = "".join(_tile(ctx, album, name, name in troubled)
                    for name in names[page * PER_PAGE:(page + 1) * PER_PAGE])
    empty = "" if tiles else f'<p class="none">{esc(ctx.tr("tab_dataset.none_here"))}</p>'
    help_ = f'<p class="small">{esc(ctx.tr("tab_dataset.keys"))}</p>'
    return (f'{_tools(ctx, state, shown)}{empty}<ul class="grid">{tiles}</ul>'
            f'{pager(ctx, page, pages, len(names))}{help_}')


def _tools(ctx: Context, state: State, shown: Shown) -> str:
    tr = ctx.tr
    made = [_filter(tr(f"tab_dataset.filter_{one}"), one, shown.filter) for one in FILTERS]
    if shown.filter.startswith("finding:"):
        made.append(_filter(tr("tab_dataset.filter_finding"), shown.filter, shown.filter))
    picked = [_of_selected(ctx, act) for act in ("leave_out", "take_in")]
    return f'<div class="tools">{"".join(made)}<span class="spring"></span>{"".join(picked)}</div>'


def _filter(label: str, name: str, now: str) -> str:
    return (f'<button type="button" class="act" data-act="filter" data-id="{esc(name)}" '
            f'aria-pressed="{str(name == now).lower()}">{esc(label)}</button>')


def _of_selected(ctx: Context, act: str) -> str:
    why = esc(ctx.tr("tab_dataset.select_first"))
    return (f'<button type="button" class="act" data-act="{act}" data-selected disabled '
            f'data-whynot="{why}" title="{why}">{esc(ctx.tr(f"tab_dataset.{act}"))}<b></b>'
            f'</button>')


def _tile(ctx: Context, album: DatasetView, name: str, troubled: bool) -> str:
    state, key = album.now, album.key(name)
    out = name in state.chosen.left_out
    bare = not out and not state.captions.get(name)
    marks = [(troubled, "⚠", "has_finding"), (bare, "✎", "no_caption"), (out, "∅", "is_left_out"),
             (name in state.chosen.focus, "◎", "has_focus")]
    shown = "".join(f'<i title="{esc(ctx.tr(f"tab_dataset.{why}"))}">{sign}</i>'
                    for on, sign, why in marks if on)
    told = ", ".join([name, *(ctx.tr(f"tab_dataset.{why}") for on, _, why in marks if on)])
    kind = " ".join(["tile", *(["out"] if out else []),
                     *(["open"] if album.shown.open == name else [])])
    return (f'<li class="{kind}" data-key="{key}"><button type="button" data-act="open" '
            f'data-id="{key}" title="{esc(name)}" aria-label="{esc(told)}">'
            f'<img src="{address(album, name)}" alt="" loading="lazy">'
            f'<span>{esc(name)}</span></button>'
            f'<input type="checkbox" aria-label="{esc(ctx.tr("tab_dataset.select", name=name))}">'
            f'<span class="marks">{shown}</span></li>')


def pager(ctx: Context, page: int, pages: int, count: int) -> str:
    tr = ctx.tr
    first = "" if page else tr("tab_dataset.first_page")
    last = "" if page + 1 < pages else tr("tab_dataset.last_page")
    turns = [button(tr(f"tab_dataset.{name}"), "page", str(to), why_not=why_not)
             for name, to, why_not in (("first", 0, first), ("previous", page - 1, first),
                                       ("next", page + 1, last), ("last", pages - 1, last))
             if pages > 2 or name in ("previous", "next")]
    where = f'<span>{esc(tr("tab_dataset.page", page=page + 1, pages=pages, count=count))}</span>'
    half = len(turns) // 2
    return f'<div class="tools">{"".join([*turns[:half], where, *turns[half:]])}</div>'


def address(album: DatasetView, name: str, view: bool = False) -> str:
    """Changes with each look at the folder, so that browsers may keep what they got; no file is
    asked here, which would wait for the threads that read them all."""
    return f"/dataset/{album.key(name)}?v={album.now.looked}" + ("&view=1" if view else "")


# --- one picture ---

def large(ctx: Context, album: DatasetView) -> str:
    """Empty where none is open."""
    state, name = album.now, album.shown.open
    if name not in state.names:
        return ""
    tr, key = ctx.tr, album.key(name)
    out = name in state.chosen.left_out
    caption = state.captions.get(name) or tr("tab_dataset.no_caption")
    acts = [button(tr("tab_dataset.previous_picture"), "step", "-1"),
            button(tr("tab_dataset.next_picture"), "step", "1"),
            button(tr("tab_dataset.take_in" if out else "tab_dataset.leave_out"),
                   "take_in" if out else "leave_out", key)]
    if name in state.chosen.focus:
        acts.append(button(tr("tab_dataset.clear_focus"), "unfocus", key))
    acts += [button(tr("tab_dataset.edit_caption"), "edit", key),
             button(tr("tab_dataset.close"), "close")]
    return (f'<section class="box"><h3>{esc(name)}</h3>{_aim(ctx, album, name)}'
            f'<p class="small">{esc(_facts(ctx, state, name))}</p>'
            f'<p class="caption-of">{esc(caption)}</p><p class="acts">{"".join(acts)}</p>'
            f'<p class="small">{esc(tr("tab_dataset.aim_help"))}</p></section>')


def _aim(ctx: Context, album: DatasetView, name: str) -> str:
    state = album.now
    one, point = state.planned(name), state.chosen.focus.get(name)
    if point is None and one is not None:
        point = one.focus
    frame = ""
    if one is not None and one.cut > 0:
        left, top, wide, high = frame_of(one.crop.source(one.size), one.size)
        frame = (f'<i class="kept" style="left:{left:.2f}%;top:{top:.2f}%;width:{wide:.2f}%;'
                 f'height:{high:.2f}%"></i>')
    dot = (f'<i class="dot" style="left:{100 * point[0]:.2f}%;top:{100 * point[1]:.2f}%"></i>'
           if point else "")
    at = f' data-x="{point[0]}" data-y="{point[1]}"' if point else ""
    return (f'<div class="large aim" role="application" tabindex="0" '
            f'data-key="{album.key(name)}"{at} aria-label="{esc(ctx.tr("tab_dataset.aim"))}">'
            f'<img alt="{esc(name)}" src="{address(album, name, view=True)}">{frame}{dot}</div>')


def frame_of(source: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """What a crop keeps, in % of the picture: left, top, width, height."""
    left, top, right, bottom = source
    return (100 * left / size[0], 100 * top / size[1], 100 * (right - left) / size[0],
            100 * (bottom - top) / size[1])


def _facts(ctx: Context, state: State, name: str) -> str:
    one = state.planned(name)
    if one is None:
        return ctx.tr("tab_dataset.not_planned")
    (width, height), (wide, high) = one.size, one.crop.size
    key = "cut_none" if one.cut == 0 else "cut_some"
    return ctx.tr(f"tab_dataset.{key}", width=width, height=height, wide=wide, high=high,
                  cut=f"{100 * one.cut:.0f}", scale=f"{one.scale:.2f}")
