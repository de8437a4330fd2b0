"""Parameters: what is trained, whether it fits, Start; while a run is shown the tab is the run.

What its panels' buttons do stands in gui/actions.py.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import gradio as gr

from core import importers
from core.config import TrainConfig, dump_yaml, parse_train_config
from core.errors import UserError
from core.importers import FOREIGN, load_train_config
from core.workspace import presets
from gui import actions, checklist
from gui.html import acts, button
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.dataset_view import absolute
from gui.state.form import Form, keys_of
from gui.tabs.run import RunView
from gui.widgets.base_chooser import base_chooser
from gui.widgets.drop_zone import drop_zone, uploaded
from gui.widgets.onboarding import first_start
from gui.widgets.panel import panel
from gui.widgets.preset_cards import own_presets, preset_cards
from gui.widgets.runs.compare import compare
from gui.widgets.runs.history import history
from gui.widgets.suggestion import suggestion

BASIC = ("output_name", "epochs", "learning_rate", "lora_rank", "batch_size", "max_resolution")
CONFIG_FILES = (".yaml", ".yml", ".safetensors", *FOREIGN)


class Parameters:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.form = Form(ctx)
        with gr.Column(elem_id="setup") as self.setup:
            self._build_setup()
            self._build_more()
            with gr.Row(equal_height=True, elem_id="start-row"):
                self.checks = panel("checklist", scale=3)
                self.start = gr.Button(ctx.tr("start"), variant="primary", elem_id="start",
                                       scale=1, interactive=False, min_width=220)
        self.run = RunView(ctx)
        self.compare, self.history = panel("run-compare"), panel("history")
        ctx.page.on(self.begin, self.start.click, fill=True)
        ctx.page.on(functools.partial(actions.act, ctx), self.welcome, self.bases, self.native,
                    self.presets, self.memory, self.compare, self.history, fill=True)

    # --- building ---

    def _build_setup(self) -> None:
        ctx = self.ctx
        self.welcome = panel("welcome")
        with gr.Row(equal_height=True):
            self.base = gr.Dropdown([(ctx.tr("base_demo"), "demo")], allow_custom_value=True,
                                    label=ctx.tr("base_model"), info=ctx.tr("base_model_help"),
                                    elem_id="field-base_model", scale=2)
            self.purpose = gr.Radio([(ctx.tr(f"presets.purpose_{name}"), name) for name in (
                "style", "character", "object", "concept")], label=ctx.tr("purpose"),
                info=ctx.tr("purpose_help"), elem_id="purpose", scale=2)
        self.bases = panel("bases")
        with gr.Row():
            self.form.add(["train_data_dir", "trigger_word"])
        self.native = panel("native")
        self.presets = panel("presets")
        with gr.Row():
            with gr.Column(scale=5, min_width=380):
                self.memory = panel("memory")
            with gr.Column(scale=6, min_width=420):
                for keys in (BASIC[:3], BASIC[3:], ["output_dir"]):
                    with gr.Row():
                        self.form.add(keys)
        ctx.page.on(self.choose_base, self.base.input, inputs=[self.base], fill=True)
        ctx.page.on(self.choose_purpose, self.purpose.input, inputs=[self.purpose], fill=True)

    def _build_more(self) -> None:
        ctx = self.ctx
        for level in ("advanced", "expert"):
            keys = keys_of(level)
            with gr.Accordion(ctx.tr(f"level_{level}", count=len(keys)), open=False,
                              elem_id=f"level-{level}"):
                for n in range(0, len(keys), 4):
                    with gr.Row():
                        self.form.add(keys[n:n + 4])
        with gr.Accordion("YAML", open=False, elem_id="level-yaml"):
            self.yaml = gr.Code(language="yaml", label=ctx.tr("yaml_label"), lines=10,
                                interactive=True, elem_id="yaml")
            with gr.Row():
                take = gr.Button(ctx.tr("yaml_take"), elem_id="yaml-take")
                self.file = drop_zone(ctx, "yaml-file", CONFIG_FILES, "drop_config", ("files",))
        ctx.page.on(self.take_yaml, take.click, inputs=[self.yaml], fill=True)
        ctx.page.on(self.take_file, self.file, fill=True)

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        training = snap.active and snap.active.job == "train"
        return f"3 {self.ctx.tr('tab_parameters')}" + (" ●" if training else "")

    def paint(self, snap: Snapshot) -> Updates:
        ctx, shown = self.ctx, snap.shown
        cards = presets_of_base(snap)
        removed = snap.project.state("presets", removed="")["removed"]
        return {self.setup: gr.update(visible=shown is None),
                self.welcome: first_start(ctx, snap, cards),
                self.base: gr.update(choices=bases(ctx, snap)),
                self.bases: base_chooser(ctx, snap), self.native: native(ctx, snap),
                self.presets: preset_cards(ctx, cards, snap.project.preset, snap.project.purpose,
                                           snap.machine)
                + own_presets(ctx, snap.project.chosen(), removed),
                self.memory: suggestion(ctx, snap),
                self.checks: checklist.html(ctx, snap),
                self.start: gr.update(interactive=checklist.ready(ctx, snap), value=ctx.tr(
                    "start_queued" if snap.active else "start")),
                self.history: history(ctx, snap), self.compare: compare(ctx, snap),
                **self.form.paint(snap), **self.run.paint(snap)}

    def fill(self, snap: Snapshot) -> Updates:
        base = str(snap.project.edits.get("base_model", ""))
        return {self.base: gr.update(value=base or None, choices=bases(self.ctx, snap)),
                self.purpose: snap.project.purpose, self.yaml: dump_yaml(snap.config),
                **self.form.fill(snap)}

    # --- acting ---

    def choose_base(self, value: str | None) -> None:
        app_state = self.ctx.app_state
        text = str(value or "").strip().strip('"')
        app_state.projects.edit(base_model=text or None)
        # Raises UserError where nothing is there: the page tells it at once.
        presets.family_of(text, family=app_state.projects.now.edits.get("family", "auto"))
        app_state.replan(self.ctx.language)

    def choose_purpose(self, value: str) -> None:
        app_state = self.ctx.app_state
        chosen = app_state.projects.now.chosen()
        app_state.projects.change(purpose=value)
        # A chosen preset is exchanged for the same card of the other purpose.
        same = chosen and next((
            preset for preset in presets.list_presets(family=chosen.family)
            if (preset.purpose, preset.title) == (value, chosen.title)), None)
        if same:
            actions.choose_preset(app_state, same.slug)
        app_state.replan(self.ctx.language)

    def take_yaml(self, text: str) -> None:
        self._replace(parse_train_config(text or "", "YAML"))

    def take_file(self, act: str, message: str) -> None:
        """A YAML, TOML, JSON or LoRA file that was dropped."""
        files = uploaded(message)
        if act != "dropped" or not files:
            return
        self._replace(load_train_config(files[0]))
        self.ctx.page.tell(self.ctx.tr("drop_config.taken", file=files[0].name))
        # A config of another trainer may say more than ours can.
        if files[0].suffix.lower() in FOREIGN:
            head, *lines = importers.report_lines(importers.read(files[0]), self.ctx.language)
            self.ctx.page.tell("\n".join(lines), head, "warning")

    def _replace(self, config: TrainConfig) -> None:
        actions.replace_edits(self.ctx.app_state, config.model_dump(exclude_unset=True))
        self.ctx.app_state.replan(self.ctx.language)

    def begin(self) -> None:
        app_state = self.ctx.app_state
        snap = app_state.snapshot()
        if not checklist.ready(self.ctx, snap):
            raise UserError("gui.not_ready")
        app_state.projects.change(run=app_state.jobs.start(startable(snap.config)))


# --- what it knows ---

def presets_of_base(snap: Snapshot) -> list[presets.Preset]:
    """The presets of the project's base."""
    base = snap.config.base_model
    # Without a base and a card all of them would only say that they don't fit.
    if not base and (snap.machine is None or snap.machine.kind != "cuda"):
        return []
    try:
        return presets.list_presets(family=presets.family_of(base, family=snap.config.family))
    except UserError:
        return []


def bases(ctx: Context, snap: Snapshot) -> list[tuple[str, str]]:
    """(name, path) of the demo's base, those of earlier runs that are still there, those found."""
    used = dict.fromkeys(str(view.config.get("base_model", "")) for view in snap.runs)
    here = [path for path in used if path not in ("", "demo") and os.path.exists(path)]
    here += [str(model.path) for model in snap.bases.found if not model.reason]
    return [(ctx.tr("base_demo"), "demo"),
            *((Path(path).name, path) for path in dict.fromkeys(here))]


def native(ctx: Context, snap: Snapshot) -> str:
    """Buttons of the system's own dialogs, where a native window runs."""
    if not snap.native:
        return ""
    return acts(*(button(f'{ctx.tr(f"first_start.{kind}")}: {ctx.tr("close.choose_folder")}',
                         f"native_{kind}") for kind in ("pictures", "output")))


def startable(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths: users don't know the working folder of the window."""
    # Words that are no paths.
    words = {"base_model": "demo", "tokenizer": "shipped"}
    keys = ("train_data_dir", "base_model", "vae", "tokenizer", "output_dir", "metadata_path")
    paths = {key: absolute(path) for key in keys
             if (path := getattr(config, key)) != words.get(key)}
    return config.with_changes(
        text_encoders=[absolute(path) for path in config.text_encoders], **paths)
