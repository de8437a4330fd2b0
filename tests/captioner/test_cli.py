"""darkroom caption, captions ..., auto_label: answers, exit codes, sentences."""

from __future__ import annotations

import ast
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from captioner import cli
from core import i18n
from core.dataset.image_folder import scan
from tests.calls import ROOT, Run, run
from tests.servers.scripted import scripted

__all__ = ["run"]

COLOURS = "tests.caption_colours:Colours"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "my photos 图"
    for name, colour in (("1.png", "red"), ("2.png", "green"), ("sub/3.png", "blue")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(root / name)
    return root


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).with_suffix("").as_posix(): path.read_text()
            for path in sorted(folder.rglob("*.txt"))}


# --- caption ----------------------------------------------------------------------------------

def test_caption_undo_redo(run: Run, folder: Path) -> None:
    told = run("caption", folder, "--with", COLOURS, "--trigger", "sks", "--rule",
               "replace:mostly=>all", "--rule", '{"rule": "suffix", "text": "flat"}')
    assert told.code == 0
    whole = {"1": "sks, all red, red, flat", "2": "sks, all green, green, flat",
             "sub/3": "sks, all blue, blue, flat"}
    assert texts(folder) == whole
    assert f"3 of 3 pictures captioned in {folder}." in told.out
    assert "1.png  sks, all red, red, flat" in told.err
    told = run("captions", "undo", folder)
    assert (told.code, told.out) == (0, "Undone (captioning): 3 captions are as they were.\n")
    assert texts(folder) == {}
    told = run("runs", "resume", "last")
    assert told.code == 0, told.err
    assert texts(folder) == whole
    told = run("captions", "undo", folder)
    assert texts(folder) == {}
    assert run("captions", "redo", folder, "--json").json["changed"] == [
        "1.png", "2.png", "sub/3.png"]
    assert texts(folder) == whole


def test_only_and_keep_and_json(run: Run, folder: Path) -> None:
    (folder / "1.txt").write_text("mine")
    told = run("caption", folder, "--with", COLOURS, "--only", "*1.png", "--only", "sub/*",
               "--json")
    assert told.code == 0
    assert {key: told.json[key] for key in ("ok", "state", "captioned", "kept", "total")} == {
        "ok": True, "state": "done", "captioned": 1, "kept": 1, "total": 2}
    assert texts(folder) == {"1": "mine", "sub/3": "mostly blue, blue"}


def test_what_failed_is_named_and_the_same_command_tries_it_again(run: Run, folder: Path) -> None:
    answers = {"red": "I’m sorry, I can’t."}
    with scripted(lambda body, colour, n: answers.get("red" if colour[0] > 200 else "", "A disc.")
                  ) as script:
        command = ("caption", folder, "--with", "endpoint", "--set", f"endpoint={script.address}")
        told = run(*command)
        assert (told.code, list(texts(folder))) == (0, ["2", "sub/3"])
        assert "1.png: no caption was written. The model refused: `I’m sorry, I can’t.`" in told.err
        assert "1 got no caption" in told.out
        answers.clear()
        told = run(*command, lang="zh-CN")
        assert (told.code, list(texts(folder))) == (0, ["1", "2", "sub/3"])
        assert len(script.asked) == 4
        told = run(*command, "--json")
    assert told.json["failed"] == []


def test_dry_run(run: Run, folder: Path) -> None:
    (folder / "1.txt").write_text("mine")
    told = run("caption", folder, "--with", COLOURS, "--existing", "add", "--dry-run")
    assert told.code == 0
    assert "1.png\n  - mine\n  + mine, mostly red, red\n" in told.out
    assert "Nothing was written." in told.out
    assert texts(folder) == {"1": "mine"}
    assert run("captions", "undo", folder).code == 2


@pytest.mark.parametrize(("words_", "sentence"), [
    (["--with", "nobody"], "There is no captioner named nobody"),
    (["--rule", "replace:a"], "Rule 1: `replace:a` needs the form replace:find=>with."),
    (["--rule", "dedupe", "--rule", "max_tokens:no"], "Rule 2 (max_tokens): `limit: no`"),
    (["--rule", "{bad"], "Rule 1: `{bad` is no valid JSON"),
    (["--only", "*.gif"], "None of the 3 pictures"),
    (["--set", "bemas=3"], "unknown key `bemas`. Did you mean `beams`?"),
    (["--set", "beams=0"], "beams"), (["--set", "beams"], "`--set beams` doesn't work"),
    (["--model", "x", "--with", "clip+blip"], "`--model x`: write which captioner"),
    (["--metadata", "labels.xls"], "captions are kept in a .csv or a .jsonl")])
def test_bad_input_is_one_sentence(run: Run, folder: Path, words_: list[str],
                                   sentence: str) -> None:
    with_ = [] if "--with" in words_ else ["--with", COLOURS]
    told = run("caption", folder, *with_, *words_)
    assert told.code == 2
    assert sentence in told.err
    assert "Traceback" not in told.err
    assert texts(folder) == {}


def test_a_folder_that_is_not_there(run: Run, tmp_path: Path) -> None:
    for action in (["caption"], ["captions", "stats"], ["captions", "undo"]):
        told = run(*action, tmp_path / "nowhere")
        assert (told.code, "nowhere" in told.err) == (2, True)


def test_models_and_set_reach_the_config(folder: Path) -> None:
    parser = __import__("argparse").ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    options = parser.parse_args([
        "caption", str(folder), "--with", "clip+blip", "--model", "blip=a/b", "--model",
        "clip=c=d", "--set", "beams=5", "--set", "exclude=[cat, dog]", "--rule", "dedupe"])
    config = cli._config(options, options.folder, {"existing": "add", "dry_run": None})
    assert (config.models, config.beams, config.exclude, config.existing, config.rules) == (
        {"blip": "a/b", "clip": "c=d"}, 5, ["cat", "dog"], "add", [{"rule": "dedupe"}])


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "parent"), [(signal.SIGINT, "default_sigint"),
                                                (signal.SIGTERM, "ignored_sigint")])
def test_ctrl_c_stops_and_the_same_command_goes_on(tmp_path: Path, number: int, parent: str,
                                                   request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(parent)
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(12):
        Image.new("RGB", (8, 8), "red").save(folder / f"{n:02}.png")
    code = ("import sys, launcher\nfrom core.jobs import worker\n"
            "worker.JOBS['caption'] = worker.Job('captioner.job:load',"
            " 'captioner.job:caption')\n"
            "launcher.ROOMS = ('core.cli.commands', 'captioner.cli')\n"
            "sys.exit(launcher.main(sys.argv[1:]))")
    command = [sys.executable, "-c", code, "caption", str(folder), "--with", COLOURS, "--set",
               "batch_size=1", "--json"]
    env = {**os.environ, "COLOURS_SLOW_S": "0.2", "COLOURS_LOG": str(tmp_path / "log"),
           "DARKROOM_RESTARTED": str(ROOT / ".venv")}
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "log").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    told = json.loads(out.splitlines()[-1])
    assert told["state"] == "stopped"
    assert 0 < told["captioned"] < 12
    assert "Stopping" in err
    done = subprocess.run(command, cwd=ROOT, env=env | {"COLOURS_SLOW_S": "0"}, text=True,
                          capture_output=True, check=True)
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["kept"] + again["captioned"] == 12
    assert len((tmp_path / "log").read_text().splitlines()) == 12
    assert texts(folder) == {f"{n:02}": "mostly red, red" for n in range(12)}


# --- captions ---------------------------------------------------------------------------------

def captioned(folder: Path) -> Path:
    (folder / "1.txt").write_text("cat, red hair, 1girl\nsks")
    (folder / "2.txt").write_text("Cat, red_hair")
    return folder


def test_stats(run: Run, folder: Path) -> None:
    told = run("captions", "stats", captioned(folder), "--trigger", "sks", "--json")
    assert told.json["top"] == [["cat", 2], ["red hair", 2], ["1girl", 1], ["sks", 1]]
    assert (told.json["pictures"], told.json["captioned"], told.json["with_trigger"]) == (3, 2, 1)
    told = run("captions", "stats", folder, "--tag", "1girl")
    assert "3 pictures, 2 with a caption, 4 different tags" in told.out
    assert "Together with 1girl:\ncat       1" in told.out


def test_filter(run: Run, folder: Path) -> None:
    told = run("captions", "filter", captioned(folder), "cat and not has:trigger", "--trigger",
               "sks")
    assert (told.code, told.out) == (0, "2.png\tCat, red_hair\n")
    assert told.err == "1 of 3 pictures.\n"
    assert run("captions", "filter", folder, "tokens > 5", "--json").json["found"] == {
        "1.png": "cat, red hair, 1girl, sks"}
    told = run("captions", "filter", folder, "cat and (dog", lang="zh-CN")
    assert (told.code, told.err) == (2, "筛选条件 `cat and (dog` 第 9 列：括号没有闭合。\n")


def test_apply(run: Run, folder: Path) -> None:
    captioned(folder)
    told = run("captions", "apply", folder, "--rule", "rename:red hair=>ginger", "--where",
               "1girl", "--trigger", "sks", "--dry-run", "--json")
    assert told.json["changes"] == [{"path": "1.png", "before": "cat, red hair, 1girl, sks",
                                     "after": "sks, cat, ginger, 1girl"}]
    assert texts(folder)["1"] == "cat, red hair, 1girl\nsks"
    told = run("captions", "apply", folder, "--rule", "rename:red hair=>ginger", "--trigger",
               "sks")
    assert texts(folder) == {"1": "sks, cat, ginger, 1girl", "2": "sks, Cat, ginger"}
    assert told.out.splitlines()[0].startswith("2 captions changed.")
    assert "1 captions had several lines" in told.out
    told = run("captions", "history", folder)
    assert told.out.startswith("1  ")
    assert "rules" in told.out
    (folder / "2.txt").write_text("by hand")
    told = run("captions", "undo", folder)
    assert "Undone (rules): 1 captions" in told.out
    assert "2.png: its caption was changed by another program" in told.out
    assert texts(folder) == {"1": "cat, red hair, 1girl\nsks", "2": "by hand"}
    assert run("captions", "apply", folder).code == 2
    assert run("captions", "undo", folder).code == 2


def test_apply_with_a_token_limit(run: Run, folder: Path) -> None:
    captioned(folder)
    assert run("captions", "apply", folder, "--rule", "max_tokens:4").code == 0
    assert texts(folder) == {"1": "cat, red hair", "2": "Cat"}


def test_a_given_table(run: Run, folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    assert run("captions", "stats", folder, "--metadata", table).code == 2
    table.write_text("1.png,cat\nsub/3.png,cat\n")
    assert run("captions", "apply", folder, "--metadata", table, "--rule",
               "replace:cat=>a, b").code == 0
    assert table.read_text() == '1.png,"a, b"\nsub/3.png,"a, b"\n'


# --- auto_label -------------------------------------------------------------------------------

def test_auto_label(run: Run, folder: Path) -> None:
    (folder / "1.txt").write_text("mine, 猫")
    table = folder / "metadata.csv"
    told = run("auto_label", "--input", folder, "--output", table, "--with", COLOURS)
    assert told.code == 0
    rows = list(csv.reader(table.read_text("utf-8").splitlines()))
    assert rows[0] == ["filename", "prompt"]
    assert sorted(rows[1:]) == [["1.png", "mine, 猫"], ["2.png", "mostly green, green"],
                                ["sub/3.png", "mostly blue, blue"]]
    assert {one.path.name: one.caption for one in scan(folder, table).pictures} == {
        "1.png": "mine, 猫", "2.png": "mostly green, green", "3.png": "mostly blue, blue"}


def test_auto_label_as_a_script_keeps_rows(run: Run, folder: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "out" / "metadata.csv"
    table.parent.mkdir()
    table.write_text("1.png,by hand\n")
    given = ["--input", str(folder), "--output", str(table), "--with", COLOURS]
    assert cli.auto_label_main(given) == 0
    assert table.read_text() == ('1.png,by hand\n2.png,"mostly green, green"\n'
                                 'sub/3.png,"mostly blue, blue"\n')
    assert cli.auto_label_main([*given, "--overwrite"]) == 0
    assert table.read_text().startswith('1.png,"mostly red, red"\n2.png,')
    capsys.readouterr()
    assert cli.auto_label_main([*given[:3], "labels.txt"]) == 2
    assert "labels.txt: captions are kept in" in capsys.readouterr().err
    assert cli.auto_label_main(["--input", str(folder)]) == 2


# --- sentences --------------------------------------------------------------------------------

def test_every_sentence_of_the_commands_exists() -> None:
    known, found = i18n.catalogue("en"), set()
    for name in ("cli", "edit_cli"):
        for node in ast.walk(ast.parse((ROOT / f"captioner/{name}.py").read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            words_ = [word.value for word in node.args if isinstance(word, ast.Constant)]
            if getattr(node.func, "id", "") == "tr" and words_:
                found.add(f"captions.{words_[0]}")
            elif getattr(node.func, "id", "") == "add_argument":
                found.add(f"captions.arg_{words_[-1].removeprefix('--').replace('-', '_')}")
    assert len(found) > 25
    assert sorted(found - known.keys()) == []
    computed = [f"captions.summary_{key}" for key in (
        "resumed", "kept", "copied", "flattened", "skipped", "left")]
    computed += [f"captions.help_captions_{key}" for key in (
        "stats", "filter", "apply", "undo", "redo", "history")]
    computed += [f"captions.{key}" for key in (
        "stats_top", "stats_words", "stats_together", "what_caption", "what_apply", "what_edit",
        "shared_row", "not_text", "not_readable")]
    assert [key for key in computed if key not in known] == []


@pytest.mark.parametrize("words_", [
    ["caption"], ["captions"], ["captions", "stats"], ["captions", "filter"],
    ["captions", "apply"], ["captions", "undo"], ["auto_label"]])
@pytest.mark.parametrize("lang", ["en", "zh-CN"])
def test_help(run: Run, words_: list[str], lang: str) -> None:
    told = run(*words_, "--help", lang=lang)
    assert told.code == 0
    assert "captions." not in told.out


def test_what_can_not_be_written_is_told(run: Run, folder: Path) -> None:
    (folder / "1.txt").write_bytes("ä".encode("cp1252"))
    (folder / "2.txt").write_text("a cat")
    (folder / "4.txt").write_text("of nobody")
    told = run("captions", "apply", folder, "--rule", "suffix:wet", "--json")
    assert told.code == 0
    for words in ("1.png: the encoding of 1.txt is in doubt", "as Windows-1252 it says: ä",
                  "4.txt"):
        assert words in told.err
    assert (folder / "1.txt").read_bytes() == "ä".encode("cp1252")
    assert (folder / "2.txt").read_text() == "a cat, wet"
