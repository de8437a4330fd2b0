"""Parameters: what is trained, whether it fits, Start; while a run is shown the tab is the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from core import foreign, journal, paths, presets
from core.config import FOREIGN, TrainConfig, dump_yaml, load_train_config, parse_train_config
from core.faults import Fault
from core.project import known_presets
from gui import checklist
from gui.context import Context, Snapshot, Updates
from gui.form import Form, keys_of
from gui.html import esc
from gui.tabs.run import RunView
from gui.widgets.history import history
from gui.widgets.panel import panel
from gui.widgets.preset_cards import preset_cards
from gui.widgets.suggestion import suggestion

BASIC = ("output_name", "epochs", "learning_rate", "lora_rank", "batch_size", "max_resolution")
CONFIG_FILES = [".yaml", ".yml", ".safetensors", *FOREIGN]


def build(ctx: Context) -> Parameters:
    return Parameters(ctx)


class Parameters:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.form = Form(ctx)
        with gr.Column(elem_id="setup") as self.setup:
            self._build_setup()
        self.run = RunView(ctx)
        self.history = panel("history")
        ctx.page.on_panel(self.history, self.act, fill=True)

    # --- building ---

    def _build_setup(self) -> None:
        ctx = self.ctx
        self.welcome = panel("welcome")
        ctx.page.on_panel(self.welcome, self.act, fill=True)
        with gr.Row(equal_height=True):
            self.base = gr.Dropdown([(ctx.say("base_demo"), "demo")], allow_custom_value=True,
                                    label=ctx.say("base_model"), info=ctx.say("base_model_help"),
                                    elem_id="field-base_model", scale=2)
            self.purpose = gr.Radio([(ctx.say(f"presets.purpose_{one}"), one) for one in (
                "style", "character", "object", "concept")], label=ctx.say("purpose"),
                info=ctx.say("purpose_help"), elem_id="purpose", scale=2)
        with gr.Row():
            self.form.add(["train_data_dir", "trigger_word"])
        self.presets = panel("presets")
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                self.memory = panel("memory")
            with gr.Column(scale=6, min_width=420):
                self._build_basics()
        self._build_more()
        with gr.Row(equal_height=True, elem_id="start-row"):
            self.checks = panel("checklist", scale=3)
            self.start = gr.Button(ctx.say("start"), variant="primary", elem_id="start", scale=1,
                                   min_width=220)
        ctx.page.on(self.base.input, self.choose_base, [self.base], fill=True)
        ctx.page.on(self.purpose.input, self.choose_purpose, [self.purpose], fill=True)
        ctx.page.on_panel(self.presets, self.act, fill=True)
        ctx.page.on_panel(self.memory, self.act, fill=True)
        ctx.page.on(self.start.click, self.begin, fill=True)

    def _build_basics(self) -> None:
        for three in (BASIC[:3], BASIC[3:]):
            with gr.Row():
                self.form.add(three)
        with gr.Row():
            self.form.add(["output_dir"])

    def _build_more(self) -> None:
        ctx = self.ctx
        for level in ("advanced", "expert"):
            keys = keys_of(level)
            title = ctx.say(f"level_{level}", count=len(keys))
            with gr.Accordion(title, open=False, elem_id=f"level-{level}"):
                for n in range(0, len(keys), 4):
                    with gr.Row():
                        self.form.add(keys[n:n + 4])
        with gr.Accordion("YAML", open=False, elem_id="level-yaml"):
            self.yaml = gr.Code(language="yaml", label=ctx.say("yaml_label"), lines=10,
                                interactive=True, elem_id="yaml")
            with gr.Row():
                take = gr.Button(ctx.say("yaml_take"), elem_id="yaml-take")
                self.file = gr.File(label=ctx.say("yaml_file"), file_types=CONFIG_FILES,
                                    height=90, elem_id="yaml-file")
        ctx.page.on(take.click, self.take_yaml, [self.yaml], fill=True)
        ctx.page.on(self.file.upload, self.take_file, [self.file], fill=True)

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        active = snap.active
        mark = " ●" if active and active.job == "train" else ""
        return f"3 {self.ctx.say('tab_parameters')}{mark}"

    def paint(self, snap: Snapshot) -> Updates:
        ctx, shown = self.ctx, snap.shown
        ready, greeting = checklist.ready(ctx, snap), checklist.welcome(ctx, snap)
        return {self.setup: gr.update(visible=shown is None),
                self.welcome: greeting,
                self.presets: preset_cards(ctx, known(snap), snap.project.preset,
                                           snap.project.purpose, snap.machine),
                self.memory: suggestion(ctx, snap),
                self.checks: checklist.html(ctx, snap),
                self.start: gr.update(interactive=ready, value=ctx.say(
                    "start_queued" if snap.active else "start")),
                self.history: history(ctx, snap),
                **self.form.paint(snap), **self.run.paint(snap)}

    def fill(self, snap: Snapshot) -> Updates:
        project = snap.project
        base = str(project.edits.get("base_model", ""))
        return {self.base: gr.update(value=base or None, choices=bases(self.ctx, snap)),
                self.purpose: project.purpose, self.yaml: dump_yaml(snap.config),
                self.file: None, **self.form.fill(snap)}

    # --- acting ---

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons of the tab's panels."""
        house = self.ctx.house
        match act:
            case "preset":
                choose_preset(house, id)
            case "advice":
                take_advice(house)
            case "nearest":
                changes = house.planning.now.answer.get("nearest") or {}
                house.projects.edit(**changes.get("changes", {}))
            case "demo":
                load_demo(house)
            case "welcomed":
                house.settings.change(welcomed=True)
            case "show":
                house.projects.change(run=id)
            case "reload":
                house.projects.update(lambda project: project.model_copy(update={
                    "edits": config_of(house, id).model_dump(exclude_defaults=True, exclude={
                        "resume"}), "preset": "", "advised": {}, "invalid": {}, "run": ""}))
            case "resume":
                house.projects.change(run=house.jobs.resume(id))
            case "leave":
                house.jobs.stop(id)
        if act in ("preset", "advice", "nearest", "demo", "reload"):
            house.replan(self.ctx.language)
        return None

    def choose_base(self, value: str | None) -> None:
        house = self.ctx.house
        text = str(value or "").strip().strip('"')
        house.projects.edit(base_model=text or None)
        presets.family_of(text)                 # a fault where nothing is there
        house.replan(self.ctx.language)

    def choose_purpose(self, value: str) -> None:
        house = self.ctx.house
        project = house.projects.now
        house.projects.change(purpose=value)
        if chosen := project.chosen():          # the same card for the other purpose
            same = next((one for one in known_presets(chosen.family)
                         if one.purpose == value and one.title == chosen.title), None)
            if same:
                choose_preset(house, same.slug)
        house.replan(self.ctx.language)

    def take_yaml(self, text: str) -> None:
        config = parse_train_config(text or "", "YAML")
        self._replace(config)

    def take_file(self, path: str) -> None:
        self._replace(load_train_config(Path(path)))
        if path.lower().endswith(FOREIGN):          # what another trainer's config said beyond ours
            head, *lines = foreign.told(foreign.read(Path(path)), self.ctx.language)
            gr.Info("<br>".join(map(esc, lines)), title=esc(head), duration=None)

    def _replace(self, config: TrainConfig) -> None:
        house = self.ctx.house
        house.projects.update(lambda project: project.model_copy(update={
            "edits": config.model_dump(exclude_unset=True), "preset": "", "advised": {},
            "invalid": {}}))
        house.replan(self.ctx.language)

    def begin(self) -> None:
        house = self.ctx.house
        snap = house.snapshot()
        if not checklist.ready(self.ctx, snap):
            raise Fault("gui.not_ready")
        house.projects.change(run=house.jobs.start(startable(snap.config)))


# --- what the buttons do ---

def known(snap: Snapshot) -> list[presets.Preset]:
    base = str(snap.project.edits.get("base_model", ""))
    if not base and (snap.machine is None or snap.machine.kind != "cuda"):
        return []                               # all of them would only say that they don't fit
    try:
        return known_presets(presets.family_of(base))
    except Fault:
        return []


def bases(ctx: Context, snap: Snapshot) -> list[tuple[str, str]]:
    """The demo's, and those of earlier runs that are still there."""
    used = dict.fromkeys(str(view.config.get("base_model", "")) for view in snap.runs)
    found = [(ctx.say("base_demo"), "demo")]
    return found + [(Path(one).name, one) for one in used
                    if one not in ("", "demo") and Path(one).exists()]


def choose_preset(house: Any, slug: str) -> None:
    """A preset that is chosen decides its fields: own edits of them are taken back."""
    def chosen(project: Any) -> Any:
        fresh = project.model_copy(update={"preset": slug, "advised": {}, "invalid": {}})
        preset = fresh.chosen()
        if preset is None:
            return project
        hidden = {*preset.set, "epochs", "max_train_steps"}
        edits = {key: value for key, value in project.edits.items() if key not in hidden}
        return fresh.model_copy(update={"edits": edits, "purpose": preset.purpose})
    house.projects.update(chosen)


def take_advice(house: Any) -> None:
    values = (house.planning.now.answer.get("suggestion") or {}).get("values", {})
    hidden = {*values, "epochs", "max_train_steps"}
    house.projects.update(lambda project: project.model_copy(update={
        "advised": dict(values), "invalid": {}, "edits": {
            key: value for key, value in project.edits.items() if key not in hidden}}))


def load_demo(house: Any) -> None:
    """The demo's own config and pictures, with a preview that shows the style coming."""
    config = load_train_config(paths.DEMO / "demo.yaml")
    edits = config.model_dump(exclude_unset=True, exclude={"output_dir", "output_name"}) | {
        "base_model": "demo", "train_data_dir": str(paths.DEMO / "pictures"),
        "trigger_word": "duskprint style", "sample_every": 125, "sample_inference_steps": 16,
        "sample_cfg": 1.5, "sample_prompts": ["a cat, duskprint style", "a house, duskprint style"]}
    house.projects.update(lambda project: project.model_copy(update={
        "edits": edits, "preset": "", "advised": {}, "invalid": {}, "run": ""}))
    house.settings.change(welcomed=True)


def startable(config: TrainConfig) -> TrainConfig:
    """Paths made absolute: the window's working folder means nothing to anyone."""
    def full(text: str) -> str:
        return str(Path(text).expanduser().absolute()) if text else ""
    base = config.base_model if config.base_model == "demo" else full(config.base_model)
    return config.with_changes(train_data_dir=full(config.train_data_dir), base_model=base,
                               output_dir=full(config.output_dir),
                               metadata_path=full(config.metadata_path))


def config_of(house: Any, run_id: str) -> TrainConfig:
    view = house.jobs.view(run_id)
    return load_train_config(view.folder / journal.CONFIG)
