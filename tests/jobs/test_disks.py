"""Disks that are full, folders that go, permissions that are lost in mid-run: one clear note or
fault each, and the last checkpoint stays good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config import TrainConfig, dump_yaml
from core.errors import UserError
from core.jobs import worker
from core.jobs.control import Control
from core.jobs.events import Event, Note, Step
from core.jobs.journal import Journal
from core.jobs.runs import create_run, load_run
from core.lora_files import files
from core.training import checkpoint, output
from core.training.run import train
from tests import tiny
from tests.warm import Warm

Make = Callable[..., TrainConfig]


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Make:
    pictures = tiny.pictures(tmp_path / "pictures")

    def config(name: str = "out", **changes: Any) -> TrainConfig:
        return TrainConfig.model_validate({
            "base_model": str(base), "train_data_dir": str(pictures), "lora_rank": 2,
            "output_dir": str(tmp_path / name), "output_name": "ink", "batch_size": 3,
            "max_train_steps": 4, "save_steps": 1, "learning_rate": 1e-3,
            "save_precision": "fp32"} | changes)
    return config


def notes_of(events: list[Event]) -> list[str]:
    return [e.key for e in events if isinstance(e, Note)]


def equal(a: str | Path, b: str | Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- real file systems, in a namespace of their own ---

ON_A_DISK = """
import json, shutil, subprocess, sys, time
from pathlib import Path
from core.jobs import worker
from core.config import dump_yaml, read_train_config
from core.jobs.control import Control
from core.jobs.events import Note, Step
from core.jobs.runs import create_run, load_run
disk, config, report, how = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]).returncode:
    sys.exit(77)
def run(spoil=lambda: None, **changes):
    folder = create_run("train", dump_yaml(read_train_config(config).with_changes(**changes)), "x",
                        queued=False)
    notes, spoiled = [], []
    def listen(event):
        if isinstance(event, Note):
            notes.append(event.key)
        if isinstance(event, Step) and event.step >= 2 and not spoiled:
            spoiled.append(spoil())
    end = worker.run_job("train", None, folder, Control(), listen)
    view = load_run(folder.name)
    return {"state": end.state, "notes": notes, "lora": end.result.get("lora"),
            "fault": view.fault.code if view.fault else None,
            "fixes": [fix.changes for fix in view.fault.fixes] if view.fault else []}
def fill():
    try:
        (disk / "filler").write_bytes(bytes(10**8))
    except OSError:
        pass
def forbid():                           # busy while a checkpoint is being written
    while subprocess.run(["mount", "-o", "remount,ro", disk], stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.01)
def free():
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    (disk / "filler").unlink(missing_ok=True)
first = run({"full": fill, "read-only": forbid}[how])
free()
second = run(resume=True)
shutil.copy(second["lora"], report.with_suffix(".safetensors"))
report.write_text(json.dumps([first, second]))
"""


@pytest.fixture(scope="module")
def apart() -> Iterator[Warm]:
    if shutil.which("unshare") is None:
        pytest.skip("no namespaces here")
    with Warm(apart=True) as warm:
        yield warm


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["full", "read-only"])
@pytest.mark.parametrize("spare", [True, False])
def test_a_real_disk_in_mid_run(apart: Warm, make: Make, tmp_path: Path, own_home: Path,
                                how: str, spare: bool) -> None:
    """Without a spare folder it ends in a fault; made free again, the run is resumed and ends as
    one that had no trouble."""
    whole = train(make("whole"), lambda event: None, Control())
    disk, report = tmp_path / "disk", tmp_path / "report.json"
    disk.mkdir()
    if not spare:
        (own_home / "rescued").write_text("a file where a folder is wanted")
    (tmp_path / "config.yaml").write_text(dump_yaml(make("disk/out", max_train_steps=4)))
    code = apart.start(ON_A_DISK, str(disk), str(tmp_path / "config.yaml"), str(report), how).wait()
    if code == 77:
        pytest.skip("no file system can be mounted here")
    first, second = json.loads(report.read_text())
    assert "engine.checkpoint_failed" in first["notes"]
    if spare:
        assert (first["state"], first["fault"]) == ("done", None)
        assert "engine.saved_elsewhere" in first["notes"]
        assert equal(first["lora"], whole["lora"])
    else:
        assert (first["state"], first["fault"]) == ("failed", "engine.cant_save")
        assert first["fixes"][0] == {"resume": True}
        assert "output_dir" in first["fixes"][1]
    assert "engine.resumed" in second["notes"]
    assert second["state"] == "done"
    assert equal(report.with_suffix(".safetensors"), whole["lora"])


# --- folders ---

def test_an_output_folder_that_vanishes_comes_back(make: Make, tmp_path: Path) -> None:
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.step == 2:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    result = train(make(), emit, Control())
    assert result["proof"]["ok"]
    assert Path(result["lora"]).exists()


def test_an_output_folder_that_is_a_file_all_along(make: Make, tmp_path: Path,
                                                   own_home: Path) -> None:
    """A stop keeps its state in the spare folder, and a resume finds it there."""
    whole = train(make("whole"), lambda event: None, Control())
    (tmp_path / "out").write_text("a file where a folder is wanted")
    events: list[Event] = []
    control = Control()

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step):
            control.ask("stop")
    stopped = train(make(), emit, control)
    assert 0 < stopped["steps"] < 4
    assert Path(stopped["checkpoint"]).is_relative_to(own_home / "rescued")
    (tmp_path / "out").unlink()
    resumed = train(make(resume=True), events.append, Control())
    assert "engine.resumed" in notes_of(events)
    assert Path(resumed["lora"]).parent == tmp_path / "out"
    assert equal(resumed["lora"], whole["lora"])


def test_pictures_and_base_that_go_in_mid_run_change_nothing(
        make: Make, base: Path, tmp_path: Path) -> None:
    whole = train(make("whole"), lambda event: None, Control())
    own = shutil.copytree(base, tmp_path / "base")
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Step) and event.step == 2:
            shutil.rmtree(tmp_path / "pictures", ignore_errors=True)
            shutil.rmtree(own, ignore_errors=True)
    result = train(make(base_model=str(own), sample_prompts=["a"], sample_every=4,
                        sample_inference_steps=1), emit, Control())
    assert equal(result["lora"], whole["lora"])
    assert {"engine.no_preview", "engine.not_proven"} <= set(notes_of(events))
    assert result["proof"]["ok"] is False


# --- checkpoints ---

def test_a_failed_checkpoint_is_told_and_tried_again(
        make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "AGAIN_S", 0.0)
    real, tries = checkpoint.save, list[int]()

    def save(folder: Path, position: checkpoint.Position, *rest: Any) -> Path:
        tries.append(position.update)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        return real(folder, position, *rest)
    monkeypatch.setattr(checkpoint, "save", save)
    events: list[Event] = []
    result = train(make(max_train_steps=5, save_steps=2), events.append, Control())
    assert notes_of(events).count("engine.checkpoint_failed") == 1
    assert tries[:2] in ([2, 3], [2, 4])
    assert [Path(path).name for path in result["checkpoints"]][-1] == "ink-000005"


def test_a_checkpoint_that_is_torn_is_passed_over(make: Make, tmp_path: Path) -> None:
    whole = train(make("whole"), lambda event: None, Control())
    train(make(keep_checkpoints=0), lambda event: None, Control())
    (tmp_path / "out" / "ink.safetensors").unlink()
    folder = tmp_path / "out" / "checkpoints"
    state = folder / "ink-000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    (folder / "ink-000003" / "state.json").write_text('{"update": 3')
    (folder / ".ink-000005.x.tmp").mkdir()
    (folder / "ink-000002").rename(folder / ".ink-000002.y.old")
    events: list[Event] = []
    result = train(make(resume=True), events.append, Control())
    assert notes_of(events).count("engine.bad_checkpoint") == 2
    assert [e.params["step"] for e in events if isinstance(e, Note)
            and e.key == "engine.resumed"] == [2]
    assert equal(result["lora"], whole["lora"])
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_save_that_fails_anywhere_keeps_the_old_one(
        make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same step saved again, failing at each call in turn."""
    tensor = {"a": torch.zeros(3)}
    state = checkpoint.State(1, tensor, {}, {})
    position = checkpoint.Position(1, "ink", {}, "", 0.0, 0.0)

    def write(path: Path) -> None:
        files.write_lora(path, tensor, {})
    final = checkpoint.save(tmp_path, position, state, write)
    real = getattr(checkpoint.os, name)
    for number in range(20):
        calls = iter(range(100))

        def fail(*rest: Any, at: int = number, calls: Iterator[int] = calls) -> Any:
            if next(calls) == at:
                raise OSError(28, "No space left on device")
            return real(*rest)
        monkeypatch.setattr(checkpoint.os, name, fail)
        try:
            checkpoint.save(tmp_path, position, state, write)
            break
        except OSError:
            assert checkpoint.load(final)[0] == position
        finally:
            monkeypatch.undo()
    assert 1 < number < 19
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["ink-000001"]


def test_the_name_of_a_run_is_no_pattern(tmp_path: Path) -> None:
    tensor = {"a": torch.zeros(3)}
    for name in ("ink[1]", "ink1"):
        checkpoint.save(tmp_path, checkpoint.Position(7, name, {}, "", 0.0, 0.0),
                        checkpoint.State(7, tensor, {}, {}), lambda path: None)
    assert checkpoint.steps_of(tmp_path, "ink[1]") == [7]
    assert [p.name for p in checkpoint.find([tmp_path], "ink[1]")] == ["ink[1]-000007"]


def test_neither_folder_takes_the_file(make: Make, tmp_path: Path, own_home: Path) -> None:
    (tmp_path / "out").write_text("a file where a folder is wanted")
    (own_home / "rescued").write_text("likewise")
    with pytest.raises(UserError) as caught:
        train(make(max_train_steps=1), lambda event: None, Control())
    assert caught.value.code == "engine.cant_save"
    assert all(make().with_changes(**fix.changes) for fix in caught.value.fixes)


# --- the journal's own disk ---

def test_events_wait_while_the_journals_disk_is_full(
        make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real, full = Journal.append, [True] * 5

    def append(self: Journal, event: Event) -> None:
        if full:
            full.pop()
            raise OSError(28, "No space left on device")
        real(self, event)
    monkeypatch.setattr(Journal, "append", append)
    folder = create_run("train", "", "x", queued=False)
    end = worker.run_job("train", make(max_train_steps=2), folder, Control())
    view = load_run(folder.name)
    assert (end.state, view.state, view.total) == ("done", "done", 2)
    assert view.config["output_name"] == "ink"
