"""Inference: the last LoRA at weight 0.8 is ready; generate, compare, sweep, keep, export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from core.errors import UserError
from core.families.schedulers import SAMPLERS
from core.importers import load_train_config
from core.inference import png_info
from core.jobs.runs import JobView
from core.lora_files import export, library
from gui.state import inference_request as wanted
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.inference_files import PER_PAGE, InferenceFiles, desk_of
from gui.state.inference_request import Added, Choice
from gui.widgets import drawings
from gui.widgets.drop_zone import drop_zone, uploaded
from gui.widgets.fault_card import fix_of, keep_companions
from gui.widgets.lora_export import lora_export as export_panel
from gui.widgets.lora_list import lora_list
from gui.widgets.lora_list import lora_names as names_panel
from gui.widgets.panel import panel

DROPPED = [".png", ".safetensors"]
KINDS = ("draw", "compare", "sweep", "checkpoints")


def build(ctx: Context) -> Inference:
    return Inference(ctx)


class Inference:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.desk: InferenceFiles = desk_of(ctx.app_state)
        self._ready: str | None = None          # the run whose LoRA was painted last
        with gr.Row():
            with gr.Column(scale=6, min_width=440):
                self.loras = panel("loras", "lora_list", dense=True)
                self.names = panel("lora-names", "lora_completion")
                self._build_inputs()
                self.actions = panel("draw-acts")
                self.export = panel("lora-export", "lora_list", dense=True)
                self.drop = drop_zone(ctx, "inference-drop", DROPPED, "tab_inference", ("files",))
            with gr.Column(scale=5, min_width=360):
                self.status = panel("draw-status", dense=True)
                self.large = panel("draw-large", "drawing_view", dense=True)
        self.gallery = panel("gallery", dense=True)
        self._wire()

    def _build_inputs(self) -> None:
        tr = self.ctx.tr
        self.prompt = gr.Textbox(label=tr("prompt"), lines=2, max_lines=5, elem_id="prompt",
                                 placeholder=tr("tab_inference.prompt_hint"))
        self.negative = gr.Textbox(label=tr("negative"), lines=1, max_lines=4,
                                   elem_id="negative")
        with gr.Row(elem_id="draw-numbers"):
            self.seed = gr.Number(label=tr("seed"), precision=0, value=42, min_width=110,
                                  elem_id="seed", minimum=0)
            with gr.Column(min_width=130, elem_id="seed-acts"):
                dice = gr.Button(tr("new_seed"), size="sm", min_width=90, elem_id="dice")
                self.same = gr.Checkbox(label=tr("tab_inference.same_seed"), value=True,
                                        container=False, elem_id="same-seed")
            self.count = gr.Number(label=tr("count"), precision=0, value=1, min_width=80,
                                   elem_id="draw-count", minimum=1)
            self.steps = gr.Number(label=tr("draw_steps"), precision=0, min_width=80,
                                   elem_id="draw-steps", minimum=1,
                                   placeholder=tr("tab_inference.auto"))
        with gr.Row(elem_id="draw-more"):
            self.cfg = gr.Number(label=tr("cfg"), min_width=100, elem_id="draw-cfg", minimum=0,
                                 placeholder=tr("tab_inference.auto"))
            self.sampler = gr.Dropdown(
                [(tr("tab_inference.auto"), "auto"),
                 *((label, name) for name, (label, _, _) in SAMPLERS.items())],
                value="auto", label=tr("tab_inference.sampler"), min_width=150,
                elem_id="draw-sampler")
            self.size = gr.Textbox(label=tr("size"), placeholder=tr("size_hint"), min_width=130,
                                   elem_id="size")
            self.skip = gr.Number(label=tr("tab_inference.clip_skip"), precision=0, minimum=1,
                                  maximum=12, placeholder=tr("tab_inference.auto"),
                                  min_width=90, elem_id="draw-clip-skip")
        self.dice = dice

    def _wire(self) -> None:
        page = self.ctx.page
        self.asked = {"prompt": self.prompt, "negative": self.negative, "seed": self.seed,
                      "steps": self.steps, "cfg": self.cfg, "size": self.size,
                      "sampler": self.sampler, "clip_skip": self.skip, "count": self.count,
                      "same_seed": self.same}
        for name, made in self.asked.items():
            page.on(made.input, self._keeper(name), [made])
        for name in ("prompt", "negative"):     # what a script put in is told when it is left
            page.on(self.asked[name].blur, self._keeper(name), [self.asked[name]])
        page.on(self.dice.click, self.roll, outputs=[self.seed])
        page.on_panel(self.actions, self.start, list(self.asked.values()), outputs=[self.seed])
        page.on_panel(self.loras, self.change)
        page.on_panel(self.drop, self.take, fill=True)
        page.on_panel(self.export, self.send)
        for one in (self.status, self.large, self.gallery):
            page.on_panel(one, self.act, fill=True)

    def _keeper(self, name: str) -> Any:
        def keep(value: Any) -> None:
            self._keep_typed({name: value})
        return keep

    def _keep_typed(self, values: Mapping[str, Any]) -> None:
        """What differs from what is shown anyhow: a default that nobody touched stays one."""
        snap = self.ctx.app_state.snapshot()
        shown = wanted.typed(snap, wanted.choices(snap, self.desk))
        if changed := {name: value for name, value in values.items() if value != shown[name]}:
            self._keep(changed)

    def _keep(self, values: Mapping[str, Any]) -> None:
        self.ctx.app_state.projects.update(lambda project: project.model_copy(update={
            "inference": {**project.inference, **values}}))

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        drawing = any(view.job == "generate" and not view.over and view.state != "queued"
                      for view in snap.runs)
        return f"4 {self.ctx.tr('tab_inference')}" + (" ●" if drawing else "")

    def paint(self, snap: Snapshot) -> Updates:
        ctx, desk = self.ctx, self.desk
        ready = wanted.newest(wanted.choices(snap, desk))
        if self._ready not in (None, ready):    # a new LoRA: its prompt and numbers
            ctx.app_state.filled()
        self._ready = ready
        return {self.loras: lora_list(ctx, snap, desk), self.names: names_panel(snap, desk),
                self.actions: drawings.actions(ctx, snap, desk),
                self.status: drawings.status(ctx, snap, desk),
                self.large: drawings.large(ctx, snap, desk),
                self.gallery: drawings.gallery(ctx, snap, desk),
                self.export: export_panel(ctx, snap, desk)}

    def fill(self, snap: Snapshot) -> Updates:
        self.desk.look_for_places()
        values = wanted.typed(snap, wanted.choices(snap, self.desk))
        return {made: values[name] for name, made in self.asked.items()}

    # --- drawing ---

    def start(self, act: str, id: str, *asked: Any) -> Updates | None:
        """`id`: the device, where it isn't the usual one."""
        app_state = self.ctx.app_state
        if act == "preview":
            app_state.jobs.sample(id)
            self.ctx.page.tell(self.ctx.tr("tab_inference.preview_asked"))
        if act not in KINDS:
            return None
        values = dict(zip(self.asked, asked, strict=True))
        updates = None if values["same_seed"] else self.roll()
        if updates:
            values["seed"] = updates[self.seed]
        config, name = wanted.job(app_state.snapshot(), self.desk, act, values, id or "auto")
        app_state.jobs.start(config, name=name, job="generate")
        self._keep_typed(values)
        self.desk.show(open="", page=0)
        return updates

    def roll(self) -> Updates:
        seed = wanted.new_seed()
        self._keep({"seed": seed})
        return {self.seed: seed}

    # --- LoRAs ---

    def change(self, act: str, id: str) -> Updates | None:
        """Buttons, lists and sliders of the LoRA box."""
        snap = self.ctx.app_state.snapshot()
        found = wanted.choices(snap, self.desk)
        loras = wanted.added(snap, found)
        match act:
            case "add":
                loras = self._with(loras, self._path(id), snap, found)
            case "remove" if id.isdigit() and int(id) < len(loras):
                del loras[int(id)]
            case "weight":
                loras = _weighed(loras, id)
            case _:
                return self._other(act, id, wanted.bases(snap, found))
        self._keep(wanted.own_list(loras, found))
        if act != "weight":
            self.ctx.app_state.filled()
        return None

    def _other(self, act: str, id: str, bases: list[str]) -> Updates | None:
        if act == "base" and id in bases:
            self._keep({"base": id})
            self.ctx.app_state.filled()
        elif act == "take_config":
            return self._take_config()
        elif act == "close_dropped":
            self.desk.show(dropped=None)
        return None

    def _path(self, text: str) -> Path:
        path = Path(text.strip().strip('"')).expanduser()
        if not path.is_absolute():
            raise UserError("gui.not_absolute", folder=text)
        return path

    def _with(self, loras: list[Added], path: Path, snap: Snapshot, found: list[Choice]
              ) -> list[Added]:
        """With one LoRA more. Raises UserError where the file is none for this base."""
        if kind := wanted.kind_of(snap, found):
            library.checked(path, kind)
        if len(loras) >= wanted.MOST_ADDED:
            raise UserError("tab_inference.too_many", most=wanted.MOST_ADDED)
        if any(one.file == str(path) for one in loras):
            return loras
        return [*loras, Added(str(path))]

    def _take_config(self) -> Updates | None:
        """The training settings of the LoRA that was dropped, for the Parameters tab."""
        info, app_state = self.desk.dropped, self.ctx.app_state
        if info is None:
            return None
        config = load_train_config(info.path)
        app_state.projects.update(lambda project: project.model_copy(update={
            "edits": config.model_dump(exclude_defaults=True, exclude={
                "resume", "output_dir", "output_name"}),
            "preset": "", "advised": {}, "invalid": {}, "run": ""}))
        app_state.replan(self.ctx.language)
        app_state.filled()
        return self.ctx.page.select("parameters")

    # --- what is dropped ---

    def take(self, act: str, told: str) -> None:
        for file in uploaded(told) if act == "dropped" else []:
            if file.suffix.lower() == ".safetensors":
                self._take_lora(file)
            else:
                self._take_picture(png_info.read(file), file.name)

    def _take_lora(self, file: Path) -> None:
        snap = self.ctx.app_state.snapshot()
        found = wanted.choices(snap, self.desk)
        info = self.desk.take(file, wanted.kind_of(snap, found))
        loras = self._with(wanted.added(snap, found), info.path, snap, found)
        self._keep(wanted.own_list(loras, found))
        self.ctx.page.tell(self.ctx.tr("tab_inference.lora_taken", name=info.path.stem))

    def _take_picture(self, told: png_info.Settings, file: str) -> None:
        """A picture's prompt and numbers. Its LoRAs go into the list where they are here; others
        stay in the prompt, and are named."""
        tr, snap = self.ctx.tr, self.ctx.app_state.snapshot()
        found = wanted.choices(snap, self.desk)
        known = wanted.used(snap) | wanted.names(found)
        loras = {known[tag.name]: tag.weight for tag in library.split_prompt(told.prompt)[1]
                 if tag.name in known and wanted.LEAST <= tag.weight <= wanted.MOST
                 and tag.text is None}      # two weights stay in the prompt

        def kept(tag: Any) -> str:
            return "" if known.get(tag[1].strip()) in loras else str(tag[0])
        prompt = library.TAG.sub(kept, told.prompt).strip()
        values = {"prompt": prompt, "negative": told.negative, "seed": told.seed,
                  "steps": told.steps, "cfg": told.cfg, "size": told.size,
                  "sampler": told.sampler or "auto", "same_seed": True, "count": 1}
        added = [Added(name, weight) for name, weight in loras.items()]
        self._keep({key: value for key, value in values.items() if value is not None}
                   | {"clip_skip": told.clip_skip} | wanted.own_list(added, found))
        missing = [tag.name for tag in library.split_prompt(prompt)[1]
                   if tag.name not in wanted.names(found)]
        self.ctx.page.tell(tr("tab_inference.picture_taken", file=file))
        if missing:
            self.ctx.page.tell(tr("tab_inference.loras_missing", names=", ".join(missing)),
                               kind="warning")
        if told.unknown_sampler:
            self.ctx.page.tell(tr("tab_inference.other_sampler", name=told.unknown_sampler),
                               kind="warning")

    # --- pictures ---

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons of progress, picture and gallery."""
        app_state, desk = self.ctx.app_state, self.desk
        match act:
            case "stop":
                app_state.jobs.stop(id)
            case "open":
                desk.show(open=id)
            case "close":
                desk.show(open="")
            case "page" if id.lstrip("-").isdigit():
                desk.show(page=int(id))
            case "undelete":
                desk.undelete()
            case "step" if id in ("1", "-1"):
                self._step(int(id))
            case "fix":
                view, _, number = id.rpartition("/")
                self._again(app_state.jobs.view(view), number)
            case "again" | "delete" | "as_preview":
                self._use(act, id)
        return None

    def _again(self, view: JobView, number: str) -> None:
        """The drawing with its fault's fix of that number, which the project keeps."""
        changes = fix_of(view, number)
        keep_companions(self.ctx, str(view.config.get("base", "")), changes)
        self.ctx.app_state.jobs.start(wanted.again(view, changes), name=view.name, job="generate")

    def _step(self, by: int) -> None:
        """The next picture, and the page that it stands on."""
        desk = self.desk
        pictures = desk.pictures(self.ctx.app_state.snapshot())
        ids = [drawings.id_of(*one) for one in pictures]
        if ids:
            at = ids.index(desk.open) if desk.open in ids else -by
            at = min(max(at + by, 0), len(ids) - 1)
            desk.show(open=ids[at], page=at // PER_PAGE)

    def _use(self, act: str, id: str) -> None:
        snap, tr = self.ctx.app_state.snapshot(), self.ctx.tr
        found = drawings.find(self.desk.pictures(snap), id)
        if found is None:
            raise UserError("tab_inference.picture_gone")
        view, number = found
        if act == "delete":
            self.desk.delete(Path(view.samples[number].path))
        elif act == "again":
            loras = wanted.own_list(wanted.loras_of(view, number),
                                    wanted.choices(snap, self.desk))
            self._keep(wanted.settings_of(view, number) | loras)
            self.ctx.page.tell(tr("tab_inference.again_done"))
        else:
            self._as_preview(view.samples[number].prompt)

    def _as_preview(self, prompt: str) -> None:
        app_state, tr = self.ctx.app_state, self.ctx.tr
        config = app_state.snapshot().config
        app_state.projects.edit(sample_prompts=[*dict.fromkeys([*config.sample_prompts, prompt])])
        key = "preview_added" if config.sample_every else "preview_never"
        self.ctx.page.tell(tr(f"tab_inference.{key}", every=config.sample_every))

    # --- other programs ---

    def send(self, act: str, told: str) -> None:
        """`told`: file, program and folder as JSON. The file must be one that is added."""
        try:
            asked = dict(json.loads(told))
        except (ValueError, TypeError):
            return
        app_state = self.ctx.app_state
        snap = app_state.snapshot()
        loras = wanted.added(snap, wanted.choices(snap, self.desk))
        file, program = str(asked.get("file", "")), str(asked.get("program", ""))
        if act != "export" or program not in export.PROGRAMS or not any(
                one.file == file for one in loras):
            return
        folder = export.target_folder(str(asked.get("folder", "")), program)
        self.desk.export(Path(file), program, folder, self.ctx.tr, self.ctx.language)
        app_state.settings.change(exports={**snap.settings.exports, program: str(folder)})


def _weighed(loras: list[Added], told: str) -> list[Added]:
    """'1 0.65': the second LoRA's weight."""
    number, _, text = told.partition(" ")
    try:
        at, weight = int(number), float(text)
    except ValueError:
        return loras
    if not 0 <= at < len(loras) or not wanted.LEAST <= weight <= wanted.MOST:
        return loras
    return [replace(one, weight=weight) if n == at else one for n, one in enumerate(loras)]
