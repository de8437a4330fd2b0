"""`darkroom models list | get REPO`: the known models, and fetching one on the user's word."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli.console import FINE, INTERRUPTED, add_command, print_json, stop_on_ctrl_c
from core.errors import UserError

if TYPE_CHECKING:
    from core.base_models.catalog import Entry, Offer


def add_commands(commands: Any) -> None:
    models = add_command(commands, "models", line="models list")
    inner = models.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_command(inner, "list", _list, key="models_list", answers=True, line="models list")
    get = add_command(inner, "get", _get, key="models_get", answers=True,
                      line="models get SmilingWolf/wd-vit-tagger-v3")
    get.add_argument("repo", metavar="REPO", help=_tr("arg_repo"))
    get.add_argument("--mirror", default="", metavar="URL", help=_tr("arg_mirror"))
    get.add_argument("--revision", default="", metavar="NAME", help=_tr("arg_revision"))
    get.add_argument("--yes", action="store_true", help=_tr("arg_yes"))


def _list(options: argparse.Namespace) -> int:
    from core.base_models import hub
    rows = [(entry, hub.local(entry.repo, entry.files[:1])) for entry in hub.catalogue()]
    if options.json:
        print_json({"ok": True, "models": [_facts(entry, place) for entry, place in rows]})
        return FINE
    for purpose in dict.fromkeys(entry.purpose for entry, _ in rows):
        print(_tr(f"purpose_{purpose}"))
        for entry, place in rows:
            if entry.purpose == purpose:
                print("\n".join(_lines(entry, place)))
    return FINE


def _lines(entry: Entry, place: Any) -> list[str]:
    state = _tr("here", path=place) if place else _tr("not_here")
    return [f"  {entry.repo}  ({_size(entry.mb)}, {entry.licence})  {state}",
            f"      {entry.about[i18n.language()]}"]


def _facts(entry: Entry, place: Any) -> dict[str, Any]:
    return {"repo": entry.repo, "purpose": entry.purpose, "mb": entry.mb,
            "licence": entry.licence, "about": entry.about[i18n.language()], "path": place}


def _get(options: argparse.Namespace) -> int:
    from core.base_models import hub
    from core.cli.progress import Terminal
    from core.jobs.control import Control
    offer = hub.describe(options.repo, options.mirror, options.revision)
    _show(offer)
    if not (options.yes or _agreed(options)):
        print(_tr("declined"), file=sys.stderr)
        return FINE
    control = Control()
    with Terminal() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        path = hub.fetch(offer.repo, terminal, control, options.mirror, offer=offer)
    if options.json:
        print_json({"ok": path is not None, "repo": offer.repo, "path": path})
    else:
        print(path or _tr("stopped", repo=offer.repo))
    return INTERRUPTED if path is None else FINE


def _show(offer: Offer) -> None:
    """Size and licence, before anything is fetched; on stderr, as stdout is for answers."""
    print(_tr("offer", repo=offer.repo, size=_size(-(-offer.size // 1_000_000)),
              count=len(offer.files), licence=offer.licence or _tr("no_licence"),
              source=offer.source, folder=offer.folder), file=sys.stderr)


def _agreed(options: argparse.Namespace) -> bool:
    if options.json or not sys.stdin.isatty():
        raise UserError("hub.needs_yes", repo=options.repo)
    print(_tr("question"), end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes", "j", "是", "好")


def _size(mb: int) -> str:
    return f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb} MB"


def _tr(key: str, **params: Any) -> str:
    return i18n.tr(f"hub.{key}", params)
