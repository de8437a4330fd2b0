"""`darkroom models list | get REPO`: the known models, and fetching one on the user's word."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from core import i18n
from core.cli.console import FINE, INTERRUPTED, add_group, answer, argument_adder, job_terminal
from core.errors import UserError
from core.units import file_size

tr = i18n.translator("hub")
add_argument = argument_adder(tr)


def add_commands(commands: Any) -> None:
    add = add_group(commands, "models", "models list")
    add("list", list_command, "models list")
    get = add("get", get_command, "models get SmilingWolf/wd-vit-tagger-v3")
    add_argument(get, "repo", metavar="REPO")
    add_argument(get, "--mirror", default="", metavar="URL")
    add_argument(get, "--revision", default="", metavar="NAME")
    add_argument(get, "--yes", action="store_true")


def list_command(options: argparse.Namespace) -> int:
    from core.base_models import hub
    from core.base_models.catalog import catalogue
    language = i18n.language()
    models = [(entry, hub.local(entry.repo, entry.files[:1])) for entry in catalogue()]
    lines = []
    for purpose in dict.fromkeys(entry.purpose for entry, _ in models):
        lines.append(tr(f"purpose_{purpose}"))
        for entry, path in models:
            if entry.purpose == purpose:
                state = tr("here", path=path) if path else tr("not_here")
                lines += [f"  {entry.repo}  ({file_size(entry.mb)}, {entry.licence})  {state}",
                          f"      {entry.about[language]}"]
    facts = [{"repo": entry.repo, "purpose": entry.purpose, "mb": entry.mb,
              "licence": entry.licence, "about": entry.about[language], "path": path}
             for entry, path in models]
    return answer(options, {"ok": True, "models": facts}, lines)


def get_command(options: argparse.Namespace) -> int:
    """Shows size and licence first; nothing is fetched before the user says yes."""
    from core.base_models import hub
    from core.base_models.catalog import describe
    offer = describe(options.repo, options.mirror, options.revision)
    # on stderr, as stdout is for answers
    print(tr("offer", repo=offer.repo, size=file_size(-(-offer.size // 1_000_000)),
             count=len(offer.files), licence=offer.licence or tr("no_licence"),
             source=offer.source, folder=offer.folder), file=sys.stderr)
    if not options.yes:
        if options.json or not sys.stdin.isatty():
            raise UserError("hub.needs_yes", repo=options.repo)
        print(tr("question"), end=" ", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes", "j", "是", "好"):
            print(tr("declined"), file=sys.stderr)
            return FINE
    with job_terminal() as (terminal, control):
        path = hub.fetch(offer.repo, terminal, control, options.mirror, offer=offer)
    answer(options, {"ok": path is not None, "repo": offer.repo, "path": path},
           [str(path) if path else tr("stopped", repo=offer.repo)])
    return INTERRUPTED if path is None else FINE
