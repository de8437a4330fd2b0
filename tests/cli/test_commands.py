"""The engine's commands in this process: answers, exit codes, sentences; real jobs, a real LoRA."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import i18n
from core.cli import commands, console
from core.config import TrainConfig
from core.errors import UserError
from core.jobs import runs, worker
from core.jobs.control import Control
from core.jobs.events import Step
from tests import tiny
from tests.calls import ROOT, Run, run

__all__ = ["run"]


@pytest.fixture
def fake_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` runs tests/fake_job.py instead of the engine: 20 ms a step, and mishaps to order."""
    monkeypatch.setitem(worker.JOBS, "train",
                        worker.JOBS["train"]._replace(run="tests.fake_job:train"))


def yaml(folder: Path, **keys: Any) -> Path:
    path = folder / "my config 配置.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()),
                    "utf-8")
    return path


# --- bad input: one sentence, in the user's language, and exit code 2 ---

@pytest.mark.parametrize(("lang", "sentence"), [
    ("en", ", line 2: unknown key `lora_rnak`. Did you mean `lora_rank`?"),
    ("zh-CN", " 第 2 行：未知的键 `lora_rnak`。您是想写 `lora_rank` 吗？")])
def test_unknown_key(run: Run, tmp_path: Path, lang: str, sentence: str) -> None:
    path = yaml(tmp_path, epochs=3, lora_rnak=8)
    told = run("train", "--config", path, lang=lang)
    assert told == (2, "", f"{path}{sentence}\n")


def test_the_same_as_json(run: Run, tmp_path: Path) -> None:
    path = yaml(tmp_path, lora_rnak=8)
    told = run("train", "--config", path, "--json")
    assert told.code == 2
    assert told.json == {"ok": False, "fault": "config.unknown_key", "message": told.err.strip()}


@pytest.mark.parametrize(("lang", "problem"), [
    ("en", "it must be a multiple of 75"), ("zh-CN", "75")])
def test_a_bad_option_is_called_as_it_is_typed(run: Run, lang: str, problem: str) -> None:
    told = run("generate", "--prompt", "x", "--max-tokens", "80", lang=lang)
    assert told.code == 2
    assert "--max-tokens 80" in told.err
    assert problem in told.err
    assert "Input should be" not in told.err


@pytest.mark.parametrize("argv", [
    ["train", "--config", "no.yaml"], ["lora", "info", "no.safetensors"],
    ["lora", "verify", "no.safetensors"], ["runs", "show", "nothing"], ["runs", "resume", "last"],
    ["runs", "stop", "x"], ["generate", "--size", "x"], ["generate", "--steps", "0"],
    ["generate", "--base", "no/such/base", "--prompt", "x"],
    ["train", "--config", "c.yaml", "--set", "epochs"],
    ["train", "--config", "c.yaml", "--set", "=3"],
    ["train", "--config", "c.yaml", "--set", "epochs=many"],
    ["train", "--config", "c.yaml", "--set", "epoch=3"]])
@pytest.mark.parametrize("lang", i18n.LANGUAGES)
def test_bad_input_is_one_sentence(run: Run, tmp_path: Path, argv: list[str], lang: str) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 2\n")
    told = run(*argv, lang=lang)
    assert told.code == 2, told
    assert told.out == ""
    lines = told.err.strip().splitlines()
    assert "Traceback" not in told.err
    assert len([line for line in lines if line[2:3] != ":"]) == 1      # phases have a clock
    assert not any(lines[-1].startswith(stem) for stem in ("commands.", "jobs.", "config."))
    assert "{" not in lines[-1]


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run("train", "--config", "no.yaml", "--debug")
    assert "Traceback" in told.err
    assert told.code == 2
    monkeypatch.setenv("DARKROOM_DEBUG", "1")
    assert "Traceback" in run("lora", "info", "no.safetensors").err


def test_the_unforeseen(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ZeroDivisionError("by zero")
    assert console.guarded(fail, []) == 1
    assert capsys.readouterr().err == (
        "Something unforeseen went wrong (ZeroDivisionError: by zero). "
        "Run the command again with --debug and report what it shows.\n")
    assert console.guarded(fail, ["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fault"] == "commands.unexpected"


def test_a_file_that_cant_be_used_is_nothing_unforeseen(capsys: pytest.CaptureFixture[str],
                                                        tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    assert console.guarded(lambda: len(os.listdir(tmp_path / "home")), []) == 1
    told = capsys.readouterr().err
    assert f"{tmp_path}/home" in told
    assert "unforeseen" not in told

    def fill() -> int:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert console.guarded(fill, []) == 1
    assert "unforeseen" not in capsys.readouterr().err


def test_ctrl_c_outside_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise KeyboardInterrupt
    assert console.guarded(fail, []) == 130
    assert capsys.readouterr().err == "Aborted.\n"


def test_overrides() -> None:
    assert commands.overrides(["a=1", " b = x=y", "c="]) == {"a": "1", "b": " x=y", "c": ""}
    with pytest.raises(UserError, match=r"needs the form key=value"):
        commands.overrides(["a"])


# --- jobs ---

def test_a_run_that_ends_well(run: Run, fake_job: None, tmp_path: Path) -> None:
    told = run("train", "--config", yaml(tmp_path, epochs=3), "--set", "lora_rank=4", "--json")
    assert told.code == 0, told.err
    assert told.json["ok"]
    assert told.json["lora"] == "final.safetensors"
    assert "training  3 / 3  loss" in told.err
    view = runs.load_run(told.json["run"])
    assert (view.state, view.step, view.config["lora_rank"]) == ("done", 3, 4)
    listed = run("runs", "list", "--json").json["runs"]
    assert [(one["id"], one["state"]) for one in listed] == [(view.id, "done")]
    assert f"{view.id}  done  step 3 / 3" in run("runs", "list").out
    assert run("runs", "show", "last", "--json").json["result"]["lora"] == "final.safetensors"
    shown = run("runs", "show", view.id[-4:], lang="zh-CN").out
    assert "已完成" in shown
    assert str(view.folder) in shown


def test_no_runs_yet(run: Run) -> None:
    assert "no runs yet" in run("runs", "list").out
    assert run("runs", "list", "--json").json == {"ok": True, "runs": []}


@pytest.mark.parametrize(("mishap", "code", "words_"), [
    ("crash", 1, "ValueError"), ("memory", 1, "memory"), ("disk", 1, "/full/disk.bin"),
    ("fault", 1, "There is no config file")])
def test_a_run_that_fails(run: Run, fake_job: None, tmp_path: Path, mishap: str, code: int,
                          words_: str) -> None:
    path = yaml(tmp_path, epochs=3, trigger_word=mishap)
    told = run("train", "--config", path, "--json")
    assert told.code == code
    assert "Traceback" not in told.err
    last = told.err.strip().splitlines()[-1]
    assert words_ in last
    assert told.json["message"] == last
    assert told.json["state"] == "failed"
    assert runs.load_run(told.json["run"]).state == "failed"
    assert "Traceback" in run("train", "--config", path, "--debug").err


def test_bad_data_found_by_the_engine_is_bad_input(run: Run, tmp_path: Path) -> None:
    told = run("train", "--config", yaml(tmp_path, base_model="gone.safetensors",
                                         train_data_dir="x"))
    assert told.code == 2
    assert "gone.safetensors" in told.err.strip().splitlines()[-1]
    assert "Traceback" not in told.err


def test_resume_goes_on_where_a_run_was(run: Run, fake_job: None, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("train", "--config", yaml(tmp_path, epochs=2), "--json").json
    monkeypatch.chdir("/")
    again = run("runs", "resume", "last", "--json").json
    view = runs.load_run(again["run"])
    assert (view.state, view.resumed_from, view.config["resume"]) == ("done", first["run"], False)
    assert view.cwd == str(tmp_path)                    # relative paths mean what they meant


def test_runs_stop_reaches_a_run_elsewhere(run: Run, fake_job: None, tmp_path: Path) -> None:
    import threading
    path = yaml(tmp_path, epochs=500)
    config = TrainConfig(epochs=500)
    folder = runs.create_run("train", f"epochs: {config.epochs}\n", "x", queued=False)
    thread = threading.Thread(target=worker.run_job, args=("train", config, folder, Control()))
    thread.start()
    wait_until(lambda: runs.load_run(folder.name).step > 1)
    assert path.exists()
    told = run("runs", "stop", folder.name)
    assert told.code == 0
    assert folder.name in told.out
    thread.join(30)
    assert runs.load_run(folder.name).state == "stopped"
    assert run("runs", "stop", folder.name).code == 2   # it is over


def wait_until(happened: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
STARTER = """
import sys
from core.jobs import worker
worker.JOBS["train"] = worker.JOBS["train"]._replace(run="tests.fake_job:train")
import launcher
sys.exit(launcher.main(sys.argv[1:]))
"""


def in_background(path: Path) -> subprocess.Popen[str]:
    env = os.environ | {"DARKROOM_RESTARTED": str(ROOT / ".venv"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, "train", "--config", path, "--json"], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=path.parent)
    wait_until(lambda: any(view.step > 1 for view in runs.list_runs()))
    return process


@posix
@pytest.mark.parametrize(("number", "parent"), [(signal.SIGINT, "default_sigint"),
                                                (signal.SIGTERM, "default_sigint"),
                                                (signal.SIGTERM, "ignored_sigint")])
def test_first_ctrl_c_saves_and_stops(tmp_path: Path, number: int, parent: str,
                                      request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(parent)
    process = in_background(yaml(tmp_path, epochs=1000))
    if parent == "ignored_sigint":                      # as of its parent's group, under nohup
        step = max(view.step for view in runs.list_runs())
        process.send_signal(signal.SIGINT)
        wait_until(lambda: max(view.step for view in runs.list_runs()) > step + 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "saved last.ckpt" in err
    answer = json.loads(out.splitlines()[-1])
    assert (answer["ok"], answer["state"]) == (False, "stopped")
    assert runs.load_run(answer["run"]).state == "stopped"


@posix
@pytest.mark.usefixtures("default_sigint")
def test_second_ctrl_c_aborts(tmp_path: Path) -> None:
    process = in_background(yaml(tmp_path, epochs=1000, trigger_word="slow"))
    process.send_signal(signal.SIGINT)
    time.sleep(1)                                       # the job is saving, and slow at it
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err


def interrupt_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_handler_is_taken_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    control, told = Control(), []
    with console.stop_on_ctrl_c(control, told.append):
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: control.stopping)
        assert "Ctrl+C again" in told[0]
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_wait()
    assert signal.getsignal(signal.SIGINT) is before


# --- a real LoRA, from pictures to pictures ---

def test_from_pictures_to_a_lora_and_back(run: Run, base: Path, tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "图片", 4)
    path = yaml(tmp_path, train_data_dir="图片", base_model=str(base), output_dir="out",
                output_name="disc", batch_size=2, max_train_steps=2, device="cpu")
    told = run("train", "--config", path)
    assert told.code == 0, told.err
    lora = tmp_path / "out" / "disc.safetensors"
    assert lora.exists()
    assert str(lora) in told.out
    info = run("lora", "info", lora, "--json")
    assert info.code == 0
    assert (info.json["format"], info.json["ranks"]) == ("kohya", [8])
    assert "kohya" in run("lora", "info", lora, lang="zh-CN").out
    proof = run("lora", "verify", lora, "--base", base, "--json")
    for key in ("--vae", "--text-encoder"):         # read as `generate` reads them
        assert "no_such.safetensors" in run("lora", "verify", lora, "--base", base, key,
                                            "no_such.safetensors").err
    assert proof.json["matched"] == proof.json["modules"] > 0
    assert proof.code == (0 if proof.json["ok"] else 1)
    drawn = run("generate", "--base", base, "--prompt", f"a disc <lora:{lora.stem}:0.8>", "--steps",
                "2", "--out", tmp_path / "drawn", "--seed", "7", "--json")
    assert drawn.code == 0, drawn.err
    assert [Path(file).suffix for file in drawn.json["files"]] == [".png"]
    assert Path(drawn.json["files"][0]).exists()
    # the file holds no whole paths (metadata: public)
    again = run("train", "--config", lora, "--set", "output_dir=again", "--set",
                f"base_model={base}", "--json")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "disc.safetensors").exists()


# --- answers ---

def test_doctor(run: Run) -> None:
    told = run("doctor", "--json")
    assert told.code == (0 if told.json["ok"] else 1)
    assert {"python", "packages"} <= {finding["key"] for finding in told.json["findings"]}


def test_json_takes_all_that_commands_answer(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    console.print_json({"path": Path("/图"), "number": np.float32(0.5), "set": {"b", "a"},
                        "step": Step})
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["number"], found["set"]) == ("/图", 0.5, ["a", "b"])


def test_facts_have_words() -> None:
    lines = console.fact_lines(
        {"ok": True, "matched": 3, "change": 12.3456789, "unknown": 1, "file": ""}, "proof")
    assert [line.split("  ")[-1].strip() for line in lines] == ["yes", "3", "12.3457"]
