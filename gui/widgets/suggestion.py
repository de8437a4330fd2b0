"""This machine: the memory that the run would take, and what would be better, with reasons."""

from __future__ import annotations

from typing import Any

from core.config import TrainConfig
from gui.html import button, esc, gigabytes
from gui.state.app_state import Context, Snapshot
from gui.state.form import label
from gui.widgets.memory_bar import memory_bar

FIRST = ("max_resolution", "batch_size", "gradient_accumulation_steps", "lora_rank",
         "base_precision", "gradient_checkpointing", "epochs", "learning_rate")


def suggestion(ctx: Context, snap: Snapshot) -> str:
    answer = snap.plan_state.answer
    title = f'<h3>{esc(ctx.tr("this_machine"))}</h3>'
    if "plan" not in answer:
        waits = ctx.tr("planning" if snap.plan_state.pending else "nothing_planned")
        fault = answer.get("fault")
        text = ctx.tr(fault["code"], **fault["params"]) if fault else waits
        return f'<section class="box">{title}<p class="small">{esc(text)}</p></section>'
    bar = memory_bar(ctx, answer["plan"], pending=snap.plan_state.pending)
    waits = f'<p class="small">{esc(ctx.tr("planning"))}</p>' if snap.plan_state.pending else ""
    return (f'<section class="box">{title}{bar}{waits}{_nearest(ctx, answer)}'
            f'{_advice(ctx, snap, answer.get("suggestion"))}</section>')


def _nearest(ctx: Context, answer: dict[str, Any]) -> str:
    """The gentlest changes that make it fit."""
    if answer["verdict"] == "fits":
        return ""
    nearest = answer.get("nearest")
    if not nearest or not nearest["changes"]:
        return f'<p class="small">{esc(ctx.tr("nothing_fits"))}</p>'
    changes = ", ".join(f"{ctx.tr(f'config_help.{key}')} {value_text(ctx, value)}"
                        for key, value in nearest["changes"].items())
    said = ctx.tr("nearest", changes=changes, needs=gigabytes(nearest["needs_mb"]))
    return f'<p>{esc(said)} {button(ctx.tr("apply"), "nearest")}</p>'


def _advice(ctx: Context, snap: Snapshot, found: dict[str, Any] | None) -> str:
    if not found:
        return f'<p class="small">{esc(ctx.tr("advising"))}</p>'
    values = found["values"]
    current = snap.config.model_dump()
    differs = [key for key in values if current.get(key) != values[key]]
    short = " · ".join(f"{ctx.tr(f'config_help.{key}')} {value_text(ctx, values[key])}"
                       for key in FIRST if key in values
                       and values[key] != TrainConfig.model_fields[key].default)
    act = (button(ctx.tr("apply"), "advice") if differs
           else f'<span class="small">✓ {esc(ctx.tr("advice_taken"))}</span>')
    rows = "".join(f"<tr{' class=differs' if key in differs else ''}><th>{esc(label(ctx, key))}"
                   f"</th><td>{esc(value_text(ctx, values[key]))}</td><td>{esc(reason)}</td></tr>"
                   for key, reason in found["reasons"].items() if key in values)
    notes = "".join(f"<li>{esc(note)}</li>" for note in found["notes"])
    return (f'<p class="advice"><b>{esc(ctx.tr("suggested"))}</b> {esc(short)} {act}</p>'
            f'<details><summary>{esc(ctx.tr("why"))}</summary><ul>{notes}</ul>'
            f'<table class="reasons">{rows}</table></details>')


def value_text(ctx: Context, value: Any) -> str:
    if isinstance(value, bool):
        return ctx.tr("yes" if value else "no")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.replace(",", " × ") if value.replace(",", "").isdigit() else value
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
