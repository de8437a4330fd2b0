"""Base models to choose from: found here, or fetched once size and licence have been agreed to."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from core.base_models import catalog, hub
from core.base_models.catalog import Entry
from core.base_models.search import Found
from core.families.registry import SPECS
from core.units import file_size as size
from gui.html import acts, bar, button, card, details, esc, small
from gui.state.app_state import Context, Snapshot
from gui.state.base_models import Fetch


def base_chooser(ctx: Context, snap: Snapshot) -> str:
    """Models on this machine and those that can be fetched, folded; a download stands above."""
    tr, bases = ctx.tr, snap.bases
    # A row's button names its model by the place in `found`: pages send no paths.
    usable, refused = (
        [_found(ctx, snap, model, number) for number, model in enumerate(bases.found)
         if bool(model.reason) == has_reason] for has_reason in (False, True))
    here = small(tr("base_model.searching")) if bases.searching else ""
    if bases.found:
        here += f'<table class="rows">{"".join(usable)}</table>'
    elif bases.searched:
        here = here or small(tr("base_model.none_found"))
    if refused:
        here += details(tr("base_model.others", count=len(refused)),
                        f'<table class="rows">{"".join(refused)}</table>')
    native = [button(tr(f"close.choose_{kind}"), f"native_{kind}") for kind in ("file", "folder")]
    search = button(tr("base_model.look"), "look", hint=tr("base_model.look_hint"),
                    why_not=tr("base_model.searching") if bases.searching else "")
    offers = "".join(_offer(ctx, snap, entry) for entry in catalog.catalogue()
                     if entry.purpose == "base")
    return _download(ctx, bases.fetch) + details(
        tr("base_model.more", count=len(usable)),
        f'<div class="two"><section><h3>{esc(tr("base_model.here"))}</h3>'
        f'{here}{acts(*native if snap.native else [], search)}</section>'
        f'<section><h3>{esc(tr("base_model.fetch"))}</h3><table class="rows">{offers}</table>'
        f'</section></div>', "bases")


def _found(ctx: Context, snap: Snapshot, model: Found, number: int) -> str:
    path = model.path
    action = (esc(model.why(ctx.language)) if model.reason
              else _use(ctx, snap, path, "use_base", str(number)))
    name = path.name if path.suffix else "/".join(path.parts[-2:])
    family = SPECS[model.family].short_title if model.family in SPECS else ""
    # The last folders are enough to tell two models of one name apart.
    folders = str(Path(*path.parent.parts[-3:]))
    facts = " · ".join(filter(None, (family, size(model.mb), folders)))
    return (f'<tr><td title="{esc(path)}"><b>{esc(name)}</b><br>'
            f'<small>{esc(facts)}</small></td><td>{action}</td></tr>')


def _use(ctx: Context, snap: Snapshot, path: Path, act: str, id: str) -> str:
    """The button that chooses a base; a mark where it is chosen."""
    if str(path) == snap.config.base_model:
        return f"✓ {esc(ctx.tr('base_model.used'))}"
    return button(ctx.tr("base_model.use"), act, id)


# --- downloads ---

def _offer(ctx: Context, snap: Snapshot, entry: Entry) -> str:
    tr = ctx.tr
    path = hub.local(entry.repo, entry.files[:1])
    if entry.family not in SPECS:
        here = f"{tr('base_model.is_here')}. " if path else ""
        action = esc(here + tr("model_search.not_yet", family=entry.family))
    elif path:
        action = _use(ctx, snap, path, "use_repo", entry.repo)
    else:
        action = button(tr("base_model.get"), "ask", entry.repo)
    question = ""
    # Size and licence are shown before anything is fetched.
    if snap.bases.asked == entry.repo and not path:
        text = tr("base_model.offer", size=size(entry.mb), licence=entry.licence,
                  source=source(snap.settings.mirror), folder=catalog.models_dir() / entry.repo)
        buttons = acts(
            button(tr("base_model.agree"), "fetch", entry.repo, kind="primary", once=True),
            button(tr("base_model.cancel"), "ask", ""),
            f'<a href="{esc(f"https://huggingface.co/{entry.repo}")}" target="_blank" '
            f'rel="noreferrer">{esc(tr("base_model.licence_page"))}</a>')
        question = f'<div class="asked" role="status"><p>{esc(text)}</p>{buttons}</div>'
    return (f"<tr><td><b>{esc(entry.about[ctx.language])}</b><br><small>{esc(entry.repo)} · "
            f"{size(entry.mb)} · {esc(entry.licence)}</small>{question}</td><td>{action}</td></tr>")


def source(mirror: str) -> str:
    """The host that models are fetched from."""
    from huggingface_hub.constants import ENDPOINT
    address = mirror or str(ENDPOINT)
    return urlsplit(address if "://" in address else f"https://{address}").netloc


def _download(ctx: Context, fetch: Fetch | None) -> str:
    if fetch is None:
        return ""
    tr = ctx.tr
    resume = acts(button(tr("base_model.go_on"), "fetch", fetch.repo, kind="primary", once=True),
                  button(tr("base_model.cancel"), "forget"))
    if fetch.fault:
        return card("fault", tr("base_model.failed"), ctx.error_text(fetch.fault), html=resume)
    if fetch.path:
        return card("good", tr("base_model.done", repo=fetch.repo),
                    html=acts(button(tr("dismiss"), "forget")))
    if fetch.over:
        return card("warning", tr("base_model.stopped", done=size(fetch.done)), html=resume)
    # The hub tells the size of a model only after the first answer.
    text = tr("base_model.progress" if fetch.total else "base_model.begins", repo=fetch.repo,
              done=size(fetch.done), total=size(fetch.total),
              source=source(ctx.app_state.settings.now.mirror))
    stop = acts(button(tr("base_model.stop"), "stop_fetch", once=True))
    return (f'<section class="box"><p>{esc(text)}</p>{bar(fetch.done, fetch.total, text)}{stop}'
            '</section>')
