"""The caption editor's rows and texts, tag statistics, and what rules would change."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from captioner.captions import search as caption_search
from captioner.captions.rules import Change
from core.config import TrainConfig
from core.dataset.captions import split_tags
from gui.html import box, button, esc, small
from gui.state.app_state import Context
from gui.state.dataset import State
from gui.state.dataset_view import DatasetView
from gui.widgets.picture_grid import address, page_of, pager

PER_PAGE = 20
MOST_TAGS = 60
# A longer part between two commas is a clause, not a tag.
TAG_WORDS = 4
SHOWN_CHANGES = 3


# --- which captions ---

def matching(dataset: DatasetView, trigger: str = "") -> tuple[str, ...]:
    """The pictures whose captions are looked at. Raises UserError for a search that can't be
    read."""
    state, shown = dataset.now, dataset.shown
    scope = frozenset(shown.only or state.names)
    captions = {name: state.captions.get(name, "") for name in state.names if name in scope}
    if not shown.search.strip():
        return tuple(captions)
    return tuple(caption_search.find(shown.search, captions, trigger,
                                     dataset.count_tokens or count_words))


def count_words(text: str) -> int:
    return len(text.split())


def next_empty(names: Sequence[str], captions: Mapping[str, str], page: int) -> int | None:
    """The page after this one that has a picture without caption, from the start again at the
    end; None: all have one."""
    without = [at // PER_PAGE for at, name in enumerate(names) if not captions.get(name)]
    return next((number for number in without if number > page), next(iter(without), None))


# --- rows ---

def rows(ctx: Context, dataset: DatasetView, names: Sequence[str]) -> str:
    """Boxes without their texts: see caption_editor.js."""
    state, shown, tr = dataset.now, dataset.shown, ctx.tr
    if not state.names:
        return f'<p class="none">{esc(tr("tab_captioning.no_pictures"))}</p>'
    filters = "".join(
        button(tr(f"tab_captioning.{key}"), "search", search,
               pressed=shown.search == search and not shown.only)
        for search, key in (("", "all"), ("empty", "without")))
    if shown.only:
        filters += f'<span>{esc(tr("tab_captioning.only", count=len(shown.only)))}</span>'
    # The buttons tell what would be undone or done again.
    history = "".join(
        button(tr(f"tab_captioning.{step}"), step,
               hint=tr(f"captions.what_{action}") if action else "",
               why_not="" if action else tr(f"tab_captioning.no_{step}"))
        for step, action in (("undo", state.undo), ("redo", state.redo)))
    page, pages = page_of(len(names), shown.rows, PER_PAGE)
    items = "".join(_row(ctx, dataset, name) for name in names[page * PER_PAGE:][:PER_PAGE])
    empty = "" if items else f'<p class="none">{esc(tr("tab_captioning.none_found"))}</p>'
    return (f'<div class="tools">{filters}<span class="spring"></span>{history}</div>'
            f'{empty}<ul class="rows">{items}</ul>{pager(ctx, page, pages, len(names))}'
            + small(tr("tab_captioning.keys")))


def _row(ctx: Context, dataset: DatasetView, name: str) -> str:
    css, title, reason = "", name, ""
    if name in dataset.now.chosen.left_out:
        css, title = ' class="out"', f"{name} · {ctx.tr('tab_dataset.is_left_out')}"
    if locked := dataset.now.locked.get(name):
        reason = small(ctx.tr(f"captions.{locked}", picture=name, file=""))
    return (f'<li{css}><img src="{address(dataset, name)}" alt="" loading="lazy"><div>'
            f'<span class="name">{esc(title)}</span>'
            f'<textarea data-key="{dataset.key(name)}" rows="2" spellcheck="true" '
            f'aria-label="{esc(ctx.tr("tab_captioning.caption_of", name=name))}"></textarea>'
            f'{reason}</div><span class="count"></span></li>')


def texts(ctx: Context, dataset: DatasetView, names: Sequence[str]) -> str:
    """The captions of the page, by key, as JSON in an attribute."""
    state, report = dataset.now, dataset.now.report
    # The most tokens that the base reads; the folder was checked for that base.
    limit = report.facts.token_limit if report else TrainConfig().max_tokens
    # The tokenizer is loaded in a thread: words are counted until it is there.
    exact, count = dataset.count_tokens is not None, dataset.count_tokens or count_words
    page, _ = page_of(len(names), dataset.shown.rows, PER_PAGE)
    data: dict[str, dict[str, Any]] = {}
    for name in names[page * PER_PAGE:][:PER_PAGE]:
        caption = state.captions.get(name, "")
        length = count(caption)
        shown = f"{length}/{limit}" if exact else ctx.tr("tab_captioning.words_n", count=length)
        said = ctx.tr(f"tab_captioning.count_{'tokens' if exact else 'words'}", count=length,
                      limit=limit)
        data[dataset.key(name)] = {
            "text": caption, "locked": state.locked.get(name, ""), "count": shown,
            "over": exact and length > limit, "said": said}
    return f'<div hidden data-texts="{esc(json.dumps(data, ensure_ascii=False))}"></div>'


# --- statistics ---

# A page is painted once a second, and the captions seldom change.
@functools.lru_cache(maxsize=4)
def _most_used(captions: tuple[str, ...]) -> tuple[str, tuple[tuple[str, int], ...]]:
    if are_tags(captions):
        return "tags", tuple(caption_search.count(captions))
    return "words", tuple(caption_search.count_words(captions))


def are_tags(captions: Sequence[str]) -> bool:
    """Whether most parts between commas are short; else words are counted."""
    parts = [part for caption in captions[:500] for part in split_tags(caption)]
    return 2 * sum(len(part.split()) <= TAG_WORDS for part in parts) > len(parts)


def statistics(ctx: Context, state: State) -> str:
    """The tags or words that are used most, each with buttons to show and to remove it."""
    tr = ctx.tr
    captions = tuple(text for name in state.training if (text := state.captions.get(name)))
    if not captions:
        return box(tr("tab_captioning.most_used"), small(tr("tab_captioning.no_words")))
    kind, counts = _most_used(captions)
    items = ""
    for word, count in counts[:MOST_TAGS]:
        show = esc(tr("tab_captioning.show_with", word=word, count=count))
        remove = esc(tr("tab_captioning.remove_all", word=word, count=count))
        items += (f'<li><button type="button" data-act="search" '
                  f'data-id="{esc(search_of(kind, word))}" title="{show}">{esc(word)} '
                  f'<small>{count}</small></button>'
                  f'<button type="button" data-act="remove_{kind}" data-id="{esc(word)}" '
                  f'title="{remove}" aria-label="{remove}">×</button></li>')
    html = f'<ul class="tags">{items}</ul>'
    if (more := len(counts) - MOST_TAGS) > 0:
        html += small(tr("tab_captioning.more_words", count=more))
    return box(tr(f"tab_captioning.most_{kind}"), html + small(tr("tab_captioning.stats_help")))


def search_of(kind: str, word: str) -> str:
    """A search that finds the captions with a tag or a word, whatever signs it has."""
    quoted = '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"tag:{quoted}" if kind == "tags" else quoted


# --- what rules would do ---

def changes(ctx: Context, changed: Sequence[Change], total: int) -> str:
    """How many of `total` captions rules would change, and the first of them in full."""
    if not changed:
        return small(ctx.tr("tab_captioning.no_changes", total=total))
    items = "".join(f'<li><span class="name small">{esc(change.path)}</span><br>'
                    f'{difference(change.before, change.after)}</li>'
                    for change in changed[:SHOWN_CHANGES])
    title = ctx.tr("tab_captioning.would_change", count=len(changed), total=total)
    return f'<p><b>{esc(title)}</b></p><ul class="changes">{items}</ul>'


def difference(before: str, after: str) -> str:
    """Both texts in one, by words: what goes is struck out, what comes is bold."""
    old, new = before.split(" "), after.split(" ")
    parts: list[str] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = esc(" ".join(old[a:b])), esc(" ".join(new[c:d]))
        if kind == "equal":
            parts.append(gone)
        else:
            parts += [f"<del>{gone}</del>"] * (a < b) + [f"<ins>{come}</ins>"] * (c < d)
    return " ".join(parts)
