from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from core import i18n, paths
from core.dataset import curation
from core.errors import UserError
from core.workspace.project import Project
from gui.state.app_state import Context, Snapshot
from gui.state.dataset import Question
from gui.state.dataset_view import DatasetView, absolute, facts_of
from gui.widgets import dataset_report
from gui.widgets.drop_zone import uploaded
from gui.widgets.picture_grid import (
    PER_PAGE,
    address,
    filtered,
    frame_of,
    grid,
    large,
    of_finding,
    page_of,
)

ENGLISH = Context(None, "en", None)         # type: ignore[arg-type]
CHINESE = Context(None, "zh-CN", None)      # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gui.state.dataset_view.RECHECK_S", 0.02)


def snapshot(folder: Path | str, **edits: Any) -> Snapshot:
    project = Project(edits={"train_data_dir": str(folder), "base_model": "demo"} | edits)
    return Snapshot(project=project, config=project.config(paths.data_dir()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three of the demo's pictures with captions, a copy, a wide one without, a torn one."""
    made = tmp_path / "photos"
    made.mkdir()
    for path in sorted((paths.DEMO / "pictures").glob("0[123]-*")):
        shutil.copy(path, made / path.name)
    shutil.copy(made / "01-banana.png", made / "copy.png")
    noise = Image.effect_noise((320, 150), 90).convert("RGB")
    noise.paste((200, 30, 30), (230, 30, 310, 120))
    noise.save(made / "wide.png")
    (made / "torn.png").write_bytes((made / "02-cherries.png").read_bytes()[:200])
    return made


@pytest.fixture
def album(folder: Path) -> Iterator[DatasetView]:
    made = DatasetView()
    made.follow(snapshot(folder))
    made.wait()
    yield made
    made.wait()


def test_what_is_in_the_folder(album: DatasetView) -> None:
    state = album.now
    assert state.fault is None
    assert [name[:2] for name in state.names] == ["01", "02", "03", "co", "to", "wi"]
    assert state.captions["01-banana.png"].startswith("a banana")
    assert state.captioned == 3
    assert {"torn.png", "copy.png"} <= state.troubled
    assert filtered(state, "uncaptioned") == ("copy.png", "torn.png", "wide.png")
    assert set(filtered(state, "problems")) == state.troubled
    assert filtered(state, "all") == state.names
    assert of_finding(state, "checks.same_file") == ("01-banana.png", "copy.png")
    assert dataset_report.copies(state, "checks.same_file") == ["copy.png"]


def test_nothing_in_the_folder_is_changed(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    album = DatasetView()
    album.follow(snapshot(folder))
    album.wait()
    album.leave_out(["copy.png"])
    album.set_focus("wide.png", (0.8, 0.5))
    album.wait()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_left_out_pictures_stay_in_sight(album: DatasetView, folder: Path) -> None:
    album.leave_out(["copy.png"])
    assert curation.load(folder).left_out == {"copy.png"}
    assert "copy.png" in album.now.names
    assert "copy.png" not in album.now.training
    assert 'class="tile out"' in grid(ENGLISH, album)
    assert filtered(album.now, "left_out") == ("copy.png",)
    album.wait()
    assert of_finding(album.now, "checks.same_file") == ()
    album.take_in(["copy.png"])
    album.wait()
    assert 'class="tile out"' not in grid(ENGLISH, album)
    assert of_finding(album.now, "checks.same_file")


def test_a_point_moves_the_frame_at_once(album: DatasetView) -> None:
    album.show(open="wide.png")
    before = album.now.planned("wide.png")
    assert before is not None
    assert before.cut > 0
    album.set_focus("wide.png", (0.0, 0.0))
    left = album.now.planned("wide.png")
    album.set_focus("wide.png", (1.0, 1.0))
    right = album.now.planned("wide.png")
    assert left is not None
    assert right is not None
    assert (left.crop.left, left.crop.top) == (0, 0)
    assert (right.crop.left, right.crop.top) > (left.crop.left, left.crop.top)
    assert "dot" in large(ENGLISH, album)
    album.set_focus("wide.png", None)
    album.wait()
    assert album.now.planned("wide.png") == before


def test_a_frame_is_in_percent() -> None:
    assert frame_of((10, 0, 60, 50), (100, 50)) == (10, 0, 50, 100)


def test_pages() -> None:
    assert page_of(0, 5) == (0, 1)
    assert page_of(60, 1) == (0, 1)
    assert page_of(61, 1) == (1, 2)
    assert page_of(10_000, 999) == (166, 167)
    assert page_of(100, -3) == (0, 2)


@pytest.mark.parametrize("ctx", [ENGLISH, CHINESE], ids=["en", "zh-CN"])
def test_every_sentence_is_there(album: DatasetView, ctx: Context) -> None:
    album.show(open="wide.png", filter="finding:checks.same_file")
    html = "".join((grid(ctx, album), large(ctx, album), dataset_report.summary(ctx, album),
                    dataset_report.findings(ctx, album), dataset_report.buckets(ctx, album.now)))
    for odd in ("tab_dataset.", "checks.blurred {", "{count}", "{file}", "dataset."):
        assert odd not in html.replace("finding:checks.", "")
    assert ("Keep the best" in html) == (ctx is ENGLISH)


def test_both_languages_have_the_same_keys() -> None:
    for subject in ("tab_dataset", "tab_captioning"):
        keys = [{key for key in i18n.catalogue(language) if key.startswith(f"{subject}.")}
                for language in i18n.LANGUAGES]
        assert keys[0] == keys[1]
        assert len(keys[0]) > 40


def test_names_are_escaped_and_addresses_hold_none(tmp_path: Path) -> None:
    name = 'a"<b>&\'.png' if sys.platform != "win32" else "a&'.png"
    Image.new("RGB", (64, 64), "red").save(tmp_path / name, "PNG")
    album = DatasetView()
    album.follow(snapshot(tmp_path))
    album.wait()
    album.show(open=name)
    html = grid(ENGLISH, album) + large(ENGLISH, album)
    assert "<b>&" not in html
    found = address(album, name)
    assert "png" not in found
    assert str(tmp_path) not in html
    assert album.named(found.split("/")[2].partition("?")[0]) == name
    for strange in ("", "../../etc/passwd", "0" * 20):
        with pytest.raises(UserError):
            album.named(strange)


def test_a_folder_without_pictures_is_told(tmp_path: Path, folder: Path) -> None:
    album = DatasetView()
    album.follow(snapshot(tmp_path / "none"))
    state = album.wait()
    assert state.fault is not None
    assert "none" in dataset_report.summary(ENGLISH, album)
    album.follow(snapshot(folder))
    assert album.wait().fault is None
    album.follow(snapshot(""))
    album.wait()
    assert album.now.names == ()
    assert "No pictures yet" in dataset_report.summary(ENGLISH, album)


def test_only_what_matters_starts_a_look(folder: Path) -> None:
    album = DatasetView()
    album.follow(snapshot(folder))
    album.wait()
    version = album.version
    album.follow(snapshot(folder, learning_rate=1e-3))
    assert album.version == version
    album.follow(snapshot(folder, trigger_word="m1a"))
    album.wait()
    assert any(one.code == "checks.trigger_missing" for one in album.now.report.findings)


def test_facts_need_no_base() -> None:
    assert facts_of(Question()).area == (512, 512)
    assert facts_of(Question(base="demo")).area == (64, 64)
    nowhere = facts_of(Question(base="/nowhere/at/all"))
    assert nowhere.area == (512, 512)
    assert nowhere.fault is not None                        # told, and not as "no base is known"
    assert nowhere.fault.code == "families.missing"
    assert facts_of(Question(rule=(("max_resolution", "256,128"),))).area == (256, 128)
    assert absolute("") == ""


def test_dropped_files_come_into_the_folder(tmp_path: Path, folder: Path) -> None:
    album, seen = DatasetView(), []
    target = tmp_path / "ours"
    album.receive([folder / "01-banana.png", folder / "01-banana.txt"], target, seen.append)
    end = time.monotonic() + 10
    while not seen and time.monotonic() < end:
        time.sleep(0.02)
    assert seen[0].copied == 2
    assert sorted(path.name for path in target.iterdir()) == ["01-banana.png", "01-banana.txt"]
    assert (folder / "01-banana.png").exists()


def test_ten_thousand_pictures_page_at_once(monkeypatch: pytest.MonkeyPatch,
                                            tmp_path: Path) -> None:
    """Names come before captions and measures, and a page costs what its 60 tiles cost."""
    first = tmp_path / "00000.png"
    Image.new("RGB", (8, 8)).save(first)
    for number in range(1, 10_000):
        (tmp_path / f"{number:05d}.png").hardlink_to(first)
    page = tmp_path.parent / "page"             # as many as a page shows
    page.mkdir()
    for number in range(PER_PAGE):
        (page / f"{number}.png").hardlink_to(first)
    monkeypatch.setattr(DatasetView, "_captions", lambda *_: None)
    monkeypatch.setattr(DatasetView, "_check", lambda *_: None)
    costs = []
    for folder, count in ((tmp_path, 10_000), (page, PER_PAGE)):
        view = DatasetView()
        view.follow(snapshot(folder))
        assert len(view.wait().names) == count
        assert grid(ENGLISH, view).count("<li") == PER_PAGE
        seconds = []
        for _ in range(5):
            began = time.process_time()         # of this process alone, however busy the machine
            grid(ENGLISH, view)
            seconds.append(time.process_time() - began)
        costs.append(min(seconds))
    # What is kept of all names (a set, a count) may cost a little; 10,000 tiles cost 160 times.
    assert costs[0] < 20 * costs[1]


def test_only_uploads_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "gradio"
    root.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(root))
    (root / "a.png").write_text("x")
    (tmp_path / "b.png").write_text("x")
    (root / "link.png").symlink_to(tmp_path / "b.png")
    named = [str(root / "a.png"), str(tmp_path / "b.png"), str(root / "link.png"),
             f"{root}/../b.png", "/etc/passwd", 7]
    assert uploaded(json.dumps(named)) == [root / "a.png"]
    assert uploaded("{") == []
    assert uploaded('{"a": 1}') == []
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    assert uploaded(json.dumps(named)) == []


def test_handlers_refuse_strange_input(album: DatasetView) -> None:
    from gui.tabs.dataset import DatasetTab
    tab = object.__new__(DatasetTab)
    tab.dataset, tab.ctx = album, SimpleNamespace(app_state=None)     # type: ignore[assignment]
    for act, id in (("page", "x"), ("step", "7"), ("nonsense", "")):
        page = album.shown.page
        DatasetTab.act(tab, act, id)
        assert album.shown.page == page
    with pytest.raises(UserError):
        DatasetTab.act(tab, "leave_out", "abc")     # type: ignore[arg-type]
    DatasetTab.act(tab, "open", album.key("wide.png"))      # type: ignore[arg-type]
    DatasetTab.act(tab, "step", "-1")                       # type: ignore[arg-type]
    assert album.shown.open == "torn.png"
