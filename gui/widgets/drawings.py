"""Pictures that are drawn and were drawn: the buttons, progress, one shown large, the gallery."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from core import paths
from core.config.draw import SHEET
from core.errors import UserError
from core.inference import png_info
from core.jobs.runs import MOODS, JobView
from core.lora_files.library import DEFAULT_WEIGHT
from gui.html import acts, bar, button, card, clock, duration, esc, fact_table, small
from gui.state import inference_request as request
from gui.state.app_state import Context, Snapshot
from gui.state.inference_files import PER_PAGE, InferenceFiles, is_of
from gui.widgets.fault_card import fault_card
from gui.widgets.lora_list import base_name
from gui.widgets.picture_grid import page_of, pager

# Weights of a comparison: without the LoRA and with it.
COMPARE = 2
# What only says how a picture was drawn; any other note means that something had no effect.
NEUTRAL_NOTES = ("families.companions_taken", "distilled.drawn", "generate.clip_skip",
                 "generate.prediction", "generate.zero_snr", "generate.choice")


# --- what can be pressed ---

def holder(snap: Snapshot) -> JobView | None:
    """The training or captioning that a drawing has to wait for."""
    view = snap.active
    return view if view and not view.beside and view.job != "generate" else None


def actions(ctx: Context, snap: Snapshot, files: InferenceFiles) -> str:
    """The buttons that draw; while a run holds the machine also those that don't wait for it."""
    tr, busy = ctx.tr, holder(snap)
    loras = request.added(snap, request.lora_choices(snap, files))
    points = request.checkpoints(snap, loras[0].file) if loras else []
    no_lora = "" if loras else tr("gui.no_lora")
    no_points = no_lora or ("" if len(points) > 1 else tr("tab_inference.one_checkpoint"))
    steps = " · ".join(str(point.step) for point in points[:4]) + " …" * (len(points) > 4)
    sweep = " · ".join(f"{weight:g}" for weight in request.SWEEP)
    weight = f"{(loras[0].weight if loras else 0) or DEFAULT_WEIGHT:g}"
    # Of several LoRAs the first alone is compared; the others stay as they are.
    hint = tr("tab_inference.of_first") if len(loras) > 1 else ""
    drawing = any(not view.over and view.job == "generate" for view in snap.runs)
    key = "tab_inference.queue_after" if busy else "generate_queued" if drawing else "generate"
    return (_busy(ctx, snap, busy) if busy else "") + acts(
        button(tr(key), "draw", kind="primary", hint="Ctrl+Enter"),
        button(tr("tab_inference.on_cpu"), "draw", "cpu", hint=tr("tab_inference.on_cpu_help"))
        if busy else "",
        button(tr("tab_inference.compare", weight=weight), "compare", why_not=no_lora, hint=hint),
        button(tr("tab_inference.sweep", weights=sweep), "sweep", why_not=no_lora, hint=hint),
        button(tr("tab_inference.checkpoints", steps=steps), "checkpoints", why_not=no_points,
               hint=hint))


def _busy(ctx: Context, snap: Snapshot, busy: JobView) -> str:
    """Says which run holds the machine, and offers a preview of that run."""
    tr = ctx.tr
    why_not = "" if busy.step or busy.phase == "train" else tr("not_before_training")
    if busy.job == "train" and busy.state in ("starting", "stopping"):
        why_not = tr(f"not_while_{busy.state}")
    elif busy.job != "train" or busy.state != "running":
        why_not = tr("tab_inference.no_training")
    preview = button(tr("tab_inference.preview_in_run"), "preview", busy.id, why_not=why_not,
                     hint=tr("tab_inference.preview_help"))
    key = "busy_cpu" if snap.gauge.kind == "cpu" else "busy_gpu"
    return card("info", tr(f"tab_inference.{key}", name=busy.name), tr("tab_inference.busy_help"),
                html=acts(preview))


# --- how it goes ---

def status(ctx: Context, snap: Snapshot, files: InferenceFiles) -> str:
    """What is drawn or waits, else how the last drawing ended."""
    pending = [view for view in reversed(snap.runs) if view.job == "generate" and not view.over]
    if pending:
        return "".join(_progress(ctx, snap, view) for view in pending[:4])
    last = next((view for view in snap.runs if is_of(view, snap)), None)
    if last is None:
        loras = request.added(snap, request.lora_choices(snap, files))
        return small(ctx.tr("first_picture")) if loras else ""
    if last.fault:
        return fault_card(ctx, last)
    took = duration(ctx, last.ended - last.started) if last.started else ""
    count = sum(sample.step != SHEET for sample in last.samples)
    key = "tab_inference.stopped" if last.state == "stopped" else "drawn"
    return small(ctx.tr(key, count=count, time=took)) + _notes(ctx, last)


def _notes(ctx: Context, view: JobView) -> str:
    # A dict, since every picture of a run may repeat a note.
    kinds = {ctx.tr(note.key, **note.params): "info" if note.key in NEUTRAL_NOTES else "warning"
             for note in view.notes if note.key not in MOODS}
    return "".join(card(kind, text) for text, kind in kinds.items())


def _progress(ctx: Context, snap: Snapshot, view: JobView) -> str:
    tr, drawing = ctx.tr, view.phase == "draw"
    if view.state == "queued":
        text = tr("gpu_busy", name=snap.active.name) if snap.active else tr("starts_soon")
        return card("info", text, html=acts(button(tr("leave_queue"), "stop", view.id)))
    total = request.total_of(view)
    done = min(sum(sample.step != SHEET for sample in view.samples) + 1, total)
    text = tr("drawing" if drawing else "tab_inference.loading", done=done, total=total)
    parts = [text]
    if view.eta_s and drawing:
        parts.append(tr("left", time=duration(ctx, view.eta_s),
                        clock=clock(view.updated + view.eta_s)))
    if view.beside:
        parts.append(tr("tab_inference.cpu"))
    html = bar(view.phase_done, view.phase_total, text, view.state) + acts(
        f'<span>{esc(" · ".join(parts))}</span><span class="spring"></span>',
        button(tr("stop"), "stop", view.id,
               why_not=tr("not_while_stopping") if view.state == "stopping" else ""))
    return f'<section class="box" data-key="{esc(view.id)}">{html}</section>{_notes(ctx, view)}'


# --- one of them, large ---

def large(ctx: Context, snap: Snapshot, files: InferenceFiles) -> str:
    """The picture that was opened; else what was drawn last: a comparison, a sheet, a picture."""
    pictures = files.pictures(snap)
    chosen = find(pictures, files.open)
    if chosen is None and pictures:
        last = pictures[0][0]
        if compared := slider(ctx, last):
            return compared
        sheets = ((view, number) for view, number in pictures
                  if view is last and view.samples[number].step == SHEET)
        chosen = next(sheets, pictures[0])
    return _large(ctx, files, *chosen) if chosen else ""


def find(pictures: list[tuple[JobView, int]], id: str) -> tuple[JobView, int] | None:
    """The picture of an id; None where it is gone."""
    return next((picture for picture in pictures if id_of(*picture) == id), None)


def id_of(view: JobView, number: int) -> str:
    return f"{view.id}/{number}"


def slider(ctx: Context, view: JobView) -> str:
    """A comparison, once both of its pictures are there: drag, or the arrow keys."""
    weights = view.config.get("weights") or []
    # Reversed: of two pictures of a column the first counts.
    samples = {sample.step: n for n, sample in reversed(list(enumerate(view.samples)))}
    if len(weights) != COMPARE or not {0, 1} <= samples.keys() or not all(
            os.path.isfile(view.samples[samples[side]].path) for side in (0, 1)):
        return ""
    sides = [esc(ctx.tr("weight_n", weight=f"{weight:g}")) for weight in weights]
    images = "".join(f'<img src="/picture/{esc(view.id)}/{samples[n]}?full=1" alt="{sides[n]}">'
                     for n in (0, 1))
    return (f'<div class="compare {_scaling(view)}" data-key="{esc(view.id)}">{images}<u></u>'
            f'<span class="left">{sides[0]}</span><span class="right">{sides[1]}</span>'
            f'<input type="range" min="0" max="100" value="50" '
            f'aria-label="{esc(ctx.tr("compare_label"))}"></div>')


def _scaling(view: JobView) -> str:
    """The CSS class of a picture: those of the demo are 64 px, their pixels stay square."""
    demo = request.folder_of(str(view.config.get("base") or "")) == paths.DEMO / "base"
    return "pixels" if demo else ""


def _large(ctx: Context, files: InferenceFiles, view: JobView, number: int) -> str:
    tr, id, sample = ctx.tr, id_of(view, number), view.samples[number]
    address, sheet = f"/picture/{esc(view.id)}/{number}?full=1", sample.step == SHEET
    buttons = [
        button(tr("tab_inference.use_again"), "again", id),
        "" if sheet else button(tr("tab_inference.as_preview"), "as_preview", id,
                                hint=tr("tab_inference.as_preview_help")),
        button(tr("tab_inference.delete"), "delete", id),
        f'<a class="act" href="{address}" target="_blank">{esc(tr("tab_inference.full"))}</a>']
    if files.open:
        buttons = [button("←", "step", "-1", hint=tr("tab_dataset.previous_picture")),
                   button("→", "step", "1", hint=tr("tab_dataset.next_picture")), *buttons,
                   button(tr("tab_dataset.close"), "close")]
    table = fact_table(fact for fact in facts(ctx, view, number) if fact[1])
    return (f'<section class="box drawn" data-key="{esc(id)}" tabindex="-1"><a href="{address}" '
            f'target="_blank"><img class="{"sheet" if sheet else _scaling(view)}" '
            f'src="{address}" alt="{esc(sample.prompt)}"></a>{acts(*buttons)}{table}</section>')


def _loras(ctx: Context, view: JobView, number: int) -> str:
    """mia-v1 0.8, other 1"""
    loras = request.loras_of(view, number)
    return ", ".join(f"{lora.name} {lora.weight:g}" for lora in loras) or ctx.tr("base_alone")


def facts(ctx: Context, view: JobView, number: int) -> list[tuple[str, str]]:
    """What made a picture, as (label, text)."""
    tr, config, sample = ctx.tr, view.config, view.samples[number]
    steps, cfg = config.get("steps"), config.get("cfg")
    # Numbers that the job left to the base stand in the picture itself.
    if None in (steps, cfg):
        with contextlib.suppress(OSError, UserError):
            written = png_info.read(Path(sample.path))
            steps, cfg = steps or written.steps, written.cfg if cfg is None else cfg
    numbers = [f"{tr('seed')} {sample.seed}", f"{tr('draw_steps')} {steps}" if steps else "",
               f"CFG {cfg:g}" if cfg is not None else "", str(config.get("sampler") or ""),
               str(config.get("size") or "").replace(",", " × ")]
    return [(tr("prompt"), str(config.get("prompt") or sample.prompt)),
            (tr("negative"), str(config.get("negative") or "")),
            ("LoRA", _loras(ctx, view, number)),
            (tr("base_model"), base_name(ctx, str(config.get("base") or ""))),
            (tr("tab_inference.numbers"), " · ".join(filter(None, numbers))),
            (tr("tab_inference.when"), clock(sample.at))]


# --- all of them ---

def gallery(ctx: Context, snap: Snapshot, files: InferenceFiles) -> str:
    """Newest first, each with what made it."""
    tr, pictures, undo = ctx.tr, files.pictures(snap), ""
    if files.deleted:
        undo = button(tr("tab_inference.undelete", count=len(files.deleted)), "undelete")
    if not pictures:
        return acts(undo)
    page, pages = page_of(len(pictures), files.page, PER_PAGE)
    cells = "".join(_picture(ctx, files, *picture)
                    for picture in pictures[page * PER_PAGE:][:PER_PAGE])
    turn = pager(ctx, page, pages, len(pictures)) if pages > 1 else ""
    return (f'<div class="tools"><h3>{esc(tr("tab_inference.gallery", count=len(pictures)))}</h3>'
            f'<span class="spring"></span>{undo}</div><div class="gallery">{cells}</div>{turn}')


def _picture(ctx: Context, files: InferenceFiles, view: JobView, number: int) -> str:
    tr, id, sample = ctx.tr, id_of(view, number), view.samples[number]
    loras = _loras(ctx, view, number)
    kind = tr("tab_inference.sheet") if sample.step == SHEET else f"{tr('seed')} {sample.seed}"
    buttons = acts(button(tr("tab_inference.again_short"), "again", id, kind="link"),
                   button(tr("tab_inference.delete"), "delete", id, kind="link"))
    return (f'<figure class="{" open" if files.open == id else ""}" data-key="{esc(id)}">'
            f'<button type="button" data-act="open" data-id="{esc(id)}" '
            f'aria-label="{esc(", ".join((sample.prompt, loras, kind)))}">'
            f'<img class="{_scaling(view)}" src="/picture/{esc(view.id)}/{number}" alt="" '
            f'loading="lazy"></button><figcaption>'
            f'<span title="{esc(sample.prompt)}">{esc(sample.prompt)}</span>'
            f'<small title="{esc(loras)}">{esc(kind)} · {esc(loras)}</small>{buttons}'
            f'</figcaption></figure>')
