"""What went wrong, what it means and what mends it in one click; details come last, folded."""

from __future__ import annotations

from core.runs import JobView
from gui.context import Context
from gui.html import button, card, esc


def fault_card(ctx: Context, view: JobView, log: str = "") -> str:
    """Empty where nothing went wrong. `log`: the end of the run's log, for the diagnostics."""
    fault = view.fault
    if fault is None:
        return ""
    title = ctx.say("fault_interrupted" if view.state == "interrupted" else "fault_failed",
                    name=view.name)
    where = ctx.say("fault_at_step", step=view.step) if view.step else ""
    fixes = [button(ctx.say(f"fixes.{fix['key']}") if "." not in fix["key"]
                    else ctx.say(fix["key"], **fix.get("params", {})),
                    "fix", f"{view.id}/{number}", kind="primary" if number == 0 else "", once=True)
             for number, fix in enumerate(fault.fixes)]
    if view.checkpoints and view.job == "train":
        fixes.append(button(ctx.say("resume"), "resume", view.id, once=True,
                            kind="" if fixes else "primary"))
    details = "\n".join(filter(None, (fault.code, fault.details.strip(), log.strip())))
    more = (f'<details><summary>{esc(ctx.say("details"))}</summary><pre>{esc(details)}</pre>'
            f'</details>') if details else ""
    return card("fault", title, " ".join(filter(None, (where, ctx.say(
        fault.code, **_shown(fault.params))))),
        raw=f'<p class="acts">{"".join(fixes)}</p>{more}')


def _shown(params: dict[str, object]) -> dict[str, object]:
    return {key: value if isinstance(value, (int, float)) else str(value)
            for key, value in params.items()}
