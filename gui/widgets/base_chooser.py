"""Base models to choose from: found here, or fetched once size and licence have been agreed to."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from core import families
from core.base_models import hub
from core.base_models.catalog import Entry
from core.base_models.search import Found
from core.families.registry import SPECS
from gui.html import bar, button, card, esc
from gui.state.app_state import Context, Snapshot
from gui.state.base_models import Fetch


def base_chooser(ctx: Context, snap: Snapshot) -> str:
    tr, known = ctx.tr, snap.bases
    good = [one for one in known.found if not one.reason]
    choose = "".join(button(tr(f"close.choose_{one}"), f"native_{one}") for one in (
        "file", "folder")) if snap.native else ""
    tools = (f'<p class="acts">{choose}' + button(
        tr("base_model.look"), "look", hint=tr("base_model.look_hint"),
        why_not=tr("base_model.searching") if known.searching else "") + "</p>")
    title = tr("base_model.more", count=len(good))
    return (f'{_fetch(ctx, snap.bases.fetch)}<details class="bases"><summary>{esc(title)}'
            f'</summary><div class="two"><section><h3>{esc(tr("base_model.here"))}</h3>'
            f'{_here(ctx, snap, good)}{tools}</section><section><h3>'
            f'{esc(tr("base_model.fetch"))}</h3>{_offers(ctx, snap)}</section></div></details>')


def size(mb: float) -> str:
    """Of 10^6 bytes, as the hub counts."""
    return f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB"


def _here(ctx: Context, snap: Snapshot, good: list[Found]) -> str:
    known, tr = snap.bases, ctx.tr
    waits = f'<p class="small">{esc(tr("base_model.searching"))}</p>' if known.searching else ""
    if not known.found:
        return waits or (f'<p class="small">{esc(tr("base_model.none_found"))}</p>'
                         if known.searched else "")
    numbers = {one.path: n for n, one in enumerate(known.found)}
    rows = "".join(_found(ctx, snap, one, numbers[one.path]) for one in good)
    refused = [one for one in known.found if one.reason]
    others = "".join(_found(ctx, snap, one, numbers[one.path]) for one in refused)
    more = (f'<details><summary>{esc(tr("base_model.others", count=len(refused)))}</summary>'
            f'<table class="rows">{others}</table></details>') if refused else ""
    return f'{waits}<table class="rows">{rows}</table>{more}'


def _found(ctx: Context, snap: Snapshot, one: Found, number: int) -> str:
    family = SPECS[one.family].short_title if one.family in SPECS else ""
    if one.reason:
        act = esc(one.why(ctx.language))
    elif str(one.path) == snap.config.base_model:
        act = f"✓ {esc(ctx.tr('base_model.used'))}"
    else:
        act = button(ctx.tr("base_model.use"), "use_base", str(number))
    name = one.path.name if one.path.suffix else "/".join(one.path.parts[-2:])
    return (f'<tr><td title="{esc(one.path)}"><b>{esc(name)}</b><br>'
            f'<small>{esc(" · ".join(filter(None, (family, size(one.mb), _place(one)))))}</small>'
            f"</td><td>{act}</td></tr>")


def _place(one: Found) -> str:
    """The last folders: enough to tell two of a name apart."""
    return str(Path(*one.path.parent.parts[-3:]))


# --- downloads ---

def _offers(ctx: Context, snap: Snapshot) -> str:
    rows = "".join(_offer(ctx, snap, entry) for entry in hub.catalogue()
                   if entry.purpose == "base")
    return f'<table class="rows">{rows}</table>'


def _offer(ctx: Context, snap: Snapshot, entry: Entry) -> str:
    tr = ctx.tr
    place = hub.local(entry.repo, entry.files[:1])
    reason = "" if entry.family in families.SPECS else tr(
        "model_search.not_yet", family=entry.family)
    if place and reason:
        act = esc(f"{tr('base_model.is_here')}. {reason}")
    elif place and str(place) == snap.config.base_model:
        act = f"✓ {esc(tr('base_model.used'))}"
    elif place:
        act = button(tr("base_model.use"), "use_repo", entry.repo)
    elif reason:
        act = esc(reason)
    else:
        act = button(tr("base_model.get"), "ask", entry.repo)
    asked = _asked(ctx, snap, entry) if snap.bases.asked == entry.repo and not place else ""
    return (f"<tr><td><b>{esc(entry.about[ctx.language])}</b><br><small>{esc(entry.repo)} · "
            f"{size(entry.mb)} · {esc(entry.licence)}</small>{asked}</td><td>{act}</td></tr>")


def _asked(ctx: Context, snap: Snapshot, entry: Entry) -> str:
    """Size and licence, before anything is fetched."""
    tr = ctx.tr
    said = tr("base_model.offer", size=size(entry.mb), licence=entry.licence,
              source=source(snap.settings.mirror), folder=hub.models_dir() / entry.repo)
    page = f"https://huggingface.co/{entry.repo}"
    return (f'<div class="asked" role="status"><p>{esc(said)}</p><p class="acts">'
            + button(tr("base_model.agree"), "fetch", entry.repo, kind="primary", once=True)
            + button(tr("base_model.cancel"), "ask", "")
            + f'<a href="{esc(page)}" target="_blank" rel="noreferrer">'
              f'{esc(tr("base_model.licence_page"))}</a></p></div>')


def source(mirror: str) -> str:
    """The host that is asked."""
    from huggingface_hub.constants import ENDPOINT
    address = mirror or str(ENDPOINT)
    return urlsplit(address if "://" in address else f"https://{address}").netloc


def _fetch(ctx: Context, fetch: Fetch | None) -> str:
    if fetch is None:
        return ""
    tr = ctx.tr
    again = button(tr("base_model.go_on"), "fetch", fetch.repo, kind="primary", once=True)
    put_away = button(tr("base_model.cancel"), "forget")
    if fetch.fault:
        return card("fault", tr("base_model.failed"), ctx.told(fetch.fault),
                    raw=f'<p class="acts">{again}{put_away}</p>')
    if fetch.path:
        return card("good", tr("base_model.done", repo=fetch.repo),
                    raw=f'<p class="acts">{button(tr("dismiss"), "forget")}</p>')
    if fetch.over:
        return card("warning", tr("base_model.stopped", done=size(fetch.done)),
                    raw=f'<p class="acts">{again}{put_away}</p>')
    said = (tr("base_model.progress", repo=fetch.repo, done=size(fetch.done),
               total=size(fetch.total)) if fetch.total
            else tr("base_model.begins", repo=fetch.repo, source=source(
                ctx.app_state.settings.now.mirror)))
    share = fetch.done / fetch.total if fetch.total else 0.0
    return (f'<section class="box"><p>{esc(said)}</p>{bar(share, said)}<p class="acts">'
            f'{button(tr("base_model.stop"), "stop_fetch", once=True)}</p></section>')
