"""Whether Start can be pressed, and what stands in the way."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, NamedTuple

from core import i18n
from core.base_models import search
from core.errors import UserError
from core.workspace import presets
from gui.html import esc, gigabytes
from gui.state.app_state import Context, Snapshot
from gui.state.form import problems, said

Mark = Literal["ok", "wait", "warn", "bad"]
_SIGNS: dict[Mark, str] = {"ok": "✓", "wait": "…", "warn": "⚠", "bad": "✖"}


class Item(NamedTuple):
    mark: Mark
    text: str


def items(ctx: Context, snap: Snapshot) -> list[Item]:
    found = [_pictures(ctx, snap), _base(ctx, snap), *_memory(ctx, snap), *_lacking(ctx, snap)]
    found += [Item("bad", text) for text in problems(ctx, snap)]
    if snap.problem:
        found.append(Item("bad", said(ctx, snap.problem)))
    if steps := snap.plan_state.answer.get("updates"):
        found.append(Item("ok", ctx.tr("will_do_steps", steps=steps)))
    if length := snap.plan_state.answer.get("length"):
        found.append(Item("warn", ctx.tr(length["key"], **length["params"])))
    return found


def ready(ctx: Context, snap: Snapshot) -> bool:
    return all(item.mark != "bad" for item in items(ctx, snap))


def html(ctx: Context, snap: Snapshot) -> str:
    lines = "".join(f'<li class="{item.mark}"><span aria-hidden="true">{_SIGNS[item.mark]}</span> '
                    f'{esc(item.text)}</li>' for item in items(ctx, snap))
    return f'<ul class="checklist" aria-label="{esc(ctx.tr("checklist"))}">{lines}</ul>'


def _pictures(ctx: Context, snap: Snapshot) -> Item:
    folder = snap.config.train_data_dir
    if not folder:
        return Item("bad", ctx.tr("no_folder"))
    if not Path(folder).expanduser().is_dir():
        return Item("bad", ctx.tr("folder_missing", folder=folder))
    answer, question = snap.plan_state.answer, snap.plan_state.question.get("config", {})
    if question.get("train_data_dir") != folder:
        return Item("wait", ctx.tr("counting"))
    if fault := answer.get("pictures_fault"):
        return Item("bad", ctx.tr(fault["code"], **fault["params"]))
    if not (count := answer.get("pictures", 0)):
        return Item("wait", ctx.tr("counting"))
    return Item("ok" if count >= 5 else "warn", ctx.tr(
        "pictures_n" if count >= 5 else "pictures_few", count=count))


def _base(ctx: Context, snap: Snapshot) -> Item:
    base = snap.config.base_model
    if not base:
        return Item("bad", ctx.tr("no_base"))
    try:
        family = presets.family_of(base, family=snap.config.family)
    except UserError as fault:
        return Item("bad", ctx.told(fault))
    if snap.config.family == "auto" and (unfit := _unfit(ctx, base)):
        return Item("bad", unfit)
    return Item("ok", ctx.tr("base_is", base=Path(base).name, family=family))


def _unfit(ctx: Context, base: str) -> str:
    """Why a file or folder is no base that can be trained; "": it is one."""
    path = Path(base).expanduser()
    try:
        return "" if base == "demo" else _looked(path, path.stat().st_mtime_ns, ctx.language)
    except OSError:
        return ""                       # its absence is told already


@functools.lru_cache(maxsize=32)
def _looked(path: Path, mark: int, language: str) -> str:
    try:
        found = search.look(path)
    except UserError:
        return i18n.tr("base_model.damaged", {"base": path.name}, language)
    if found is None:
        return i18n.tr("base_model.no_base", {"base": path.name}, language)
    return found.why(language) if found.reason else ""


def _memory(ctx: Context, snap: Snapshot) -> list[Item]:
    answer = snap.plan_state.answer
    if not answer:
        return [Item("wait", ctx.tr("planning"))] if snap.plan_state.pending else []
    if fault := answer.get("fault"):
        return [Item("warn", ctx.tr(fault["code"], **fault["params"]))]
    plan = answer["plan"]
    mark: Mark = {"fits": "ok", "tight": "warn"}.get(answer["verdict"],
                                                     "warn")  # type: ignore[assignment]
    return [Item(mark, ctx.tr(f"memory_{answer['verdict']}", needs=gigabytes(plan["needs_mb"]),
                              free=gigabytes(plan["machine"]["free_mb"])))]


def _lacking(ctx: Context, snap: Snapshot) -> list[Item]:
    answer = snap.plan_state.answer
    short = [Item("warn", ctx.tr(f"advisor.{what}_short", **params))
             for what, params in (answer.get("lacking") or {}).items()]
    disk = (answer.get("plan") or {}).get("machine", {}).get("disk_mb")
    if disk and "disk" not in (answer.get("lacking") or {}):
        short.append(Item("ok", ctx.tr("disk_free", free=gigabytes(disk))))
    return short
