"""Inference: the last LoRA at weight 0.8 is ready; generate, compare, sweep, keep, export."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from core.errors import UserError
from core.families.schedulers import SAMPLERS
from core.importers import load_train_config
from core.inference import png_info
from core.lora_files import export, library
from core.serialization import json_of
from gui import actions
from gui.state import inference_request as request
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.inference_files import PER_PAGE, InferenceFiles
from gui.state.inference_request import Added, Choice
from gui.widgets import drawings
from gui.widgets.drop_zone import drop_zone, uploaded
from gui.widgets.fault_card import chosen_fix
from gui.widgets.lora_export import lora_export
from gui.widgets.lora_list import lora_list, lora_names
from gui.widgets.panel import panel
from gui.widgets.picture_grid import neighbour

DROPPED = [*png_info.SUFFIXES, ".safetensors"]
# A picture's settings whose labels have another name.
FIELDS = {"steps": "draw_steps", "sampler": "tab_inference.sampler"}
KINDS = ("draw", "compare", "sweep", "checkpoints")


class Inference:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.files: InferenceFiles = ctx.app_state.shared(InferenceFiles)
        # The run whose LoRA was painted last.
        self._ready: str | None = None
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

        page, seed = ctx.page, self.inputs["seed"]
        for name, component in self.inputs.items():
            # What a script put in (lora_completion.js) is told when the box is left.
            blur = [component.blur] if name in ("prompt", "negative") else []
            page.on(functools.partial(self._typed, name), component.input, *blur,
                    inputs=[component])
        page.on(self.roll, self.dice.click, outputs=[seed])
        page.on(self.start, self.actions, inputs=list(self.inputs.values()), outputs=[seed])
        page.on(self.change, self.loras)
        page.on(self.take, self.drop, fill=True)
        page.on(self.send, self.export)
        page.on(self.act, self.status, self.large, self.gallery, fill=True)

    def _build_inputs(self) -> None:
        tr, auto = self.ctx.tr, self.ctx.tr("tab_inference.auto")
        # By the names that the project knows them by.
        inputs = self.inputs = dict[str, Any]()
        inputs["prompt"] = gr.Textbox(label=tr("prompt"), lines=2, max_lines=5, elem_id="prompt",
                                      placeholder=tr("tab_inference.prompt_hint"))
        inputs["negative"] = gr.Textbox(label=tr("negative"), max_lines=4, elem_id="negative")
        with gr.Row(elem_id="draw-numbers"):
            inputs["seed"] = gr.Number(
                label=tr("seed"), precision=0, value=request.SEED, minimum=-1, min_width=110,
                elem_id="seed")
            with gr.Column(min_width=130, elem_id="seed-acts"):
                self.dice = gr.Button(tr("new_seed"), size="sm", min_width=90, elem_id="dice")
                inputs["same_seed"] = gr.Checkbox(label=tr("tab_inference.same_seed"), value=True,
                                                  container=False, elem_id="same-seed")
            inputs["count"] = gr.Number(label=tr("count"), precision=0, value=1, minimum=1,
                                        min_width=80, elem_id="draw-count")
            inputs["steps"] = gr.Number(label=tr("draw_steps"), precision=0, minimum=1,
                                        placeholder=auto, min_width=80, elem_id="draw-steps")
        with gr.Row(elem_id="draw-more"):
            inputs["cfg"] = gr.Number(
                label=tr("cfg"), minimum=0, placeholder=auto, min_width=100, elem_id="draw-cfg")
            samplers = [(label, name) for name, (label, _, _) in SAMPLERS.items()]
            inputs["sampler"] = gr.Dropdown(
                [(auto, "auto"), *samplers], value="auto", label=tr("tab_inference.sampler"),
                min_width=150, elem_id="draw-sampler")
            inputs["size"] = gr.Textbox(
                label=tr("size"), placeholder=tr("size_hint"), min_width=130, elem_id="size")
            inputs["clip_skip"] = gr.Number(
                label=tr("tab_inference.clip_skip"), precision=0, minimum=1, maximum=12,
                placeholder=auto, min_width=90, elem_id="draw-clip-skip")

    def _typed(self, name: str, value: Any) -> None:
        self._keep_typed({name: value})

    def _keep_typed(self, values: Mapping[str, Any]) -> None:
        """Saves values that differ from those shown: untouched defaults stay defaults."""
        snap = self.ctx.app_state.snapshot()
        shown = request.typed(snap, request.lora_choices(snap, self.files))
        self._keep({name: value for name, value in values.items() if value != shown[name]})

    def _keep(self, values: Mapping[str, Any]) -> None:
        actions.keep_drawing(self.ctx.app_state, values)

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        drawing = any(view.job == "generate" and not view.over and view.state != "queued"
                      for view in snap.runs)
        return f"4 {self.ctx.tr('tab_inference')}" + (" ●" if drawing else "")

    def paint(self, snap: Snapshot) -> Updates:
        ctx, files = self.ctx, self.files
        ready = request.newest(request.lora_choices(snap, files))
        # A training has ended: its LoRA brings its prompt and its numbers.
        if self._ready not in (None, ready):
            ctx.app_state.filled()
        self._ready = ready
        painters = {self.loras: lora_list, self.export: lora_export, self.large: drawings.large,
                    self.actions: drawings.actions, self.status: drawings.status,
                    self.gallery: drawings.gallery}
        return {self.names: lora_names(snap, files),
                **{area: html(ctx, snap, files) for area, html in painters.items()}}

    def fill(self, snap: Snapshot) -> Updates:
        self.files.look_for_places()
        values = request.typed(snap, request.lora_choices(snap, self.files))
        return {component: values[name] for name, component in self.inputs.items()}

    # --- drawing ---

    def start(self, act: str, id: str, *inputs: Any) -> Updates | None:
        """Queues a drawing. `id`: the device where it isn't the usual one; of a preview its run."""
        app_state = self.ctx.app_state
        if act == "preview":
            app_state.jobs.ask(id, "sample")
            self.ctx.page.tell(self.ctx.tr("tab_inference.preview_asked"))
        if act not in KINDS:
            return None
        values, updates = dict(zip(self.inputs, inputs, strict=True)), None
        if not values["same_seed"]:
            updates = self.roll()
            values["seed"] = updates[self.inputs["seed"]]
        config, name = request.job(app_state.snapshot(), self.files, act, values, id or "auto")
        app_state.jobs.start(config, name=name, job="generate")
        self._keep_typed(values)
        self.files.show(open="", page=0)
        return updates

    def roll(self) -> Updates:
        """Chooses another seed."""
        seed = random.randrange(2**31)
        self._keep({"seed": seed})
        return {self.inputs["seed"]: seed}

    # --- LoRAs ---

    def change(self, act: str, id: str) -> Updates | None:
        """Buttons, lists and sliders of the LoRA box."""
        app_state, snap = self.ctx.app_state, self.ctx.app_state.snapshot()
        choices = request.lora_choices(snap, self.files)
        loras = request.added(snap, choices)
        match act:
            case "add":
                loras = self._with(loras, actions.absolute(id), snap, choices)
            case "remove" if id.isdigit() and int(id) < len(loras):
                del loras[int(id)]
            case "weight":
                # '1 0.65': the second LoRA's weight.
                number, _, text = id.partition(" ")
                with contextlib.suppress(ValueError):
                    at, weight = int(number), float(text)
                    if 0 <= at < len(loras) and request.LEAST <= weight <= request.MOST:
                        loras[at] = replace(loras[at], weight=weight)
            case "base":
                if id in request.bases(snap, choices):
                    self._keep({"base": id})
                    app_state.filled()
                return None
            case "take_config" if self.files.dropped:
                # The training settings of the LoRA that was dropped, for the Parameters tab.
                config = load_train_config(self.files.dropped.path)
                actions.replace_edits(app_state, config.model_dump(
                    exclude_defaults=True, exclude={"resume", "output_dir", "output_name"}))
                app_state.replan(self.ctx.language)
                app_state.filled()
                return self.ctx.page.select("parameters")
            case "close_dropped":
                self.files.show(dropped=None)
                return None
            case _:
                return None
        self._keep(request.own_list(loras, choices))
        # The slider shows its weight already; another list brings its own prompt and numbers.
        if act != "weight":
            app_state.filled()
        return None

    def _with(self, loras: list[Added], path: Path, snap: Snapshot, choices: list[Choice]
              ) -> list[Added]:
        """The list with one LoRA more. Raises UserError where the file is none for this base."""
        if family := request.kind_of(snap, choices):
            library.checked(path, family)
        if len(loras) >= request.MOST_ADDED:
            raise UserError("tab_inference.too_many", most=request.MOST_ADDED)
        if any(lora.file == str(path) for lora in loras):
            return loras
        return [*loras, Added(str(path))]

    # --- what is dropped ---

    def take(self, act: str, message: str) -> None:
        """Adds LoRAs that were dropped, and takes prompt and numbers of pictures."""
        for file in uploaded(message) if act == "dropped" else []:
            if file.suffix.lower() != ".safetensors":
                self._take_picture(png_info.read(file), file.name)
                continue
            snap = self.ctx.app_state.snapshot()
            choices = request.lora_choices(snap, self.files)
            info = self.files.take(file, request.kind_of(snap, choices))
            loras = self._with(request.added(snap, choices), info.path, snap, choices)
            self._keep(request.own_list(loras, choices))
            self.ctx.page.tell(self.ctx.tr("tab_inference.lora_taken", name=info.path.stem))

    def _take_picture(self, picture: png_info.Settings, file: str) -> None:
        """A picture's prompt and numbers. Its LoRAs go into the list where they are here; others
        stay in the prompt, and are named."""
        tr, snap = self.ctx.tr, self.ctx.app_state.snapshot()
        choices = request.lora_choices(snap, self.files)
        known = request.used(snap) | request.names(choices)
        # A tag with two weights has no place in the list: it stays in the prompt.
        loras = {known[tag.name]: tag.weight for tag in library.split_prompt(picture.prompt)[1]
                 if tag.name in known and request.LEAST <= tag.weight <= request.MOST
                 and tag.text is None and tag.bad is None}

        prompt = library.TAG.sub(
            lambda tag: "" if known.get(library.name_in(tag)) in loras else tag[0],
            picture.prompt).strip()
        # What the picture doesn't tell is what it is without a word of it: nothing stays of the
        # picture before.
        values = {"prompt": prompt, "negative": picture.negative, "steps": picture.steps,
                  "cfg": picture.cfg, "size": picture.size, "clip_skip": picture.clip_skip,
                  "seed": request.SEED if picture.seed is None else picture.seed,
                  "sampler": picture.sampler or "auto", "same_seed": True, "count": 1}
        added = [Added(name, weight) for name, weight in loras.items()]
        self._keep(values | request.own_list(added, choices))
        missing = [tag.name for tag in library.split_prompt(prompt)[1]
                   if tag.name not in request.names(choices)]
        tell = self.ctx.page.tell
        tell(tr("tab_inference.picture_taken", file=file))
        if missing:
            tell(tr("tab_inference.loras_missing", names=", ".join(missing)), kind="warning")
        if picture.unknown_sampler:
            tell(tr("tab_inference.other_sampler", name=picture.unknown_sampler), kind="warning")
        if picture.not_told:
            fields = ", ".join(tr(FIELDS.get(name, name)) for name in picture.not_told)
            tell(tr("tab_inference.not_told", file=file, fields=fields), kind="warning")
        if picture.beyond:
            tell(tr("tab_inference.beyond", names=", ".join(picture.beyond)), kind="warning")

    # --- pictures ---

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons of progress, picture and gallery."""
        app_state, files = self.ctx.app_state, self.files
        match act:
            case "stop":
                app_state.jobs.stop(id)
            case "open":
                files.show(open=id)
            case "close":
                files.show(open="")
            case "page" if id.lstrip("-").isdigit():
                files.show(page=int(id))
            case "undelete":
                files.undelete()
            case "step" if id in ("1", "-1"):
                # The next picture, and the page that it stands on.
                if ids := [drawings.id_of(*picture)
                           for picture in files.pictures(app_state.snapshot())]:
                    at = neighbour(ids, files.open, int(id))
                    files.show(open=ids[at], page=at // PER_PAGE)
            case "fix":
                view, changes = chosen_fix(self.ctx, id)
                app_state.jobs.start(request.again(view, changes), name=view.name, job="generate")
            case "again" | "delete" | "as_preview":
                self._use(act, id)
        return None

    def _use(self, act: str, id: str) -> None:
        """Deletes a picture, or takes its settings or its prompt."""
        snap, tr = self.ctx.app_state.snapshot(), self.ctx.tr
        picture = drawings.find(self.files.pictures(snap), id)
        if picture is None:
            raise UserError("tab_inference.picture_gone")
        view, number = picture
        sample = view.samples[number]
        if act == "delete":
            self.files.delete(Path(sample.path))
        elif act == "again":
            loras = request.own_list(request.loras_of(view, number),
                                     request.lora_choices(snap, self.files))
            self._keep(request.settings_of(view, number) | loras)
            self.ctx.page.tell(tr("tab_inference.again_done"))
        else:
            every, prompts = snap.config.sample_every, [*snap.config.sample_prompts, sample.prompt]
            self.ctx.app_state.projects.edit(sample_prompts=[*dict.fromkeys(prompts)])
            key = "preview_added" if every else "preview_never"
            self.ctx.page.tell(tr(f"tab_inference.{key}", every=every))

    # --- other programs ---

    def send(self, act: str, message: str) -> None:
        """`message`: file, program and folder as JSON. The file must be one that is added."""
        form, snap = json_of(message, dict), self.ctx.app_state.snapshot()
        file, program = str(form.get("file", "")), str(form.get("program", ""))
        loras = request.added(snap, request.lora_choices(snap, self.files))
        if (act == "export" and program in export.PROGRAMS
                and any(lora.file == file for lora in loras)):
            folder = export.target_folder(str(form.get("folder", "")), program)
            self.files.export(self.ctx, Path(file), program, folder)
            self.ctx.app_state.settings.change(
                exports={**snap.settings.exports, program: str(folder)})
