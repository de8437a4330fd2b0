"""A run as the Parameters tab shows it: phases, loss, memory, previews, notes, its buttons."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import gradio as gr

from core.errors import UserError
from core.importers import load_train_config
from core.jobs.journal import CONFIG, LOG
from core.jobs.outcome import said_first
from core.jobs.runs import JobView, resume_of
from gui import actions
from gui.html import acts, bar, box, button, card, clock, duration, esc, small, speed
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.run_files import lora_file, lora_of
from gui.widgets import fault_card
from gui.widgets.memory_bar import memory_bar
from gui.widgets.panel import panel
from gui.widgets.runs.loss_chart import ema, loss_chart
from gui.widgets.runs.previews import previews

PHASES = ("scan", "load", "cache", "train", "save", "verify")
# Phases of the engine that a page shows as part of another.
ALIAS = {"check": "scan", "texts": "cache", "regular": "cache", "draw": "train", "download": "load"}
MOST_NOTES = 30
# Notes that decide whether the LoRA will be of use: they stand on top of the run.
ALARMS = ("base_check.wrong", "base_check.wrong_parts", "base_check.predicts_other",
          "advisor.too_few")


class RunView:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Column(elem_id="run", visible=False) as self.column:
            self.head = panel("run-head")
            with gr.Row():
                with gr.Column(scale=3, min_width=420):
                    self.chart = panel("run-chart")
                    self.previews = panel("run-previews")
                with gr.Column(scale=2, min_width=340):
                    self.memory = panel("run-memory")
                    self.notes = panel("run-notes")
        ctx.page.on(self.act, self.head, fill=True)

    def paint(self, snap: Snapshot) -> Updates:
        ctx, view = self.ctx, snap.shown
        if view is None:
            return {self.column: gr.update(visible=False), self.head: "", self.chart: "",
                    self.previews: "", self.memory: "", self.notes: ""}
        return {self.column: gr.update(visible=True), self.head: head(ctx, view, snap),
                self.chart: loss_chart(ctx, view.losses, view.validations, view.total),
                self.previews: box(ctx.tr("previews"), previews(ctx, view)),
                self.memory: box(ctx.tr("memory"), memory(ctx, view)),
                self.notes: box(ctx.tr("notes"), notes(ctx, view))}

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons of the run and of its fault card."""
        app_state = self.ctx.app_state
        match act:
            case "pause" | "go" | "sample" | "save":
                app_state.jobs.ask(id, act)
            case "stop":
                app_state.jobs.stop(id)
            case "resume" | "folder":
                actions.act(self.ctx, act, id)
            case "fix":
                self._again(*fault_card.chosen_fix(self.ctx, id))
            case "remedy":
                # 'run/oom_start/advisor.do_batch': the same with that remedy of the symptom.
                run_id, symptom, key = [*id.split("/"), "", ""][:3]
                view = app_state.jobs.view(run_id)
                changes = next((remedy["changes"] for remedy in fault_card.known_remedies(
                    self.ctx, view, symptom) if remedy["key"] == key), None)
                if not changes:
                    raise UserError("gui.no_fix")
                self._again(view, changes)
            case "symptom":
                run_id, _, symptom = id.partition("/")
                fault_card.remedies(self.ctx, app_state.jobs.view(run_id), symptom, "")
            case "back":
                app_state.projects.change(run="")
            case "try":
                # An empty name makes the Inference tab choose the newest LoRA again.
                actions.keep_drawing(app_state, {"lora": ""})
                app_state.filled()
                return self.ctx.page.select("inference")
        return None

    def _again(self, view: JobView, changes: Mapping[str, Any]) -> None:
        """Starts a run's config anew with changes, and shows that run."""
        app_state = self.ctx.app_state
        config = load_train_config(view.folder / CONFIG)
        # A LoRA of another shape can't go on from the checkpoint of the old one.
        other_lora = {"lora_rank", "lora_alpha", "target_modules"} & changes.keys()
        goes_on = changes.get("resume", bool(config.resume) and not other_lora)
        resume = resume_of(view.folder, config.resume) if goes_on else False
        app_state.projects.change(
            run=app_state.jobs.start(config.with_changes(**{**changes, "resume": resume})))


# --- the top ---

def head(ctx: Context, view: JobView, snap: Snapshot) -> str:
    """What happens and can be done; below it, what must be known of the run."""
    # A bar of the updates; before there are any, of the phase.
    done, total = (view.step, view.total) if view.total else (view.phase_done, view.phase_total)
    log = log_end(view) if view.fault and view.over else ""
    alarms = "".join(card("warning", ctx.tr("look_at_this"), ctx.tr(note.key, **note.params))
                     for note in view.notes if note.key in ALARMS)
    return (f'<section class="box run {view.state}">{title(ctx, view)}'
            f'{bar(done, total, ctx.tr("progress"), view.state)}{phases(ctx, view)}'
            f'{buttons(ctx, view, snap)}</section>{fault_card.fault_card(ctx, view, log)}'
            f'{verdicts(ctx, view)}{alarms}{finished(ctx, view)}')


def verdicts(ctx: Context, view: JobView) -> str:
    """What a user must know before the LoRA is used; see core/jobs/outcome.py."""
    titles = {"engine.proof_failed": "not_proven", "engine.not_proven": "not_proven",
              "engine.nothing_trained": "nothing_trained", "engine.faint": "faint"}
    return "".join(card("fault" if titles[key] == "not_proven" else "warning",
                        ctx.tr(titles[key]), ctx.tr(key, **params))
                   for key, params in said_first(view.result))


def log_end(view: JobView, most: int = 6000) -> str:
    """The last bytes of a run's log, as text; "" where its folder was deleted."""
    with contextlib.suppress(OSError), open(view.folder / LOG, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - most))
        return log.read().decode("utf-8", "replace")
    return ""


def title(ctx: Context, view: JobView) -> str:
    """mia-v1 · Training · step 612 / 1500 · epoch 26 · 1.52 s per step · 22 min left (14:37)"""
    tr, running = ctx.tr, view.state == "running"
    state = tr(f"phase_{ALIAS.get(view.phase, view.phase)}" if running and view.phase
               else f"state_{view.state}")
    facts = [tr("step_of", step=view.step, total=view.total),
             tr("epoch_n", epoch=f"{view.epoch:.1f}")] if view.total else []
    if running and view.phase == "train" and view.steps_per_s:
        facts.append(speed(ctx, view.steps_per_s))
        if view.eta_s:
            facts.append(tr("left", time=duration(ctx, view.eta_s),
                            clock=clock(view.updated + view.eta_s)))
    if view.losses:
        facts.append(tr("loss_n", loss=f"{view.losses[-1][1]:.4f}",
                        smooth=f"{ema(view.losses)[-1][1]:.4f}"))
    if view.over and view.started and view.ended:
        facts.append(tr("took", time=duration(ctx, view.ended - view.started),
                        clock=clock(view.ended)))
    line = " · ".join([f"<b>{esc(view.name)}</b>", f'<b class="state">{esc(state)}</b>',
                       *map(esc, facts)])
    # Screen readers would read a line aloud that changes each second.
    return f'<p class="title" aria-live="off">{line}</p>'


def phases(ctx: Context, view: JobView) -> str:
    """download ✓ load ✓ cache ✓ train ● save: colour is not the only sign."""
    now = ALIAS.get(view.phase, view.phase)
    at = PHASES.index(now) if now in PHASES else -1
    done = len(PHASES) if view.state == "done" else at
    items = ""
    for number, name in enumerate(PHASES):
        sign, kind = ("✓", "done") if number < done else ("○", "")
        if number == at and view.state != "done":
            sign, kind = ("■", "") if view.over else ("●", "now")
        count = (f" {view.phase_done}/{view.phase_total}" if number == at and view.phase_total
                 and name != "train" and not view.over else "")
        items += f'<li class="{kind}">{esc(ctx.tr(f"phase_{name}"))}{count} {sign}</li>'
    return f'<ol class="phases">{items}</ol>'


def buttons(ctx: Context, view: JobView, snap: Snapshot) -> str:
    """Every button is there in every state; one that can't be pressed says why."""
    tr = ctx.tr
    if view.over:
        resume = ""
        # A fault's card has its own button to resume.
        if view.state != "done" and view.fault is None:
            resume = button(tr("resume"), "resume", view.id, once=True,
                            why_not="" if view.checkpoints else tr("no_checkpoint"),
                            kind="" if view.checkpoints else "primary")
        return acts(resume, button(tr("back_to_settings"), "back"))
    if view.state == "queued":
        reason = tr("waits_for", name=snap.active.name) if snap.active else tr("starts_soon")
        return acts(button(tr("leave_queue"), "stop", view.id),
                    f'<span class="small">{esc(reason)}</span>')
    why_not = "" if view.step or view.phase == "train" else tr("not_before_training")
    if view.state not in ("running", "paused"):
        why_not = tr(f"not_while_{view.state}")
    paused = view.state == "paused"
    turn = ("go_on", "go") if paused else ("pause", "pause")
    return acts(*(button(tr(key), act, view.id, why_not=why_not)
                  for key, act in (turn, ("preview_now", "sample"), ("save_now", "save"))),
                button(tr("stop_and_save"), "stop", view.id, kind="primary",
                       why_not=tr("not_while_stopping") if view.state == "stopping" else ""))


def finished(ctx: Context, view: JobView) -> str:
    """Where the LoRA is, and the way to the pictures."""
    number = lora_of(view)
    if not view.over or number is None:
        return ""
    point, first = view.checkpoints[number], said_first(view.result)
    key = "finished" if view.state == "done" and not first else "saved_at"
    buttons = acts(
        button(ctx.tr("try_it"), "try", view.id, kind="primary"), fault_card.folder(ctx, view),
        f'<a class="act" href="/lora/{esc(view.id)}/{number}" download>'
        f'{esc(ctx.tr("download_lora"))}</a>')
    return card("info" if first else "good", ctx.tr(key, step=point.step), ctx.tr(
        "saved_as", file=lora_file(point)), html=buttons + fault_card.unhappy(ctx, view))


# --- the sides ---

def memory(ctx: Context, view: JobView) -> str:
    """The plan's memory, with what the run holds now while it runs."""
    if not view.plan:
        return small(ctx.tr("no_plan_yet"))
    if view.over:
        return memory_bar(ctx, view.plan)
    degrees = small(f"{view.temperature_c:.0f} °C" if view.temperature_c else "")
    return memory_bar(ctx, view.plan, view.memory_mb) + degrees


def notes(ctx: Context, view: JobView) -> str:
    """The run's notes in words, the newest first."""
    lines = [*((note.at, ctx.tr(note.key, **note.params)) for note in view.notes),
             *((point.at, ctx.tr("note_saved", step=point.step)) for point in view.checkpoints)]
    newest = sorted(lines, key=lambda line: line[0], reverse=True)[:MOST_NOTES]
    items = "".join(f"<li><time>{clock(at)}</time> {esc(text)}</li>" for at, text in newest)
    return f'<ul class="notes">{items}</ul>' if items else small(ctx.tr("no_notes"))
