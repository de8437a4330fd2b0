"""Records of runs with any value in any place: every tab is painted, every summary is printed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core import i18n
from core.cli import progress
from core.config import TrainConfig
from core.config.draw import DrawConfig
from core.jobs import history, manager
from core.jobs.journal import CONFIG, EVENTS
from core.jobs.manager import JobManager
from core.jobs.runs import RUN, create_run, list_runs, load_run
from gui import actions
from gui.app import build
from gui.state.app_state import AppState, Context
from gui.state.page import Page
from tests.gui.test_views import Silent, plan_dict

AT = 1.7e9
TRAIN = TrainConfig(base_model="demo").model_dump(mode="json")
DRAW = DrawConfig(base="demo", prompt="a", loras=["/x/a.safetensors:0.8"],
                  weights=[0.5, 1.0]).model_dump(mode="json")
STARTED = {"kind": "started", "at": AT, "job": "train", "pid": 1, "config": TRAIN}
EVENTS_OF_A_RUN: list[dict[str, Any]] = [
    STARTED,
    {"kind": "phase", "at": AT, "name": "train", "done": 1, "total": 2, "eta_s": 3.0},
    {"kind": "plan", "at": AT, "plan": plan_dict()},
    {"kind": "note", "at": AT, "key": "jobs.paused", "params": {}},
    *({"kind": "step", "at": AT, "step": step, "total": 2, "epoch": 0.5, "loss": 0.1, "lr": 1e-4,
       "steps_per_s": 1.0, "eta_s": 1.0, "memory_mb": 5.0, "free_mb": 3.0, "temperature_c": 50.0,
       "validation": 0.2} for step in (1, 2)),
    {"kind": "sample", "at": AT, "step": 1, "path": "/x/a.png", "prompt": "a", "seed": 1},
    {"kind": "checkpoint", "at": AT, "step": 1, "path": "/x/a.safetensors"},
    {"kind": "captioned", "at": AT, "path": "/x", "caption": "c"},
    {"kind": "fault", "at": AT, "code": "jobs.crash", "params": {"reason": "x"}, "details": "t",
     "fixes": [{"key": "smaller_batch", "changes": {"batch_size": 1}, "params": {}}]},
    {"kind": "ended", "at": AT, "state": "failed", "result": {
        "steps": 2, "lora": "/x", "seconds": 3, "memory": {}, "samples": ["/x/a.png"],
        "proof": {"ok": True}}}]
VALUES: list[Any] = [
    None, "", "x", -1, 0, 1e300, -1e300, 10**30, float("nan"), float("inf"), [], {}, {"a": 1}, [1],
    True, "\0", "\ud800", "a" * 3000, [{"x": 1}], {"machine": 5}]


def broken_events() -> Iterator[tuple[int, dict[str, Any]]]:
    """-> number of the event, and the event with one value replaced, at up to two levels."""
    for number, event in enumerate([*EVENTS_OF_A_RUN, STARTED | {"job": "generate",
                                                                 "config": DRAW}]):
        number %= len(EVENTS_OF_A_RUN)
        for key, inner in event.items():
            if key != "kind":
                yield from ((number, event | {key: value}) for value in VALUES)
            if isinstance(inner, dict):
                yield from ((number, event | {key: inner | {name: value}})
                            for name in inner for value in VALUES)
    plan = plan_dict()
    for name in plan["machine"]:
        for value in VALUES:
            yield 2, EVENTS_OF_A_RUN[2] | {
                "plan": plan | {"machine": plan["machine"] | {name: value}}}


def paint_all(own_home: Path, broken: list[tuple[int, dict[str, Any]]]) -> None:
    jobs = JobManager(dispatch=False, poll_s=100)
    state = AppState(jobs, Silent())
    page = Page()
    build(Context(state, "en", page), page)
    try:
        for count, (number, event) in enumerate(broken):
            over = count % 2 == 0
            folder = create_run("train", "base_model: demo\n", "x", queued=over)
            lines = [*EVENTS_OF_A_RUN]
            lines[number] = event
            if not over and number != len(lines) - 1:
                lines.pop()
            (folder / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
            # the tabs themselves: Page._painted would go on without one that fails
            jobs._refresh()
            state.projects.change(run=folder.name)
            snap = state.snapshot()
            assert [view.id for view in snap.runs] == [folder.name]
            for _, tab in page.tabs:
                tab.label(snap)
                tab.paint(snap)
            page.header.paint(snap)
            progress.summary(load_run(folder.name).result)
            shutil.rmtree(folder)
            jobs._refresh()
    finally:
        state.close()


def test_a_sample_of_damaged_journals_is_painted(own_home: Path) -> None:
    paint_all(own_home, random.Random(0).sample(list(broken_events()), 60))


@pytest.mark.thorough
@pytest.mark.timeout(1200)            # a minute or two on a quiet machine
def test_every_damaged_journal_is_painted(own_home: Path) -> None:
    broken = list(broken_events())
    assert len(broken) > 4000
    paint_all(own_home, broken)


@pytest.mark.parametrize("content", [None, "", "[]", "5", '{"job": 5}', '{"created": NaN}',
                                     '{"job": "train", "created": 1e300}'])
def test_a_run_whose_facts_are_damaged_is_listed_and_can_be_removed(
        own_home: Path, content: str | None) -> None:
    """A journal without a readable run.json is a run too; what tells neither its job nor that it
    began is told, never started."""
    began, ill = (create_run("train", "base_model: demo\n", name) for name in ("began", "ill"))
    (began / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in EVENTS_OF_A_RUN))
    for folder in (began, ill):
        (folder / RUN).unlink()
        if content is not None:
            (folder / RUN).write_text(content)
    views = {view.id: view for view in list_runs()}
    assert views[began.name].state == "failed"
    assert (views[began.name].job, views[began.name].step) == ("train", 2)
    known = "train" in (content or "")
    assert (ill.name in views) == (content is not None)
    if content is not None and not known:
        assert views[ill.name].state == "interrupted"
        assert str(ill / RUN) in i18n.tr(views[ill.name].fault.code, views[ill.name].fault.params)
    for view in views.values():
        if view.over:
            history.remove(view)
    assert [view.id for view in list_runs()] == [ill.name] * known


def test_the_window_lists_a_damaged_record_and_removes_it(own_home: Path) -> None:
    folder = create_run("train", "base_model: demo\n", "ill")
    (folder / RUN).write_text("[]")
    jobs = JobManager(dispatch=False, poll_s=100)
    state = AppState(jobs, Silent())
    page = Page()
    ctx = Context(state, "en", page)
    build(ctx, page)
    try:
        panels = page._painted(state.snapshot())[0]
        assert f'data-act="remove" data-id="{folder.name}"' in "".join(panels.values())
        actions.act(ctx, "remove", folder.name)
        jobs._refresh()
        assert jobs.views() == []
    finally:
        state.close()


def test_an_old_run_is_glanced_at_and_read_when_it_is_looked_at(
        own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of past runs: their ends are read at the start, the rest when it is wanted."""
    monkeypatch.setattr(manager, "NEWEST", 1)
    monkeypatch.setattr(manager, "_SLICE_S", -1.0)          # nothing by itself
    folders = []
    for number in range(3):
        folder = create_run("train", "base_model: demo\n", f"run {number}")
        (folder / CONFIG).write_text("\0")          # YAML is not needed for a run that has begun
        # between the last step and the end come files, notes and phases
        *begun, ended = EVENTS_OF_A_RUN
        saving = [{"kind": "phase", "at": 3.0, "name": "save", "done": 0, "total": 0, "eta_s": 0.0}]
        (folder / EVENTS).write_text("".join(
            json.dumps(line) + "\n" for line in [*begun, *saving * 20, ended]))
        folders.append(folder.name)
    glanced = {view.id: view for view in list_runs()}
    with JobManager(dispatch=False, poll_s=100) as jobs:
        views = {view.id: view for view in jobs.views()}
        whole = {run_id: load_run(run_id) for run_id in folders}
        assert views[folders[-1]] == whole[folders[-1]]
        for run_id in folders[:-1]:
            light = views[run_id]
            assert light == glanced[run_id]
            assert (light.state, light.step, light.loss, light.result, light.output_dir) == (
                "failed", 2, 0.1, whole[run_id].result, whole[run_id].output_dir)
            assert len(light.losses) < len(whole[run_id].losses) == 2
            assert jobs.view(run_id) == whole[run_id]
            assert {view.id: view for view in jobs.views()}[run_id] == whole[run_id]
