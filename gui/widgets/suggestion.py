"""This machine: the memory that the run would take, and what would be better, with reasons."""

from __future__ import annotations

from typing import Any

from core.config import TrainConfig
from core.units import gigabytes
from gui.html import box, button, details, esc, small
from gui.state.app_state import Context, Snapshot
from gui.state.form import label
from gui.widgets.memory_bar import memory_bar

# Settings that the one line above the table names, where they aren't the defaults.
FIRST = ("max_resolution", "batch_size", "gradient_accumulation_steps", "lora_rank",
         "base_precision", "gradient_checkpointing", "epochs", "learning_rate")


def suggestion(ctx: Context, snap: Snapshot) -> str:
    """The plan's memory and the advice, or why there is no plan yet."""
    tr, answer, pending = ctx.tr, snap.plan_state.answer, snap.plan_state.pending
    if "plan" not in answer:
        fault = answer.get("fault")
        text = (tr(fault["code"], **fault["params"]) if fault
                else tr("planning" if pending else "nothing_planned"))
        return box(tr("this_machine"), small(text))
    html = memory_bar(ctx, answer["plan"], pending=pending)
    html += small(tr("planning") if pending else "")
    if answer["verdict"] != "fits":
        # The gentlest changes that make it fit.
        nearest = answer.get("nearest") or {}
        if nearest.get("changes"):
            changes = ", ".join(setting(ctx, *change) for change in nearest["changes"].items())
            text = tr("nearest", changes=changes, needs=gigabytes(nearest["needs_mb"]))
            html += f'<p>{esc(text)} {button(tr("apply"), "nearest")}</p>'
        else:
            html += small(tr("nothing_fits"))
    return box(tr("this_machine"), html + _advice(ctx, snap, answer.get("suggestion")))


def setting(ctx: Context, key: str, value: Any) -> str:
    return f"{ctx.tr(f'config_help.{key}')} {value_text(ctx, value)}"


def _advice(ctx: Context, snap: Snapshot, advice: dict[str, Any] | None) -> str:
    tr = ctx.tr
    # The suggestion comes after the plan: it weighs many plans.
    if not advice:
        return small(tr("advising"))
    values, current = advice["values"], snap.config.model_dump()
    differs = [key for key in values if current.get(key) != values[key]]
    short = " · ".join(setting(ctx, key, values[key]) for key in FIRST if key in values
                       and values[key] != TrainConfig.model_fields[key].default)
    action = (button(tr("apply"), "advice") if differs
              else f'<span class="small">✓ {esc(tr("advice_taken"))}</span>')
    rows = "".join(f"<tr{' class=differs' if key in differs else ''}><th>{esc(label(ctx, key))}"
                   f"</th><td>{esc(value_text(ctx, values[key]))}</td><td>{esc(reason)}</td></tr>"
                   for key, reason in advice["reasons"].items() if key in values)
    notes = "".join(f"<li>{esc(note)}</li>" for note in advice["notes"])
    return (f'<p class="advice"><b>{esc(tr("suggested"))}</b> {esc(short)} {action}</p>'
            + details(tr("why"), f'<ul>{notes}</ul><table class="reasons">{rows}</table>'))


def value_text(ctx: Context, value: Any) -> str:
    """A setting's value for people: yes or no, 512 × 768, a list with commas."""
    if isinstance(value, bool):
        return ctx.tr("yes" if value else "no")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value.replace(",", " × ") if value.replace(",", "").isdigit() else value
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
