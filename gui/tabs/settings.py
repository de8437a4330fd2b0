"""Settings: where LoRAs go, language and theme; what this program found and keeps."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from core import __version__, paths
from core.faults import Fault
from gui.context import Context, Snapshot, Updates
from gui.html import esc, gigabytes
from gui.widgets.panel import panel


def build(ctx: Context) -> SettingsTab:
    return SettingsTab(ctx)


class SettingsTab:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Row():
            self.output = gr.Textbox(label=ctx.say("output_root"), info=ctx.say("output_root_help"),
                                     elem_id="output-root")
        with gr.Row():
            save = gr.Button(ctx.say("save_settings"), variant="primary", elem_id="save-settings",
                             scale=0, min_width=200)
        self.facts = panel("facts")
        ctx.page.on(save.click, self.save, [self.output], fill=True)

    def label(self, snap: Snapshot) -> str:
        return self.ctx.say("tab_settings")

    def paint(self, snap: Snapshot) -> Updates:
        say = self.ctx.say
        rows = [(say("version"), __version__), (say("device"), snap.gauge.name),
                (say("device_memory"), gigabytes(snap.gauge.total_mb)),
                (say("data_folder"), paths.data_dir()), (say("cache_folder"), paths.cache_dir())]
        body = "".join(f"<tr><th>{esc(name)}</th><td>{esc(value)}</td></tr>"
                       for name, value in rows)
        return {self.facts: f'<section class="box"><h3>{esc(say("about"))}</h3>'
                            f'<table class="facts">{body}</table>'
                            f'<p class="small">{esc(say("private"))}</p></section>'}

    def fill(self, snap: Snapshot) -> Updates:
        return {self.output: str(snap.settings.output_folder)}

    def save(self, folder: str) -> None:
        path = Path(folder.strip()).expanduser() if folder and folder.strip() else None
        if path is not None and not path.is_absolute():
            raise Fault("gui.not_absolute", folder=folder)
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
        house = self.ctx.house
        house.settings.change(output_root=str(path or ""))
        house.projects.update(lambda project: project.model_copy(update={"edits": {
            key: value for key, value in project.edits.items() if key != "output_dir"}}))
        house.replan(self.ctx.language)
        self.ctx.page.tell(self.ctx.say("saved"))
