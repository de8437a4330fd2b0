"""The caption job on real pictures with a real small captioner (tests/caption_colours.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from captioner import job as runner
from captioner.captions.undo import History, state_dir
from captioner.config import CaptionConfig
from core.config import dump_yaml
from core.errors import UserError
from core.jobs import runs, worker
from core.jobs.control import Control
from core.jobs.events import Captioned, Event, Note, Phase
from core.jobs.manager import JobManager

COLOURS = "tests.caption_colours:Colours"
SAID = {"red": "mostly red, red", "green": "mostly green, green", "blue": "mostly blue, blue",
        "yellow": "mostly yellow, yellow"}
NAMES = {"1.png": "red", "2.png": "green", "sub/3.png": "blue", "sub/4.png": "yellow"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures", NAMES)


def pictures(folder: Path, names: dict[str, str]) -> Path:
    for name, colour in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16), colour).save(folder / name)
    return folder


class Ran:
    def __init__(self, folder: Path, control: Control | None = None,
                 listen: Callable[[Event], None] | None = None, **keys: Any) -> None:
        self.events: list[Event] = []

        def emit(event: Event) -> None:
            self.events.append(event)
            if listen:
                listen(event)

        config = CaptionConfig(folder=str(folder), **{"captioner": COLOURS, **keys})
        self.result = runner.caption(config, emit, control or Control())

    @property
    def notes(self) -> list[str]:
        return [event.key for event in self.events if isinstance(event, Note)]

    @property
    def captioned(self) -> list[str]:
        return [Path(event.path).name for event in self.events if isinstance(event, Captioned)]


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).with_suffix("").as_posix(): path.read_text()
            for path in sorted(folder.rglob("*.txt"))}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def described(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


# --- the plain way ----------------------------------------------------------------------------

def test_a_folder(folder: Path) -> None:
    ran = Ran(folder)
    assert texts(folder) == {name.removesuffix(".png"): SAID[colour]
                             for name, colour in NAMES.items()}
    assert ran.captioned == ["1.png", "2.png", "3.png", "4.png"]
    phases = [(e.name, e.done, e.total) for e in ran.events if isinstance(e, Phase)]
    assert phases[:3] == [("scan", 0, 0), ("load", 0, 0), ("caption", 0, 4)]
    assert phases[-1] == ("caption", 4, 4)
    assert {key: ran.result[key] for key in ("captioned", "kept", "total", "skipped", "left")} == {
        "captioned": 4, "kept": 0, "total": 4, "skipped": [], "left": []}
    assert "state" not in ran.result
    assert not list(state_dir(folder).glob("progress-*"))
    assert leftovers(folder) == []


def test_one_undo_for_the_whole_job(folder: Path) -> None:
    (folder / "1.txt").write_text("mine\ntwo")
    assert Ran(folder, existing="replace").result["flattened"] == 1
    assert len(History(folder).actions()) == 1
    outcome = History(folder).undo()
    assert outcome is not None
    assert len(outcome.done) == 4
    assert texts(folder) == {"1": "mine\ntwo"}


@pytest.mark.parametrize(("existing", "text"), [
    ("keep", "mine, red"), ("add", "mine, red, mostly red"), ("replace", "mostly red, red")])
def test_existing_captions(folder: Path, existing: str, text: str) -> None:
    (folder / "1.txt").write_text("mine, red")
    ran = Ran(folder, existing=existing)
    assert texts(folder)["1"] == text
    assert ran.result["kept"] == (existing == "keep")
    assert texts(folder)["2"] == SAID["green"]


def test_a_dry_run_writes_nothing(folder: Path, own_home: Path) -> None:
    (folder / "1.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ran = Ran(folder, dry_run=True, existing="add", only=["1.png", "2.png"])
    assert ran.result["changes"] == [
        {"path": "1.png", "before": "mine", "after": "mine, mostly red, red"},
        {"path": "2.png", "before": "", "after": SAID["green"]}]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(own_home.rglob("*.jsonl")) == []


def test_rules_trigger_and_tag_options(folder: Path) -> None:
    Ran(folder, only=["1.png"], trigger_word="sks", exclude=["RED"], rules=[
        {"rule": "replace", "find": "mostly", "with": "very (very)"},
        {"rule": "max_tokens", "limit": 40}], escape_brackets=True)
    assert texts(folder) == {"1": r"sks, very \(very\) red"}
    picture = Image.new("RGB", (16, 16), "red")
    picture.paste("blue", (0, 0, 16, 6))
    picture.save(folder / "2.png")
    Ran(folder, only=["2.png"], rules=[{"rule": "sort", "by": "name"}], underscores=True)
    assert texts(folder)["2"] == "blue, mostly red, red"


def test_sorting_by_frequency_is_refused_before_anything(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        Ran(folder, rules=[{"rule": "dedupe"}, {"rule": "sort", "by": "frequency"}])
    assert (caught.value.code, caught.value.params["number"]) == ("rules.needs_all", 2)


def test_two_captioners_as_one(folder: Path) -> None:
    ran = Ran(folder, captioner=f"{COLOURS}+{COLOURS}", only=["1.png"])
    assert texts(folder) == {"1": "mostly red"}             # `red` is said by the sentence
    assert ran.result["captioned"] == 1


@pytest.mark.parametrize("keys", [{"captioner": "nobody"}, {"captioner": "os:system"},
                                  {"captioner": "no.such:Thing"}, {"only": ["9.png"]}])
def test_what_is_not_there(folder: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        Ran(folder, **keys)
    assert caught.value.code in ("captioner.unknown", "runner.no_such_picture")
    assert texts(folder) == {}


def test_an_unreadable_picture_is_told_and_skipped(folder: Path) -> None:
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[:60])
    (folder / "sub/3.png").write_bytes(b"no picture")
    ran = Ran(folder)
    assert ran.result["skipped"] == ["2.png", "sub/3.png"]
    assert list(texts(folder)) == ["1", "sub/4"]
    assert len([key for key in ran.notes if key.startswith("dataset.")]) == 2


def test_nothing_to_say_changes_nothing(folder: Path) -> None:
    (folder / "1.txt").write_text("mine")
    ran = Ran(folder, captioner="tests.caption_colours:Silent", existing="replace",
              trigger_word="sks")
    assert texts(folder) == {"1": "mine"}
    assert ran.result["left"] == list(NAMES)


def test_memory_running_out_halves_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                             tmp_path: Path) -> None:
    monkeypatch.setenv("COLOURS_MOST_AT_ONCE", "1")
    monkeypatch.setenv("COLOURS_LOG", str(tmp_path / "log"))
    ran = Ran(folder, batch_size=4)
    assert ran.notes == ["runner.batch_halved", "runner.batch_halved"]
    assert len(texts(folder)) == 4
    assert described(tmp_path / "log") == 4
    monkeypatch.setenv("COLOURS_MOST_AT_ONCE", "0")
    with pytest.raises(UserError) as caught:
        Ran(folder, existing="replace")
    assert caught.value.code == "captioner.out_of_memory"
    assert texts(folder)["1"] == SAID["red"]


# --- tables -----------------------------------------------------------------------------------

def test_a_table_takes_what_is_new_and_what_was_elsewhere(folder: Path) -> None:
    (folder / "1.txt").write_text("mine")
    ran = Ran(folder, write_to="csv")
    assert (folder / "metadata.csv").read_text() == (
        'filename,prompt\n2.png,"mostly green, green"\nsub/3.png,"mostly blue, blue"\n'
        'sub/4.png,"mostly yellow, yellow"\n1.png,mine\n')
    assert {key: ran.result[key] for key in ("captioned", "copied", "kept")} == {
        "captioned": 3, "copied": 1, "kept": 0}
    History(folder).undo()
    assert not (folder / "metadata.csv").exists()
    assert texts(folder) == {"1": "mine"}


def test_a_table_that_is_there(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "mine", "x": 1}\n')
    ran = Ran(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert rows[0] == {"file_name": "2.png", "text": "mine", "x": 1}
    assert {row["file_name"]: row["text"] for row in rows[1:]} == {
        "1.png": SAID["red"], "sub/3.png": SAID["blue"], "sub/4.png": SAID["yellow"]}
    assert ran.result["kept"] == 1


# --- stop, pause, going on --------------------------------------------------------------------

def test_stop_and_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOURS_LOG", str(tmp_path / "log"))
    (folder / "1.txt").write_text("mine")
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "caption" and event.done == 2:
            control.ask("stop")

    first = Ran(folder, control, stop, existing="add", batch_size=1)
    assert first.result["state"] == "stopped"
    assert texts(folder) == {"1": "mine, mostly red, red", "2": SAID["green"]}
    second = Ran(folder, existing="add", batch_size=2)
    assert second.notes == ["runner.resumed"]
    assert (second.result["resumed"], second.result["captioned"]) == (2, 2)
    assert texts(folder)["1"] == "mine, mostly red, red"                # not added twice
    assert described(tmp_path / "log") == 4                             # not described twice
    assert len(History(folder).actions()) == 1
    History(folder).undo()
    assert texts(folder) == {"1": "mine"}


def test_a_pause_holds(folder: Path) -> None:
    import threading
    control = Control()
    control.ask("pause")
    thread = threading.Thread(target=lambda: Ran(folder, control))
    thread.start()
    time.sleep(0.5)
    assert texts(folder) == {}
    control.ask("go")
    thread.join(20)
    assert len(texts(folder)) == 4


def interrupted(folder: Path, **keys: Any) -> None:
    """A job that breaks off after two pictures."""
    def fall(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "caption" and event.done == 2:
            raise RuntimeError("power cut")
    with pytest.raises(RuntimeError):
        Ran(folder, None, fall, batch_size=1, **keys)


def test_described_but_not_written_is_written_later(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FLUSH_S", 1e9)
    monkeypatch.setenv("COLOURS_LOG", str(tmp_path / "log"))
    interrupted(folder)
    assert texts(folder) == {}
    with open(next(state_dir(folder).glob("progress-*")), "ab") as file:
        file.write(b'{"name":"sub/3.png","si')                          # torn by the cut
    assert len(Ran(folder).captioned) == 4
    assert len(texts(folder)) == 4
    assert described(tmp_path / "log") == 4


def test_an_edit_after_the_interruption_is_kept(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FLUSH_S", 0)
    interrupted(folder, existing="replace")
    (folder / "1.txt").write_text("by hand")
    ran = Ran(folder, existing="replace")
    assert texts(folder)["1"] == "by hand"
    assert ran.result["left"] == ["1.png"]
    assert ran.notes == ["runner.edited", "runner.resumed"]
    assert len(texts(folder)) == 4


def test_undo_after_the_interruption_is_no_edit(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FLUSH_S", 0)
    interrupted(folder, existing="add")
    History(folder).undo()
    assert texts(folder) == {}
    assert Ran(folder, existing="add").result["captioned"] == 4


def test_another_picture_of_the_same_name_is_described_anew(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "FLUSH_S", 1e9)
    interrupted(folder)
    Image.new("RGB", (24, 16), "blue").save(folder / "1.png")
    os.utime(folder / "2.png")                              # touched, but the same
    ran = Ran(folder)
    assert texts(folder)["1"] == SAID["blue"]
    note = next(e for e in ran.events if isinstance(e, Note))
    assert note.params == {"count": 1, "total": 4}


def test_an_edit_in_mid_run_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "2.txt").write_text("old")

    def meddle(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "load":
            (folder / "2.txt").write_text("by hand")
            (folder / "1.txt").write_text("too")

    ran = Ran(folder, None, meddle, existing="replace")
    assert texts(folder)["2"] == "by hand"
    assert texts(folder)["1"] == "too"
    assert sorted(ran.result["left"]) == ["1.png", "2.png"]
    assert ran.notes == ["runner.edited"] * 2
    assert ran.captioned == ["3.png", "4.png"]


# --- faults of the disk -----------------------------------------------------------------------

def test_a_full_disk_in_mid_run(folder: Path, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setenv("COLOURS_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(runner, "FLUSH_S", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "caption" and event.done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))

    try:
        with pytest.raises(UserError) as caught:
            Ran(folder, None, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "captions.disk_full"
    assert set(texts(folder).values()) <= set(SAID.values())            # none half-written
    assert leftovers(folder) == []
    Ran(folder)
    assert len(texts(folder)) == 4
    assert described(tmp_path / "log") <= 5


def test_a_folder_that_can_not_be_written_is_told_before_the_model_loads(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    events: list[Event] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            Ran(folder, None, events.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "captions.disk_full"
    assert [e.name for e in events if isinstance(e, Phase)] == ["scan"]


# --- as a run ---------------------------------------------------------------------------------

@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.JOBS, "caption",
                        worker.Job("captioner.job:load", "captioner.job:caption"))


def test_run_job_reads_its_config_yaml(folder: Path, job: None) -> None:
    config = CaptionConfig(folder=str(folder), captioner=COLOURS, trigger_word="sks: 猫",
                           rules=[{"rule": "remove", "tags": ["red", "blue"]}], only=["1.png"])
    run = runs.create_run("caption", dump_yaml(config), "pictures", queued=False)
    assert runner.load(run / "config.yaml") == config
    end = worker.run_job("caption", None, run, Control())
    assert (end.state, end.result["captioned"]) == ("done", 1)
    assert texts(folder) == {"1": "sks: 猫, mostly red"}
    view = runs.load_run(run.name)
    assert (view.captioned, view.phase, view.phase_total) == (1, "caption", 1)


@pytest.mark.parametrize(("text", "code"), [
    ("folder: x\nbatch_szie: 3\n", "config.unknown_key"), ("batch_size: 3\n", "config.bad_value"),
    ("folder: x\nbatch_size: 0\n", "config.bad_value"), ("- x\n", "config.not_a_mapping"),
    ("folder: x\nbeams: many\n", "config.bad_value")])
def test_a_wrong_config(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        runner.load(tmp_path / "config.yaml")
    assert caught.value.code == code
    assert "{" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_killed_and_resumed_in_a_real_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              kind: str) -> None:
    """SIGKILL in mid-run: no caption lost, none half-written, none done twice."""
    colours = list(SAID)
    names = {f"{n:02}.png": colours[n % 4] for n in range(24)}
    folder = pictures(tmp_path / "many", names)
    for name in names:
        (folder / name).with_suffix(".txt").write_text("mine\n")
    monkeypatch.setenv("COLOURS_SLOW_S", "0.08")
    monkeypatch.setenv("COLOURS_LOG", str(tmp_path / "log"))
    config = CaptionConfig(folder=str(folder), captioner=COLOURS, existing="add", batch_size=2,
                           write_to=kind)  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = [sys.executable, "-m", "tests.caption_colours"]   # by path, tests/captioner were ours
    with JobManager(command=command) as manager:
        first = manager.start(config, job="caption")
        until(lambda: manager.view(first).captioned >= 4)
        os.kill(manager.view(first).pid, signal.SIGKILL)
        until(lambda: manager.view(first).state == "interrupted")
        halfway = described(tmp_path / "log")
        assert halfway < 24
        for path in folder.glob("*.txt"):                   # each is whole: old or new
            assert path.read_text() == "mine\n" or path.read_text().startswith("mine, mostly ")
        second = manager.resume(first)
        view = manager.wait(second, 60)
    assert view.state == "done", view.fault
    assert view.result["resumed"] >= 4
    assert view.result["resumed"] + view.result["captioned"] == 24
    assert described(tmp_path / "log") <= 24 + 2            # at most the batch in hand again
    expected = {name: f"mine, {SAID[colour]}" for name, colour in names.items()}
    assert trained(folder) == expected
    assert leftovers(folder) == []
    assert len(History(folder).actions()) == 1
    History(folder).undo()
    assert trained(folder) == dict.fromkeys(names, "mine")
    assert not (folder / "metadata.csv").exists()


def trained(folder: Path) -> dict[str, str]:
    from core.dataset.image_folder import scan
    return {picture.path.name: picture.caption for picture in scan(folder).pictures}


def until(happened: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
