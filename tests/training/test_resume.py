"""Runs that go on otherwise than they began, that have nothing left to do, or whose LoRA is no
good: each says so, and none pretends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import families, i18n
from core.cli.progress import summary
from core.config import TrainConfig, dump_yaml
from core.dataset.examples import Encoder, find
from core.errors import UserError
from core.jobs import runs, worker
from core.jobs.control import Control
from core.jobs.events import Checkpoint, Event, JobEnded, Note, Phase, Step
from core.jobs.outcome import said_first
from core.safetensors_header import read_header
from core.training import checkpoint
from core.training.run import train
from core.training.trainer import Trainer
from core.weights.precision import choose
from tests import tiny
from tests.conftest import handling

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(base: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(tiny.pictures(tmp_path / "p", 6)),
        "output_dir": str(tmp_path / "out"), "output_name": "ink", "lora_rank": 2, "epochs": 3,
        "learning_rate": 1e-3, "batch_size": 1, "save_steps": 1, "keep_checkpoints": 0,
        "save_precision": "fp32", "lr_scheduler": "linear"})


def run(config: TrainConfig, stop: int = 0) -> tuple[dict[str, Any], list[Event]]:
    """`stop`: stopped after that step's checkpoint, and later ones deleted."""
    events: list[Event] = []
    control = Control()

    def emit(event: Event) -> None:
        events.append(event)
        if stop and isinstance(event, Checkpoint) and event.step >= stop:
            control.ask("stop")
    result = train(config, emit, control)
    for path in Path(config.output_dir).glob("checkpoints/*") if stop else ():
        if int(path.name[-6:]) > stop:
            shutil.rmtree(path)
    return result, events


def told(events: list[Event], key: str) -> list[dict[str, Any]]:
    return [event.params for event in events if isinstance(event, Note) and event.key == key]


def equal(a: str, b: str) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def place(config: TrainConfig, step: int) -> dict[str, Any]:
    path = Path(config.output_dir) / checkpoint.FOLDER / f"ink-{step:06d}" / checkpoint.STATE
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


# --- counted in samples ---

@pytest.mark.parametrize(("changes", "steps"), [
    ({"batch_size": 3}, 4 + 1 + 2 + 2), ({"gradient_accumulation_steps": 2}, 4 + 1 + 3 + 3),
    ({"epochs": 2}, 12), ({"epochs": 1}, 6), ({"seed": 9}, 18)])
def test_other_settings_go_on_at_the_right_sample(config: TrainConfig, changes: dict[str, Any],
                                                  steps: int) -> None:
    """Six pictures at batch 1, stopped after 4 samples: what is left of 18 is learned, in so
    many steps, and the run says what has changed."""
    run(config, stop=4)
    result, events = run(config.with_changes(resume=True, **changes))
    assert result["steps"] == steps
    assert told(events, "engine.resumed")[0]["samples"] == 4
    key, new = next(iter(changes.items()))
    note = told(events, "engine.resumed_otherwise")[0]
    assert note["keys"] == f"{key}: {getattr(config, key)} -> {new}"
    assert (note["samples"], note["left"]) == (4, steps - 4)
    end = place(config, steps)["place"]
    epochs = changes.get("epochs", config.epochs)
    assert (end["samples"], end["epoch"], end["seen"]) == (6 * epochs, epochs, {})
    assert not told(events, "engine.other_pictures")
    # and after a second break it still comes to the same
    for path in Path(config.output_dir).glob("checkpoints/*"):
        if int(path.name[-6:]) > 5:
            shutil.rmtree(path)
    again, _ = run(config.with_changes(resume=True, **changes))
    assert equal(again["lora"], result["lora"])


def test_the_rate_follows_the_share_of_the_run(config: TrainConfig) -> None:
    """A linear rate falls to 0 at the end of the run, also where half of it has fewer steps."""
    run(config, stop=9)
    _, events = run(config.with_changes(resume=True, batch_size=3))
    rates = [event.lr for event in events if isinstance(event, Step)]
    start = config.learning_rate * 9 / 18
    assert rates[0] == pytest.approx(start, rel=0.12)       # 9 of 18 samples are learned
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] <= config.learning_rate / 6 + 1e-12    # the last of 6 whole steps of 3


def test_pictures_that_come_and_go(config: TrainConfig, tmp_path: Path) -> None:
    run(config, stop=2)
    seen = place(config, 2)["place"]["seen"]
    assert sum(seen.values()) == 2
    pictures = tmp_path / "p"
    gone = next(path for path in sorted(pictures.glob("*.png")) if path.name not in seen)
    for path in pictures.glob(f"{gone.stem}.*"):
        path.unlink()
    for number in range(2):
        (pictures / f"new{number}.png").write_bytes(
            next(path for path in pictures.glob("*.png")).read_bytes())
    result, events = run(config.with_changes(resume=True, epochs=1))
    assert told(events, "engine.other_pictures") == [{"there": 6, "here": 7}]
    assert result["steps"] == 2 + 5                         # 7 pictures, 2 of them are learned


def test_a_checkpoint_of_an_older_version_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    """It knows its updates alone: with the same settings the run ends as an unbroken one, with
    others it goes on at the sample where its own settings had come to."""
    whole, _ = run(config.with_changes(output_dir=str(tmp_path / "whole"), batch_size=2))
    run(config.with_changes(batch_size=2), stop=4)
    for path in (tmp_path / "out" / "checkpoints").glob(f"*/{checkpoint.STATE}"):
        found = json.loads(path.read_text("utf-8"))
        for key in ("place", "start", "order"):
            del found[key]
        path.write_text(json.dumps(found))
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    same, events = run(config.with_changes(batch_size=2, resume=True))
    assert equal(same["lora"], whole["lora"])
    assert not told(events, "engine.other_pictures")
    assert not told(events, "engine.resumed_otherwise")
    _, events = run(config.with_changes(batch_size=3, resume=True,
                                        output_dir=str(tmp_path / "other")))
    assert told(events, "engine.resumed")[0]["samples"] == trainer_of(
        config.with_changes(batch_size=2)).sampler.place(4).samples


def trainer_of(config: TrainConfig) -> Trainer:
    family, precision = families.get("sd15"), choose(config.precision, "cpu")
    source = Path(config.base_model)
    parts = family.load(source, precision)

    def emit(event: Event) -> None:
        pass
    examples = find(config, Path(config.train_data_dir), None, parts.native_size,
                    parts.bucket_step, emit)
    Encoder(family, source, precision, config, emit, Control()).fill(examples)
    return Trainer(config, family, parts, precision, examples, emit, Control())


def test_what_is_learned_otherwise_is_told(config: TrainConfig) -> None:
    """And what has no effect on it is not: the same alpha and objective by their names, previews,
    checkpoints."""
    run(config, stop=2)
    _, events = run(config.with_changes(
        resume=True, prediction_type="epsilon", lora_alpha=2.0, caption_dropout=0.5, epochs=1,
        save_steps=2, keep_checkpoints=5, sample_every=7, sample_prompts=["a"], sample_cfg=3))
    assert told(events, "engine.resumed_otherwise")[0]["keys"] == (
        "epochs: 3 -> 1; lora_alpha: - -> 2.0; caption_dropout: 0.0 -> 0.5; "
        "prediction_type: auto -> epsilon")


OTHERS = [({"lora_rank": 4}, "lora_rank: 2 -> 4"), ({"lora_alpha": 1}, "lora_alpha: - -> 1.0"),
          ({"adapter": "rslora"}, "adapter: lora -> rslora"),
          ({"target_modules": "attention+ff"}, "target_modules: attention -> attention+ff"),
          ({"conv_rank": 2}, "conv_rank: 0 -> 2"),
          ({"block_ranks": {"attn2": 0}}, "block_ranks: - -> {'attn2': 0}"),
          ({"text_encoder_lr": 1e-4}, "text_encoder_lr: 0.0 -> 0.0001"),
          ({"pivotal_tokens": 2, "trigger_word": "x"}, "pivotal_tokens: 0 -> 2"),
          ({"prediction_type": "v_prediction"}, "prediction_type: epsilon -> v_prediction"),
          ({"lora_rank": 4, "lora_alpha": 2}, "lora_rank: 2 -> 4; lora_alpha: - -> 2.0")]


def test_what_would_mean_something_else_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """Before anything is encoded, with the checkpoint's own values as the fix; each finished file
    stays as it was."""
    run(config.with_changes(epochs=1))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for changes, keys in OTHERS:
        events: list[Event] = []
        with pytest.raises(UserError) as caught:
            train(config.with_changes(resume=True, **changes), events.append, Control())
        fault = caught.value
        assert (fault.code, fault.params["keys"]) == ("engine.other_adapter_keys", keys)
        assert Path(fault.params["lora"]).is_file()
        assert not [event for event in events if isinstance(event, Phase | Step)]
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*")
                if path.is_file()} == before
    fixed = config.with_changes(**{**changes, **fault.fixes[0].changes, "epochs": 2})
    assert (run(fixed)[0]["state"], fault.fixes[0].changes["resume"]) == ("done", True)


def test_a_run_goes_on_by_what_checkpoints_say(config: TrainConfig, tmp_path: Path) -> None:
    """Not by the times of their folders, nor by the step alone: a run that went back to an earlier
    checkpoint goes on from there, and deletes what it left behind first."""
    run(config, stop=6)
    folder = tmp_path / "out" / "checkpoints"
    for number, path in enumerate(sorted(folder.glob("ink-*"), reverse=True)):
        os.utime(path, (1.7e9 + number, 1.7e9 + number))

    def found() -> list[str]:
        return [path.name[-1] for path in checkpoint.find([tmp_path / "out"], "ink")]
    assert found() == ["6", "5", "4", "3", "2", "1"]
    shutil.copytree(folder, tmp_path / "all")
    run(config.with_changes(resume=str(folder / "ink-000002"), seed=3), stop=3)
    for step in (4, 5, 6):                  # `stop` deletes them
        shutil.copytree(tmp_path / "all" / f"ink-00000{step}", folder / f"ink-00000{step}")
    assert found() == ["3", "6", "5", "4", "2", "1"]
    _, events = run(config.with_changes(resume=True, seed=3, keep_checkpoints=2), stop=4)
    assert told(events, "engine.resumed")[0]["step"] == 3
    assert found()[0] == "4"
    assert {"4"} <= set(found()) <= {"3", "4"}


def test_of_two_runs_of_a_name_the_one_that_fits_goes_on(config: TrainConfig) -> None:
    """The later one is of another rank: it is not this config's, and stays as it is."""
    run(config, stop=2)
    other, _ = run(config.with_changes(lora_rank=4, epochs=1))
    content = Path(other["lora"]).read_bytes()
    result, events = run(config.with_changes(resume=True))
    assert told(events, "engine.resumed")[0]["path"].endswith("ink-000002")
    assert (result["name"], Path(other["lora"]).name) == ("ink", "ink-2.safetensors")
    assert Path(other["lora"]).read_bytes() == content


def test_facts_are_of_the_whole_run(config: TrainConfig) -> None:
    """Steps, seconds and metadata after a resume to more, and to fewer, steps."""
    first, _ = run(config.with_changes(max_train_steps=4))
    position = checkpoint.position_of(
        Path(first["lora"]).parent / "checkpoints" / "ink-000004")
    assert 0 < position["seconds"] <= first["seconds"]
    began = time.time()
    more, events = run(config.with_changes(max_train_steps=7, resume=True))
    assert more["steps"] == 7
    assert position["seconds"] < more["seconds"] < position["seconds"] + time.time() - began
    assert [e.step for e in events if isinstance(e, Step)][-1] == 7
    fewer, _ = run(config.with_changes(max_train_steps=2, resume=True, save_format="peft"))
    for result, steps in ((first, 4), (more, 7), (fewer, 7)):
        file = result.get("lora") or result["nothing"]["file"]
        metadata = read_header(next(iter(sorted(Path(file).glob("*.safetensors"))), Path(file))
                               ).metadata
        assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == str(steps)
        assert metadata["ss_epoch"] == str(steps // 6)
        assert metadata["ss_num_epochs"] == str(-(-steps // 6))


def test_a_rate_that_jumps_is_told(config: TrainConfig) -> None:
    cosine = config.with_changes(lr_scheduler="cosine", max_train_steps=4)
    run(cosine)
    _, events = run(cosine.with_changes(resume=True, max_train_steps=8), stop=5)
    note = told(events, "engine.rate_jumps")[0]
    assert (note["there"], note["here"], note["scheduler"]) == ("0", "0.0005", "cosine")
    for changes in ({}, {"learning_rate": 1e-4}):       # told as such
        _, events = run(cosine.with_changes(resume=True, max_train_steps=8, **changes), stop=6)
        assert not told(events, "engine.rate_jumps")


# --- nothing left to do ---

@pytest.mark.parametrize(("part", "file"), [
    ("denoiser", "unet/diffusion_pytorch_model.safetensors"),
    ("vae", "vae/diffusion_pytorch_model.safetensors"),
    ("text", "text_encoder/model.safetensors")])
def test_a_base_that_was_changed_meanwhile_is_told(config: TrainConfig, tmp_path: Path, part: str,
                                                   file: str) -> None:
    base = shutil.copytree(config.base_model, tmp_path / "own base")
    config = config.with_changes(base_model=str(base))
    run(config, stop=1)
    _, events = run(config.with_changes(resume=True), stop=2)
    changed = ("vae", "text")
    assert not any(told(events, f"engine.other_{one}") for one in changed)
    weights = load_file(base / file)
    save_file({name: one * 1.01 for name, one in weights.items()}, base / file, {"format": "pt"})
    if part == "denoiser":                  # nothing else fits what was learned
        with pytest.raises(UserError) as caught:
            run(config.with_changes(resume=True))
        assert caught.value.code == "engine.other_denoiser"
        return
    _, events = run(config.with_changes(resume=True), stop=3)
    assert [one for one in changed if told(events, f"engine.other_{one}")] == [part]


def test_a_run_that_trains_nothing_says_so(config: TrainConfig) -> None:
    first, _ = run(config.with_changes(epochs=1))
    content = Path(first["lora"]).read_bytes()
    for changes in ({}, {"max_train_steps": 3}):
        result, events = run(config.with_changes(epochs=1, resume=True, **changes))
        assert result["state"] == "nothing"
        assert "lora" not in result
        assert result["nothing"]["file"] == first["lora"]
        assert told(events, "engine.nothing_trained")
        assert not [event for event in events if isinstance(event, Step)]
        assert summary(result)[0].startswith("NOTHING WAS TRAINED: the checkpoint is at step 6")
    assert Path(first["lora"]).read_bytes() == content
    assert [path.name for path in Path(config.output_dir).glob("*.safetensors")] == [
        "ink.safetensors"]
    # its file is gone: it is saved from the checkpoint, and that nothing was trained is still told
    Path(first["lora"]).unlink()
    result, _ = run(config.with_changes(epochs=1, resume=True))
    assert (result["state"], result["lora"]) == ("nothing", first["lora"])
    assert result["proof"]["ok"]


def test_a_finished_lora_stays_when_its_run_goes_on(config: TrainConfig) -> None:
    first, _ = run(config.with_changes(epochs=1))
    content = Path(first["lora"]).read_bytes()
    longer, events = run(config.with_changes(epochs=2, resume=True))
    assert Path(first["lora"]).read_bytes() == content
    assert Path(longer["lora"]).name == "ink-2.safetensors"
    assert told(events, "engine.other_name")[0]["name"] == "ink-2"
    assert not equal(first["lora"], longer["lora"])


# --- the proof ---

SPOILS = """
import torch
from safetensors.torch import load_file, save_file, save_file
from core.jobs.events import Checkpoint

def spoil(event):
    if isinstance(event, Checkpoint) and event.final:
        tensors = load_file(event.path)
        save_file({k: v if k.endswith("alpha") else torch.randn_like(v) * 3
                   for k, v in tensors.items()}, event.path)
"""


@pytest.mark.thorough
def test_a_proof_that_fails_is_said_on_top(config: TrainConfig, tmp_path: Path) -> None:
    """The saved file is another than what was trained: exit code 1, state, first line."""
    (tmp_path / "own.py").write_text(SPOILS)
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config.with_changes(
        epochs=1, callbacks=[f"{tmp_path / 'own.py'}:spoil"])))
    done = subprocess.run([sys.executable, "launcher.py", "train", "--config", str(file)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("The saved file could NOT be proven")
    view = runs.list_runs()[0]
    assert (view.state, view.result["state"]) == ("unproven", "unproven")
    assert view.over
    assert Path(view.result["lora"]).is_file()
    listed = subprocess.run([sys.executable, "launcher.py", "runs", "list"], cwd=ROOT,
                            capture_output=True, text=True)
    assert "NOT proven" in listed.stdout
    shown = subprocess.run([sys.executable, "launcher.py", "runs", "show", "last"], cwd=ROOT,
                           capture_output=True, text=True)
    assert "The saved file could NOT be proven" in shown.stdout


def test_a_worker_whose_proof_failed_ends_so(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SPOILS)
    folder = runs.create_run("train", "", "ink", queued=False)
    heard: list[Event] = []
    end = worker.run_job("train", config.with_changes(
        epochs=1, callbacks=[f"{tmp_path / 'own.py'}:spoil"]), folder, Control(), heard.append)
    assert end.state == "unproven"
    assert [e.state for e in heard if isinstance(e, JobEnded)] == ["unproven"]
    assert [key for key, _ in said_first(end.result)] == ["engine.proof_failed"]


def test_almost_no_effect_is_told(config: TrainConfig) -> None:
    result, events = run(config.with_changes(epochs=1, learning_rate=1e-3))
    assert (result["state"], result["proof"]["ok"], result["proof"]["faint"]) == (
        "done", True, True)
    assert 0 < result["proof"]["change"] < 1.5
    assert told(events, "engine.faint")
    assert summary(result)[0].startswith("ALMOST NO EFFECT")
    strong, events = run(config.with_changes(learning_rate=3e-2, epochs=6, output_name="strong"))
    assert not strong["proof"]["faint"], strong["proof"]
    assert not told(events, "engine.faint")


def test_what_is_said_first_reads_whatever_a_journal_holds() -> None:
    for odd in ({"proof": 7}, {"proof": "x", "nothing": 3}, {"proof": {}}, {"nothing": []}, {}):
        assert said_first(odd) == []
    for language in i18n.LANGUAGES:
        for key, params in said_first({
                "proof": {"ok": False, "faint": True, "matched": 1, "modules": 2, "change": 0.1,
                          "from_memory": 3, "tolerance": 1.5},
                "nothing": {"step": 3, "total": 2, "file": "x"}}):
            assert "{" not in i18n.tr(key, params, language)


# --- several processes ---

def test_torchrun_is_refused_once(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config))
    train_it = [str(ROOT / "launcher.py"), "train", "--config", str(file)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3",
                           *train_it], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("3 processes were started around it") == 1
    assert not runs.list_runs()
    plain = {key: value for key, value in os.environ.items() if key not in (
        "WORLD_SIZE", "RANK", "LOCAL_RANK")}
    for more, code, says in (({"WORLD_SIZE": "2", "RANK": "0"}, 2, True),
                             ({"WORLD_SIZE": "2", "RANK": "1"}, 0, False),
                             ({"LOCAL_RANK": "3"}, 2, True),
                             ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, 2, True)):
        done = subprocess.run([sys.executable, *train_it], cwd=ROOT, capture_output=True,
                              text=True, env=plain | more)
        assert (done.returncode, bool(done.stderr)) == (code, says), (more, done.stderr)
    assert not Path(config.output_dir).exists()


@pytest.mark.thorough
def test_one_process_of_a_launcher_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config.with_changes(epochs=1)))
    done = subprocess.run(
        [sys.executable, "launcher.py", "train", "--config", str(file)], cwd=ROOT, text=True,
        capture_output=True, env=os.environ | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    assert done.returncode == 0, done.stderr


# --- what goes away while a run goes on ---

@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_reader_that_goes_away_costs_no_run(config: TrainConfig, tmp_path: Path) -> None:
    """Its output is a pipe that nobody reads any more: the run comes to its proven LoRA."""
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config.with_changes(epochs=1)))
    process = subprocess.Popen([sys.executable, "launcher.py", "train", "--config", str(file)],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    process.stdout.close()
    process.wait()
    view = runs.list_runs()[0]
    assert (view.state, view.result["proof"]["ok"]) == ("done", True)


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_terminal_that_closes_saves_the_run(config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml(config.with_changes(epochs=1000, save_steps=0)))
    with handling(signal.SIGHUP, signal.SIG_DFL):       # under nohup it would stay ignored
        process = subprocess.Popen(
            [sys.executable, "launcher.py", "train", "--config", str(file)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (started := runs.list_runs()) or not started[0].step:
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    process.wait()
    view = runs.list_runs()[0]
    assert view.state == "stopped"
    assert Path(view.result["checkpoint"]).is_dir()
