"""Dataset: choose or drop pictures, see what the check says of them, leave out, set crops."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from core.dataset import image_folder, import_files
from core.errors import UserError
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.dataset_view import DatasetView, album_of
from gui.widgets import dataset_report
from gui.widgets.drop_zone import drop_zone, uploaded
from gui.widgets.panel import panel
from gui.widgets.picture_grid import PER_PAGE, filtered, grid, large, of_finding, page_of

DROPPED = [*sorted(image_folder.SUFFIXES), *sorted(import_files.CAPTIONS)]


def build(ctx: Context) -> DatasetTab:
    return DatasetTab(ctx)


class DatasetTab:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.album: DatasetView = album_of(ctx.app_state)
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
        page = ctx.page
        for event in (self.folder.submit, self.folder.blur):
            page.on(event, self.choose, [self.folder], fill=True)
        for event in (self.trigger.submit, self.trigger.blur):
            page.on(event, self.name, [self.trigger], fill=True)
        page.on_panel(self.dropped, self.take, fill=True)
        page.on(self.again.click, self.album.look_again)
        page.on(self.next.click, lambda: page.select("captioning"))
        for one in (self.grid, self.large, self.report):
            page.on_panel(one, self.act)

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        count = len(self.album.now.training)
        return f"1 {self.ctx.tr('tab_dataset')}" + (f" ✓{count}" if count else "")

    def paint(self, snap: Snapshot) -> Updates:
        ctx, album = self.ctx, self.album
        album.follow(snap)
        report = (dataset_report.summary(ctx, album) + dataset_report.findings(ctx, album)
                  + dataset_report.buckets(ctx, album.now))
        none = not album.now.names
        # both boxes tell the project when they are left, so that painting can't disturb typing
        return {self.folder: snap.config.train_data_dir, self.trigger: snap.config.trigger_word,
                self.grid: grid(ctx, album), self.large: large(ctx, album), self.report: report,
                self.next: gr.update(interactive=not none),
                self.again: gr.update(interactive=album.now.folder is not None)}

    def fill(self, snap: Snapshot) -> Updates:
        return {}

    # --- acting ---

    def choose(self, text: str) -> None:
        """A folder by path. Raises UserError where there is none."""
        folder = (text or "").strip().strip('"')
        app_state = self.ctx.app_state
        if folder == app_state.snapshot().config.train_data_dir:
            return
        if folder and not Path(folder).expanduser().is_absolute():
            raise UserError("gui.not_absolute", folder=folder)
        app_state.projects.edit(train_data_dir=folder or None)
        app_state.replan(self.ctx.language)

    def name(self, word: str) -> None:
        app_state = self.ctx.app_state
        if (word or "").strip() != app_state.snapshot().config.trigger_word:
            app_state.projects.edit(trigger_word=(word or "").strip() or None)
            app_state.replan(self.ctx.language)

    def take(self, act: str, told: str) -> None:
        """Copies what was dropped into a folder of ours and shows that folder."""
        app_state, language = self.ctx.app_state, self.ctx.language
        given = uploaded(told)
        folder = import_files.folder_for(app_state.projects.now.name)

        def then(taken: import_files.Taken) -> None:
            if taken.copied or taken.same:
                app_state.projects.edit(train_data_dir=str(folder))
                app_state.replan(language)
        if act == "dropped" and given:
            self.album.receive(given, folder, then)
            self.ctx.page.tell(self.ctx.tr("tab_dataset.copying", count=len(given),
                                           folder=folder))

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons, tiles and keys of the three panels."""
        album = self.album
        match act:
            case "filter":
                album.show(filter=id)
            case "page" if id.lstrip("-").isdigit():
                album.show(page=int(id))
            case "open":
                album.show(open=album.named(id))
            case "close":
                album.show(open="")
            case "step" if id in ("1", "-1"):
                self._step(int(id))
            case "leave_out":
                album.leave_out([album.named(key) for key in id.split(",") if key])
            case "take_in":
                album.take_in([album.named(key) for key in id.split(",") if key])
            case "focus":
                self._focus(id)
            case "unfocus":
                album.set_focus(album.named(id), None)
            case "edit":
                return self._captions([album.named(id)])
            case _:
                return self._answer(act, id)
        return None

    def _answer(self, act: str, code: str) -> Updates | None:
        """What the buttons of a finding do."""
        album, app_state = self.album, self.ctx.app_state
        match act:
            case "finding":
                names = of_finding(album.now, code)
                album.show(filter=f"finding:{code}", open=names[0] if names else "")
            case "keep_best":
                album.leave_out(dataset_report.copies(album.now, code))
            case "leave_finding":
                album.leave_out(of_finding(album.now, code))
            case "crop_subject":
                app_state.projects.edit(crop_about="subject")
                app_state.replan(self.ctx.language)
            case "captions":
                return self._captions(of_finding(album.now, code))
        return None

    def _captions(self, names: list[str] | tuple[str, ...]) -> Updates:
        """Shows these in the caption editor."""
        self.album.show(search="", only=tuple(names))
        return self.ctx.page.select("captioning")

    def _step(self, by: int) -> None:
        """The next picture of the filter, and the page that it stands on."""
        album = self.album
        names = filtered(album.now, album.shown.filter) or album.now.names
        at = names.index(album.shown.open) if album.shown.open in names else -by
        at = min(max(at + by, 0), len(names) - 1)
        album.show(open=names[at], page=page_of(len(names), at // PER_PAGE)[0])

    def _focus(self, id: str) -> None:
        key, x, y = id.split("/")
        self.album.set_focus(self.album.named(key), (float(x), float(y)))
