"""Whether Start can be pressed, and what stands in the way."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Literal, NamedTuple

from core import i18n, paths
from core.base_models import search
from core.errors import UserError
from core.units import gigabytes
from core.workspace import presets
from gui.html import esc
from gui.state.app_state import Context, Snapshot
from gui.state.form import error_text, problems

Mark = Literal["ok", "wait", "warn", "bad"]
_SIGNS: dict[Mark, str] = {"ok": "✓", "wait": "…", "warn": "⚠", "bad": "✖"}


class Item(NamedTuple):
    """A line of the list; one that is `bad` keeps the training from starting."""

    mark: Mark
    text: str


def items(ctx: Context, snap: Snapshot) -> list[Item]:
    """In the order in which a user sets things up; the last ones say what Start will do."""
    checks = [_pictures(ctx, snap), _base(ctx, snap), *_machine(ctx, snap)]
    checks += [Item("bad", text) for text in problems(ctx, snap)]
    if snap.problem:
        checks.append(Item("bad", error_text(ctx, snap.problem)))
    answer = snap.plan_state.answer
    if steps := answer.get("updates"):
        checks.append(Item("ok", ctx.tr("will_do_steps", steps=steps)))
    checks += [Item("warn", ctx.tr(remark["key"], **remark["params"]))
               for remark in answer.get("remarks") or ()]
    checks += [Item("warn", ctx.tr("plan.not_counted", key=key, name=name))
               for key, name in answer.get("not_counted", {}).items()]
    return checks


def ready(ctx: Context, snap: Snapshot) -> bool:
    return all(item.mark != "bad" for item in items(ctx, snap))


def html(ctx: Context, snap: Snapshot) -> str:
    lines = "".join(f'<li class="{mark}"><span aria-hidden="true">{_SIGNS[mark]}</span> '
                    f'{esc(text)}</li>' for mark, text in items(ctx, snap))
    return f'<ul class="checklist" aria-label="{esc(ctx.tr("checklist"))}">{lines}</ul>'


def _pictures(ctx: Context, snap: Snapshot) -> Item:
    folder = snap.config.train_data_dir
    if not folder:
        return Item("bad", ctx.tr("no_folder"))
    if not os.path.isdir(paths.expanded(folder)):
        return Item("bad", ctx.tr("folder_missing", folder=folder))
    answer, question = snap.plan_state.answer, snap.plan_state.question.get("config", {})
    # The planner counts; its answer may still be about another folder.
    if question.get("train_data_dir") != folder:
        return Item("wait", ctx.tr("counting"))
    if fault := answer.get("pictures_fault"):
        return Item("bad", ctx.tr(fault["code"], **fault["params"]))
    count = answer.get("pictures", 0)
    if count >= 5:
        return Item("ok", ctx.tr("pictures_n", count=count))
    return (Item("warn", ctx.tr("pictures_few", count=count)) if count
            else Item("wait", ctx.tr("counting")))


def _base(ctx: Context, snap: Snapshot) -> Item:
    base = snap.config.base_model
    if not base:
        return Item("bad", ctx.tr("no_base"))
    try:
        family = presets.family_of(base, family=snap.config.family)
    except UserError as error:
        return Item("bad", ctx.error_text(error))
    # A family that the user names may be one of the user's own: then the base is taken as it is.
    if snap.config.family == "auto" and base != "demo":
        path = paths.expanded(base)
        # The absence of a file is told above already.
        with contextlib.suppress(OSError):
            if reason := _unfit(path, path.stat().st_mtime_ns, ctx.language):
                return Item("bad", reason)
    return Item("ok", ctx.tr("base_is", base=Path(base).name, family=family))


# Pages are painted once a second, and a look reads the headers of a checkpoint.
@functools.lru_cache(maxsize=32)
def _unfit(path: Path, changed_ns: int, language: str) -> str:
    """Why a file or folder is no base that can be trained; "": it is one. `changed_ns` is only a
    key of the cache: a file that changes is looked at anew."""
    try:
        if model := search.look(path):
            return model.why(language) if model.reason else ""
        key = "no_base"
    except UserError:
        key = "damaged"
    return i18n.tr(f"base_model.{key}", {"base": path.name}, language)


def _machine(ctx: Context, snap: Snapshot) -> list[Item]:
    """Graphics memory, main memory and disk, by the plan."""
    answer = snap.plan_state.answer
    if not answer:
        return [Item("wait", ctx.tr("planning"))] if snap.plan_state.pending else []
    checks, plan = [], answer.get("plan") or {}
    if fault := answer.get("fault"):
        checks.append(Item("warn", ctx.tr(fault["code"], **fault["params"])))
    else:
        # Too big a plan only warns: it may be wrong, and the user may know better.
        checks.append(Item("ok" if answer["verdict"] == "fits" else "warn", ctx.tr(
            f"memory_{answer['verdict']}", needs=gigabytes(plan["needs_mb"]),
            free=gigabytes(plan["machine"]["free_mb"]))))
    lacking = answer.get("lacking") or {}
    checks += [Item("warn", ctx.tr(f"advisor.{resource}_short", **params))
               for resource, params in lacking.items()]
    if (disk_mb := plan.get("machine", {}).get("disk_mb")) and "disk" not in lacking:
        checks.append(Item("ok", ctx.tr("disk_free", free=gigabytes(disk_mb))))
    return checks
