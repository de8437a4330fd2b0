"""What went wrong, what it means and what mends it in one click; details come last, folded."""

from __future__ import annotations

from typing import Any

from core.config import COMPANIONS, TrainConfig
from core.errors import UserError
from core.jobs.runs import JobView
from core.memory import relief
from core.memory import troubleshooting as core_remedies
from core.units import gigabytes
from gui.html import acts, button, card, details, esc, small
from gui.state.app_state import Context

MOST_REMEDIES = 5
# What can be wrong with the pictures of a run that went through.
SYMPTOMS = ("weak", "overtrained", "loss_swings")
MEMORY_FAULTS = ("jobs.out_of_gpu_memory", "jobs.out_of_memory", "jobs.killed")


def fault_card(ctx: Context, view: JobView, log: str = "") -> str:
    """Empty where nothing went wrong. `log`: the end of the run's log, for the details."""
    tr, fault = ctx.tr, view.fault
    if fault is None:
        return ""
    fixes = [button(tr(f"fixes.{fix.key}") if "." not in fix.key else tr(fix.key, **fix.params),
                    "fix", f"{view.id}/{number}", kind="primary" if number == 0 else "", once=True)
             for number, fix in enumerate(fault.fixes)]
    if view.checkpoints and view.job == "train":
        fixes.append(button(tr("resume"), "resume", view.id, once=True,
                            kind="" if fixes else "primary"))
    answers = ""
    if view.job == "train" and fault.code in MEMORY_FAULTS:
        symptom = "oom_run" if view.step > 1 else "oom_start"
        answers = remedies(ctx, view, symptom, tr("remedies.memory"))
    trace = "\n".join(filter(None, (fault.code, fault.details.strip(), log.strip())))
    more = details(tr("details"), f"<pre>{esc(trace)}</pre>")
    # Sentences format numbers by themselves; a path or an error comes as its text.
    params = {key: value if isinstance(value, (int, float)) else str(value)
              for key, value in fault.params.items()}
    where = tr("fault_at_step", step=view.step) if view.step else ""
    key = "fault_interrupted" if view.state == "interrupted" else "fault_failed"
    return card("fault", tr(key, name=view.name), f"{where} {tr(fault.code, **params)}".lstrip(),
                html=acts(*fixes, diagnostics(ctx, view.id), folder(ctx, view)) + answers + more)


def chosen_fix(ctx: Context, id: str) -> tuple[JobView, dict[str, Any]]:
    """'run/2' -> the run, and the changes of its fault's third fix. Raises UserError where there is
    no such fix."""
    run_id, _, number = id.rpartition("/")
    view = ctx.app_state.jobs.view(run_id)
    if view.fault is None or not number.isdigit() or int(number) >= len(view.fault.fixes):
        raise UserError("gui.no_fix")
    changes: dict[str, Any] = view.fault.fixes[int(number)].changes
    # The project keeps which files belong to its base, so that it is asked once only. A training
    # names its base `base_model`, a drawing `base`.
    companions = {key: value for key, value in changes.items() if key in COMPANIONS}
    base = view.config.get("base_model", view.config.get("base"))
    if companions and base == ctx.app_state.projects.now.edits.get("base_model", "demo"):
        ctx.app_state.projects.edit(**companions)
        ctx.app_state.filled()
    return view, changes


def diagnostics(ctx: Context, run_id: str = "") -> str:
    """The button that copies the diagnostics; see live.js, which shows the three sentences."""
    address = "/diagnostics" + (f"/{run_id}" if run_id else "")
    sentences = "".join(
        f' data-{key.replace("_", "-")}="{esc(ctx.tr(f"close.{key}", lines="LINES"))}"'
        for key in ("copying", "copied", "copy_failed"))
    return (f'<button type="button" class="act" data-copy="{esc(address)}"{sentences}>'
            f'{esc(ctx.tr("close.copy"))}</button>')


def folder(ctx: Context, view: JobView) -> str:
    """The button that opens the folder of a run."""
    return button(ctx.tr("close.open_folder"), "folder", view.id, hint=view.output_dir)


# --- what to change ---

def remedies(ctx: Context, view: JobView, symptom: str, title: str) -> str:
    """Answers of core/memory/troubleshooting.py, with what each saves by the plan."""
    key = f"{view.id}/{symptom}"
    ctx.app_state.planning.remedy(key, _question(ctx, view, symptom))
    planned = ctx.app_state.planning.now.remedies.get(key)
    waits = small(ctx.tr("remedies.looking"), status=True) if planned is None else ""
    items = ""
    for remedy in known_remedies(ctx, view, symptom)[:MOST_REMEDIES]:
        text = esc(ctx.tr(remedy["key"], **remedy["params"]))
        if (saves := remedy.get("saves_mb") or 0) > 0:
            text += f' <small>{esc(ctx.tr("remedies.saves", mb=gigabytes(saves)))}</small>'
        action = '<span aria-hidden="true">•</span>'
        if remedy["changes"]:
            action = button(ctx.tr("remedies.retry"), "remedy", f"{key}/{remedy['key']}", once=True)
        items += f"<li>{action}<span>{text}</span></li>"
    if items:
        return f'<h4>{esc(title)}</h4><ul class="fixes">{items}</ul>{waits}'
    return waits or small(ctx.tr("remedies.none"))


def known_remedies(ctx: Context, view: JobView, symptom: str) -> list[dict[str, Any]]:
    """What may help, as the planner has weighed it; until it has answered, all that may help."""
    planned = ctx.app_state.planning.now.remedies.get(f"{view.id}/{symptom}")
    if planned is not None:
        return planned
    question, machine = _question(ctx, view, symptom), ctx.app_state.machine
    facts = core_remedies.Facts(
        capabilities=relief.capabilities(machine) if machine else relief.Capabilities(),
        updates=question["updates"], best_step=question["best_step"])
    config = TrainConfig.model_validate(question["config"])
    # A smaller resolution needs the base's own size, which the planner alone reads.
    return [{"key": remedy.key, "params": dict(remedy.params), "changes": dict(remedy.changes)}
            for remedy in core_remedies.answer(symptom, config, None, facts)
            if "max_resolution" not in remedy.changes]


def _question(ctx: Context, view: JobView, symptom: str) -> dict[str, Any]:
    known = {key: value for key, value in view.config.items() if key in TrainConfig.model_fields}
    best = min(view.validations, key=lambda point: point[1], default=(0, 0.0))[0]
    return {"config": known, "symptom": symptom, "language": ctx.language, "updates": view.total,
            "best_step": int(best)}


def unhappy(ctx: Context, view: JobView) -> str:
    """For a run that went through: what to change when the pictures disappoint."""
    answered = ctx.app_state.planning.now.remedies
    asked = [symptom for symptom in SYMPTOMS if f"{view.id}/{symptom}" in answered]
    buttons = [button(ctx.tr(f"remedies.{symptom}"), "symptom", f"{view.id}/{symptom}",
                      kind="primary" if symptom in asked[-1:] else "") for symptom in SYMPTOMS]
    shown = remedies(ctx, view, asked[-1], "") if asked else ""
    return details(ctx.tr("remedies.unhappy"), acts(*buttons) + shown)
