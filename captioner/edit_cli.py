"""Commands on existing captions: darkroom captions stats, filter, apply, undo, redo, history.

Modules that a command needs are imported when it runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli import console
from core.cli.console import FINE, print_json
from core.errors import UserError

if TYPE_CHECKING:
    from captioner.captions.store import Store
    from captioner.captions.undo import Outcome

PURPOSES = ("person", "object", "style")
SHOWN = 30                                  # rows of a table


def tr(key: str, **params: Any) -> str:
    return i18n.tr(f"captions.{key}", params)


# --- parsers ----------------------------------------------------------------------------------

def add_commands(commands: Any) -> None:
    captions = command(commands, "captions", None, "captions stats photos", answers=False)
    inner = captions.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, run, line in (
            ("stats", _stats, "captions stats photos --tag hat"),
            ("filter", _filter, 'captions filter photos "cat and not dog"'),
            ("apply", _apply, 'captions apply photos --rule "replace:girl=>woman"'),
            ("undo", partial(_step, which="undo"), "captions undo photos"),
            ("redo", partial(_step, which="redo"), "captions redo photos"),
            ("history", _history, "captions history photos"),
            ("outliers", _outliers, "captions outliers photos --purpose style")):
        parser = command(inner, name, run, line, key=f"captions_{name}")
        parser.add_argument("folder", type=Path, metavar="DIR", help=tr("arg_folder"))
        if name in ("stats", "filter", "apply"):
            parser.add_argument("--metadata", type=Path, metavar="FILE", help=tr("arg_metadata"))
        if name in ("stats", "filter"):
            parser.add_argument("--trigger", default="", metavar="WORD", help=tr("arg_has"))
        if name in ("filter", "apply"):
            parser.add_argument("--base", default="", metavar="MODEL", help=tr("arg_base"))
    choices = inner.choices
    choices["outliers"].add_argument("--model", default="demo", help=tr("arg_clip_model"))
    choices["outliers"].add_argument("--purpose", default="", choices=["", *PURPOSES],
                                     metavar="person|object|style", help=tr("arg_purpose"))
    choices["stats"].add_argument("--tag", default="", help=tr("arg_tag"))
    choices["filter"].add_argument("filter", metavar="FILTER", help=tr("arg_filter"))
    add_rules(choices["apply"])
    choices["apply"].add_argument("--trigger", default="", metavar="WORD",
                                  help=tr("arg_trigger"))
    choices["apply"].add_argument("--where", default="", metavar="FILTER", help=tr("arg_where"))
    choices["apply"].add_argument("--dry-run", action="store_true", help=tr("arg_dry_run"))


def add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rule", action="append", default=[], metavar="RULE",
                        help=tr("arg_rule"))


def command(commands: Any, name: str, run: Any, line: str, *, key: str = "",
             answers: bool = True) -> argparse.ArgumentParser:
    """Like console.add_command, with the captioner's own sentences."""
    help_ = tr(f"help_{key or name}")
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_, description=help_, epilog=console.example(line),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, answers)
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_common(parser: argparse.ArgumentParser, answers: bool) -> None:
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                        help=console.tr("arg_debug"))
    if answers:
        parser.add_argument("--json", action="store_true", help=console.tr("arg_json"))


def rules_of_lines(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Rules from the command line: `replace:a=>b` and the like, or JSON."""
    from captioner.captions.rule_parser import parse_line
    rules = []
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("{"):
            rules.append(parse_line(line, number))
            continue
        try:
            rules.append(json.loads(line))
        except ValueError as error:
            raise UserError("rules.bad_json", number=number, line=line, reason=error) from None
    return rules


def _outliers(options: argparse.Namespace) -> int:
    from captioner.config import CaptionConfig
    from captioner.outliers import find_outliers
    from core.cli.progress import Terminal
    config = CaptionConfig(folder=str(options.folder.expanduser().absolute()),
                           models={"clip": options.model})
    with Terminal() as terminal:
        count, finding = find_outliers(config, options.purpose, terminal)
    if options.model == "demo":
        print(i18n.tr("captioner.demo_only"), file=sys.stderr)
    subjects = finding.subjects if finding else ()
    if options.json:
        print_json({"ok": True, "compared": count, "outliers": [
            {"file": subject.name, **subject.params} for subject in subjects]})
    elif finding:
        print("\n".join([finding.text, *(f"  {finding.line(subject)}" for subject in subjects),
                         finding.mend]))
    else:
        print(tr("no_outliers", count=count))
    return FINE


# --- looking ----------------------------------------------------------------------------------

def _open(options: argparse.Namespace) -> Store:
    from captioner.captions.store import Store
    if options.metadata and not options.metadata.is_file():
        raise UserError("dataset.metadata_missing", file=options.metadata)
    return Store(options.folder, options.metadata)


def _stats(options: argparse.Namespace) -> int:
    from captioner.captions import search
    from core.cli import progress
    captions = list(_open(options).captions.values())
    stats = {**search.counted(captions, options.trigger), "top": search.count(captions),
             "words": search.count_words(captions)}
    if options.tag:
        stats["together"] = search.together(captions, options.tag)
    if options.json:
        print_json({"ok": True, **stats})
        return FINE
    print(tr("stats", **stats))
    if stats["with_trigger"] is not None:
        print(tr("stats_trigger", trigger=options.trigger, **stats))
    for key in ("together",) if options.tag else ("top", "words"):
        print("\n" + tr(f"stats_{key}", tag=options.tag))
        rows = [(str(row[0]), str(row[1])) for row in stats[key][:SHOWN]]
        print("\n".join(progress.table(rows)))
    return FINE


def _filter(options: argparse.Namespace) -> int:
    from captioner.captions import search
    from captioner.captions.tokens import counter
    count = counter(options.base) if search.needs_tokens(options.filter) else None
    captions = _open(options).captions
    matching = search.find(options.filter, captions, options.trigger, count)
    if options.json:
        print_json({"ok": True, "found": {name: captions[name] for name in matching}})
    else:
        print("\n".join(f"{name}\t{captions[name]}" for name in matching))
        print(tr("found", count=len(matching), total=len(captions)), file=sys.stderr)
    return FINE


def _apply(options: argparse.Namespace) -> int:
    """Applies rules to existing captions; pictures without a caption stay without."""
    from dataclasses import replace

    from captioner.captions import search
    from captioner.captions.rule_parser import parse
    from captioner.captions.rules import MaxTokens, preview, with_trigger_rule
    from captioner.captions.tokens import counter
    from captioner.captions.undo import Action, History
    from captioner.job import tokens_of
    rules = with_trigger_rule(parse(rules_of_lines(options.rule)), options.trigger)
    if not rules:
        raise UserError("captions.no_rules")
    if options.base:
        rules = tuple(replace(rule, base=options.base) if isinstance(rule, MaxTokens) else rule
                      for rule in rules)
    store = _open(options)
    captions = {name: text for name, text in store.captions.items() if text}
    count = counter(options.base) if search.needs_tokens(options.where) else None
    selected = search.find(options.where, captions, options.trigger, count)
    changes = preview({name: captions[name] for name in selected}, rules, tokens_of(rules))
    if options.dry_run:
        if options.json:
            print_json({"ok": True, "dry_run": True, "changes": [
                {"path": change.path, "before": change.before, "after": change.after}
                for change in changes]})
            return FINE
        for change in changes:
            print(change_line(change.path, change.before, change.after))
        print(tr("would_change", count=len(changes), total=len(selected)))
        return FINE
    history = History(store.folder)
    swaps = store.swaps({change.path: change.after for change in changes})
    flattened = sum(store.entries[swap.picture].several_lines for swap in swaps if swap.picture)
    outcome = history.carry_out(Action("apply", {"rules": options.rule}), swaps)
    if options.json:
        print_json({"ok": not outcome.left, **_outcome_json(outcome), "flattened": flattened})
        return FINE
    print(tr("applied", count=_pictures(outcome.done), folder=store.folder))
    if flattened:
        print(tr("summary_flattened", count=flattened))
    _print_left(outcome)
    return FINE


def _step(options: argparse.Namespace, which: str) -> int:
    from captioner.captions.undo import History
    if not options.folder.is_dir():
        raise UserError("dataset.not_a_folder" if options.folder.exists() else "captions.no_folder",
                        folder=options.folder)
    history = History(options.folder)
    outcome = history.undo() if which == "undo" else history.redo()
    if outcome is None:
        raise UserError(f"captions.nothing_to_{which}", folder=options.folder)
    if options.json:
        print_json({"ok": not outcome.left, **_outcome_json(outcome)})
        return FINE
    print(tr("undone" if which == "undo" else "redone", count=_pictures(outcome.done),
             what=tr(f"what_{outcome.action.what}")))
    _print_left(outcome)
    return FINE


def _history(options: argparse.Namespace) -> int:
    from captioner.captions.undo import History
    actions = History(options.folder).actions()
    if options.json:
        print_json({"ok": True, "actions": [
            {"id": action.id, "what": action.what, "params": action.params, "at": action.at,
             "undone": action.undone} for action in actions]})
        return FINE
    for action in actions:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(action.at))
        print(f"{action.id}  {when}  {tr(f'what_{action.what}')}  "
              f"{tr('is_undone') * action.undone}")
    if not actions:
        print(tr("no_history", folder=options.folder))
    return FINE


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {"action": outcome.action.id, "what": outcome.action.what,
            "changed": [swap.picture for swap in outcome.done if swap.picture],
            "left": [swap.picture for swap in outcome.left if swap.picture]}


def _pictures(swaps: Sequence[Any]) -> int:
    return sum(bool(swap.picture) for swap in swaps)


def _print_left(outcome: Outcome) -> None:
    for swap in outcome.left:
        if swap.picture:
            print(i18n.tr("runner.edited", {"picture": swap.picture}))


def change_line(name: str, before: str, after: str) -> str:
    return f"{name}\n  - {before}\n  + {after}"
