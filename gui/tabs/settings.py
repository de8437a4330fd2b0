"""Settings: folders, the mirror of the model hub; what this program found, keeps and can tell."""

from __future__ import annotations

import gradio as gr

from core import __version__, paths
from core.base_models.catalog import checked_source
from core.jobs import bug_report
from core.units import gigabytes
from gui import actions
from gui.html import acts, box, button, fact_table, small
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.desktop import open_folder
from gui.widgets.fault_card import diagnostics
from gui.widgets.panel import panel


class SettingsTab:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        tr = ctx.tr
        with gr.Row():
            self.output = gr.Textbox(
                label=tr("output_root"), info=tr("output_root_help"), elem_id="output-root")
            self.mirror = gr.Textbox(label=tr("tab_settings.mirror"), elem_id="mirror",
                                     info=tr("tab_settings.mirror_help"))
        self.folders = gr.Textbox(
            label=tr("tab_settings.model_folders"), info=tr("tab_settings.model_folders_help"),
            lines=2, max_lines=8, elem_id="model-folders")
        with gr.Row():
            save = gr.Button(tr("save_settings"), variant="primary", elem_id="save-settings",
                             scale=0, min_width=200)
        self.facts = panel("facts")
        ctx.page.on(self.save, save.click, inputs=[self.output, self.mirror, self.folders],
                    fill=True)
        ctx.page.on(self.act, self.facts, fill=True)

    def label(self, snap: Snapshot) -> str:
        return self.ctx.tr("tab_settings")

    def paint(self, snap: Snapshot) -> Updates:
        tr = self.ctx.tr
        rows = [(tr("version"), __version__), (tr("device"), snap.gauge.name),
                (tr("device_memory"), gigabytes(snap.gauge.total_mb)),
                (tr("data_folder"), paths.data_dir()), (tr("cache_folder"), paths.cache_dir())]
        buttons = acts(
            diagnostics(self.ctx),
            *(button(tr(f"tab_settings.open_{kind}"), "open", kind) for kind in ("logs", "output")),
            button(tr("tab_settings.introduction"), "introduction"))
        return {self.facts: box(tr("about"), fact_table(rows) + small(tr("private")) + buttons)}

    def fill(self, snap: Snapshot) -> Updates:
        return {self.output: str(snap.settings.output_folder), self.mirror: snap.settings.mirror,
                self.folders: "\n".join(snap.settings.model_folders)}

    def act(self, act: str, id: str) -> Updates | None:
        app_state = self.ctx.app_state
        if act == "open":
            output = app_state.settings.now.output_folder
            folder = bug_report.log_folder() if id == "logs" else output
            folder.mkdir(parents=True, exist_ok=True)
            open_folder(folder)
        elif act == "introduction":
            app_state.settings.change(welcomed=False, first_step=1)
            return self.ctx.page.select("parameters")
        return None

    def save(self, folder: str, mirror: str, folders: str) -> None:
        """Saves all boxes. Raises UserError, and saves none, where one of them can't be used."""
        app_state = self.ctx.app_state
        mirror = (mirror or "").strip()
        checked_source(mirror)
        searched = [str(actions.absolute(line)) for line in (folders or "").splitlines()
                    if line.strip()]
        actions.set_output(self.ctx, folder or "")
        if searched != app_state.settings.now.model_folders:
            app_state.settings.change(model_folders=searched)
            actions.search_bases(app_state)
        app_state.settings.change(mirror=mirror)
        app_state.replan(self.ctx.language)
        self.ctx.page.tell(self.ctx.tr("saved"))
