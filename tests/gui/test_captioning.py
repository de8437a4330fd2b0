from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import captioner
from captioner.captions import search
from captioner.captions.rules import Change
from core import paths
from core.errors import UserError
from core.jobs.events import Phase
from core.jobs.runs import JobView, fold
from core.workspace.project import Project
from gui.state.app_state import Context, Snapshot
from gui.state.dataset_view import DatasetView
from gui.state.page import Page
from gui.tabs import captioning
from gui.tabs.captioning import CaptioningTab, config_of, offers, options_of, progress, status
from gui.widgets import caption_rows
from gui.widgets.caption_rows import are_tags, difference, next_empty, search_of

ENGLISH = Context(None, "en", Page())       # type: ignore[arg-type]
CHINESE = Context(None, "zh-CN", Page())    # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gui.state.dataset_view.RECHECK_S", 0.02)
    monkeypatch.setattr("gui.state.dataset_view.REREAD_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "photos"
    made.mkdir()
    for path in sorted((paths.DEMO / "pictures").glob("0[1234]-*")):
        shutil.copy(path, made / path.name)
    (made / "04-mushroom.txt").unlink()
    return made


def snapshot(folder: Path, *runs: JobView, **more: Any) -> Snapshot:
    project = Project(edits={"train_data_dir": str(folder), "base_model": "demo",
                             "trigger_word": "duskprint style"}, **more)
    return Snapshot(project=project, config=project.config(paths.data_dir()), runs=runs)


@pytest.fixture
def album(folder: Path) -> Iterator[DatasetView]:
    made = DatasetView()
    made.follow(snapshot(folder))
    made.wait()
    yield made
    made.wait()


def texts_of(album: DatasetView) -> dict[str, Any]:
    html = caption_rows.texts(ENGLISH, album, caption_rows.matching(album))
    found = re.search(r'data-texts="([^"]*)"', html)
    assert found
    told: dict[str, Any] = json.loads(unescape(found[1]))
    return told


# --- the editor ---

def test_an_edit_is_written_and_comes_back(album: DatasetView, folder: Path) -> None:
    before = (folder / "01-banana.txt").read_bytes()
    album.write({"01-banana.png": "a ripe banana"})
    assert (folder / "01-banana.txt").read_text().strip() == "a ripe banana"
    assert album.now.undo == "edit"
    album.step("undo")
    assert (folder / "01-banana.txt").read_bytes() == before
    assert (album.now.undo, album.now.redo) == ("", "edit")
    album.step("redo")
    assert album.now.captions["01-banana.png"] == "a ripe banana"
    album.step("undo")
    with pytest.raises(UserError):
        album.step("undo")


def test_a_first_caption_makes_its_file_and_undo_takes_it_away(album: DatasetView,
                                                               folder: Path) -> None:
    album.write({"04-mushroom.png": "a mushroom"})
    assert album.now.captioned == 4
    assert (folder / "04-mushroom.txt").read_text().strip() == "a mushroom"
    album.step("undo")
    assert not (folder / "04-mushroom.txt").exists()


def test_an_edit_of_another_program_is_not_overwritten(album: DatasetView, folder: Path) -> None:
    (folder / "01-banana.txt").write_text("theirs")
    outcome = album.write({"01-banana.png": "mine"})
    assert [swap.picture for swap in outcome.left] == ["01-banana.png"]
    assert (folder / "01-banana.txt").read_text() == "theirs"
    assert album.wait().captions["01-banana.png"] == "theirs"


def test_rows_and_texts_are_apart(album: DatasetView) -> None:
    names = caption_rows.matching(album)
    rows = caption_rows.rows(ENGLISH, album, names)
    told = texts_of(album)
    key = album.key("01-banana.png")
    assert rows.count("<textarea") == 4
    assert told[key]["text"] == album.now.captions["01-banana.png"]
    assert told[key]["text"] not in rows
    album.write({"01-banana.png": 'x "<b>" & 中文'})
    assert texts_of(album)[key]["text"] == 'x "<b>" & 中文'
    again = caption_rows.rows(ENGLISH, album, names)
    assert again[again.index("<ul"):] == rows[rows.index("<ul"):]     # typing goes on undisturbed


def test_tokens_are_clips_own_and_words_until_then(album: DatasetView) -> None:
    key = album.key("01-banana.png")
    assert album.count_tokens is not None
    assert re.fullmatch(r"\d+/225", texts_of(album)[key]["count"])
    album.write({"01-banana.png": "word " * 240})
    assert texts_of(album)[key]["over"]
    album.count_tokens = None
    assert texts_of(album)[key]["count"] == "240 words"
    assert not texts_of(album)[key]["over"]


def test_searching(album: DatasetView) -> None:
    album.show(search="empty")
    assert caption_rows.matching(album) == ("04-mushroom.png",)
    album.show(search=search_of("tags", "duskprint style"))
    assert len(caption_rows.matching(album)) == 3
    album.show(search="", only=("02-cherries.png",))
    assert caption_rows.matching(album) == ("02-cherries.png",)
    album.show(search="tokens >")
    with pytest.raises(UserError):
        caption_rows.matching(album)


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1))
def test_every_tag_finds_itself(word: str) -> None:
    for tag, _ in search.count([word]):
        assert search.find(search_of("tags", tag), {"a.png": word}) == ["a.png"]


def test_next_empty_goes_round() -> None:
    names = [f"{n}" for n in range(50)]
    captions = {name: "x" for name in names}
    assert next_empty(names, captions, 0) is None
    captions["45"] = ""
    assert next_empty(names, captions, 0) == 2
    captions["3"] = ""
    assert next_empty(names, captions, 2) == 0
    assert next_empty([], {}, 0) is None


def test_statistics_count_tags_or_words(album: DatasetView) -> None:
    html = caption_rows.statistics(ENGLISH, album.now)
    assert "duskprint style <small>3</small>" in html
    assert are_tags(["a, b, c", "d, e"])
    assert not are_tags(["a long sentence that tells of many things in a row"])


@given(st.text(), st.text())
def test_a_difference_keeps_both_texts(before: str, after: str) -> None:
    html = difference(before, after)
    old = re.sub(r"<ins>.*?</ins>|</?del>", "", html, flags=re.DOTALL)
    new = re.sub(r"<del>.*?</del>|</?ins>", "", html, flags=re.DOTALL)
    assert unescape(old).split() == before.split()
    assert unescape(new).split() == after.split()


def test_changes_are_counted() -> None:
    html = caption_rows.changes(ENGLISH, [Change("a.png", "a girl", "a <woman>")], 9)
    assert "1 of 9" in html
    assert "<del>girl</del> <ins>a" not in html
    assert "&lt;woman&gt;" in html


# --- rules, over the tab's own handlers ---

@pytest.fixture
def tab(album: DatasetView, folder: Path, monkeypatch: pytest.MonkeyPatch) -> CaptioningTab:
    """The tab without a page: its handlers need the album and the project only."""
    monkeypatch.setattr(captioning.gr, "Info", lambda *_, **__: None)
    made = object.__new__(CaptioningTab)
    app_state = SimpleNamespace(snapshot=lambda: snapshot(folder),
                                projects=SimpleNamespace(update=lambda how: None))
    made.ctx, made.dataset = Context(app_state, "en", Page()), album
    made.would = "would"                    # type: ignore[assignment]
    return made


def test_rules_are_previewed_then_applied(tab: CaptioningTab, album: DatasetView) -> None:
    before = dict(album.now.captions)
    html = tab.try_rules("replace:a banana=>one banana", False)["would"]
    assert "1 of 3" in html
    assert album.now.captions == before
    tab.apply_rules("replace:a banana=>one banana\n\n  dedupe", True)
    assert album.now.captions["01-banana.png"] == "duskprint style, one banana"
    assert album.now.captions["04-mushroom.png"] == ""      # those without stay without
    tab.act("undo", "")
    assert album.now.captions == before


def test_bad_rules_are_named(tab: CaptioningTab) -> None:
    for text in ("nonsense:x", "replace:a", "regex:(=>x", ""):
        with pytest.raises(UserError):
            tab.try_rules(text, False)


def test_a_tag_is_removed_everywhere(tab: CaptioningTab, album: DatasetView) -> None:
    tab.act("remove_tags", "Duskprint_Style")
    assert not any("duskprint" in text for text in album.now.captions.values())
    tab.act("undo", "")
    assert sum("duskprint" in text for text in album.now.captions.values()) == 3


def test_saving_a_row(tab: CaptioningTab, album: DatasetView) -> None:
    tab.act("save", f"{album.key('02-cherries.png')}  two \n cherries ")
    assert album.now.captions["02-cherries.png"] == "two cherries"
    with pytest.raises(UserError):
        tab.act("save", "0123 text")


# --- the job ---

def test_every_captioner_can_be_chosen() -> None:
    values = {value.partition("=")[0] for kind in ("sentence", "tags")
              for _, value in offers(ENGLISH, kind)} - {""}
    assert values == set(captioner.REGISTRY)
    assert all(label for kind in ("sentence", "tags") for label, _ in offers(CHINESE, kind))


def test_the_config_that_a_job_gets(album: DatasetView, folder: Path) -> None:
    kept = options_of(snapshot(folder))
    config = config_of(kept, album, "m1a", "")
    assert (config.captioner, config.trigger_word, config.only) == ("blip+clip", "m1a", [])
    assert config.models == {"blip": "demo", "clip": "demo"}
    album.leave_out(["02-cherries.png"])
    config = config_of(kept | {"sentence": "endpoint=auto", "tags": ""}, album, "", "")
    assert (config.captioner, config.models) == ("endpoint", {})
    assert "02-cherries.png" not in config.only
    assert len(config.only) == 3
    with pytest.raises(UserError):
        config_of(kept | {"sentence": "", "tags": ""}, album, "", "")
    with pytest.raises(UserError):
        config_of(kept, DatasetView(), "", "")


def test_what_the_project_keeps_may_be_anything(folder: Path) -> None:
    odd = snapshot(folder, tabs={"captioning": {"sentence": 7, "tags": "", "more": 1}})
    assert options_of(odd)["sentence"] == "blip=demo"
    assert options_of(odd)["tags"] == ""
    assert "more" not in options_of(odd)


@pytest.mark.parametrize("ctx", [ENGLISH, CHINESE], ids=["en", "zh-CN"])
def test_the_job_is_told(ctx: Context, folder: Path) -> None:
    view = JobView(id="r", folder=folder, job="caption", name="photos", state="running",
                   started=100.0, config={"folder": str(folder)})
    view = fold(view, replace(Phase(name="caption", done=2, total=8), at=104.0))
    snap = snapshot(folder, view)
    assert "2.0" in progress(ctx, snap, view)
    assert "12" in progress(ctx, snap, view)            # seconds left
    assert 'aria-valuenow="25"' in status(ctx, snap, view, options_of(snap))
    done = replace(view, state="done", result={"captioned": 8, "kept": 1, "left": ["a"]})
    html = status(ctx, snap, done, options_of(snap)) + status(ctx, snap, None, options_of(snap))
    assert "8" in html
    assert "68" in html                                 # the demo captioner says what it knows
    assert "tab_captioning" not in html


@pytest.mark.parametrize("ctx", [ENGLISH, CHINESE], ids=["en", "zh-CN"])
def test_what_failed_is_listed_and_tried_again(ctx: Context, folder: Path) -> None:
    failed: list[Any] = [
        {"picture": f"{n}.png", "code": "endpoint.unclear", "params": {"answer": "<b>1. A?"}}
        for n in range(30)]
    view = JobView(id="run1", folder=folder, job="caption", name="photos", state="done",
                   started=100.0, config={"folder": str(folder)},
                   result={"captioned": 5, "kept": 0, "failed": failed})
    html = status(ctx, snapshot(folder, view), view, options_of(snapshot(folder)))
    assert "0.png" in html
    assert "&lt;b&gt;1. A?" in html
    assert html.count(".png") == captioning.MOST_FAILED
    assert re.search(r'data-act="again"[^>]*data-id="run1"', html)
    assert "endpoint." not in html
    # Of a record that another program has written.
    odd = replace(view, result={"failed": [3, {}, {"picture": None, "params": 5}]})
    assert "again" in status(ctx, snapshot(folder, odd), odd, options_of(snapshot(folder)))


def test_trying_again_starts_the_same_job(tab: CaptioningTab, folder: Path) -> None:
    config = {"folder": str(folder), "captioner": "endpoint", "existing": "replace"}
    started: list[Any] = []
    tab.ctx.app_state.jobs = SimpleNamespace(       # type: ignore[assignment]
        view=lambda id: JobView(id=id, folder=folder, job="caption", name="n", config=config),
        start=lambda config, name, job: started.append((config, name, job)))
    tab.act("again", "run1")
    config_, name, job = started[0]
    assert (name, job) == ("n", "caption")
    assert config_ == captioner.config.CaptionConfig(**config)


def test_captions_of_a_running_job_come_in(album: DatasetView, folder: Path) -> None:
    view = JobView(id="r", folder=folder, job="caption", state="running",
                   config={"folder": str(folder)})
    (folder / "04-mushroom.txt").write_text("a mushroom")
    album.follow(snapshot(folder, replace(view, captioned=1)))
    album.wait()
    assert album.now.captions["04-mushroom.png"] == "a mushroom"
    (folder / "04-mushroom.txt").write_text("a red mushroom")
    album.follow(snapshot(folder, replace(view, captioned=1, state="done")))
    end = time.monotonic() + 10
    while album.now.captions["04-mushroom.png"] != "a red mushroom" and time.monotonic() < end:
        time.sleep(0.02)
    assert album.now.captions["04-mushroom.png"] == "a red mushroom"


def test_no_torch_comes_in(folder: Path) -> None:
    """Folder, check, captions and exact tokens, all in a process that has no torch."""
    code = (f"import sys; from pathlib import Path\n"
            f"from gui.state.dataset_view import DatasetView\n"
            f"from gui.state.dataset import Question\n"
            f"import gui.tabs.dataset, gui.tabs.captioning\n"
            f"album = DatasetView(); album._ask(Question(folder={str(folder)!r}, base='demo'))\n"
            f"album.wait(); assert album.now.report and album.count_tokens('a b') == 2\n"
            f"assert 'torch' not in sys.modules, 'torch'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
