"""Inference: the last LoRA at weight 0.8 is ready; generate, compare with the base, sweep."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gradio as gr

from core import paths
from core.draw_config import DrawConfig
from core.faults import Fault
from core.runs import JobView
from gui.context import Context, Snapshot, Updates, pictures_folder
from gui.html import bar, button, card, duration, esc
from gui.tabs.run import lora_file, lora_of
from gui.widgets.fault_card import fault_card
from gui.widgets.panel import panel

WEIGHT = 0.8
SWEEP = (0.0, 0.4, 0.8, 1.0)
COMPARE = 2                             # weights of a comparison: without, with
MOST_LORAS = 60
MOST_SHOWN = 24


def build(ctx: Context) -> Inference:
    return Inference(ctx)


class Inference:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        say = ctx.say
        with gr.Row():
            self.lora = gr.Dropdown([], label="LoRA", info=say("lora_help"), scale=3,
                                    elem_id="lora", interactive=True)
            self.weight = gr.Slider(-1, 2, WEIGHT, step=0.05, label=say("weight"), scale=2,
                                    info=say("weight_help"), elem_id="weight")
        with gr.Row():
            self.prompt = gr.Textbox(label=say("prompt"), lines=2, max_lines=4, scale=3,
                                     elem_id="prompt", placeholder=say("prompt_hint"))
            self.negative = gr.Textbox(label=say("negative"), lines=2, max_lines=4, scale=2,
                                       elem_id="negative")
        with gr.Row():
            self.seed = gr.Number(label=say("seed"), precision=0, value=42, min_width=110,
                                  elem_id="seed")
            self.steps = gr.Number(label=say("draw_steps"), precision=0, value=28, min_width=110)
            self.cfg = gr.Number(label=say("cfg"), value=7, min_width=110)
            self.size = gr.Textbox(label=say("size"), placeholder=say("size_hint"), min_width=130,
                                   elem_id="size")
            self.count = gr.Number(label=say("count"), precision=0, value=1, min_width=110)
        with gr.Row(elem_id="draw-row"):
            self.draw = gr.Button(say("generate"), variant="primary", elem_id="generate")
            compare = gr.Button(say("compare"), elem_id="compare")
            sweep = gr.Button(say("sweep"), elem_id="sweep")
            dice = gr.Button(say("new_seed"), elem_id="dice")
        self.status = panel("draw-status")
        self.slider = panel("slider")
        self.gallery = panel("gallery")
        self._wire(compare, sweep, dice)

    def _wire(self, compare: Any, sweep: Any, dice: Any) -> None:
        page = self.ctx.page
        asked = [self.lora, self.weight, self.prompt, self.negative, self.seed, self.steps,
                 self.cfg, self.size, self.count]
        page.on(self.draw.click, lambda *a: self.start(a, []), asked)
        page.on(compare.click, lambda *a: self.start(a, [0.0, float(a[1] or WEIGHT)]), asked)
        page.on(sweep.click, lambda *a: self.start(a, list(SWEEP)), asked)
        page.on(dice.click, self.new_seed, fill=True)
        for name, made in (("prompt", self.prompt), ("negative", self.negative),
                           ("seed", self.seed), ("weight", self.weight), ("steps", self.steps),
                           ("cfg", self.cfg), ("size", self.size), ("count", self.count),
                           ("lora", self.lora)):
            page.on(made.input, self._keeper(name), [made], fill=name == "lora")
        page.on_panel(self.status, self.act)
        page.on_panel(self.gallery, self.act, fill=True)

    def _keeper(self, name: str) -> Any:
        def keep(value: Any) -> None:
            self.ctx.house.projects.update(lambda project: project.model_copy(update={
                "inference": {**project.inference, name: value}}))
        return keep

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        active = snap.active
        return f"4 {self.ctx.say('tab_inference')}" + (
            " ●" if active and active.job == "generate" else "")

    def paint(self, snap: Snapshot) -> Updates:
        view = last_drawing(snap)
        busy = snap.active is not None and snap.active.job == "train"
        return {self.status: status(self.ctx, snap, view), self.gallery: gallery(self.ctx, snap),
                self.slider: slider(self.ctx, view),
                self.draw: gr.update(value=self.ctx.say("generate_queued" if busy
                                                        else "generate"))}

    def fill(self, snap: Snapshot) -> Updates:
        kept, choices = snap.project.inference, loras(self.ctx, snap)
        chosen = kept.get("lora") or (choices[0][1] if choices else None)
        if chosen not in [value for _, value in choices]:
            chosen = choices[0][1] if choices else None
        usual = defaults(snap, chosen)
        filled = {name: kept.get(name, usual.get(name)) for name in (
            "weight", "prompt", "negative", "seed", "steps", "cfg", "size", "count")}
        return {self.lora: gr.update(choices=choices, value=chosen), self.weight: filled["weight"],
                self.prompt: filled["prompt"], self.negative: filled["negative"],
                self.seed: filled["seed"], self.steps: filled["steps"], self.cfg: filled["cfg"],
                self.size: filled["size"], self.count: filled["count"]}

    # --- acting ---

    def start(self, asked: tuple[Any, ...], weights: list[float]) -> None:
        lora, weight, prompt, negative, seed, steps, cfg, size, count = asked
        snap = self.ctx.house.snapshot()
        source = trained(snap, lora)
        if weights and source is None:
            raise Fault("gui.no_lora")
        base = str(source[0].config.get("base_model", "")) if source else snap.config.base_model
        self.ctx.house.jobs.start(DrawConfig.model_validate({
            "base": base or "demo", "prompt": prompt or "", "negative": negative or "",
            "loras": [f"{source[1]}:{weight:g}"] if source else [],
            "weights": weights or ([float(weight)] if source else []), "size": size or "",
            "seed": int(seed or 0), "steps": int(steps or 20), "cfg": float(cfg or 0),
            "count": int(count or 1), "out": str(pictures_folder() / snap.project.name)}),
            name=Path(source[1]).stem if source else snap.project.name, job="generate")

    def new_seed(self) -> None:
        self._keeper("seed")(random.randrange(2**31))

    def act(self, act: str, id: str) -> None:
        house = self.ctx.house
        if act in ("stop", "leave"):
            house.jobs.stop(id)
        elif act == "again":
            view = house.jobs.view(id)
            known = ("prompt", "negative", "seed", "steps", "cfg", "size", "count")
            house.projects.update(lambda project: project.model_copy(update={"inference": {
                **project.inference, **{key: view.config[key] for key in known
                                        if key in view.config}}}))


# --- what is there ---

def loras(ctx: Context, snap: Snapshot) -> list[tuple[str, str]]:
    """(label, 'run/number'): the newest run's best file first, then its checkpoints, then older."""
    found: list[tuple[str, str]] = []
    for view in (view for view in snap.runs if view.job == "train"):
        first = lora_of(view)
        if first is None:
            continue
        rest = [n for n in reversed(range(len(view.checkpoints))) if n != first]
        for number in [first, *rest]:
            point = view.checkpoints[number]
            if lora_file(point).is_file():
                kind = ctx.say("final") if point.final else ctx.say("best") if point.best else ""
                said = " · ".join(filter(None, (view.name, ctx.say("step_n", step=point.step),
                                                kind)))
                found.append((said, f"{view.id}/{number}"))
        if len(found) >= MOST_LORAS:
            break
    return found


def trained(snap: Snapshot, chosen: str | None) -> tuple[JobView, str] | None:
    """The run and the file of a choice."""
    run_id, _, number = str(chosen or "").rpartition("/")
    view = snap.run(run_id)
    if view is None or not number.isdigit() or int(number) >= len(view.checkpoints):
        return None
    return view, str(lora_file(view.checkpoints[int(number)]))


def defaults(snap: Snapshot, chosen: str | None) -> dict[str, Any]:
    """A prompt that shows the LoRA, and what its base likes."""
    source = trained(snap, chosen)
    config = source[0].config if source else snap.project.edits
    prompts, trigger = config.get("sample_prompts") or [], str(config.get("trigger_word", ""))
    demo = str(config.get("base_model", "")) in ("demo", str(paths.DEMO / "base"))
    return {"prompt": prompts[0] if prompts else trigger, "negative": "", "seed": 42,
            "steps": 16 if demo else 28, "cfg": 1.5 if demo else 7.0, "size": "", "count": 1,
            "weight": WEIGHT}


def last_drawing(snap: Snapshot) -> JobView | None:
    return next((view for view in snap.runs if view.job == "generate"), None)


def slider(ctx: Context, view: JobView | None) -> str:
    """A comparison, once both of its pictures are there: drag, or the arrow keys."""
    weights = view.config.get("weights") or [] if view else []
    if view is None or len(weights) != COMPARE or len(view.samples) < COMPARE:
        return ""
    sides = [ctx.say("weight_n", weight=f"{weight:g}") for weight in weights]
    images = "".join(f'<img src="/picture/{esc(view.id)}/{n}?full=1" alt="{esc(sides[n])}">'
                     for n in range(COMPARE))
    move = "this.parentElement.style.setProperty('--at', this.value + '%')"
    return (f'<div class="compare">{images}<u></u><span class="left">{esc(sides[0])}</span>'
            f'<span class="right">{esc(sides[1])}</span><input type="range" min="0" max="100" '
            f'value="50" aria-label="{esc(ctx.say("compare_label"))}" oninput="{move}"></div>')


def status(ctx: Context, snap: Snapshot, view: JobView | None) -> str:
    if view is None:
        key = "first_picture" if loras(ctx, snap) else "no_lora_yet"
        return f'<p class="small">{esc(ctx.say(key))}</p>'
    if view.state == "queued":
        active = snap.active
        text = ctx.say("gpu_busy", name=active.name) if active else ctx.say("starts_soon")
        leave = button(ctx.say("leave_queue"), "leave", view.id)
        return card("info", text, raw=f'<p class="acts">{leave}</p>')
    if not view.over:
        text = ctx.say("phase_load") if view.phase != "draw" else ctx.say(
            "drawing", done=view.phase_done + 1, total=view.phase_total)
        share = view.phase_done / view.phase_total if view.phase_total else 0.0
        return (f'<section class="box">{bar(share, text, view.state)}<p class="acts">'
                f'<span>{esc(text)}</span>{button(ctx.say("stop"), "stop", view.id)}</p></section>')
    if view.fault:
        return fault_card(ctx, view)
    took = duration(ctx, view.ended - view.started)
    return f'<p class="small">{esc(ctx.say("drawn", count=len(view.samples), time=took))}</p>'


def gallery(ctx: Context, snap: Snapshot) -> str:
    """Newest first, each with what made it."""
    cells: list[str] = []
    for view in (view for view in snap.runs if view.job == "generate"):
        shown = sorted(range(len(view.samples)), key=lambda n: n)
        cells += [_picture(ctx, view, number) for number in shown]
        if len(cells) >= MOST_SHOWN:
            break
    return f'<div class="gallery">{"".join(cells)}</div>' if cells else ""


def _picture(ctx: Context, view: JobView, number: int) -> str:
    sample = view.samples[number]
    weights = view.config.get("weights") or []
    facts = [view.name if weights else ctx.say("base_alone"),
             ctx.say("weight_n", weight=f"{weights[sample.step]:g}")
             if sample.step < len(weights) else "", f"{ctx.say('seed')} {sample.seed}"]
    address = f"/picture/{esc(view.id)}/{number}"
    return (f'<figure><a href="{address}?full=1" target="_blank"><img src="{address}" '
            f'alt="{esc(sample.prompt)}" loading="lazy"></a><figcaption>'
            f'<span title="{esc(sample.prompt)}">{esc(sample.prompt)}</span>'
            f'<small>{esc(" · ".join(filter(None, facts)))}</small>'
            f'{button(ctx.say("use_again"), "again", view.id, kind="link")}</figcaption></figure>')
