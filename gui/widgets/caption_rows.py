"""The caption editor's rows and texts, tag statistics, and what rules would change."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from captioner.captions import search as tags
from captioner.captions.rules import Change
from core.config import TrainConfig
from core.dataset.captions import split_tags
from gui.html import button, esc
from gui.state.app_state import Context
from gui.state.dataset import State
from gui.state.dataset_view import DatasetView
from gui.widgets.picture_grid import address, page_of, pager

PER_PAGE = 20
MOST_TAGS = 60
TAG_WORDS = 4                   # a longer part is a clause, not a tag
SHOWN_CHANGES = 3


# --- which captions ---

def found(album: DatasetView, trigger: str = "") -> tuple[str, ...]:
    """The pictures whose captions are looked at. Raises UserError for a search that can't be
    read."""
    state, shown = album.now, album.shown
    here = frozenset(shown.only) if shown.only else frozenset(state.names)
    names = tuple(name for name in state.names if name in here)
    if not shown.search.strip():
        return names
    captions = {name: state.captions.get(name, "") for name in names}
    return tuple(tags.find(shown.search, captions, trigger, album.count_tokens or count_words))


def count_words(text: str) -> int:
    return len(text.split())


def token_limit(album: DatasetView) -> int:
    """Of the base that the folder was checked for."""
    report = album.now.report
    return report.facts.token_limit if report else TrainConfig().max_tokens


def next_empty(names: Sequence[str], captions: Mapping[str, str], page: int) -> int | None:
    """The page after this one that has a picture without caption, from the start again at the
    end; None: all have one."""
    _, pages = page_of(len(names), 0, PER_PAGE)
    bare = {at // PER_PAGE for at, name in enumerate(names) if not captions.get(name)}
    return next((one % pages for one in range(page + 1, page + 1 + pages)
                 if one % pages in bare), None)


# --- rows ---

def rows(ctx: Context, album: DatasetView, names: Sequence[str]) -> str:
    """Boxes without their texts: see caption_editor.js."""
    state, tr = album.now, ctx.tr
    if not state.names:
        return f'<p class="none">{esc(tr("tab_captioning.no_pictures"))}</p>'
    page, pages = page_of(len(names), album.shown.rows, PER_PAGE)
    made = "".join(_row(ctx, album, name)
                   for name in names[page * PER_PAGE:(page + 1) * PER_PAGE])
    empty = "" if made else f'<p class="none">{esc(tr("tab_captioning.none_found"))}</p>'
    return (f'{_head(ctx, album)}{empty}<ul class="rows">{made}</ul>'
            f'{pager(ctx, page, pages, len(names))}'
            f'<p class="small">{esc(tr("tab_captioning.keys"))}</p>')


def _head(ctx: Context, album: DatasetView) -> str:
    tr, state, shown = ctx.tr, album.now, album.shown
    named = {which: tr(f"captions.what_{what}") if what else ""
             for which, what in (("undo", state.undo), ("redo", state.redo))}
    steps = "".join(button(tr(f"tab_captioning.{which}"), which, hint=named[which],
                           why_not="" if named[which] else tr(f"tab_captioning.no_{which}"))
                    for which in ("undo", "redo"))
    picks = "".join(
        f'<button type="button" class="act" data-act="search" data-id="{esc(search)}" '
        f'aria-pressed="{str(shown.search == search and not shown.only).lower()}">'
        f'{esc(tr(f"tab_captioning.{key}"))}</button>'
        for search, key in (("", "all"), ("empty", "without")))
    only = f'<span>{esc(tr("tab_captioning.only", count=len(shown.only)))}</span>' \
        if shown.only else ""
    return f'<div class="tools">{picks}{only}<span class="spring"></span>{steps}</div>'


def _row(ctx: Context, album: DatasetView, name: str) -> str:
    key, state = album.key(name), album.now
    out = name in state.chosen.left_out
    kind = ' class="out"' if out else ""
    said = ctx.tr("tab_captioning.caption_of", name=name)
    note = f" · {ctx.tr('tab_dataset.is_left_out')}" if out else ""
    lock = state.locked.get(name, "")
    why = f'<p class="small">{esc(ctx.tr(f"captions.{lock}", picture=name, file=""))}</p>' \
        if lock else ""
    return (f'<li{kind}><img src="{address(album, name)}" alt="" loading="lazy"><div>'
            f'<span class="name">{esc(name)}{esc(note)}</span>'
            f'<textarea data-key="{key}" rows="2" spellcheck="true" '
            f'aria-label="{esc(said)}"></textarea>{why}</div><span class="count"></span></li>')


def texts(ctx: Context, album: DatasetView, names: Sequence[str]) -> str:
    """The captions of the page, by key, as JSON in an attribute."""
    page, _ = page_of(len(names), album.shown.rows, PER_PAGE)
    told = {album.key(name): _text(ctx, album, name)
            for name in names[page * PER_PAGE:(page + 1) * PER_PAGE]}
    return f'<div hidden data-texts="{esc(json.dumps(told, ensure_ascii=False))}"></div>'


def _text(ctx: Context, album: DatasetView, name: str) -> dict[str, Any]:
    caption, limit = album.now.captions.get(name, ""), token_limit(album)
    count: Callable[[str], int] = album.count_tokens or count_words
    exact = album.count_tokens is not None
    length = count(caption)
    key = "tokens" if exact else "words"
    return {"text": caption, "locked": album.now.locked.get(name, ""),
            "count": f"{length}/{limit}" if exact else ctx.tr("tab_captioning.words_n",
                                                              count=length),
            "over": exact and length > limit,
            "said": ctx.tr(f"tab_captioning.count_{key}", count=length, limit=limit)}


# --- statistics ---

@functools.lru_cache(maxsize=4)
def _counted(captions: tuple[str, ...]) -> tuple[str, tuple[tuple[str, int], ...]]:
    kind = "tags" if are_tags(captions) else "words"
    counted = tags.count(captions) if kind == "tags" else tags.count_words(captions)
    return kind, tuple(counted)


def are_tags(captions: Sequence[str]) -> bool:
    """Most parts between commas are short; else words are counted."""
    parts = [part for caption in captions[:500] for part in split_tags(caption)]
    return 2 * sum(len(part.split()) <= TAG_WORDS for part in parts) > len(parts)


def statistics(ctx: Context, state: State) -> str:
    tr = ctx.tr
    captions = tuple(text for name in state.training if (text := state.captions.get(name)))
    if not captions:
        return (f'<section class="box"><h3>{esc(tr("tab_captioning.most_used"))}</h3>'
                f'<p class="small">{esc(tr("tab_captioning.no_words"))}</p></section>')
    kind, counted = _counted(captions)
    made = "".join(_tag(ctx, kind, word, count) for word, count in counted[:MOST_TAGS])
    more = len(counted) - MOST_TAGS
    rest = f'<p class="small">{esc(tr("tab_captioning.more_words", count=more))}</p>' \
        if more > 0 else ""
    return (f'<section class="box"><h3>{esc(tr(f"tab_captioning.most_{kind}"))}</h3>'
            f'<ul class="tags">{made}</ul>{rest}'
            f'<p class="small">{esc(tr("tab_captioning.stats_help"))}</p></section>')


def _tag(ctx: Context, kind: str, word: str, count: int) -> str:
    show = ctx.tr("tab_captioning.show_with", word=word, count=count)
    drop = ctx.tr("tab_captioning.remove_all", word=word, count=count)
    return (f'<li><button type="button" data-act="search" data-id="{esc(search_of(kind, word))}" '
            f'title="{esc(show)}">{esc(word)} <small>{count}</small></button>'
            f'<button type="button" data-act="remove_{kind}" data-id="{esc(word)}" '
            f'title="{esc(drop)}" aria-label="{esc(drop)}">×</button></li>')


def search_of(kind: str, word: str) -> str:
    """A search that finds the captions with a tag or a word, whatever signs it has."""
    quoted = '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"tag:{quoted}" if kind == "tags" else quoted


# --- what rules would do ---

def changes(ctx: Context, found: Sequence[Change], total: int) -> str:
    tr = ctx.tr
    if not found:
        return f'<p class="small">{esc(tr("tab_captioning.no_changes", total=total))}</p>'
    items = "".join(f'<li><span class="name small">{esc(one.path)}</span><br>'
                    f'{difference(one.before, one.after)}</li>' for one in found[:SHOWN_CHANGES])
    said = tr("tab_captioning.would_change", count=len(found), total=total)
    return f'<p><b>{esc(said)}</b></p><ul class="changes">{items}</ul>'


def difference(before: str, after: str) -> str:
    """Both texts in one, by words: what goes is struck out, what comes is bold."""
    old, new = before.split(" "), after.split(" ")
    made: list[str] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            made.append(esc(" ".join(old[a:b])))
            continue
        if a < b:
            made.append(f"<del>{esc(' '.join(old[a:b]))}</del>")
        if c < d:
            made.append(f"<ins>{esc(' '.join(new[c:d]))}</ins>")
    return " ".join(made)
