"""Dataset: choose or drop pictures, see what the check says of them, leave out, set crops."""

from __future__ import annotations

import functools

import gradio as gr

from core.dataset import image_folder, import_files
from gui import actions
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.dataset_view import DatasetView
from gui.widgets import dataset_report, picture_grid
from gui.widgets.drop_zone import drop_zone, uploaded
from gui.widgets.panel import panel
from gui.widgets.picture_grid import of_finding

DROPPED = [*sorted(image_folder.SUFFIXES), *sorted(import_files.CAPTIONS)]


class DatasetTab:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.dataset: DatasetView = ctx.app_state.shared(DatasetView)
        tr = ctx.tr
        with gr.Row(equal_height=True, elem_id="dataset-folder-row"):
            self.folder = gr.Textbox(
                label=tr("tab_dataset.folder"), info=tr("tab_dataset.folder_help"),
                elem_id="dataset-folder", scale=5, min_width=320)
            self.trigger = gr.Textbox(
                label=tr("config_help.trigger_word"), info=tr("tab_dataset.trigger_help"),
                elem_id="dataset-trigger", scale=3, min_width=200)
            with gr.Column(scale=4, min_width=260):
                self.dropped = drop_zone(ctx, "dataset-drop", DROPPED)
        with gr.Row():
            with gr.Column(scale=7, min_width=420):
                self.grid = panel("dataset-grid", "picture_grid", dense=True)
            with gr.Column(scale=5, min_width=340):
                self.large = panel("dataset-large", "picture_view", dense=True)
                self.report = panel("dataset-report", dense=True)
                with gr.Row():
                    self.again = gr.Button(tr("tab_dataset.look_again"), size="sm")
                    self.next = gr.Button(tr("tab_dataset.to_captions"), variant="primary",
                                          size="sm", elem_id="to-captions")
        page, folder, trigger = ctx.page, self.folder, self.trigger
        page.on(self.choose, folder.submit, folder.blur, inputs=[folder], fill=True)
        page.on(functools.partial(actions.set_trigger, ctx), trigger.submit, trigger.blur,
                inputs=[trigger], fill=True)
        page.on(self.take, self.dropped, fill=True)
        page.on(self.dataset.look_again, self.again.click)
        page.on(lambda: page.select("captioning"), self.next.click)
        page.on(self.act, self.grid, self.large, self.report)

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        count = len(self.dataset.now.training)
        return f"1 {self.ctx.tr('tab_dataset')}" + (f" ✓{count}" if count else "")

    def paint(self, snap: Snapshot) -> Updates:
        ctx, dataset = self.ctx, self.dataset
        dataset.follow(snap)
        report = (dataset_report.summary(ctx, dataset) + dataset_report.findings(ctx, dataset)
                  + dataset_report.buckets(ctx, dataset.now))
        # Both boxes tell the project when they are left, so that painting can't disturb typing.
        return {self.folder: snap.config.train_data_dir, self.trigger: snap.config.trigger_word,
                self.grid: picture_grid.grid(ctx, dataset),
                self.large: picture_grid.large(ctx, dataset), self.report: report,
                self.next: gr.update(interactive=bool(dataset.now.names)),
                self.again: gr.update(interactive=dataset.now.folder is not None)}

    def fill(self, snap: Snapshot) -> Updates:
        return {}

    # --- acting ---

    def choose(self, text: str) -> None:
        """Chooses a folder by its path. Raises UserError for a relative path."""
        folder = (text or "").strip().strip('"').strip()
        app_state = self.ctx.app_state
        if folder == app_state.snapshot().config.train_data_dir:
            return
        if folder:
            # Only to refuse a relative path: the project keeps what was typed.
            actions.absolute(folder)
        app_state.projects.edit(train_data_dir=folder or None)
        app_state.replan(self.ctx.language)

    def take(self, act: str, message: str) -> None:
        """Copies what was dropped into a folder of ours and shows that folder."""
        app_state, files = self.ctx.app_state, uploaded(message)
        folder = import_files.folder_for(app_state.projects.now.name)

        def then(taken: import_files.Taken) -> None:
            if taken.copied or taken.same:
                app_state.projects.edit(train_data_dir=str(folder))
                app_state.replan(self.ctx.language)
        if act == "dropped" and files:
            self.dataset.receive(files, folder, then)
            self.ctx.page.tell(self.ctx.tr("tab_dataset.copying", count=len(files), folder=folder))

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons, tiles and keys of the three panels."""
        dataset, app_state = self.dataset, self.ctx.app_state
        match act:
            case "filter":
                dataset.show(filter=id)
            case "page" if id.lstrip("-").isdigit():
                dataset.show(page=int(id))
            case "open":
                dataset.show(open=dataset.named(id))
            case "close":
                dataset.show(open="")
            case "step" if id in ("1", "-1"):
                # The next picture of the filter, and the page that it stands on.
                state, shown = dataset.now, dataset.shown
                names = picture_grid.filtered(state, shown.filter) or state.names
                at = picture_grid.neighbour(names, shown.open, int(id))
                dataset.show(open=names[at], page=at // picture_grid.PER_PAGE)
            case "leave_out" | "take_in":
                names = tuple(dataset.named(key) for key in id.split(",") if key)
                (dataset.take_in if act == "take_in" else dataset.leave_out)(names)
            case "focus":
                key, x, y = id.split("/")
                dataset.set_focus(dataset.named(key), (float(x), float(y)))
            case "unfocus":
                dataset.set_focus(dataset.named(id), None)
            case "edit":
                return self._captions((dataset.named(id),))
            # The buttons of a finding: `id` is its code.
            case "finding":
                names = of_finding(dataset.now, id)
                dataset.show(filter=f"finding:{id}", open=next(iter(names), ""))
            case "keep_best":
                dataset.leave_out(dataset_report.copies(dataset.now, id))
            case "leave_finding":
                dataset.leave_out(of_finding(dataset.now, id))
            case "crop_subject":
                app_state.projects.edit(crop_about="subject")
                app_state.replan(self.ctx.language)
            case "captions":
                return self._captions(of_finding(dataset.now, id))
        return None

    def _captions(self, names: tuple[str, ...]) -> Updates:
        """Shows these pictures in the caption editor."""
        self.dataset.show(search="", only=names)
        return self.ctx.page.select("captioning")
