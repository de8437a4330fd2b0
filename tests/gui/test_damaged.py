"""Files of ours that someone edited or a disk damaged: each is told, none takes the window down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import yaml

from core.config import TrainConfig
from core.jobs.manager import JobManager
from core.memory import history, plan
from core.workspace import settings
from core.workspace.project import Project, Projects
from core.workspace.settings import Settings, SettingsFile
from gui.app import build
from gui.state.app_state import AppState, Context
from gui.state.page import Page
from gui.state.plan_client import Planning
from gui.widgets.memory_bar import memory_bar

JUNK: list[Any] = [None, True, -1, 5, 1e300, float("nan"), "", "x", "\0", "<b>", [], [1, "a"], {},
                   {"a": {"b": [1]}}, {"weight": "x"}, "9" * 500, "~nobody-here/x"]
# What tabs keep: keys, by tab.
TABS = {"runs": ("removed", "page", "compare"), "presets": ("removed",),
        "captioning": ("sentence", "tags", "existing", "endpoint", "rules", "first")}
DRAWING = ("prompt", "negative", "seed", "steps", "cfg", "size", "sampler", "clip_skip", "count",
           "same_seed", "base", "lora", "loras")


class Silent(Planning):
    def _loop(self) -> None:
        return


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AppState, Page]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DARKROOM_HOME", str(tmp_path_factory.mktemp("damaged")))
        app_state = AppState(JobManager(dispatch=False), Silent())
        page = Page()
        build(Context(app_state, "en", page), page)
        yield app_state, page
        app_state.close()


def assert_shown(shown: tuple[AppState, Page], what: object) -> str:
    """The panels, all of whose tabs are there; Gradio takes what their inputs are given."""
    app_state, page = shown
    app_state.touch()
    snap = app_state.snapshot()
    panels, rest = page._painted(snap)
    assert "card fault" not in panels["header"], (what, panels["header"])
    for component, value in [*rest.items(), *page._filled(snap).items()]:
        if isinstance(value, dict) and value.get("__type__") == "update":
            value = value.get("value")
        if value is not None and isinstance(component, gr.Number | gr.Textbox | gr.Checkbox):
            component.postprocess(value)
    return json.dumps(panels)


def open_project(shown: tuple[AppState, Page], content: Any) -> None:
    file = Path(settings.paths.data_dir() / "projects" / "mia.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), "utf-8")
    shown[0].projects = Projects("mia")
    shown[0].projects.version = shown[0]._touched       # another object counts from 0


@pytest.mark.parametrize("field", [name for name in Project.model_fields if name != "name"])
def test_a_project_of_any_types_is_shown(shown: tuple[AppState, Page], field: str) -> None:
    for junk in JUNK:
        open_project(shown, {"purpose": "character", field: junk})
        assert_shown(shown, (field, junk))
        projects = shown[0].projects
        if projects.broken:                             # told, kept, and the rest counts
            assert projects.names() == ["mia"]
            assert field == "purpose" or projects.now.purpose == "character"
            assert list(Path(settings.paths.data_dir() / "projects").glob("mia.yaml.broken*"))


@pytest.mark.parametrize("tab", TABS)
def test_a_tabs_state_of_any_types_is_shown(shown: tuple[AppState, Page], tab: str) -> None:
    for key in TABS[tab]:
        for junk in JUNK:
            open_project(shown, {"tabs": {tab: {key: junk}}})
            assert_shown(shown, (tab, key, junk))


def test_a_drawing_of_any_types_is_shown(shown: tuple[AppState, Page]) -> None:
    for key in DRAWING:
        for junk in JUNK:
            open_project(shown, {"inference": {key: junk}})
            assert_shown(shown, (key, junk))


def test_settings_of_a_run_of_any_types_are_shown(shown: tuple[AppState, Page]) -> None:
    """Two junk values for each key of the config."""
    for number, key in enumerate(TrainConfig.model_fields):
        for junk in (JUNK[number % len(JUNK)], JUNK[(number * 7 + 3) % len(JUNK)]):
            open_project(shown, {"edits": {key: junk}, "advised": {key: junk},
                                 "invalid": {key: "x"}})
            assert_shown(shown, (key, junk))
            # Another setting can be changed all the same.
            assert shown[0].projects.edit(seed=7).edits["seed"] == 7


@pytest.mark.parametrize("field", Settings.model_fields)
def test_settings_of_any_types_are_shown(shown: tuple[AppState, Page], field: str) -> None:
    file = settings.paths.data_dir() / settings.FILE
    for junk in JUNK:
        file.write_text(yaml.safe_dump({"mirror": "https://m.example", field: junk}), "utf-8")
        shown[0].settings = SettingsFile()
        panels = assert_shown(shown, (field, junk))
        if shown[0].settings.broken:
            assert "settings.yaml.broken" in panels
            assert field == "mirror" or shown[0].settings.now.mirror == "https://m.example"
    file.unlink()
    shown[0].settings = SettingsFile()


def test_a_damaged_preset_is_told_once_and_costs_no_other(shown: tuple[AppState, Page]) -> None:
    file = settings.paths.data_dir() / "presets" / "sd15" / "own-<i>.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("title: 5\nset: {lora_rank: x}\n", "utf-8")
    open_project(shown, {"edits": {"base_model": "sd15"}})
    assert "own-&lt;i&gt;.yaml" in assert_shown(shown, file)
    shown[0].dismiss()
    assert "own-&lt;i&gt;.yaml" not in assert_shown(shown, file)
    assert file.read_text("utf-8") == "title: 5\nset: {lora_rank: x}\n"
    file.unlink()


def test_what_nobody_foresaw_costs_one_tab(shown: tuple[AppState, Page],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    app_state, page = shown
    tabs = dict(page.tabs)

    def fail(snap: Any) -> Any:
        raise RuntimeError("<i>unforeseen")
    monkeypatch.setattr(tabs["inference"], "paint", fail)
    monkeypatch.setattr(tabs["dataset"], "fill", fail)
    app_state.touch()
    panels, _ = page._painted(app_state.snapshot())
    assert "card fault" in panels["header"]
    assert "&lt;i&gt;unforeseen" in panels["header"]
    assert "tab-settings-button" in panels
    assert page._filled(app_state.snapshot())


@pytest.mark.parametrize("junk", [{}, {"machine": 5}, {"needs_mb": "x", "machine": {}}, {
    "needs_mb": 5, "machine": {"free_mb": 1, "total_mb": 2}, "verdict": "?", "phases": [],
    "peak": [], "outside": None}, {"needs_mb": 1, "machine": {"free_mb": [], "total_mb": {}}}])
def test_a_plan_of_another_version_is_told(shown: tuple[AppState, Page], junk: Any) -> None:
    assert "be read: it is damaged" in memory_bar(Context(shown[0], "en", shown[1]), junk)


@pytest.mark.parametrize("junk", ["", "{torn", "[]", '{"card": 5}', '{"card": [1, null, {}]}',
                                  '{"card": [{"planned": 0, "reserved": 1}]}',
                                  '{"card": [{"planned": "x", "reserved": 1}]}'])
def test_damaged_figures_of_earlier_runs_are_none(own_home: Path, junk: str) -> None:
    (own_home / "planned-and-real.json").write_text(junk)
    assert history.overhead("card") is None
    history.remember("card", 100, 110, 150)
    assert history.overhead("card") == pytest.approx(0.5)


@pytest.mark.parametrize("junk", ["", "[1]", '{"native": "x"}', "{", "5"])
def test_a_damaged_trace_is_traced_anew(tmp_path: Path, junk: str) -> None:
    (tmp_path / "x.json").write_text(junk)
    assert plan._read(tmp_path / "x.json") is None
