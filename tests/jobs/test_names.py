"""Names are taken, not looked for: runs and programs that start together, and that are killed."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image, ImageStat
from safetensors.torch import load_file

from core import paths
from core.config import TrainConfig, dump_yaml
from core.errors import UserError
from core.inference import trash
from core.jobs import runs
from core.jobs.control import Control
from core.jobs.events import Checkpoint, Event, Note, Step
from core.jobs.journal import Journal
from core.jobs.manager import JobManager
from core.lora_files.metadata import CONFIG_KEY
from core.safetensors_header import read_header
from core.training import checkpoint
from core.training.output_names import Output
from core.training.run import train
from tests import tiny
from tests.warm import Warm

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, fork")


def silent(event: Event) -> None:
    pass


# --- files ---

MANY = """
import os, sys, time
from pathlib import Path
from core import paths
folder, me, links = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if links == "none":
    def none(*_, **__):
        raise PermissionError(1, "this file system knows no links")
    os.link = none
(folder / f"ready-{me}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for n in range(40):
    paths.create(folder / "a.txt.yaml", lambda path: path.write_text(f"{me} {n} " * 200))
"""


@pytest.mark.parametrize("links", ["some", "none"])
def test_programs_that_want_one_name_get_one_each(tmp_path: Path, links: str) -> None:
    """Real processes; on file systems without links too, where the name is taken first."""
    programs = [subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path), str(n), links],
                                 cwd=ROOT) for n in range(4)]
    while len([*tmp_path.glob("ready-*")]) < 4:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [program.wait() for program in programs] == [0] * 4
    files = sorted(tmp_path.glob("*.yaml"))
    assert {path.name for path in files} == {
        "a.txt.yaml", *(f"a.txt-{n}.yaml" for n in range(2, 161))}
    contents = [path.read_text() for path in files]
    assert sorted(contents) == sorted(f"{me} {n} " * 200 for me in range(4) for n in range(40))
    assert not [*tmp_path.glob(".*")]


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").write_text("mine")
    for name in ("x", "link", "folder"):
        fresh = tmp_path / "fresh"
        fresh.write_text("other")
        with pytest.raises(FileExistsError):
            paths.move(fresh, tmp_path / name)
        made = tmp_path / "made"
        made.mkdir()
        with pytest.raises(FileExistsError):
            paths.move(made, tmp_path / name)
        assert paths.place(made, tmp_path / name).name == f"{name}-2"
        assert paths.place(fresh, tmp_path / name).name == f"{name}-3"
    assert (tmp_path / "x").read_text() == (folder / "inside").read_text() == "mine"


def test_the_same_file_is_enough(tmp_path: Path) -> None:
    for text in ("one", "two", "one", "two", "three"):
        paths.create(tmp_path / "a.png", lambda path, text=text: path.write_text(text), once=True)
    assert [(tmp_path / f"a{end}.png").read_text() for end in ("", "-2", "-3")] == [
        "one", "two", "three"]
    assert len([*tmp_path.iterdir()]) == 3


def test_a_deleted_picture_comes_back_only_to_a_free_name(tmp_path: Path) -> None:
    file = tmp_path / "00001.png"
    file.write_text("first")
    gone = trash.discard(file)
    file.write_text("second")
    with pytest.raises(FileExistsError):
        trash.restore(gone, file)
    assert trash.discard(file).name == "00001-2.png"
    trash.restore(gone, file)
    assert file.read_text() == "first"


# --- claims ---

@pytest.mark.thorough
@posix
def test_a_thousand_claims_under_fire(tmp_path: Path, own_home: Path) -> None:
    """Processes take names, make a file of each and let go; they are killed at random. No two
    ever hold a name at once, and what dead ones held is free again."""
    config, dice = TrainConfig(output_dir=str(tmp_path), output_name="ink"), random.Random(7)
    children: dict[int, None] = {}
    for number in range(60):
        if not (pid := os.fork()):
            _take_names(tmp_path, config, number)
        children[pid] = None
        time.sleep(dice.uniform(0, 0.03))
        if dice.random() < 0.6:
            os.kill(dice.choice([*children]), 9)
        for one in [*children]:
            if os.waitpid(one, os.WNOHANG)[0]:
                del children[one]
    for one in children:
        os.waitpid(one, 0)
    assert not (tmp_path / "twice").exists(), (tmp_path / "twice").read_text()
    made = [*tmp_path.glob("*.safetensors")]
    assert len(made) > 60
    assert len({path.read_text() for path in made}) == len(made)
    with Output(tmp_path, config, silent) as last:          # gaps are of dead claims: free
        last.rename()
        numbers = {1 if path.stem == "ink" else int(path.stem[4:]) for path in made}
        free = next(n for n in range(1, 10**6) if n not in numbers)
        assert last.name == ("ink" if free == 1 else f"ink-{free}")


def _take_names(folder: Path, config: TrainConfig, number: int) -> None:
    """In a child: never returns."""
    try:
        for n in range(20):
            with Output(folder, config, silent) as one:
                one.rename()
                with open(folder / f"{one.name}.safetensors", "x") as file:
                    file.write(f"{number} {n}")
    except FileExistsError as error:
        (folder / "twice").write_text(str(error))
    finally:
        os._exit(0)


def test_a_claim_of_a_process_that_is_gone_is_free(tmp_path: Path) -> None:
    """One that was killed takes its name with it; one that lives keeps it. A pid alone says
    nothing: another process may have it by now."""
    config = TrainConfig(output_dir=str(tmp_path), output_name="ink")
    claim = tmp_path / ".ink.taken"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {"pid": child.pid, "create_time": psutil.Process(child.pid).create_time(),
             "host": platform.node()}
    for told, gone, name in ((owner, False, "ink-2"), (owner | {"create_time": 1.0}, False, "ink"),
                             (owner, True, "ink")):
        if gone:
            child.kill()
            child.wait()
        claim.write_text(json.dumps(told))
        with Output(tmp_path, config, silent) as one:
            one.rename()
            assert one.name == name


def test_a_claim_of_another_computer_or_without_content(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path), output_name="ink")
    claim = tmp_path / ".ink.taken"
    claim.write_text(json.dumps({"pid": 1, "create_time": 1.0, "host": "elsewhere"}))
    with Output(tmp_path, config, silent) as one:
        one.rename()
        assert one.name == "ink-2"
        with pytest.raises(UserError) as caught:
            one.go_on_as("ink", "1")
        assert caught.value.code == "engine.still_going"
        assert str(claim) in str(caught.value)
    claim.write_text("")                                    # just being written
    with Output(tmp_path, config, silent) as one:
        one.rename()
        assert one.name == "ink-2"
    os.utime(claim, (1, 1))                                 # long ago
    with Output(tmp_path, config, silent) as one:
        one.rename()
        assert one.name == "ink"
    assert not [*tmp_path.iterdir()]


def test_a_claim_that_went_with_its_folder_is_not_another_ones(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    config = TrainConfig(output_dir=str(folder), output_name="ink")
    with Output(folder, config, silent) as first:
        first.rename()
        (folder / ".ink.taken").unlink()
        folder.rmdir()
        with Output(folder, config, silent) as second:
            second.rename()
            assert second.name == "ink"
            first.__exit__()
            assert (folder / ".ink.taken").exists()


# --- runs ---

@pytest.fixture
def config(base: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(tiny.pictures(tmp_path / "p", 6)),
        "output_dir": str(tmp_path / "out"), "output_name": "ink", "lora_rank": 2,
        "max_train_steps": 8, "learning_rate": 1e-3, "save_steps": 2, "keep_checkpoints": 2,
        "save_precision": "fp32", "sample_prompts": ["red disc"], "sample_every": 8,
        "sample_inference_steps": 1, "sample_size": "64,64"})


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def equal(a: str | Path, b: str | Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


TOGETHER = """
import sys, time
from pathlib import Path
from core.jobs import worker
from core.jobs.control import Control
run, go = Path(sys.argv[1]), Path(sys.argv[2])
go.with_name(f"{go.name}-{run.name}").touch()
while not go.exists():
    time.sleep(0.0005)
sys.exit(worker.run_job("train", None, run, Control()).state != "done")
"""


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Warm, Warm]]:
    with Warm() as first, Warm() as second:
        yield first, second


@pytest.mark.thorough
@posix
def test_two_runs_of_one_config_at_once(two: tuple[Warm, Warm], config: TrainConfig,
                                        tmp_path: Path) -> None:
    """Each time two LoRAs, checkpoints and previews, each as of a run alone; one of them is
    killed half the times, goes on, and comes to the same."""
    alone = [train(config.with_changes(seed=seed, output_dir=str(tmp_path / f"alone{seed}")),
                   silent, Control()) for seed in (1, 2)]
    dice = random.Random(3)
    for turn in range(4):
        out = tmp_path / f"together{turn}"
        started, children = [], []
        for seed, warm in zip((1, 2), two, strict=True):
            mine = config.with_changes(seed=seed, output_dir=str(out))
            started.append(runs.create_run("train", dump_yaml(mine), "ink"))
            children.append(warm.start(TOGETHER, str(started[-1]), str(tmp_path / f"go{turn}")))
        while len([*tmp_path.glob(f"go{turn}-*")]) < 2:
            time.sleep(0.01)
        (tmp_path / f"go{turn}").touch()
        if killed := turn % 2 == 1:
            time.sleep(dice.uniform(0.2, 2.5))
            children[0].kill()
        codes = [child.wait() for child in children]
        assert codes[1] == 0
        if killed and codes[0]:
            assert codes[0] == -9
            resumed = config.with_changes(seed=1, output_dir=str(out),
                                          resume=runs.resume_of(started[0], False))
            started[0] = runs.create_run("train", dump_yaml(resumed), "ink")
            assert two[0].start(TOGETHER, str(started[0]), str(tmp_path / f"go{turn}")).wait() == 0
        _each_has_its_own(started, alone, out, killed)


def _each_has_its_own(started: list[Path], alone: list[dict[str, Any]], out: Path,
                      killed: bool) -> None:
    views = [runs.load_run(folder.name) for folder in started]
    names = [view.result["name"] for view in views]
    assert names[0] != names[1]
    for view, name, reference in zip(views, names, alone, strict=True):
        assert view.result["proof"]["ok"]
        # one that was killed after its file was there, and goes on, has nothing left to train
        lora = Path(view.result.get("lora") or view.result["nothing"]["file"])
        assert lora == out / f"{name}.safetensors"
        assert equal(lora, reference["lora"])
        assert TrainConfig.model_validate_json(json.dumps(view.config)).seed == int(
            "seed: 2" in read_header(lora).metadata[CONFIG_KEY]) + 1
        kept = [Path(path) for path in view.result["checkpoints"]]
        assert {path.name for path in kept} >= {f"{name}-{step:06d}" for step in (6, 8)}
        assert len({checkpoint.session_of(path) for path in kept}) == 1
        last = Path(reference["checkpoints"][-1]) / "state.safetensors"
        assert equal(kept[-1] / "state.safetensors", last)
        # one that was killed between its last checkpoint and its last preview draws none any more
        [drawn, *_] = sorted((out / "samples").glob(f"{name}-000*-0*.png"), reverse=True)
        assert drawn.name.startswith(f"{name}-000008-0") or "nothing" in view.result
        assert drawn.read_bytes()[:4] == b"\x89PNG"
    assert len([*out.glob("*.safetensors")]) == 2
    # what a killed process was writing may lie there under its hidden name
    rest = {path.suffix for path in out.rglob(".*") if path.name != paths.MARK}
    assert rest <= ({".taken", ".tmp"} if killed else {".taken"}), [*out.rglob(".*")]


@pytest.mark.thorough
def test_the_windows_job_beside_the_command_line(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config.with_changes(sample_prompts=[])))
    with JobManager() as manager:
        job = manager.start(config.with_changes(sample_prompts=[]))
        beside = subprocess.run([sys.executable, "launcher.py", "train", "--config", str(file),
                                 "--json"], cwd=ROOT, capture_output=True, text=True)
        view = manager.wait(job, 240)
    answer = json.loads(beside.stdout.splitlines()[-1])
    assert (beside.returncode, view.state) == (0, "done"), (beside.stderr, view.fault)
    assert {answer["name"], view.result["name"]} == {"ink", "ink-2"}
    assert equal(answer["lora"], view.result["lora"])
    assert answer["lora"] != view.result["lora"]


# --- whose checkpoints ---

def stopped_at(config: TrainConfig, step: int) -> list[Event]:
    """Trains and stops after `step`."""
    events: list[Event] = []
    control = Control()

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, (Step, Checkpoint)) and event.step >= step:
            control.ask("stop")
    assert train(config, emit, control)["state"] == "stopped"
    return events


def told(events: list[Event], key: str) -> list[dict[str, Any]]:
    return [event.params for event in events if isinstance(event, Note) and event.key == key]


@pytest.mark.thorough
def test_a_run_is_resumed_and_not_a_later_one_of_its_name(config: TrainConfig,
                                                          tmp_path: Path) -> None:
    plain = config.with_changes(sample_prompts=[], keep_checkpoints=0)
    whole = train(plain.with_changes(output_dir=str(tmp_path / "whole")), silent, Control())
    first = stopped_at(plain, 4)
    other = train(plain.with_changes(seed=7, max_train_steps=4), silent, Control())
    before = Path(other["lora"]).read_bytes()
    session = told(first, "engine.named")[-1]["session"]
    events: list[Event] = []
    resumed = train(plain.with_changes(resume=session), events.append, Control())
    assert equal(resumed["lora"], whole["lora"])
    assert Path(resumed["lora"]).name == "ink.safetensors"
    assert Path(other["lora"]).read_bytes() == before
    # by its checkpoint's folder: from exactly there, into a name of its own where others have it
    early = tmp_path / "out" / "checkpoints" / "ink-000002"
    again = train(plain.with_changes(resume=str(early)), silent, Control())
    assert Path(again["lora"]) == Path(resumed["lora"])     # the very same LoRA
    longer = train(plain.with_changes(resume=str(early), max_train_steps=10), silent, Control())
    assert Path(longer["lora"]).name == "ink-3.safetensors"
    assert equal(resumed["lora"], whole["lora"])


def test_the_name_of_another_lora_is_not_ours(config: TrainConfig, tmp_path: Path) -> None:
    """`cat-2` may be another LoRA of the user's, not the second `cat`."""
    plain = config.with_changes(sample_prompts=[], max_train_steps=2)
    train(plain.with_changes(output_name="cat"), silent, Control())
    other = train(plain.with_changes(output_name="cat-2", seed=3), silent, Control())
    before = Path(other["lora"]).read_bytes()
    events: list[Event] = []
    result = train(plain.with_changes(output_name="cat", resume=True, max_train_steps=4),
                   events.append, Control())
    assert [Path(one["path"]).name for one in told(events, "engine.resumed")] == ["cat-000002"]
    assert Path(other["lora"]).read_bytes() == before
    assert Path(result["lora"]).name == "cat-3.safetensors"
    assert told(events, "engine.other_name")


def test_a_dead_runs_preview_is_not_the_loras_thumbnail(config: TrainConfig, tmp_path: Path
                                                        ) -> None:
    """A run that was killed before its first checkpoint leaves previews of a name that is free."""
    old = tmp_path / "out" / "samples" / "ink-000900-0.png"
    old.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64), (255, 0, 255)).save(old)
    os.utime(old, (time.time() - 3600,) * 2)
    result = train(config.with_changes(sample_prompts=[], max_train_steps=1, metadata="full"),
                   silent, Control())
    assert Path(result["lora"]).name == "ink.safetensors"
    url = read_header(Path(result["lora"])).metadata["modelspec.thumbnail"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as thumbnail:
        found = ImageStat.Stat(thumbnail.convert("RGB")).mean
    assert found[1] > 20                                    # a magenta picture has no green


def test_a_checkpoint_replaces_and_deletes_only_its_own_runs(tmp_path: Path) -> None:
    state = checkpoint.State(1, {"a": torch.zeros(3)}, {}, {})

    def save(step: int, session: str, starts: int = 0) -> Path:
        position = checkpoint.Position(step, "ink", {}, session, 0.0, 0.0, starts=starts)
        return checkpoint.save(tmp_path, position, state, lambda path: None)
    other = [save(step, "other") for step in (1, 2, 3)]
    mine = [save(step, "mine") for step in (4, 5, 6)]
    with pytest.raises(FileExistsError):
        save(2, "mine")
    checkpoint.prune(tmp_path, "ink", "mine", 1, set())
    assert [path for path in (*other, *mine) if path.exists()] == [*other, mine[-1]]
    assert save(6, "mine") == mine[-1]
    went_back = save(4, "mine", 1)              # newest by its start, not by the step
    checkpoint.prune(tmp_path, "ink", "mine", 1, set())
    assert went_back.exists()
    assert not mine[-1].exists()


def test_a_run_that_still_goes_on_is_not_resumed(config: TrainConfig, tmp_path: Path) -> None:
    events = stopped_at(config, 4)
    session = told(events, "engine.named")[-1]["session"]
    with Output(tmp_path / "out", config, silent) as living:
        living.go_on_as("ink", session)
        with pytest.raises(UserError) as caught:
            train(config.with_changes(resume=True), silent, Control())
    assert caught.value.code == "engine.still_going"
    assert train(config.with_changes(resume=True), silent, Control())["state"] == "done"


def test_a_folder_that_cant_be_written_is_told_before_the_training(
        config: TrainConfig, tmp_path: Path, own_home: Path) -> None:
    (tmp_path / "file").write_text("x")
    plain = config.with_changes(output_dir=str(tmp_path / "file" / "out"), max_train_steps=2,
                                sample_prompts=[])
    events: list[Event] = []
    first = train(plain, events.append, Control())
    warned = next(n for n, event in enumerate(events) if isinstance(event, Note)
                  and event.key == "engine.output_elsewhere")
    assert not any(isinstance(event, Step) for event in events[:warned])
    content = Path(first["lora"]).read_bytes()
    second = train(plain.with_changes(seed=2), silent, Control())
    assert Path(second["lora"]).is_relative_to(own_home / "rescued")
    assert second["lora"] != first["lora"]
    assert Path(first["lora"]).read_bytes() == content


def test_what_is_no_checkpoint_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(config.with_changes(resume=str(tmp_path / "nothing")), silent, Control())
    assert caught.value.code == "engine.no_such_checkpoint"
    events = stopped_at(config, 4)
    folder = tmp_path / "out/checkpoints/ink-000004"
    (folder / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError) as caught:
        train(config.with_changes(resume=str(folder)), silent, Control())
    assert caught.value.code == "engine.bad_checkpoint"
    assert told(events, "engine.named")


def test_a_run_that_begins_anew_tells_its_new_session(config: TrainConfig, tmp_path: Path) -> None:
    """Where every checkpoint is torn: the new run's are resumed next, not the torn ones."""
    plain = config.with_changes(sample_prompts=[])
    stopped_at(plain, 4)
    for state in (tmp_path / "out" / "checkpoints").glob("*/state.safetensors"):
        state.write_bytes(b"torn")
    second = stopped_at(plain.with_changes(resume=True), 4)
    sessions = [note["session"] for note in told(second, "engine.named")]
    assert len(set(sessions)) == 2
    third: list[Event] = []
    train(plain.with_changes(resume=sessions[-1]), third.append, Control())
    assert [one["step"] for one in told(third, "engine.resumed")] == [4]


@pytest.mark.parametrize(("own", "saved", "expected"), [
    (False, True, "12"), (True, False, "12"), ("34", False, "12"),
    ("out/checkpoints/ink-000002", False, "out/checkpoints/ink-000002"),
    ("out/checkpoints/ink-000002", True, "12")])
def test_what_went_on_from_one_checkpoint_does_so_again(own: bool | str, saved: bool,
                                                        expected: str) -> None:
    """Until it has saved one of its own."""
    folder = runs.create_run("train", "", "ink")
    with Journal(folder) as journal:
        journal.append(Note(key="engine.named", params={"session": "12", "name": "ink"}))
        if saved:
            journal.append(Checkpoint(step=3, path="out/checkpoints/ink-000003"))
    assert runs.resume_of(folder, own) == expected
