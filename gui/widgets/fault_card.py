"""What went wrong, what it means and what mends it in one click; details come last, folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.config import COMPANIONS, TrainConfig
from core.errors import UserError
from core.jobs.runs import JobView
from core.memory import relief
from core.memory import troubleshooting as core_remedies
from gui.html import button, card, esc, gigabytes
from gui.state.app_state import Context

MOST = 5                                # remedies
SYMPTOMS = ("weak", "overtrained", "loss_swings")   # of a run that went through


def fault_card(ctx: Context, view: JobView, log: str = "") -> str:
    """Empty where nothing went wrong. `log`: the end of the run's log, for the details."""
    fault = view.fault
    if fault is None:
        return ""
    title = ctx.tr("fault_interrupted" if view.state == "interrupted" else "fault_failed",
                   name=view.name)
    where = ctx.tr("fault_at_step", step=view.step) if view.step else ""
    fixes = [button(ctx.tr(f"fixes.{fix['key']}") if "." not in fix["key"]
                    else ctx.tr(fix["key"], **fix.get("params", {})),
                    "fix", f"{view.id}/{number}", kind="primary" if number == 0 else "", once=True)
             for number, fix in enumerate(fault.fixes)]
    if view.checkpoints and view.job == "train":
        fixes.append(button(ctx.tr("resume"), "resume", view.id, once=True,
                            kind="" if fixes else "primary"))
    details = "\n".join(filter(None, (fault.code, fault.details.strip(), log.strip())))
    more = (f'<details><summary>{esc(ctx.tr("details"))}</summary><pre>{esc(details)}</pre>'
            f'</details>') if details else ""
    text = " ".join(filter(None, (where, ctx.tr(fault.code, **_shown(fault.params)))))
    return card("fault", title, text, raw=(
        f'<p class="acts">{"".join(fixes)}{diagnostics(ctx, view.id)}{folder(ctx, view)}</p>'
        f'{_memory(ctx, view)}{more}'))


def fix_of(view: JobView, number: str) -> dict[str, Any]:
    """The changes of a fault's fix. Raises UserError where there is none of that number."""
    if view.fault is None or not number.isdigit() or int(number) >= len(view.fault.fixes):
        raise UserError("gui.no_fix")
    changes: dict[str, Any] = view.fault.fixes[int(number)]["changes"]
    return changes


def keep_companions(ctx: Context, base: str, changes: Mapping[str, Any]) -> None:
    """Which file belongs to the project's base is said once, not for each run."""
    kept = {key: value for key, value in changes.items() if key in COMPANIONS}
    if kept and base == ctx.app_state.projects.now.edits.get("base_model", "demo"):
        ctx.app_state.projects.edit(**kept)
        ctx.app_state.filled()


def diagnostics(ctx: Context, run_id: str = "") -> str:
    """The button that copies them; see live.js."""
    address = f"/diagnostics/{run_id}" if run_id else "/diagnostics"
    said = {one: ctx.tr(f"close.{one}", lines="LINES") for one in (
        "copying", "copied", "copy_failed")}
    return (f'<button type="button" class="act" data-copy="{esc(address)}" '
            + " ".join(f'data-{name.replace("_", "-")}="{esc(text)}"'
                       for name, text in said.items())
            + f'>{esc(ctx.tr("close.copy"))}</button>')


def folder(ctx: Context, view: JobView) -> str:
    return button(ctx.tr("close.open_folder"), "folder", view.id, hint=view.output_dir)


# --- what to change ---

def _memory(ctx: Context, view: JobView) -> str:
    """Answers of core/memory/troubleshooting.py, with what each saves by the plan."""
    if (symptom := symptom_of(view)) is None:
        return ""
    return remedies(ctx, view, symptom, ctx.tr("remedies.memory"))


def symptom_of(view: JobView) -> str | None:
    """Out of memory, before the first update or after."""
    if view.fault is None or view.job != "train" or view.fault.code not in (
            "jobs.out_of_gpu_memory", "jobs.out_of_memory", "jobs.killed"):
        return None
    return "oom_run" if view.step > 1 else "oom_start"


def remedies(ctx: Context, view: JobView, symptom: str, title: str) -> str:
    key = f"{view.id}/{symptom}"
    ctx.app_state.planning.remedy(key, _question(ctx, view, symptom))
    planned = ctx.app_state.planning.now.remedies.get(key)
    waits = "" if planned is not None else (
        f'<p class="small" role="status">{esc(ctx.tr("remedies.looking"))}</p>')
    rows = "".join(_remedy(ctx, key, one) for one in known_remedies(ctx, view, symptom)[:MOST])
    return f'<h4>{esc(title)}</h4><ul class="fixes">{rows}</ul>{waits}' if rows else waits or (
        f'<p class="small">{esc(ctx.tr("remedies.none"))}</p>')


def known_remedies(ctx: Context, view: JobView, symptom: str) -> list[dict[str, Any]]:
    """Weighed by the planner; until it has answered, all that may help."""
    planned = ctx.app_state.planning.now.remedies.get(f"{view.id}/{symptom}")
    if planned is not None:
        return planned
    question = _question(ctx, view, symptom)
    machine = ctx.app_state.machine
    able = relief.capabilities(machine) if machine else relief.Capabilities()
    facts = core_remedies.Facts(capabilities=able, updates=question["updates"],
                                best_step=question["best_step"])
    config = TrainConfig.model_validate(question["config"])
    return [{"key": one.key, "params": dict(one.params), "changes": dict(one.changes)}
            for one in core_remedies.answer(symptom, config, None, facts)
            if "max_resolution" not in one.changes]     # that needs the base's own size


def _remedy(ctx: Context, key: str, one: dict[str, Any]) -> str:
    saves = one.get("saves_mb") or 0
    gain = f' <small>{esc(ctx.tr("remedies.saves", mb=gigabytes(saves)))}</small>' \
        if saves > 0 else ""
    act = button(ctx.tr("remedies.retry"), "remedy", f"{key}/{one['key']}", once=True) \
        if one["changes"] else '<span aria-hidden="true">•</span>'
    return f'<li>{act}<span>{esc(ctx.tr(one["key"], **one["params"]))}{gain}</span></li>'


def _question(ctx: Context, view: JobView, symptom: str) -> dict[str, Any]:
    known = {key: value for key, value in view.config.items() if key in TrainConfig.model_fields}
    best = min(view.validations, key=lambda point: point[1], default=(0, 0.0))[0]
    return {"config": known, "symptom": symptom, "language": ctx.language, "updates": view.total,
            "best_step": int(best)}


def unhappy(ctx: Context, view: JobView) -> str:
    """For a run that went through: what to change when the pictures disappoint."""
    asked = [one for one in SYMPTOMS if f"{view.id}/{one}" in ctx.app_state.planning.now.remedies]
    acts = "".join(button(ctx.tr(f"remedies.{one}"), "symptom", f"{view.id}/{one}",
                          kind="primary" if one in asked[-1:] else "") for one in SYMPTOMS)
    shown = remedies(ctx, view, asked[-1], "") if asked else ""
    return (f'<details><summary>{esc(ctx.tr("remedies.unhappy"))}</summary>'
            f'<p class="acts">{acts}</p>{shown}</details>')


def _shown(params: dict[str, object]) -> dict[str, object]:
    return {key: value if isinstance(value, (int, float)) else str(value)
            for key, value in params.items()}
