"""Commands on existing captions: darkroom captions stats, filter, apply, undo, redo, history.

Modules that a command needs are imported when it runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n, paths
from core.cli import console
from core.cli.console import FINE, answer
from core.errors import UserError

if TYPE_CHECKING:
    from captioner.captions.store import Store
    from captioner.captions.undo import Outcome

SHOWN = 30                                  # rows of a table

tr = i18n.translator("captions")
add_argument = console.argument_adder(tr)


# --- parsers ----------------------------------------------------------------------------------

def add_commands(commands: Any) -> None:
    add = console.add_group(commands, "captions", "captions stats photos", says=tr)
    stats = add("stats", _stats, "captions stats photos --tag hat")
    filter_ = add("filter", _filter, 'captions filter photos "cat and not dog"')
    apply = add("apply", _apply, 'captions apply photos --rule "replace:girl=>woman"')
    undo = add("undo", partial(_step, which="undo"), "captions undo photos")
    redo = add("redo", partial(_step, which="redo"), "captions redo photos")
    history = add("history", _history, "captions history photos")
    outliers = add("outliers", _outliers, "captions outliers photos --purpose style")
    for parser in (stats, filter_, apply, undo, redo, history, outliers):
        add_argument(parser, "folder", type=Path, metavar="DIR")
    for parser in (stats, filter_, apply):
        add_argument(parser, "--metadata", type=Path, metavar="FILE")
    for parser in (stats, filter_):
        add_argument(parser, "--trigger", "has", default="", metavar="WORD")
    for parser in (filter_, apply):
        add_argument(parser, "--base", default="", metavar="MODEL")
    add_argument(outliers, "--model", "clip_model", default="demo")
    add_argument(outliers, "--purpose", default="", choices=["", "person", "object", "style"],
                 metavar="person|object|style")
    add_argument(stats, "--tag", default="")
    add_argument(filter_, "filter", metavar="FILTER")
    add_rules(apply)
    add_argument(apply, "--trigger", default="", metavar="WORD")
    add_argument(apply, "--where", default="", metavar="FILTER")
    add_argument(apply, "--dry-run", action="store_true")


def add_rules(parser: argparse.ArgumentParser) -> None:
    add_argument(parser, "--rule", action="append", default=[], metavar="RULE")


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
    config = CaptionConfig(folder=str(paths.expanded(options.folder).absolute()),
                           models={"clip": options.model})
    with Terminal() as terminal:
        count, finding = find_outliers(config, options.purpose, terminal)
    if options.model == "demo":
        print(i18n.tr("captioner.demo_only"), file=sys.stderr)
    facts, lines = [], [tr("no_outliers", count=count)]
    if finding:
        facts = [{"file": subject.name, **subject.params} for subject in finding.subjects]
        lines = [finding.text, *(f"  {finding.line(subject)}" for subject in finding.subjects),
                 finding.mend]
    return answer(options, {"ok": True, "compared": count, "outliers": facts}, lines)


# --- looking ----------------------------------------------------------------------------------

def _open(options: argparse.Namespace) -> Store:
    from captioner.captions.store import Store
    if options.metadata and not options.metadata.is_file():
        raise UserError("dataset.metadata_missing", file=options.metadata)
    store = Store(options.folder, options.metadata)
    for problem in store.problems:
        print(problem, file=sys.stderr)
    return store


def _stats(options: argparse.Namespace) -> int:
    from captioner.captions import search
    from core.cli import progress
    captions = list(_open(options).captions.values())
    stats = {**search.counted(captions, options.trigger), "top": search.count(captions),
             "words": search.count_words(captions)}
    if options.tag:
        stats["together"] = search.together(captions, options.tag)
    lines = [tr("stats", **stats)]
    if stats["with_trigger"] is not None:
        lines.append(tr("stats_trigger", trigger=options.trigger, **stats))
    for key in ("together",) if options.tag else ("top", "words"):
        rows = [(str(row[0]), str(row[1])) for row in stats[key][:SHOWN]]
        lines += ["", tr(f"stats_{key}", tag=options.tag), "\n".join(progress.table(rows))]
    return answer(options, {"ok": True, **stats}, lines)


def _filter(options: argparse.Namespace) -> int:
    from captioner.captions import search
    from captioner.captions.tokens import counter
    count = counter(options.base) if search.needs_tokens(options.filter) else None
    captions = _open(options).captions
    matching = search.find(options.filter, captions, options.trigger, count)
    answer(options, {"ok": True, "found": {name: captions[name] for name in matching}},
           [f"{name}\t{captions[name]}" for name in matching])
    if not options.json:
        print(tr("found", count=len(matching), total=len(captions)), file=sys.stderr)
    return FINE


def _apply(options: argparse.Namespace) -> int:
    """Applies rules to existing captions; pictures without a caption stay without."""
    from captioner.captions import search
    from captioner.captions.rule_parser import parse
    from captioner.captions.rules import MaxTokens, preview, with_trigger_rule
    from captioner.captions.tokens import counter, tokens_of
    from captioner.captions.undo import Action, History
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
        rows = [asdict(change) for change in changes]
        return answer(options, {"ok": True, "dry_run": True, "changes": rows}, [
            *(change_line(**row) for row in rows),
            tr("would_change", count=len(changes), total=len(selected))])
    history = History(store.folder)
    locked = [store.entries[change.path] for change in changes if store.entries[change.path].locked]
    for entry in locked:
        print(i18n.tr(f"captions.{entry.locked}", {
            "picture": entry.name, "file": store.name(entry.place.file)}), file=sys.stderr)
    swaps = store.swaps({change.path: change.after for change in changes})
    flattened = sum(store.entries[swap.picture].several_lines for swap in swaps if swap.picture)
    outcome = history.carry_out(Action("apply", {"rules": options.rule}), swaps)
    facts, left = _facts(outcome)
    lines = [tr("applied", count=len(facts["changed"]), folder=store.folder)]
    if flattened:
        lines.append(tr("summary_flattened", count=flattened))
    return answer(options, {**facts, "flattened": flattened,
                            "locked": [entry.name for entry in locked]}, [*lines, *left])


def _step(options: argparse.Namespace, which: str) -> int:
    from captioner.captions.undo import History
    if not options.folder.is_dir():
        raise UserError("dataset.not_a_folder" if options.folder.exists() else "captions.no_folder",
                        folder=options.folder)
    history = History(options.folder)
    outcome = history.undo() if which == "undo" else history.redo()
    if outcome is None:
        raise UserError(f"captions.nothing_to_{which}", folder=options.folder)
    facts, left = _facts(outcome)
    return answer(options, facts, [
        tr("undone" if which == "undo" else "redone", count=len(facts["changed"]),
           what=tr(f"what_{outcome.action.what}")), *left])


def _history(options: argparse.Namespace) -> int:
    from captioner.captions.undo import History
    actions = History(options.folder).actions()
    lines = []
    for action in actions:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(action.at))
        lines.append(f"{action.id}  {when}  {tr(f'what_{action.what}')}  "
                     f"{tr('is_undone') * action.undone}")
    facts = [{"id": action.id, **asdict(action)} for action in actions]
    return answer(options, {"ok": True, "actions": facts},
                  lines or [tr("no_history", folder=options.folder)])


def _facts(outcome: Outcome) -> tuple[dict[str, Any], list[str]]:
    """The answer for programs, and a sentence for each picture that was left."""
    changed, left = ([swap.picture for swap in swaps if swap.picture]
                     for swaps in (outcome.done, outcome.left))
    return ({"ok": not outcome.left, "action": outcome.action.id, "what": outcome.action.what,
             "changed": changed, "left": left},
            [i18n.tr("runner.edited", {"picture": picture}) for picture in left])


def change_line(path: str, before: str, after: str) -> str:
    return f"{path}\n  - {before}\n  + {after}"
