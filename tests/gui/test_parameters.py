"""The Parameters tab without a browser: bases, diagnostics, records, presets, closing."""

from __future__ import annotations

import getpass
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from core import i18n, paths
from core.base_models import hub
from core.base_models.catalog import catalogue
from core.base_models.search import Found
from core.config import TrainConfig
from core.errors import UserError
from core.jobs import bug_report, runs
from core.jobs import history as records
from core.jobs.control import Control
from core.jobs.events import JobEnded, Phase
from core.jobs.journal import Journal
from core.jobs.manager import JobManager
from core.memory import service
from core.workspace import presets
from gui import actions, checklist
from gui.state import form
from gui.state.app_state import AppState, Context
from gui.state.base_models import BaseModels
from gui.state.desktop import Desktop
from gui.state.page import Page
from gui.widgets.base_chooser import base_chooser
from gui.widgets.close_dialog import close_dialog
from gui.widgets.onboarding import first_start
from gui.widgets.runs.history import history
from tests.gui.test_views import Silent, Tags


@pytest.fixture
def app_state(own_home: Path) -> Iterator[AppState]:
    made = AppState(JobManager(dispatch=False), Silent())
    yield made
    made.close()


@pytest.fixture(params=i18n.LANGUAGES)
def ctx(app_state: AppState, request: pytest.FixtureRequest) -> Context:
    return Context(app_state, request.param, Page())


def until(question: Any) -> Any:
    deadline = time.monotonic() + 20
    while not (answer := question()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return answer


def whole(text: str) -> str:
    """Balanced, and no sentence is missing."""
    Tags(text)
    for subject in ("gui.", "base_model.", "first_start.", "close.", "run_history.", "presets."):
        assert subject not in text.replace("LoRA.", "")
    return text


# --- bases ---

def test_bases_are_listed_with_what_stands_against_them(ctx: Context, tmp_path: Path) -> None:
    app_state = ctx.app_state
    good = Found(tmp_path / "<b>good.safetensors", "sd15", 2100)
    refused = Found(tmp_path / "c", "chroma", 6900, "other", "chroma")
    app_state.bases._set(found=(good, refused), searched=True)
    text = whole(base_chooser(ctx, app_state.snapshot()))
    assert "<b>good" not in text
    assert "Chroma" in refused.why(ctx.language)
    assert refused.why(ctx.language) in text
    assert [b["data-id"] for b in Tags(text).buttons() if b["data-act"] == "use_base"] == ["0"]
    actions.act(ctx, "use_base", "0")
    assert app_state.projects.now.edits["base_model"] == str(good.path)
    actions.act(ctx, "use_base", "99")
    actions.act(ctx, "use_base", "x")


def test_a_download_shows_its_licence_first_and_then_is_the_base(
        ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    app_state, entry = ctx.app_state, next(one for one in catalogue() if one.purpose == "base")
    actions.act(ctx, "ask", entry.repo)
    text = whole(base_chooser(ctx, app_state.snapshot()))
    assert entry.licence in text
    assert app_state.bases.now.fetch is None            # nothing is fetched by being asked about

    def fetch(repo: str, emit: Any, control: Control, mirror: str) -> Path | None:
        emit(Phase(name="download", done=5, total=10))
        while not control.stopping:
            time.sleep(0.01)
        return None
    monkeypatch.setattr(hub, "fetch", fetch)
    actions.act(ctx, "fetch", entry.repo)
    until(lambda: app_state.bases.now.fetch and app_state.bases.now.fetch.done == 5)
    assert "5 MB" in whole(base_chooser(ctx, app_state.snapshot()))
    with pytest.raises(UserError):
        actions.act(ctx, "fetch", entry.repo)
    actions.act(ctx, "stop_fetch", "")
    until(lambda: app_state.bases.now.fetch and app_state.bases.now.fetch.over)
    whole(base_chooser(ctx, app_state.snapshot()))

    monkeypatch.setattr(hub, "fetch", lambda *a: paths.DEMO / "base")
    actions.act(ctx, "fetch", entry.repo)
    until(lambda: app_state.projects.now.edits["base_model"] == str(paths.DEMO / "base"))
    with pytest.raises(UserError):
        actions.act(ctx, "fetch", "someone/else")


def test_offline_a_download_says_so_in_one_sentence(ctx: Context) -> None:
    entry = next(one for one in catalogue() if one.purpose == "base")
    actions.act(ctx, "fetch", entry.repo)             # HF_HUB_OFFLINE is set for all tests
    fetch = until(lambda: ctx.app_state.bases.now.fetch and ctx.app_state.bases.now.fetch.over
                  and ctx.app_state.bases.now.fetch)
    assert fetch.fault is not None
    fault = fetch.fault
    assert ctx.error_text(fault) in i18n.tr(fault.code, fault.params, ctx.language)
    assert fetch.fault.code in ("hub.offline", "hub.unreachable")
    whole(base_chooser(ctx, ctx.app_state.snapshot()))


def test_a_search_runs_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, calls = threading.Event(), []

    def search(places: object) -> Iterator[Found]:
        calls.append(places)
        gate.wait(10)
        yield Found(tmp_path, "sd15", 1)
    monkeypatch.setattr("core.base_models.search.usual_places", lambda extra: list(extra))
    monkeypatch.setattr("core.base_models.search.search", search)
    bases = BaseModels(lambda: None)
    bases.look(("a",))
    bases.look(("b",))
    gate.set()
    until(lambda: bases.now.searched)
    assert calls == [["a"]]
    assert len(bases.now.found) == 1


def test_what_is_no_base_blocks_the_start(ctx: Context, tmp_path: Path) -> None:
    from tests.base_models.test_search import safetensors
    lora = safetensors(tmp_path / "x.safetensors", **{"lora_unet_x.lora_down.weight": (2, 2)})
    ctx.app_state.projects.edit(base_model=str(lora), train_data_dir=str(tmp_path))
    assert "x.safetensors" in checklist.html(ctx, ctx.app_state.snapshot())
    assert not checklist.ready(ctx, ctx.app_state.snapshot())


# --- first start, closing ---

def test_first_start_is_shown_once(ctx: Context) -> None:
    app_state = ctx.app_state
    until(lambda: app_state.snapshot().machine or app_state.touch())
    for step in (1, 2, 3):
        actions.act(ctx, "step", str(step))
        text = whole(first_start(ctx, app_state.snapshot(), []))
        assert len([b for b in Tags(text).buttons() if b["class"] == "act primary"]) == 1
    actions.act(ctx, "step", "x")
    whole(first_start(ctx, app_state.snapshot(), []))
    actions.act(ctx, "welcomed", "")
    assert first_start(ctx, app_state.snapshot(), []) == ""


class Fake:
    def __init__(self) -> None:
        self.closed = threading.Event()

    def choose(self, folder: bool) -> str:
        return str(Path("/") / ("folder" if folder else "file"))

    def close(self) -> None:
        self.closed.set()


def test_a_native_window_may_close_only_when_all_was_asked() -> None:
    busy, gate = [True], threading.Event()
    desktop = Desktop(lambda: None, lambda: busy[0])
    window = desktop.window = Fake()
    assert not desktop.may_close()
    assert desktop.state == "asked"
    desktop.stay()
    assert desktop.state == ""
    desktop.stop_first(lambda: gate.wait(10) and None)
    desktop.stay()                                  # called off while it was stopping
    gate.set()
    time.sleep(0.1)
    assert not desktop.quit.is_set()
    desktop.stop_first(lambda: None)
    assert desktop.quit.wait(10)
    assert window.closed.wait(10)
    assert desktop.may_close()
    busy[0] = False
    assert Desktop(lambda: None, lambda: busy[0]).may_close()


def test_dialogs_of_the_system_only_where_there_is_a_window(ctx: Context) -> None:
    with pytest.raises(UserError):
        actions.act(ctx, "native_pictures", "")
    ctx.app_state.desktop.window = Fake()
    actions.act(ctx, "native_pictures", "")
    assert ctx.app_state.projects.now.edits["train_data_dir"] == str(Path("/folder").absolute())
    actions.act(ctx, "native_file", "")
    assert ctx.app_state.projects.now.edits["base_model"].endswith("file")


@pytest.mark.parametrize("state", ["asked", "stopping", "closed"])
def test_the_question_is_a_dialog(ctx: Context, state: Any) -> None:
    ctx.app_state.desktop._set(state)
    text = whole(close_dialog(ctx, ctx.app_state.snapshot()))
    assert text.startswith("<dialog")
    assert ("data-cancel" in text) == (state != "closed")


# --- records, presets, diagnostics, sentences ---

def finished(name: str) -> str:
    folder = runs.create_run("train", "base_model: demo\nlora_rank: 5\n", name)
    with Journal(folder) as journal:
        journal.append(JobEnded(state="done"))
    return folder.name


def test_records_go_and_come_back_page_by_page(ctx: Context) -> None:
    app_state, ids = ctx.app_state, [finished(f"n{n:02d}") for n in range(12)]
    until(lambda: len(app_state.jobs.views()) == 12)
    text = whole(history(ctx, app_state.snapshot()))
    assert "n11" in text
    assert "n00" not in text
    actions.act(ctx, "page", "1")
    assert "n00" in whole(history(ctx, app_state.snapshot()))
    actions.act(ctx, "page", "99")
    assert "n00" in whole(history(ctx, app_state.snapshot()))
    actions.act(ctx, "remove", ids[0])
    until(lambda: len(app_state.jobs.views()) == 11)
    assert "<b>n00</b>" not in history(ctx, app_state.snapshot())
    actions.act(ctx, "restore", ids[0])
    until(lambda: len(app_state.jobs.views()) == 12)
    with pytest.raises(UserError):
        records.restore("../runs")
    waits = app_state.jobs.start(TrainConfig())
    with pytest.raises(UserError):
        actions.act(ctx, "remove", waits)
    for id in [*ids, "gone"]:
        actions.act(ctx, "compare", id)
    assert app_state.projects.now.tabs["runs"]["compare"] == [ids[-1], "gone"]
    whole(history(ctx, app_state.snapshot()))


def test_the_queue_is_kept_in_the_order_given(app_state: AppState) -> None:
    ids = [app_state.jobs.start(TrainConfig(), name=name) for name in "abc"]
    app_state.jobs.move_up(ids[2])
    app_state.jobs.move_up(ids[2])
    app_state.jobs.move_up(ids[2])
    later = app_state.jobs.start(TrainConfig(), name="d")
    assert [view.id for view in app_state.jobs.queue()] == [ids[2], ids[0], ids[1], later]
    assert [view.id for view in app_state.snapshot().queued] == [ids[2], ids[0], ids[1], later]
    (paths.runs_dir() / records.ORDER).write_text("{")
    assert [view.id for view in app_state.jobs.queue()] == [*ids, later]


def test_own_presets_keep_how_and_not_what(own_home: Path) -> None:
    config = TrainConfig(lora_rank=13, train_data_dir="/x", base_model="/y", seed=5)
    made = presets.save_user_preset(" My  way ", "sd15", "style", config,
                                    presets.needs_of(5000, True))
    again = presets.find("my way", "sd15")
    assert again == made
    assert again.set == {"lora_rank": 13, "seed": 5}
    assert again.needs.vram_gb == 6
    same = presets.save_user_preset("My way", "sd15", "style", config, again.needs)
    assert same.path == made.path
    presets.rename_user_preset(made, "Other")
    assert presets.find("Other", "sd15").slug == made.slug
    presets.remove_user_preset(made)
    with pytest.raises(UserError):
        presets.find("Other", "sd15")
    presets.restore_user_preset("sd15", made.slug)
    assert presets.is_user_preset(presets.find("Other", "sd15"))
    with pytest.raises(UserError):
        presets.save_user_preset("  ", "sd15", "style", config, again.needs)


def test_a_preset_that_goes_or_comes_back_is_planned_anew(
        ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    projects, asked = ctx.app_state.projects, []
    projects.edit(base_model="sd15")
    made = presets.save_user_preset("Mine", "sd15", "style", TrainConfig(lora_rank=13),
                            presets.needs_of(5000, True))
    actions.choose_preset(ctx.app_state, made.slug)
    monkeypatch.setattr(ctx.app_state.planning, "ask", asked.append)
    actions.act(ctx, "remove_preset", made.slug)
    actions.act(ctx, "restore_preset", f"sd15/{made.slug}")
    assert projects.now.preset == made.slug
    assert [request["config"].get("lora_rank") for request in asked] == [None, 13]


def test_diagnostics_name_nobody(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    monkeypatch.setattr(getpass, "getuser", lambda: "mia")
    told = bug_report.without_names(
        f"/home/me/pictures {own_home}/runs C:\\Users\\Mia Li\\x.png 'D:/Users/you/y' amiable mia")
    assert told == ("~/pictures <data>/runs C:\\Users\\<user>\\x.png 'D:/Users/<user>/y' "
                    "amiable <user>")


@pytest.mark.parametrize("values", [{"lora_rank": 9999}, {"learning_rate": "x"}, {"optimizer": "y"},
                                    {"max_resolution": "big"}, {"unknown": 1}])
def test_what_a_config_cannot_be_is_said_in_the_pages_language(ctx: Context,
                                                               values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(values)
    said = form.error_text(ctx, caught.value)
    assert "Input should" not in said
    assert "gui." not in said
    assert str(next(iter(values.values()))) in said


@pytest.mark.thorough
def test_the_planner_weighs_what_helps() -> None:
    config = {"base_model": "demo", "train_data_dir": str(paths.DEMO / "pictures"),
              "device": "cpu", "batch_size": 4}
    found = service.answer({"config": config, "symptom": "oom_start"})["remedies"]
    json.dumps(found)
    assert any(one["changes"].get("batch_size") == 2 and one["saves_mb"] > 0 for one in found)
    weak = service.answer({"config": config, "symptom": "weak", "updates": 100})["remedies"]
    assert any("lora_rank" in one["changes"] for one in weak)


def test_what_may_help_is_there_before_the_planner_answers(ctx: Context) -> None:
    from core.jobs.events import Faulted, JobStarted
    from gui.tabs.run import head
    config = {"base_model": "demo", "batch_size": 4}
    folder = runs.create_run("train", "base_model: demo\nbatch_size: 4\n", "big")
    with Journal(folder) as journal:
        journal.append(JobStarted(job="train", pid=1, config=config))
        journal.append(Faulted(code="jobs.out_of_gpu_memory", params={"reason": "x"}))
        journal.append(JobEnded(state="failed"))
    app_state = ctx.app_state
    view = until(lambda: next((one for one in app_state.jobs.views() if one.over), None))
    text = whole(head(ctx, view, app_state.snapshot()))
    ids = [str(b["data-id"]) for b in Tags(text).buttons() if b.get("data-act") == "remedy"]
    assert f"{view.id}/oom_start/advisor.do_batch" in ids
    with app_state.planning._changed:
        app_state.planning._mended(f"{view.id}/oom_start", [])
    assert "remedy" not in head(ctx, view, app_state.snapshot())
