"""core/base_models/hub.py against a real HTTP server in its own process: tests/servers/hub.py."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.base_models import catalog, download, hub
from core.cli import models
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from tests.calls import ROOT, serving
from tests.servers import hub as hub_server

MODEL = hub_server.FILES["model.safetensors"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    yield from serving("tests.servers.hub")


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "BACKOFF_S", 0.01)
    monkeypatch.setattr(hub, "TELL_S", 0.0)


def requests(server: str, repo: str) -> list[list[str]]:
    with urllib.request.urlopen(f"{server}/log") as answer:
        return [one for one in json.load(answer) if repo in one[1]]


def get(server: str, repo: str, control: Control | None = None,
        events: list[Event] | None = None) -> Path | None:
    seen: list[Event] = [] if events is None else events
    return hub.fetch(repo, seen.append, control or Control(), mirror=server)


def code(call: object) -> str:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    assert "{" not in str(caught.value)
    return caught.value.code


# --- what is fetched ---

def test_fetches_weights_and_data_checked_and_whole(server: str, own_home: Path) -> None:
    events: list[Event] = []
    folder = get(server, "good/model", events=events)
    assert folder == own_home / "models" / "good" / "model"
    there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert there == ["config.json", "darkroom.json", "model.safetensors", "sub/tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == MODEL
    manifest = json.loads((folder / "darkroom.json").read_text())
    assert manifest["licence"] == "mit"
    assert manifest["commit"] == hub_server.COMMIT
    steps = [event for event in events if isinstance(event, Phase)]
    assert {step.name for step in steps} == {"download"}
    assert steps[-1].done == steps[-1].total == 2
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert [e.key for e in events if isinstance(e, Note)] == ["hub.fetching", "hub.fetched"]
    assert not list(own_home.rglob("evil.json"))
    assert not list(folder.parent.glob("*.partial"))


def test_a_second_call_fetches_nothing(server: str) -> None:
    get(server, "good/again")
    before = len(requests(server, "good/again/resolve"))
    assert get(server, "good/again") is not None
    assert len(requests(server, "good/again/resolve")) == before == 3


def test_offer_tells_size_and_licence_and_takes_nothing(server: str, own_home: Path) -> None:
    offer = catalog.describe("good/offer", server)
    assert offer.licence == "mit"
    assert offer.size == len(MODEL) + 22 + 10_000
    assert not (own_home / "models").exists()
    assert not requests(server, "good/offer/resolve")


def test_hashes_from_headers_where_the_list_has_none(server: str) -> None:
    folder = get(server, "noblobs/model")
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == MODEL


# --- what breaks ---

@pytest.mark.parametrize("owner", ["cut", "norange", "busy", "redirect"])
def test_goes_on_after_a_break(server: str, owner: str) -> None:
    folder = get(server, f"{owner}/model")
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == MODEL
    asked = [one for one in requests(server, f"{owner}/model/resolve") if "safetensors" in one[1]]
    if owner == "cut":
        assert [one[2] for one in asked] == ["", "bytes=300000-"]


def test_token_goes_to_no_mirror_and_not_along_a_redirect(
        server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert get(server, "redirect/mirrored")
    assert not any(one[3] for one in requests(server, "redirect/mirrored"))
    for place in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        path = "" if place == "ENDPOINT" else "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"huggingface_hub.constants.{place}", f"{server}{path}")
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
                        f"{server}/{{repo_id}}/resolve/{{revision}}/{{filename}}", raising=False)
    assert hub.fetch("redirect/direct", lambda _: None, Control())
    assert all(one[3] for one in requests(server, "redirect/direct"))
    assert not any(one[3] for one in requests(server, "/cdn/"))


def test_wrong_checksum_leaves_nothing(server: str, own_home: Path) -> None:
    assert code(lambda: get(server, "wrong/model")) == "hub.checksum"
    assert not (own_home / "models" / "wrong" / "model").exists()
    assert not list(own_home.rglob("*.part"))


def test_a_damaged_rest_is_fetched_again(server: str, own_home: Path) -> None:
    stage = own_home / f"models/good/.rest.{hub_server.COMMIT[:12]}.partial"
    stage.mkdir(parents=True)
    (stage / "model.safetensors.part").write_bytes(b"\0" * 1000)
    folder = get(server, "good/rest")
    assert folder is not None
    assert (folder / "model.safetensors").read_bytes() == MODEL
    (folder / "model.safetensors").write_bytes(b"short")     # later damage is seen by its size
    assert get(server, "good/rest") == folder
    assert (folder / "model.safetensors").read_bytes() == MODEL


@pytest.mark.parametrize(("repo", "fault"), [
    ("gone/model", "hub.not_found"), ("gated/model", "hub.gated"), ("portal/m", "hub.not_a_hub"),
    ("sick/model", "hub.status"), ("pickles/model", "hub.only_pickles"),
    ("dead/model", "hub.broken_off"), ("refused/model", "hub.file_refused"),
    ("secret/model", "hub.file_refused"),
    ("no-slash", "hub.bad_name"), ("../../etc", "hub.bad_name"), ("a/b/c", "hub.bad_name")])
def test_one_clear_fault_each(server: str, repo: str, fault: str) -> None:
    assert code(lambda: get(server, repo)) == fault


def test_unknown_version(server: str) -> None:
    assert code(lambda: catalog.describe("good/model", server, "v9")) == "hub.no_revision"


def test_nobody_listens() -> None:
    assert code(lambda: get("http://127.0.0.1:9", "good/model")) == "hub.unreachable"


def test_offline_is_said(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert code(lambda: get(server, "good/model")) == "hub.offline"


@pytest.mark.parametrize("mirror", ["http://example.com", "ftp://x", "https://", "https://a b"])
def test_bad_mirrors(mirror: str) -> None:
    assert code(lambda: catalog.describe("good/model", mirror)) == "hub.bad_mirror"


def test_no_room_is_seen_before_the_first_byte(server: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RESERVE", 10**18)
    assert code(lambda: get(server, "good/huge")) == "hub.no_room"
    assert not requests(server, "good/huge/resolve")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux' own full disk")
def test_disk_full_while_writing(tmp_path: Path) -> None:
    remote = download.File("x", 10, "0" * 64)
    part = download.Part(Path("/dev/full"), remote)
    part._file = open("/dev/full", "wb")  # noqa: SIM115
    assert code(lambda: part.write(b"x" * 100_000)) == "hub.disk_full_now"


def test_folder_of_the_users_own_stays(server: str, own_home: Path) -> None:
    own = own_home / "models" / "good" / "mine"
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes(b"mine")
    assert code(lambda: get(server, "good/mine")) == "hub.folder_taken"
    assert (own / "model.safetensors").read_bytes() == b"mine"


# --- stop, kill, go on ---

def test_stop_and_go_on(server: str, own_home: Path) -> None:
    control = Control()
    threading.Timer(0.4, control.ask, ["stop"]).start()
    assert get(server, "slow/model", control) is None
    kept = sum(path.stat().st_size for path in own_home.rglob("*.part"))
    assert 0 < kept < len(MODEL)
    assert not (own_home / "models/slow/model").exists()
    events: list[Event] = []
    assert get(server, "slow/model", events=events)
    assert events[0].kind == "note"
    assert getattr(events[0], "key", "") == "hub.resumes"
    starts = [one[2] for one in requests(server, "slow/model/resolve") if "safetens" in one[1]]
    assert int(starts[-1].removeprefix("bytes=").rstrip("-")) == kept


def test_pause_holds_the_line_still(server: str, own_home: Path) -> None:
    control = Control()
    control.ask("pause")
    thread = threading.Thread(target=get, args=(server, "slow/paused", control))
    thread.start()
    time.sleep(0.6)
    first = sum(path.stat().st_size for path in own_home.rglob("*.part"))
    time.sleep(0.3)
    assert first == sum(path.stat().st_size for path in own_home.rglob("*.part"))
    control.ask("go")
    thread.join(20)
    assert (own_home / "models/slow/paused/model.safetensors").read_bytes() == MODEL


KILLED = """
import sys
from core.base_models import hub
from core.jobs.control import Control
print(hub.fetch(sys.argv[1], lambda event: None, Control(), mirror=sys.argv[2]), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_sigkill_and_resume(server: str, own_home: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", KILLED, "slow/killed", server]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        parts = list(own_home.rglob("model.safetensors.part"))
        if parts and parts[0].stat().st_size > 200_000:
            break
        time.sleep(0.02)
    assert code(lambda: get(server, "slow/killed")) == "hub.busy"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = next(own_home.rglob("model.safetensors.part")).stat().st_size
    assert 200_000 < kept < len(MODEL)
    assert not (own_home / "models/slow/killed").exists()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("killed"), done.stderr
    assert (own_home / "models/slow/killed/model.safetensors").read_bytes() == MODEL
    starts = [one[2] for one in requests(server, "slow/killed/resolve") if "safetens" in one[1]]
    assert starts == ["", f"bytes={kept}-"]


def test_crash_between_the_two_renames_is_undone(server: str) -> None:
    folder = get(server, "good/swapped")
    assert folder is not None
    folder.rename(folder.with_name(".swapped.before"))
    assert get(server, "good/swapped") == folder
    assert (folder / "model.safetensors").read_bytes() == MODEL
    assert len(requests(server, "good/swapped/resolve")) == 3


def test_new_version_takes_only_what_changed(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = get(server, "good/newer")
    assert folder is not None
    manifest = json.loads((folder / "darkroom.json").read_text())
    manifest["files"][1]["digest"] = "0" * 40               # config.json was another one
    (folder / "darkroom.json").write_text(json.dumps(manifest))
    assert get(server, "good/newer") == folder
    asked = [one[1].rpartition("/")[2] for one in requests(server, "good/newer/resolve")]
    assert sorted(asked) in (["config.json"] * 2 + ["model.safetensors", "tokenizer.json"],
                             ["config.json", "model.safetensors"] + ["tokenizer.json"] * 2,
                             ["config.json"] + ["model.safetensors"] * 2 + ["tokenizer.json"])


# --- what is here ---

def test_local_knows_paths_our_folder_and_the_hubs_cache(
        own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.local("") is None
    assert hub.local("nobody/nothing") is None
    assert hub.local(str(tmp_path), ["absent"]) == tmp_path
    own = own_home / "models" / "a" / "b"
    own.mkdir(parents=True)
    assert hub.local("a/b") == own
    assert hub.local("a/b", ["model.onnx"]) is None
    (own / "model.onnx").touch()
    assert hub.local("a/b", ["model.onnx"]) == own
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "cache"),
                        raising=False)
    store = tmp_path / "cache" / "models--c--d"
    (store / "snapshots" / "123").mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("123")
    (store / "snapshots" / "123" / "config.json").write_text("{}")
    assert hub.local("c/d") == store / "snapshots" / "123"
    assert hub.local("c/d", ["config.json", "*.safetensors"]) is None


def test_stamp_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"1")
    (tmp_path / "b.txt").write_bytes(b"1")
    before = hub.stamp(str(tmp_path))
    assert before == hub.stamp(str(tmp_path))
    (tmp_path / "b.txt").write_bytes(b"12")
    assert before == hub.stamp(str(tmp_path))
    (tmp_path / "a.onnx").write_bytes(b"12")
    assert before != hub.stamp(str(tmp_path)) != hub.stamp("no/where") == "no/where"


def test_find_names_the_command_that_fetches() -> None:
    with pytest.raises(UserError, match="darkroom models get nobody/nothing"):
        hub.find("nobody/nothing")
    assert code(lambda: hub.find("./nowhere/x/y")) == "hub.no_path"


def test_local_finds_the_one_file_that_configs_name(own_home: Path) -> None:
    entry = next(entry for entry in catalog.catalogue() if entry.use)
    file = own_home / "models" / entry.repo / entry.use
    file.parent.mkdir(parents=True)
    file.touch()
    assert hub.local(entry.repo) == file


# --- the catalogue and the choice of files ---

@pytest.mark.parametrize("entry", catalog.catalogue(), ids=lambda entry: entry.repo)
def test_catalogue_is_in_order(entry: catalog.Entry) -> None:
    assert catalog.REPOSITORY.fullmatch(entry.repo)
    assert entry.purpose in ("caption", "tag", "clip", "base")
    assert entry.mb > 0
    assert entry.licence
    assert set(entry.about) == {"en", "zh-CN"}
    assert any(pattern.endswith(catalog.WEIGHTS) for pattern in entry.files)
    assert not any(pattern.endswith((".bin", ".pt", ".ckpt", "*")) for pattern in entry.files
                   if pattern != "vocab.*")
    assert all(len(one) == 64 for one in entry.sha256.values())
    assert catalog.known(entry.repo.upper()) == entry


def test_one_copy_of_the_weights() -> None:
    names = ["model_index.json", "unet/config.json", "unet/x.safetensors",
             "unet/x.fp16.safetensors", "vae/y.safetensors", "vae/y.bin", "all.safetensors",
             "unet/x.onnx", "a.py", "unet/x.non_ema.safetensors"]
    assert catalog.chosen(names) == ["model_index.json", "unet/config.json",
                                     "unet/x.safetensors", "vae/y.safetensors"]
    assert catalog.chosen(["model.onnx", "tags.csv", "x.msgpack"]) == ["model.onnx", "tags.csv"]
    assert catalog.chosen(["a.json", "sub/b.json", "m.onnx"], ["*.json"]) == ["a.json"]


NAMES = st.text(alphabet="ab./\\:-\0", max_size=12)


@given(st.lists(st.tuples(NAMES, st.sampled_from([".safetensors", ".json", ".bin", ".py", ""]))))
def test_chosen_files_stay_in_the_folder(parts: list[tuple[str, str]]) -> None:
    for name in catalog.chosen([stem + suffix for stem, suffix in parts]):
        inside = (Path("/models/x") / name).resolve()
        assert inside.is_relative_to("/models/x")
        assert inside != Path("/models/x")
        assert not name.endswith((".bin", ".py"))


# --- commands ---

def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    models.add_commands(parser.add_subparsers())
    options = parser.parse_args(arguments)
    status = options.run(options)
    out, err = capsys.readouterr()
    return status, out, err


def test_models_list(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(["models", "list"], capsys)
    assert "SmilingWolf/wd-vit-tagger-v3" in out
    assert "Apache-2.0" in out
    _, out, _ = run(["models", "list", "--json"], capsys)
    assert len(json.loads(out)["models"]) == len(catalog.catalogue())


def test_models_get(server: str, own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["models", "get", "good/cli", "--mirror", server]
    assert code(lambda: run([*asked, "--json"], capsys)) == "hub.needs_yes"
    err = capsys.readouterr().err
    assert "2 MB" in err
    assert "mit" in err
    assert not (own_home / "models" / "good").exists()
    status, out, _ = run([*asked, "--yes", "--json"], capsys)
    assert status == 0
    assert json.loads(out)["path"] == str(own_home / "models" / "good" / "cli")


def test_hub_takes_no_torch() -> None:
    code_ = ("import sys, core.base_models.hub, core.cli.models, core.base_models.download; "
             "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code_], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
