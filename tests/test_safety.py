"""What strangers' files may not do. The long run: python -m tests.fuzz --files 10000."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from captioner.captions.edits import perform
from captioner.captions.store import Store
from captioner.models.weights import safetensors_of
from core import families, paths, serialization
from core.config import parse_train_config
from core.config.draw import DrawConfig
from core.dataset import images
from core.dataset.image_folder import scan
from core.errors import UserError
from core.families.detection import Base
from core.importers import load_train_config
from core.inference import generate
from core.inference.draw import texts_and_loras
from core.lora_files import files
from core.lora_files.library import find_lora
from core.safetensors_header import read_header
from core.training.checkpoint import load as load_checkpoint
from core.weights.precision import Precision
from core.workspace.project import checked_name

CPU = Precision(torch.device("cpu"), *[torch.float32] * 3)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value.code


# --- pickles ----------------------------------------------------------------------------------

class Bomb:
    def __reduce__(self) -> object:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.pth", "x.bin", "x.safetensors"])
@pytest.mark.parametrize("archive", [True, False])
def test_no_pickle_is_opened_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                      archive: bool) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    if archive:
        torch.save(Bomb(), file)
    else:
        file.write_bytes(pickle.dumps(Bomb()))
    family = families.get("sd15")
    for read, code in (
            (lambda: read_header(file), "lora_file"),
            (lambda: files.describe(file), "lora_file"),
            (lambda: files.read_lora(file), "lora_file"), (lambda: Base.of(file), "families"),
            (lambda: generate.load_adapter(None, file, "a", "sd15"), "lora_file"),
            (lambda: family.load(file, CPU), "families"),
            (lambda: family.skeleton(file, CPU), "families")):
        assert code_of(read) == f"{code}.pickle"
    assert not (tmp_path / "ran").exists()


def test_folders_of_pickles(base: Path, tmp_path: Path) -> None:
    unet = torch.nn.Linear(1, 1).state_dict()
    folder = tmp_path / "base"
    for config in base.glob("**/*.json"):
        (folder / config.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        (folder / config.relative_to(base)).write_bytes(config.read_bytes())
    torch.save(unet, folder / "unet" / "diffusion_pytorch_model.bin")
    load = families.get("sd15").load
    assert code_of(lambda: load(folder, CPU, frozenset({"denoiser"}))) == "families.pickle"
    torch.save(unet, tmp_path / "pytorch_model.bin")
    assert code_of(lambda: safetensors_of("clip", tmp_path, ())) == "captioner.pickle"


# --- files that make no sense -----------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_is_told_before_it_blackens_pictures(tmp_path: Path, value: float,
                                                 dtype: torch.dtype) -> None:
    weights = {"lora_unet_x.lora_down.weight": torch.ones(2, 2, dtype=dtype),
               "lora_unet_x.lora_up.weight": torch.full((2, 2), value, dtype=dtype)}
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="lora_up") as caught:
        files.read_lora(tmp_path / "a.safetensors")
    assert caught.value.code == "lora_file.holds_nan"


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [
    DEEP, "{a: " * 10_000, "- " * 50_000, "a: &a [1]\nb: *a", "seed: " + "9" * 100_000,
    "a: 2001-99-99", "? [a]\n: 1", "<<: [1]", "!!timestamp x", "!!python/name:os.system ''",
    "a: \x01", "x: " + "y" * 300_000])
def test_odd_yaml_is_refused_at_once(text: str, tmp_path: Path) -> None:
    assert code_of(lambda: parse_train_config(text, "x.yaml")).startswith("config.")
    with pytest.raises(ValueError, match="line"):
        serialization.from_yaml(text)


@pytest.mark.parametrize("content", [b"\0\1\2", b"\xff\xfe\xff", "seed: 0x" + "f" * 9999])
def test_odd_configs_are_one_sentence(content: bytes | str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert code_of(lambda: load_train_config(file)).startswith("config.")


def test_deep_json_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="deep"):
        serialization.from_json(DEEP)
    (tmp_path / "state.json").write_text(DEEP)
    assert code_of(lambda: load_checkpoint(tmp_path)) == "engine.bad_checkpoint"


@given(st.text() | st.text(alphabet="[]{}:-&*!?|>'\"#,a1. \n\t", max_size=60))
def test_any_yaml_is_a_value_or_a_value_error(text: str) -> None:
    try:
        serialization.from_yaml(text)
    except serialization.BadYaml as error:
        lines = 1 + sum(map(text.count, "\n\r\x85\u2028\u2029"))
        assert 1 <= error.line <= lines  # noqa: PT017


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pictures_of_a_few_bytes(tmp_path: Path, size: int) -> None:
    for start in (b"\x89PNG\r\n\x1a", b"\xff\xd8\xff\xe0aaa", b"GIF89aaa", b"BMaaaaaa",
                  b"II*\0aaa"):
        file = tmp_path / "a.png"
        file.write_bytes(start[:size])
        assert code_of(lambda: images.open_picture(file)).startswith("dataset.")  # noqa: B023


# --- names ------------------------------------------------------------------------------------

BAD_NAMES = ["../x", "..", ".", "/etc/x", "C:\\x", "C:x", "a/b", "a\\b", "CON", "nul.txt", "com1",
             "LPT9.a.b", "x.", "x ", "a\0b", "a\nb", "a" * 300, "~/x", "a<b", "aux ", "con .x"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_names(name: str, tmp_path: Path) -> None:
    assert not paths.is_file_name(name)
    text = json.dumps({"output_name": name})
    assert code_of(lambda: parse_train_config(text, "x.yaml")) == "config.bad_value"
    if name.strip() == name:
        assert code_of(lambda: checked_name(name)) == "gui.bad_name"
    if not set(name) & set(":<>\n") and name == name.strip():
        drawn = DrawConfig(base="x", prompt=f"a <lora:{name}:1>")
        assert code_of(lambda: texts_and_loras(drawn)) == "generate.lora_path"
    assert code_of(lambda: find_lora(name, 1.0)) == "generate.unknown_lora"


@given(st.text(max_size=40))
def test_a_file_name_stays_in_its_folder(name: str) -> None:
    if paths.is_file_name(name):
        assert Path(name).name == name
        assert os.path.normpath(f"/x/y/{name}") == f"/x/y/{name}"


@pytest.mark.parametrize("row", [
    "../secret.png", "sub/../../secret.png", "/etc/passwd", "C:\\secret.png", "\\\\host\\x.png",
    "CON", "nul.png", "a.png\0.png"])
def test_rows_that_lead_elsewhere(tmp_path: Path, row: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "metadata.csv").write_text(f"file_name,text\n{row},evil\na.png,fine\n")
    if "\0" in row:
        assert next(p.code for p in scan(folder).problems) == "dataset.metadata_unreadable"
        return
    data = scan(folder)
    assert [p.caption for p in data.pictures] == ["fine"]
    assert {p.code for p in data.problems} <= {"dataset.row_outside", "dataset.row_without_picture"}
    before = sorted(tmp_path.rglob("*"))
    store = Store(folder)
    assert perform(store.swaps({"a.png": "new"})) == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (tmp_path / ".profile").write_text("mine")
    (folder / "a.txt").symlink_to(tmp_path / ".profile")
    assert code_of(lambda: perform(Store(folder).swaps({"a.png": "evil"}))) == "captions.odd_link"
    assert (tmp_path / ".profile").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="devices are files on POSIX")
def test_a_link_to_what_never_ends(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    assert [p.caption for p in scan(tmp_path).pictures] == [""]


# --- a few of the long run's files ------------------------------------------------------------

@pytest.mark.parametrize("files", [
    pytest.param(150, marks=pytest.mark.thorough),
    pytest.param(3300, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_mutated_files_of_every_kind(files: int, tmp_path: Path) -> None:
    """In a process of its own, as it listens to everything that is opened."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--files", str(files), "--seed", "7", "--keep",
         str(tmp_path / "broken")], capture_output=True, text=True, timeout=1700, check=False,
        cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.search(r"^(\d+) files in", done.stdout, re.M)[1]) >= files * 0.97
    assert "0 broken something" in done.stdout


ESCAPES = ("a \x1b[2Jcat", "\x1b]0;title\x07, dog", "\x9b31mred", "back\x08\x08", "\u202egnp",
           "bell\x07", "bare\rover")
DANGER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("line", [
    "captions stats {folder}", "captions stats {folder} --json", "captions filter cat {folder}",
    "captions apply {folder} --rule replace:cat=>dog --dry-run", "dataset check {folder}",
    "dataset check {folder} --json", "lora info {lora}", "lora info {lora} --json",
    "config import {toml}", "train --config {yaml}", "plan --config {yaml}", "runs list",
    "runs show {run}", "runs show {run} --json"])
def test_no_command_passes_control_characters_on(
        line: str, tmp_path: Path, own_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of captions, tags, metadata, keys, names of runs; as JSON they are whole."""
    import launcher
    from core.jobs import runs
    from core.jobs.events import Captioned, Faulted, JobEnded
    from core.jobs.journal import Journal
    folder, said = tmp_path / "p", ", ".join(ESCAPES)
    folder.mkdir()
    for name in ("a", "b", "c\x1b[2J\u202e"):
        Image.effect_noise((64, 64), 60).convert("RGB").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(said, "utf-8", newline="")
    files = {"toml": f'network_dim = 8\n"{said.encode("unicode_escape").decode()}" = 5'
                     .replace("\\x", "\\u00"),
             "yaml": f"base_model: demo\n{json.dumps(said)}: 5\n"}
    for suffix, text in files.items():
        (tmp_path / f"x.{suffix}").write_text(text, "utf-8")
    save_file({"lora_unet_a.lora_down.weight": torch.ones(4, 8),
               "lora_unet_a.lora_up.weight": torch.ones(8, 4)}, tmp_path / "x.safetensors",
              {"ss_output_name": said, "modelspec.title": said, "ss_tag_frequency": json.dumps(
                  {"x": {said: 3}})})
    run = runs.create_run("caption", "{}", said, queued=False)
    with Journal(run) as journal:
        for event in (Captioned(path=said, caption=said), Faulted(
                code="jobs.crash", params={"reason": said}, fixes=[], details=said),
                JobEnded(state="failed", result={})):
            journal.append(event)
    places = {name: str(tmp_path / f"x.{name}") for name in files}
    given = [word.format(folder=folder, run=run.name, lora=tmp_path / "x.safetensors", **places)
             for word in line.split()]
    launcher.run(given)
    out, err = capfd.readouterr()
    assert "usage:" not in err
    assert not DANGER.findall(out + err)
    if "--json" in given:
        json.loads(out.splitlines()[-1])


def test_names_cant_steer_the_terminal() -> None:
    told = str(UserError("lora_file.missing", file=Path("\x1b[2J\u202ea.txt"), folder="x"))
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "[2J" in told
