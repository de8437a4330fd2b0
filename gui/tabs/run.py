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
from gui.html import bar, button, card, clock, duration, esc, speed
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.desktop import open_folder
from gui.state.run_files import folder_of, lora_file, lora_of
from gui.widgets.fault_card import (
    fault_card,
    fix_of,
    folder,
    keep_companions,
    known_remedies,
    remedies,
    unhappy,
)
from gui.widgets.memory_bar import memory_bar
from gui.widgets.panel import panel
from gui.widgets.runs.loss_chart import ema, loss_chart
from gui.widgets.runs.previews import previews

PHASES = ("scan", "load", "cache", "train", "save", "verify")
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
        ctx.page.on_panel(self.head, self.act, fill=True)

    def paint(self, snap: Snapshot) -> Updates:
        view = snap.shown
        if view is None:
            return {self.column: gr.update(visible=False), self.head: "", self.chart: "",
                    self.previews: "", self.memory: "", self.notes: ""}
        ctx = self.ctx
        return {self.column: gr.update(visible=True), self.head: head(ctx, view, snap),
                self.chart: loss_chart(ctx, view.losses, view.validations, view.total),
                self.previews: _titled(ctx, "previews", previews(ctx, view)),
                self.memory: _titled(ctx, "memory", memory(ctx, view)),
                self.notes: _titled(ctx, "notes", notes(ctx, view))}

    def act(self, act: str, id: str) -> Updates | None:
        app_state = self.ctx.app_state
        match act:
            case "pause":
                app_state.jobs.pause(id)
            case "go":
                app_state.jobs.go(id)
            case "sample":
                app_state.jobs.sample(id)
            case "save":
                app_state.jobs.save(id)
            case "stop":
                app_state.jobs.stop(id)
            case "resume":
                app_state.projects.change(run=app_state.jobs.resume(id))
            case "fix":
                app_state.projects.change(run=self._retry(id))
            case "remedy":
                app_state.projects.change(run=self._mend(id))
            case "symptom":
                run_id, _, symptom = id.partition("/")
                remedies(self.ctx, app_state.jobs.view(run_id), symptom, "")
            case "folder":
                open_folder(folder_of(app_state.jobs.view(id)))
            case "back":
                app_state.projects.change(run="")
            case "try":
                app_state.projects.update(lambda project: project.model_copy(update={
                    "inference": {**project.inference, "lora": ""}}))
                app_state.filled()
                return self.ctx.page.select("inference")
        return None

    def _retry(self, id: str) -> str:
        """'run/2': the run's config with the changes of its fault's third fix."""
        run_id, _, number = id.rpartition("/")
        view = self.ctx.app_state.jobs.view(run_id)
        changes = fix_of(view, number)
        keep_companions(self.ctx, str(view.config.get("base_model", "")), changes)
        return self._again(view, changes)

    def _mend(self, id: str) -> str:
        """'run/oom_start/advisor.do_batch': the same with that remedy against the symptom."""
        run_id, symptom, key = [*id.split("/"), "", ""][:3]
        view = self.ctx.app_state.jobs.view(run_id)
        found = known_remedies(self.ctx, view, symptom)
        changes = next((one["changes"] for one in found if one["key"] == key), None)
        if not changes:
            raise UserError("gui.no_fix")
        return self._again(view, changes)

    def _again(self, view: JobView, changes: Mapping[str, Any]) -> str:
        config = load_train_config(view.folder / CONFIG)
        other_lora = {"lora_rank", "lora_alpha", "target_modules"} & changes.keys()
        wanted = changes.get("resume", bool(config.resume) and not other_lora)
        resume = resume_of(view.folder, config.resume) if wanted else False
        return self.ctx.app_state.jobs.start(config.with_changes(**{**changes, "resume": resume}))


def _titled(ctx: Context, key: str, html: str) -> str:
    return f'<section class="box"><h3>{esc(ctx.tr(key))}</h3>{html}</section>'


# --- the top ---

def head(ctx: Context, view: JobView, snap: Snapshot) -> str:
    log = log_end(view) if view.fault and view.over else ""
    return (f'<section class="box run {view.state}">{title(ctx, view)}{progress(ctx, view)}'
            f'{phases(ctx, view)}{buttons(ctx, view, snap)}</section>'
            f'{fault_card(ctx, view, log)}{said(ctx, view)}{alarms(ctx, view)}'
            f'{finished(ctx, view)}')


def alarms(ctx: Context, view: JobView) -> str:
    return "".join(card("warning", ctx.tr("look_at_this"), ctx.tr(note.key, **note.params))
                   for note in view.notes if note.key in ALARMS)


def said(ctx: Context, view: JobView) -> str:
    """What must be known before the LoRA is used: core/jobs/outcome.py."""
    titles = {"engine.proof_failed": "not_proven", "engine.not_proven": "not_proven",
              "engine.nothing_trained": "nothing_trained", "engine.faint": "faint"}
    return "".join(card("fault" if titles[key] == "not_proven" else "warning",
                        ctx.tr(titles[key]), ctx.tr(key, **params))
                   for key, params in said_first(view.result))


def log_end(view: JobView, most: int = 6000) -> str:
    """The last bytes of a run's log, as text; a folder that was deleted has none."""
    with contextlib.suppress(OSError), open(view.folder / LOG, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - most))
        return log.read().decode("utf-8", "replace")
    return ""


def title(ctx: Context, view: JobView) -> str:
    """mia-v1 · Training · step 612 / 1500 · epoch 26 · 1.52 s per step · 22 min left (14:37)"""
    facts = [f"<b>{esc(view.name)}</b>", f'<b class="state">{esc(_state(ctx, view))}</b>']
    if view.total:
        facts.append(esc(ctx.tr("step_of", step=view.step, total=view.total)))
        facts.append(esc(ctx.tr("epoch_n", epoch=f"{view.epoch:.1f}")))
    if view.state == "running" and view.phase == "train" and view.steps_per_s:
        facts.append(esc(speed(ctx, view.steps_per_s)))
        if view.eta_s:
            facts.append(esc(ctx.tr("left", time=duration(ctx, view.eta_s),
                                    clock=clock(view.updated + view.eta_s))))
    if view.losses:
        smooth = ema(view.losses)[-1][1]
        facts.append(esc(ctx.tr("loss_n", loss=f"{view.losses[-1][1]:.4f}",
                                smooth=f"{smooth:.4f}")))
    if view.over and view.started and view.ended:
        facts.append(esc(ctx.tr("took", time=duration(ctx, view.ended - view.started),
                                clock=clock(view.ended))))
    return f'<p class="title" aria-live="off">{" · ".join(facts)}</p>'


def _state(ctx: Context, view: JobView) -> str:
    if view.state == "running" and view.phase:
        return ctx.tr(f"phase_{ALIAS.get(view.phase, view.phase)}")
    return ctx.tr(f"state_{view.state}")


def progress(ctx: Context, view: JobView) -> str:
    share = view.step / view.total if view.total else 0.0
    if not view.total and view.phase_total:
        share = view.phase_done / view.phase_total
    return bar(share, ctx.tr("progress"), view.state)


def phases(ctx: Context, view: JobView) -> str:
    """download ✓ load ✓ cache ✓ train ● save: colour is not the only sign."""
    now = ALIAS.get(view.phase, view.phase)
    at = PHASES.index(now) if now in PHASES else -1
    done = len(PHASES) if view.state == "done" else at
    items = []
    for number, name in enumerate(PHASES):
        sign, kind = ("✓", "done") if number < done else ("○", "")
        if number == at and view.state != "done":
            sign, kind = ("■", "") if view.over else ("●", "now")
        count = (f" {view.phase_done}/{view.phase_total}" if number == at and view.phase_total
                 and name != "train" and not view.over else "")
        items.append(f'<li class="{kind}">{esc(ctx.tr(f"phase_{name}"))}{count} {sign}</li>')
    return f'<ol class="phases">{"".join(items)}</ol>'


def buttons(ctx: Context, view: JobView, snap: Snapshot) -> str:
    """Every button is there in every state; one that can't be pressed says why."""
    if view.over:
        again = "" if view.checkpoints else ctx.tr("no_checkpoint")
        made = [button(ctx.tr("back_to_settings"), "back", kind="")]
        if view.state != "done" and view.fault is None:
            made.insert(0, button(ctx.tr("resume"), "resume", view.id, why_not=again,
                                  kind="" if lora_of(view) is not None else "primary",
                                  once=True))
        return f'<p class="acts">{"".join(made)}</p>'
    if view.state == "queued":
        why = ctx.tr("waits_for", name=snap.active.name) if snap.active else ctx.tr("starts_soon")
        return (f'<p class="acts">{button(ctx.tr("leave_queue"), "stop", view.id)}'
                f'<span class="small">{esc(why)}</span></p>')
    busy = "" if view.state in ("running", "paused") else ctx.tr(f"not_while_{view.state}")
    early = busy or ("" if view.step or view.phase == "train" else ctx.tr("not_before_training"))
    stop = ctx.tr("not_while_stopping") if view.state == "stopping" else ""
    paused = view.state == "paused"
    return ('<p class="acts">'
            + button(ctx.tr("go_on" if paused else "pause"), "go" if paused else "pause",
                     view.id, why_not=early)
            + button(ctx.tr("preview_now"), "sample", view.id, why_not=early)
            + button(ctx.tr("save_now"), "save", view.id, why_not=early)
            + button(ctx.tr("stop_and_save"), "stop", view.id, kind="primary", why_not=stop)
            + "</p>")


def finished(ctx: Context, view: JobView) -> str:
    """What came out, and the way to the pictures."""
    number = lora_of(view)
    if not view.over or number is None:
        return ""
    point = view.checkpoints[number]
    first = said_first(view.result)
    key = "finished" if view.state == "done" and not first else "saved_at"
    actions = (button(ctx.tr("try_it"), "try", view.id, kind="primary") + folder(ctx, view)
               + f'<a class="act" href="/lora/{esc(view.id)}/{number}" download>'
                 f'{esc(ctx.tr("download_lora"))}</a>')
    return card("info" if first else "good", ctx.tr(key, step=point.step),
                ctx.tr("saved_as", file=lora_file(point)),
                raw=f'<p class="acts">{actions}</p>{unhappy(ctx, view)}')


# --- the sides ---

def memory(ctx: Context, view: JobView) -> str:
    if not view.plan:
        return f'<p class="small">{esc(ctx.tr("no_plan_yet"))}</p>'
    live = view.memory_mb if not view.over else None
    degrees = (f'<p class="small">{view.temperature_c:.0f} °C</p>'
               if view.temperature_c and not view.over else "")
    return memory_bar(ctx, view.plan, live) + degrees


def notes(ctx: Context, view: JobView) -> str:
    """Newest first, in words."""
    lines = [(note.at, ctx.tr(note.key, **note.params)) for note in view.notes]
    lines += [(point.at, ctx.tr("note_saved", step=point.step)) for point in view.checkpoints]
    lines.sort(key=lambda line: line[0], reverse=True)
    items = "".join(f"<li><time>{clock(at)}</time> {esc(text)}</li>"
                    for at, text in lines[:MOST_NOTES])
    return f'<ul class="notes">{items}</ul>' if items else (
        f'<p class="small">{esc(ctx.tr("no_notes"))}</p>')
