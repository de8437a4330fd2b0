"""Pictures that are drawn and were drawn: the buttons, progress, one shown large, the gallery."""

from __future__ import annotations

import contextlib
from pathlib import Path

from core import paths
from core.config.draw import SHEET
from core.errors import UserError
from core.inference import png_info
from core.jobs.runs import MOODS, JobView
from core.lora_files.library import DEFAULT_WEIGHT
from gui.html import bar, button, card, clock, duration, esc
from gui.state import inference_request as wanted
from gui.state.app_state import Context, Snapshot
from gui.state.inference_files import PER_PAGE, InferenceFiles, is_of
from gui.widgets.fault_card import fault_card
from gui.widgets.lora_list import base_name
from gui.widgets.picture_grid import page_of, pager

COMPARE = 2                             # weights of a comparison: without, with


# --- what can be pressed ---

def holder(snap: Snapshot) -> JobView | None:
    """The training, or captioning, that holds the machine."""
    view = snap.active
    return view if view and not view.beside and view.job != "generate" else None


def actions(ctx: Context, snap: Snapshot, desk: InferenceFiles) -> str:
    """Generate and the comparisons; while a run holds the machine: the ways round it."""
    busy = holder(snap)
    return (_busy(ctx, snap, busy) if busy else "") + (
        f'<p class="acts">{_draw(ctx, snap, busy)}{_comparisons(ctx, snap, desk)}</p>')


def _draw(ctx: Context, snap: Snapshot, busy: JobView | None) -> str:
    if busy is None:
        drawing = any(not view.over and view.job == "generate" for view in snap.runs)
        key = "generate_queued" if drawing else "generate"
        return button(ctx.tr(key), "draw", kind="primary", hint="Ctrl+Enter")
    return (button(ctx.tr("tab_inference.queue_after"), "draw", kind="primary",
                   hint="Ctrl+Enter")
            + button(ctx.tr("tab_inference.on_cpu"), "draw", "cpu",
                     hint=ctx.tr("tab_inference.on_cpu_help")))


def _comparisons(ctx: Context, snap: Snapshot, desk: InferenceFiles) -> str:
    found = wanted.choices(snap, desk)
    loras = wanted.added(snap, found)
    points = wanted.checkpoints(snap, loras[0].file) if loras else []
    none = "" if loras else ctx.tr("gui.no_lora")
    steps = " · ".join(str(one.step) for one in points[:4]) + (" …" if len(points) > 4 else "")
    few = none or ("" if len(points) > 1 else ctx.tr("tab_inference.one_checkpoint"))
    sweep = " · ".join(f"{weight:g}" for weight in wanted.SWEEP)
    first = ctx.tr("tab_inference.of_first") if len(loras) > 1 else ""
    weight = f"{loras[0].weight or DEFAULT_WEIGHT:g}" if loras else "0.8"
    return (button(ctx.tr("tab_inference.compare", weight=weight), "compare", why_not=none,
                   hint=first)
            + button(ctx.tr("tab_inference.sweep", weights=sweep), "sweep", why_not=none,
                     hint=first)
            + button(ctx.tr("tab_inference.checkpoints", steps=steps), "checkpoints", why_not=few,
                     hint=first))


def _busy(ctx: Context, snap: Snapshot, busy: JobView) -> str:
    tr = ctx.tr
    key = "busy_gpu" if snap.gauge.kind != "cpu" else "busy_cpu"
    early = "" if busy.step or busy.phase == "train" else tr("not_before_training")
    why = "" if busy.job == "train" and busy.state == "running" else tr(
        f"not_while_{busy.state}") if busy.job == "train" and busy.state in (
        "starting", "stopping") else tr("tab_inference.no_training")
    preview = button(tr("tab_inference.preview_in_run"), "preview", busy.id,
                     why_not=why or early, hint=tr("tab_inference.preview_help"))
    return card("info", tr(f"tab_inference.{key}", name=busy.name),
                tr("tab_inference.busy_help"), raw=f'<p class="acts">{preview}</p>')


# --- how it goes ---

def status(ctx: Context, snap: Snapshot, desk: InferenceFiles) -> str:
    """What is drawn or waits, else how the last one ended."""
    drawings = [view for view in snap.runs if view.job == "generate"]
    going = [view for view in reversed(drawings) if not view.over]
    if going:
        return "".join(_going(ctx, snap, view) for view in going[:4])
    last = last_drawing(snap)
    if last is None:
        ready = wanted.added(snap, wanted.choices(snap, desk))
        return f'<p class="small">{esc(ctx.tr("first_picture"))}</p>' if ready else ""
    if last.fault:
        return fault_card(ctx, last)
    took = duration(ctx, last.ended - last.started) if last.started else ""
    count = sum(sample.step != SHEET for sample in last.samples)
    key = "tab_inference.stopped" if last.state == "stopped" else "drawn"
    return f'<p class="small">{esc(ctx.tr(key, count=count, time=took))}</p>' + _notes(ctx, last)


# What only says how a picture was drawn; of other notes something had no effect or was left out.
TOLD = ("families.companions_taken", "distilled.drawn", "generate.clip_skip",
        "generate.prediction", "generate.zero_snr")


def _notes(ctx: Context, view: JobView) -> str:
    told = {ctx.tr(note.key, **note.params): "info" if note.key in TOLD else "warning"
            for note in view.notes if note.key not in MOODS}
    return "".join(card(kind, text) for text, kind in told.items())


def _going(ctx: Context, snap: Snapshot, view: JobView) -> str:
    tr = ctx.tr
    if view.state == "queued":
        holds = snap.active
        text = tr("gpu_busy", name=holds.name) if holds else tr("starts_soon")
        leave = button(tr("leave_queue"), "stop", view.id)
        return card("info", text, raw=f'<p class="acts">{leave}</p>')
    total = wanted.total_of(view)
    done = min(sum(sample.step != SHEET for sample in view.samples) + 1, total)
    text = tr("drawing", done=done, total=total) if view.phase == "draw" else tr(
        "tab_inference.loading")
    left = tr("left", time=duration(ctx, view.eta_s), clock=clock(view.updated + view.eta_s)) \
        if view.eta_s and view.phase == "draw" else ""
    where = tr("tab_inference.cpu") if view.beside else ""
    stop = button(tr("stop"), "stop", view.id, why_not=tr("not_while_stopping")
                  if view.state == "stopping" else "")
    share = view.phase_done / view.phase_total if view.phase_total else 0.0
    said = " · ".join(filter(None, (text, left, where)))
    return (f'<section class="box" data-key="{esc(view.id)}">{bar(share, text, view.state)}'
            f'<p class="acts"><span>{esc(said)}</span><span class="spring"></span>{stop}</p>'
            f'</section>{_notes(ctx, view)}')


def last_drawing(snap: Snapshot) -> JobView | None:
    return next((view for view in snap.runs if is_of(view, snap)), None)


# --- one of them, large ---

def large(ctx: Context, snap: Snapshot, desk: InferenceFiles) -> str:
    """The picture that was opened; else what was drawn last: a comparison, a sheet, a picture."""
    pictures = desk.pictures(snap)
    chosen = find(pictures, desk.open)
    if chosen is None:
        last = pictures[0][0] if pictures else None
        newest = [one for one in pictures if one[0] is last]
        if last is not None and (compared := slider(ctx, last)):
            return compared
        sheets = [one for one in newest if one[0].samples[one[1]].step == SHEET]
        chosen = next(iter(sheets or newest), None)
    return _large(ctx, desk, *chosen) if chosen else ""


def find(pictures: list[tuple[JobView, int]], id: str) -> tuple[JobView, int] | None:
    return next((one for one in pictures if id_of(*one) == id), None)


def id_of(view: JobView, number: int) -> str:
    return f"{view.id}/{number}"


def slider(ctx: Context, view: JobView) -> str:
    """A comparison, once both of its pictures are there: drag, or the arrow keys."""
    weights = view.config.get("weights") or []
    samples = {sample.step: n for n, sample in reversed(list(enumerate(view.samples)))}
    if len(weights) != COMPARE or not {0, 1} <= samples.keys() or not all(
            Path(view.samples[samples[side]].path).is_file() for side in (0, 1)):
        return ""
    sides = [ctx.tr("weight_n", weight=f"{weight:g}") for weight in weights]
    images = "".join(
        f'<img src="/picture/{esc(view.id)}/{samples[n]}?full=1" alt="{esc(sides[n])}">'
        for n in (0, 1))
    move = "this.parentElement.style.setProperty('--at', this.value + '%')"
    return (f'<div class="compare {_look(view)}" data-key="{esc(view.id)}">{images}<u></u>'
            f'<span class="left">{esc(sides[0])}</span>'
            f'<span class="right">{esc(sides[1])}</span><input type="range" min="0" max="100" '
            f'value="50" aria-label="{esc(ctx.tr("compare_label"))}" oninput="{move}"></div>')


def _look(view: JobView) -> str:
    """Pictures of the demo are 64 px: their pixels stay square."""
    demo = wanted.folder_of(str(view.config.get("base") or "")) == paths.DEMO / "base"
    return "pixels" if demo else ""


def _large(ctx: Context, desk: InferenceFiles, view: JobView, number: int) -> str:
    tr, id, sample = ctx.tr, id_of(view, number), view.samples[number]
    address = f"/picture/{esc(view.id)}/{number}?full=1"
    sheet = sample.step == SHEET
    acts = [button(tr("tab_inference.use_again"), "again", id),
            "" if sheet else button(tr("tab_inference.as_preview"), "as_preview", id,
                                    hint=tr("tab_inference.as_preview_help")),
            button(tr("tab_inference.delete"), "delete", id),
            f'<a class="act" href="{address}" target="_blank">{esc(tr("tab_inference.full"))}</a>']
    if desk.open:
        acts = [button("←", "step", "-1", hint=tr("tab_dataset.previous_picture")),
                button("→", "step", "1", hint=tr("tab_dataset.next_picture")), *acts,
                button(tr("tab_dataset.close"), "close")]
    rows = "".join(f"<tr><th>{esc(label)}</th><td>{esc(text)}</td></tr>"
                   for label, text in facts(ctx, view, number) if text)
    kind = "sheet" if sheet else _look(view)
    return (f'<section class="box drawn" data-key="{esc(id)}" tabindex="-1"><a href="{address}" '
            f'target="_blank"><img class="{kind}" src="{address}" alt="{esc(sample.prompt)}"></a>'
            f'<p class="acts">{"".join(acts)}</p><table class="facts">{rows}</table></section>')


def facts(ctx: Context, view: JobView, number: int) -> list[tuple[str, str]]:
    """What made a picture, as (label, text)."""
    tr, config, sample = ctx.tr, view.config, view.samples[number]
    loras = ", ".join(f"{one.name} {one.weight:g}" for one in wanted.loras_of(view, number))
    steps, cfg = config.get("steps"), config.get("cfg")
    if None in (steps, cfg):                # the base's own, as the picture has them
        with contextlib.suppress(OSError, UserError):
            told = png_info.read(Path(sample.path))
            steps, cfg = steps or told.steps, told.cfg if cfg is None else cfg
    numbers = [f"{tr('seed')} {sample.seed}", f"{tr('draw_steps')} {steps}" if steps else "",
               f"CFG {cfg:g}" if cfg is not None else "",
               str(config.get("sampler") or ""),
               str(config.get("size") or "").replace(",", " × ")]
    return [(tr("prompt"), str(config.get("prompt") or sample.prompt)),
            (tr("negative"), str(config.get("negative") or "")),
            ("LoRA", loras or tr("base_alone")),
            (tr("base_model"), base_name(ctx, str(config.get("base") or ""))),
            (tr("tab_inference.numbers"), " · ".join(filter(None, numbers))),
            (tr("tab_inference.when"), clock(sample.at))]


# --- all of them ---

def gallery(ctx: Context, snap: Snapshot, desk: InferenceFiles) -> str:
    """Newest first, each with what made it."""
    tr, pictures = ctx.tr, desk.pictures(snap)
    undo = button(tr("tab_inference.undelete", count=len(desk.deleted)), "undelete") \
        if desk.deleted else ""
    if not pictures:
        return f'<p class="acts">{undo}</p>' if undo else ""
    page, pages = page_of(len(pictures), desk.page, PER_PAGE)
    cells = "".join(_picture(ctx, desk, view, number)
                    for view, number in pictures[page * PER_PAGE:(page + 1) * PER_PAGE])
    turn = pager(ctx, page, pages, len(pictures)) if pages > 1 else ""
    return (f'<div class="tools"><h3>{esc(tr("tab_inference.gallery", count=len(pictures)))}</h3>'
            f'<span class="spring"></span>{undo}</div><div class="gallery">{cells}</div>{turn}')


def _picture(ctx: Context, desk: InferenceFiles, view: JobView, number: int) -> str:
    tr, id, sample = ctx.tr, id_of(view, number), view.samples[number]
    loras = wanted.loras_of(view, number)
    named = (", ".join(f"{one.name} {one.weight:g}" for one in loras) if loras
             else tr("base_alone"))
    kind = tr("tab_inference.sheet") if sample.step == SHEET else f"{tr('seed')} {sample.seed}"
    told = ", ".join((sample.prompt, named, kind))
    chosen = " open" if desk.open == id else ""
    return (f'<figure class="{chosen}" data-key="{esc(id)}"><button type="button" data-act="open" '
            f'data-id="{esc(id)}" aria-label="{esc(told)}"><img class="{_look(view)}" '
            f'src="/picture/{esc(view.id)}/{number}" alt="" loading="lazy"></button><figcaption>'
            f'<span title="{esc(sample.prompt)}">{esc(sample.prompt)}</span>'
            f'<small title="{esc(named)}">{esc(kind)} · {esc(named)}</small><p class="acts">'
            f'{button(tr("tab_inference.again_short"), "again", id, kind="link")}'
            f'{button(tr("tab_inference.delete"), "delete", id, kind="link")}</p>'
            f'</figcaption></figure>')
