"""The Inference tab without a browser: what is offered, asked for, painted, taken and exported."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from core import i18n
from core.config import TrainConfig, dump_yaml
from core.config.draw import SHEET, DrawConfig
from core.errors import UserError
from core.inference import generate
from core.jobs import runs
from core.jobs.events import Checkpoint, Note, Phase, Sample
from core.jobs.manager import JobManager
from core.jobs.runs import JobView, fold
from core.lora_files import export, library
from gui.state import inference_request as wanted
from gui.state.app_state import AppState, Context, Snapshot
from gui.state.inference_files import InferenceFiles, pictures_folder
from gui.state.inference_request import Added
from gui.state.page import Page
from gui.state.plan_client import Planning
from gui.tabs import inference
from gui.widgets import drawings
from gui.widgets.lora_export import lora_export as export_panel
from gui.widgets.lora_list import lora_list
from tests.gui.test_views import NASTY, Silent, Tags
from tests.tiny import tiny_lora

CONFIG = {"trigger_word": "m1a", "base_model": "demo", "sample_prompts": []}


@pytest.fixture
def app_state(own_home: Path) -> Iterator[AppState]:
    planning: Planning = Silent()
    made = AppState(JobManager(dispatch=False), planning)
    yield made
    made.close()


@pytest.fixture(params=i18n.LANGUAGES)
def ctx(app_state: AppState, request: pytest.FixtureRequest) -> Context:
    return Context(app_state, request.param, Page())


@pytest.fixture
def tab(app_state: AppState) -> Any:
    """The tab's handlers, without Gradio's components."""
    made = object.__new__(inference.Inference)
    made.ctx, made._ready = Context(app_state, "en", Page()), None
    made.files = app_state.shared(InferenceFiles)
    return made


def trained(folder: Path, id: str, created: float, steps: tuple[int, ...] = (500, 1500),
            **more: Any) -> JobView:
    """A finished training; its last file is the final one."""
    points = tuple(Checkpoint(step=step, final=step == steps[-1], path=str(
        tiny_lora(folder / f"{id}-{step:06d}.safetensors"))) for step in steps)
    return JobView(**({"id": id, "folder": folder, "job": "train", "name": f"mia-{id}",
                       "state": "done", "created": created, "config": CONFIG,
                       "checkpoints": points} | more))


def drawn(folder: Path, snap: Snapshot, pictures: int = 1, **config: Any) -> JobView:
    samples = []
    for number in range(pictures):
        Image.new("RGB", (8, 8)).save(folder / f"{number:05d}.png")
        samples.append(Sample(step=number, path=str(folder / f"{number:05d}.png"), prompt="a cat",
                              seed=7))
    data = {"base": "demo", "prompt": "a cat", "out": str(pictures_folder() / snap.project.name)}
    return JobView(id="d", folder=folder, job="generate", state="done", created=9.0, started=1.0,
                   ended=3.0, samples=tuple(samples),
                   config=DrawConfig.model_validate(data | config).model_dump(mode="json"))


def desk() -> InferenceFiles:
    return InferenceFiles(lambda: None)


@contextlib.contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(UserError) as caught:
        yield
    assert caught.value.code == code


# --- what is offered ---

def test_the_last_lora_is_ready_at_its_trigger(ctx: Context, tmp_path: Path) -> None:
    old, new = trained(tmp_path, "a", 1.0), trained(tmp_path, "b", 2.0)
    snap = Snapshot(runs=(new, old))
    found = wanted.lora_choices(snap, desk())
    assert [Path(one.file).stem for one in found] == [
        "b-001500", "b-000500", "a-001500", "a-000500"]
    assert wanted.added(snap, found) == [Added(found[0].file, 0.8)]
    usual = wanted.typed(snap, found)
    assert (usual["prompt"], usual["steps"], usual["cfg"]) == ("m1a", 16, 1.5)
    assert wanted.triggers(wanted.added(snap, found), found, desk()) == ["m1a"]
    tags = Tags(lora_list(ctx, snap, desk()))
    assert [a["value"] for tag, a in tags.seen if tag == "input" and "data-weight" in a] == [
        "0.8", "0.8"]
    assert all(a.get("aria-label") for tag, a in tags.seen if tag in ("input", "select")
               and a.get("data-pick") != "base")


def test_an_own_list_stays_until_a_newer_lora_is_ready(tmp_path: Path) -> None:
    old, new = trained(tmp_path, "a", 1.0), trained(tmp_path, "b", 2.0)
    before = Snapshot(runs=(old,))
    found = wanted.lora_choices(before, desk())
    own = [Added(found[1].file, 0.35), Added(found[0].file, -0.5)]
    project = before.project.model_copy(update={"inference": wanted.own_list(own, found)})
    before = replace(before, project=project)
    assert wanted.added(before, found) == own
    after = replace(before, runs=(new, old))
    found = wanted.lora_choices(after, desk())
    assert wanted.added(after, found) == [Added(found[0].file, 0.8)]
    for foreign in ("x", [1], [{"file": "x", "weight": 9}], [{"file": 1}], None):
        project = project.model_copy(update={"inference": {"lora": "b", "loras": foreign}})
        assert wanted.added(replace(after, project=project), found) == []


def test_files_on_the_disk_are_offered_too(own_home: Path) -> None:
    snap = Snapshot()
    file = tiny_lora(snap.settings.output_folder / "x" / "ink.safetensors")
    tiny_lora(snap.settings.output_folder / "x" / "state.safetensors")
    found = wanted.lora_choices(snap, desk())
    assert [one.file for one in found] == [str(file)]
    assert wanted.added(snap, found) == []          # no run made it
    assert wanted.names(found) == {"ink": str(file)}


def test_checkpoints_go_back_through_resumed_runs(tmp_path: Path) -> None:
    old = trained(tmp_path, "a", 1.0, (100, 200))
    new = trained(tmp_path, "b", 2.0, (200, 300), resumed_from="a")
    points = wanted.checkpoints(Snapshot(runs=(new, old)), new.checkpoints[1].path)
    assert [(one.step, Path(one.file).stem) for one in points] == [
        (100, "a-000100"), (200, "b-000200"), (300, "b-000300")]


# --- what is asked for ---

def test_jobs(tmp_path: Path, own_home: Path) -> None:
    run = trained(tmp_path, "a", 1.0)
    snap = Snapshot(runs=(run,))
    final = run.checkpoints[1].path
    values = {"prompt": "x <lora:a-000500:0.3>", "seed": 5, "steps": 4, "cfg": 2.0, "count": 2,
              "size": "64x32", "sampler": "euler_a", "negative": None}
    config, name = wanted.job(snap, desk(), "draw", values, "cpu")
    assert (config.loras, config.names, config.device, name) == (
        [f"{final}:0.8"], {"a-000500": run.checkpoints[0].path}, "cpu", "a-001500")
    assert (config.size, config.count, config.sampler) == ("64,32", 2, "euler_a")
    assert wanted.job(snap, desk(), "compare", values)[0].weights == [0.0, 0.8]
    assert wanted.job(snap, desk(), "sweep", values)[0].weights == list(wanted.SWEEP)
    sweep = wanted.job(snap, desk(), "checkpoints", values)[0]
    assert sweep.labels == ["step 500", "step 1500"]
    assert sweep.checkpoints == [point.path for point in run.checkpoints]
    named = replace(run, config={**run.config, "vae": "/a/ae.safetensors", "base_model": "demo"})
    demo = TrainConfig(base_model="demo")
    config, _ = wanted.job(Snapshot(runs=(named,), config=demo), desk(), "draw", values)
    assert config.vae == ""                 # the project names none for its own base
    other = replace(named, config={**named.config, "base_model": "/a/flux.safetensors"})
    config, _ = wanted.job(Snapshot(runs=(other,)), desk(), "draw", values)
    assert (config.base, config.vae) == ("/a/flux.safetensors", "/a/ae.safetensors")
    again = wanted.again(replace(other, config=config.model_dump()), {"vae": "/b.safetensors"})
    assert (again.vae, again.base, again.seed) == ("/b.safetensors", config.base, 5)
    for changes, code in (({"steps": 0}, "bad_steps"), ({"size": "x"}, "bad_size"),
                          ({"cfg": 99}, "bad_cfg"), ({"seed": -2}, "bad_seed"),
                          ({"count": 0}, "bad_count")):
        with refused(f"tab_inference.{code}"):
            wanted.job(snap, desk(), "draw", values | changes)
    with refused("generate.unknown_lora"):
        wanted.job(snap, desk(), "draw", values | {"prompt": "<lora:nobody:1>"})
    with refused("gui.no_lora"):
        wanted.job(Snapshot(), desk(), "sweep", values)
    one = Snapshot(runs=(trained(tmp_path, "c", 2.0, (40,)),))
    with refused("tab_inference.one_checkpoint"):
        wanted.job(one, desk(), "checkpoints", values)
    Path(final).unlink()
    kept = wanted.own_list([Added(final)], wanted.lora_choices(snap, desk()))
    gone = replace(snap, project=snap.project.model_copy(update={"inference": kept}))
    with refused("tab_inference.lora_gone"):
        wanted.job(gone, desk(), "draw", values)


def test_a_picture_gives_its_settings_back(tmp_path: Path) -> None:
    snap = Snapshot()
    view = drawn(tmp_path, snap, 2, loras=["/x/ink.safetensors:0.8", "/x/mia.safetensors:-0.5"],
                 weights=[0.0, 0.4], steps=9, cfg=3.5, size="64,32", sampler="ddim",
                 negative="blur")
    assert wanted.loras_of(view, 1) == [Added("/x/ink.safetensors", 0.4),
                                        Added("/x/mia.safetensors", -0.5)]
    told = wanted.settings_of(view, 1)
    assert (told["seed"], told["steps"], told["size"], told["negative"], told["count"]) == (
        7, 9, "64,32", "blur", 1)
    points = drawn(tmp_path, snap, 2, loras=["/x/ink.safetensors:0.8"],
                   checkpoints=["/x/a.safetensors", "/x/b.safetensors"])
    assert wanted.loras_of(points, 1) == [Added("/x/b.safetensors", 0.8)]
    sheet = replace(points, samples=(replace(points.samples[0], step=SHEET),))
    assert wanted.loras_of(sheet, 0) == [Added("/x/ink.safetensors", 0.8)]


# --- what is painted ---

def test_what_is_drawn_is_painted_and_escaped(ctx: Context, tmp_path: Path) -> None:
    snap = Snapshot()
    view = drawn(tmp_path, snap, 30, prompt=NASTY, negative=NASTY,
                 loras=[f"{NASTY}.safetensors:0.8"])
    view = replace(view, name=NASTY, samples=tuple(
        replace(one, prompt=NASTY, step=0) for one in view.samples))
    snap = replace(snap, runs=(view, trained(tmp_path, "a", 1.0, name=NASTY)))
    table = desk()
    text = "".join((drawings.gallery(ctx, snap, table), drawings.large(ctx, snap, table),
                    drawings.status(ctx, snap, table), drawings.actions(ctx, snap, table),
                    lora_list(ctx, snap, table), export_panel(ctx, snap, table)))
    assert "<img src=x" not in text
    assert all("onerror" not in attributes for _, attributes in Tags(text).seen)
    assert "tab_inference." not in text
    assert "gui." not in text
    cells = [a for a in Tags(drawings.gallery(ctx, snap, table)).seen if a[0] == "figure"]
    assert len(cells) == 24
    table.page = 9                                  # beyond the end: the last one
    cells = [a for a in Tags(drawings.gallery(ctx, snap, table)).seen if a[0] == "figure"]
    assert len(cells) == 6


def test_notes_of_a_drawing_say_what_had_no_effect(ctx: Context, tmp_path: Path) -> None:
    """What only tells how it was drawn is no warning; what a job tells of itself is no note."""
    snap = Snapshot()
    keys = {"jobs.stopping": {}, "generate.clip_skip": {"skip": 2, "loras": "x"},
            "generate.tag_unread": {"name": "x", "part": "0.5"}}
    view = replace(drawn(tmp_path, snap), notes=tuple(
        Note(key=key, params=params) for key, params in keys.items()))
    text = drawings.status(ctx, replace(snap, runs=(view,)), desk())
    assert text.count("card warning") == text.count("card info") == 1
    assert ctx.tr("jobs.stopping") not in text


def test_steps_that_nobody_asked_for_are_the_pictures_own(ctx: Context, tmp_path: Path) -> None:
    """Left empty they are the base's: a turbo's 8, with guidance 1."""
    view, label = drawn(tmp_path, Snapshot()), ctx.tr("tab_inference.numbers")
    assert dict(drawings.facts(ctx, view, 0))[label].count("·") == 1    # seed and sampler
    generate.save_png(Image.new("RGB", (8, 8)), Path(view.samples[0].path),
                      "a cat\nSteps: 8, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 8x8")
    told = dict(drawings.facts(ctx, view, 0))[label]
    assert f"{ctx.tr('draw_steps')} 8 · CFG 1 " in told
    asked = drawn(tmp_path, Snapshot(), steps=12, cfg=3.0)
    assert f"{ctx.tr('draw_steps')} 12 · CFG 3 " in dict(drawings.facts(ctx, asked, 0))[label]


def test_comparisons_appear_once_both_pictures_are_there(ctx: Context, tmp_path: Path) -> None:
    view = drawn(tmp_path, Snapshot(), 2, weights=[0.0, 0.8], loras=["x:0.8"])
    assert drawings.slider(ctx, replace(view, samples=view.samples[:1])) == ""
    text = drawings.slider(ctx, view)
    assert text.count("<img") == 2
    assert 'type="range"' in text
    four = replace(view, config={**view.config, "weights": [0, 0.4, 0.8, 1]})
    assert drawings.slider(ctx, four) == ""


def test_while_a_run_holds_the_gpu_there_are_three_ways(ctx: Context, tmp_path: Path) -> None:
    run = trained(tmp_path, "a", 1.0, state="running", phase="train", step=9)
    acts = Tags(drawings.actions(ctx, Snapshot(runs=(run,)), desk())).buttons()
    assert [(a["data-act"], a["data-id"]) for a in acts[:3]] == [
        ("preview", "a"), ("draw", ""), ("draw", "cpu")]
    early = replace(run, step=0, phase="load")
    acts = Tags(drawings.actions(ctx, Snapshot(runs=(early,)), desk())).buttons()
    assert "disabled" in acts[0]
    assert acts[0]["title"]
    idle = Tags(drawings.actions(ctx, Snapshot(runs=(replace(run, state="done"),)), desk()))
    assert [a["data-act"] for a in idle.buttons()] == ["draw", "compare", "sweep", "checkpoints"]


def test_progress_tells_what_is_left(ctx: Context, tmp_path: Path) -> None:
    view = drawn(tmp_path, Snapshot(), 1, weights=[0.0, 0.4, 0.8], loras=["x:1"], count=2)
    view = fold(replace(view, state="running"), Phase(name="draw", done=30, total=120, eta_s=45.0))
    text = drawings.status(ctx, Snapshot(runs=(view,)), desk())
    assert 'aria-valuenow="25"' in text
    assert ctx.tr("drawing", done=2, total=6) in text
    assert ctx.tr("seconds", count=45) in text


def test_pictures_on_the_cpu_hide_no_training(tmp_path: Path) -> None:
    run = trained(tmp_path, "a", 1.0, state="running")
    beside = replace(drawn(tmp_path, Snapshot(), 1, device="cpu"), state="running")
    assert beside.beside
    assert Snapshot(runs=(beside, run)).active == run
    assert Snapshot(runs=(beside,)).active == beside


# --- what the handlers do ---

def test_loras_are_added_weighed_removed_and_refused(tab: Any, app_state: AppState, tmp_path: Path
                                                     ) -> None:
    def now() -> list[Added]:
        snap = app_state.snapshot()
        return wanted.added(snap, wanted.lora_choices(snap, tab.files))
    ink, mia = (tiny_lora(tmp_path / f"{name}.safetensors") for name in ("ink", "mia"))
    tab.change("add", str(ink))
    tab.change("add", f'"{mia}"')
    tab.change("add", str(ink))
    assert now() == [Added(str(ink)), Added(str(mia))]
    tab.change("weight", "1 -0.35")
    for wrong in ("1 9", "7 0.5", "x", "0", "0 nan"):
        tab.change("weight", wrong)
    assert now() == [Added(str(ink)), Added(str(mia), -0.35)]
    tab.change("remove", "0")
    assert now() == [Added(str(mia), -0.35)]
    other = tiny_lora(tmp_path / "xl.safetensors", metadata={"ss_base_model_version": "sdxl_base"})
    vae, pickle = tmp_path / "vae.safetensors", tmp_path / "x.safetensors"
    tiny_lora(vae, ("x",))
    vae.write_bytes(vae.read_bytes().replace(b"lora_unet_x.lora_down.weight",
                                             b"encoder.conv_in.xxxxx.weight"))
    pickle.write_bytes(b"\x80\x04K\x01.")
    for file, code in ((other, "generate.other_family"), (pickle, "lora_file.pickle"),
                       (tmp_path / "none.safetensors", "lora_file.missing")):
        with refused(code):
            tab.change("add", str(file))
    with refused("gui.not_absolute"):
        tab.change("add", "ink.safetensors")
    assert now() == [Added(str(mia), -0.35)]


def test_what_is_dropped_is_taken(tab: Any, app_state: AppState, own_home: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = own_home / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    file = tiny_lora(uploads / "1" / "ink.safetensors", metadata={
        "ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "inky"})
    tab.take("dropped", json.dumps([str(file)]))
    kept = own_home / "loras" / "ink.safetensors"
    snap = app_state.snapshot()
    found = wanted.lora_choices(snap, tab.files)
    assert wanted.added(snap, found) == [Added(str(kept))]
    assert wanted.triggers(wanted.added(snap, found), found, tab.files) == ["inky"]
    assert "inky" in lora_list(tab.ctx, snap, tab.files)

    from tests.inference.test_png_info import comment, png
    picture = png(uploads / "2.png", parameters=(
        "a house <lora:ink:0.35> <lora:nobody:1>\nNegative prompt: rain\n"
        "Steps: 9, Sampler: Euler a, CFG scale: 3.5, Seed: 77, Size: 64x32"))
    tab.take("dropped", json.dumps([str(picture)]))
    snap = app_state.snapshot()
    assert wanted.added(snap, wanted.lora_choices(snap, tab.files)) == [Added(str(kept), 0.35)]
    told = wanted.typed(snap, wanted.lora_choices(snap, tab.files))
    assert told == {"prompt": "a house  <lora:nobody:1>", "negative": "rain", "seed": 77,
                    "steps": 9, "cfg": 3.5, "size": "64,32", "sampler": "euler_a", "count": 1,
                    "same_seed": True, "clip_skip": None}
    picture = png(uploads / "4.png", parameters=(
        "a house\nSteps: 9, Sampler: Euler a, Seed: 77, Size: 64x32, Clip skip: 2"))
    tab.take("dropped", json.dumps([str(picture)]))
    snap = app_state.snapshot()
    assert wanted.typed(snap, wanted.lora_choices(snap, tab.files))["clip_skip"] == 2
    # what a picture doesn't tell is said, and never that of the picture before
    (uploads / "5.jpg").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(uploads / "5.jpg", exif=comment(
        b"UNICODE\0" + "a boat\nSteps: 8, Denoising strength: 0.5".encode("utf-16-be")))
    said = list[str]()
    monkeypatch.setattr(tab.ctx.page, "tell", lambda text, **_: said.append(text))
    tab.take("dropped", json.dumps([str(uploads / "5.jpg")]))
    snap = app_state.snapshot()
    assert wanted.typed(snap, wanted.lora_choices(snap, tab.files)) == {
        "prompt": "a boat", "negative": "", "seed": wanted.SEED, "steps": 8, "cfg": None,
        "size": "", "sampler": "auto", "count": 1, "same_seed": True, "clip_skip": None}
    assert "Seed, Guidance (CFG), Width,height (px), Sampler" in said[1]
    assert "denoising strength" in said[2]
    with refused("tab_inference.no_settings"):
        tab.take("dropped", json.dumps([str(png(uploads / "3.png"))]))
    before = app_state.projects.now
    tab.take("dropped", json.dumps([str(Path(__file__)), "/etc/passwd", 3]))
    tab.take("dropped", "not json")
    assert app_state.projects.now == before


def test_pictures_are_deleted_and_brought_back(tab: Any, app_state: AppState) -> None:
    folder = pictures_folder() / app_state.projects.now.name
    folder.mkdir(parents=True)
    view = drawn(folder, app_state.snapshot(), 3)
    snap = replace(app_state.snapshot(), runs=(view,))
    app_state.snapshot = lambda: snap                   # type: ignore[method-assign]
    tab.act("delete", "d/1")
    assert [n for _, n in tab.files.pictures(snap)] == [2, 0]
    assert (folder / "_deleted" / "00001.png").is_file()
    tab.act("undelete", "")
    assert [n for _, n in tab.files.pictures(snap)] == [2, 1, 0]
    for wrong in ("d/9", "x/0", "", "../d/0"):
        with refused("tab_inference.picture_gone"):
            tab.act("delete", wrong)
    tab.act("as_preview", "d/0")
    tab.act("as_preview", "d/0")
    assert app_state.projects.now.edits["sample_prompts"] == ["a cat"]
    tab.act("open", "d/2")
    tab.act("step", "1")
    assert tab.files.open == "d/1"
    tab.act("step", "-1")
    tab.act("step", "-1")
    assert tab.files.open == "d/2"


def test_exports_replace_nothing(tab: Any, app_state: AppState, tmp_path: Path) -> None:
    ink = tiny_lora(tmp_path / "ink.safetensors")
    tab.change("add", str(ink))
    comfy = tmp_path / "ComfyUI"
    (comfy / "models" / "checkpoints").mkdir(parents=True)
    ask = {"file": str(ink), "program": "comfyui", "folder": str(comfy)}
    tab.send("export", json.dumps(ask))
    copy = comfy / "models" / "loras" / "ink.safetensors"
    assert copy.read_bytes() == ink.read_bytes()
    tab.send("export", json.dumps(ask))             # the same file again: nothing to do
    copy.write_bytes(b"another's")
    tab.send("export", json.dumps(ask))
    assert copy.read_bytes() == b"another's"
    assert (copy.parent / "ink-2.safetensors").read_bytes() == ink.read_bytes()
    assert len(list(copy.parent.iterdir())) == 2
    assert app_state.settings.now.exports == {"comfyui": str(copy.parent)}
    for wrong in ({**ask, "file": "/etc/passwd"}, {**ask, "program": "x"}, {}, 3):
        tab.send("export", json.dumps(wrong))
    assert len(list(copy.parent.iterdir())) == 2
    with refused("tab_inference.no_folder"):
        tab.send("export", json.dumps({**ask, "folder": str(tmp_path / "none")}))


@pytest.mark.skipif(os.name == "nt", reason="HOME means nothing there")
def test_programs_are_found_where_people_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    for folder in ("stable-diffusion-webui/models/Stable-diffusion",
                   "Documents/webui-forge/webui/models/Stable-diffusion",
                   "Desktop/ComfyUI_windows_portable/ComfyUI/models/loras",
                   "Desktop/ComfyUI_windows_portable/ComfyUI/models/checkpoints",
                   "other/models/Stable-diffusion"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {(place.program, str(place.folder.relative_to(tmp_path)))
             for place in export.find_places() if place.folder.is_relative_to(tmp_path)}
    assert found == {
        ("a1111", "stable-diffusion-webui/models/Lora"),
        ("forge", "Documents/webui-forge/webui/models/Lora"),
        ("comfyui", "Desktop/ComfyUI_windows_portable/ComfyUI/models/loras")}


def test_names_mean_what_the_worker_makes_of_them(tmp_path: Path, own_home: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The tab's completion and core/lora_files/library.py agree on which file a name calls."""
    monkeypatch.chdir(tmp_path)
    for id in ("20260101-000000-000-a-aaaa", "20260102-000000-000-a-bbbb"):
        output = tmp_path / id
        run = own_home / "runs" / id
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({
            "job": "train", "name": "a", "created": float(id[6:8]), "cwd": str(tmp_path)}))
        (run / "config.yaml").write_text(f"output_dir: {output}\n")
        file = tiny_lora(output / "same.safetensors")
        from core.jobs.events import JobEnded, JobStarted
        from core.jobs.journal import Journal
        with Journal(run) as journal:
            journal.append(JobStarted(job="train", pid=1, config={"output_dir": str(output)}))
            journal.append(Checkpoint(step=3, path=str(file), final=True))
            journal.append(JobEnded(state="done"))
    snap = Snapshot(runs=tuple(runs.list_runs()))
    named = wanted.names(wanted.lora_choices(snap, desk()))
    assert named == {"same": str(library.find_lora("same", 1.0).path)}
    assert "20260102" in named["same"]


def test_a_draw_config_comes_back(tmp_path: Path) -> None:
    from core.config import draw
    config = DrawConfig(base="demo", checkpoints=["/a", "/b"], labels=["step 1", "step 2"],
                        names={"x": "/x"}, device="cpu")
    (tmp_path / "config.yaml").write_text(dump_yaml(config), "utf-8")
    assert draw.load(tmp_path / "config.yaml") == config


def test_the_queue_lets_the_cpu_draw_beside_a_run(own_home: Path) -> None:
    """One holds the card, one draws on the CPU; the rest waits."""
    runs.create_run("train", "base_model: demo\n", "mia", queued=False)
    with JobManager(dispatch=False) as manager:
        def queue(**more: Any) -> str:
            return manager.start(DrawConfig(base="demo", **more), "draw", "generate")
        waits = queue()
        assert manager._next() is None
        beside = queue(device="cpu")
        manager._refresh()
        found = manager._next()
        assert found is not None
        assert found.folded.id == beside
        runs.claim(found.folded.folder)             # it has begun
        queue(device="cpu")
        manager._refresh()
        assert manager._next() is None
        assert manager.view(waits).state == "queued"
