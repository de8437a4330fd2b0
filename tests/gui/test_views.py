"""What is painted for each state of a run, and what the form makes of what is typed: no browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from core import i18n
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.jobs.events import Checkpoint, Faulted, Note, Sample
from core.jobs.manager import JobManager
from core.jobs.runs import ENDED, JobView
from core.memory.plan import Machine
from core.workspace import presets
from gui import checklist, html
from gui.header import header
from gui.state import form, run_files
from gui.state.app_state import AppState, Context, Gauge, Snapshot
from gui.state.page import Page, _difference, _seen
from gui.state.plan_client import Planning, PlanState
from gui.tabs import run
from gui.widgets.fault_card import fault_card
from gui.widgets.memory_bar import grouped, memory_bar
from gui.widgets.preset_cards import preset_cards
from gui.widgets.runs.history import history
from gui.widgets.runs.loss_chart import ema, loss_chart
from gui.widgets.runs.previews import picked, previews
from gui.widgets.suggestion import suggestion

STATES = ("queued", "starting", "running", "paused", "stopping", *sorted(ENDED))
NASTY = '<img src=x onerror="alert(1)">{{7*7}}${7*7}'


class Silent(Planning):
    """Answers nothing and starts no process."""

    def _loop(self) -> None:
        return


@pytest.fixture
def app_state(own_home: Path) -> Iterator[AppState]:
    made = AppState(JobManager(dispatch=False), Silent())
    yield made
    made.close()


@pytest.fixture(params=i18n.LANGUAGES)
def ctx(app_state: AppState, request: pytest.FixtureRequest) -> Context:
    return Context(app_state, request.param, Page())


def view(tmp_path: Path, **changes: Any) -> JobView:
    (tmp_path / "x.safetensors").write_bytes(b"x")
    known: dict[str, Any] = {
        "id": "20260101-000000-000-mia-abcd", "folder": tmp_path, "name": "mia-v1", "job": "train",
        "state": "running", "phase": "train", "step": 612, "total": 1500, "epoch": 26.0,
        "loss": 0.118, "steps_per_s": 0.66, "eta_s": 1340.0, "memory_mb": 6900.0,
        "losses": tuple((n, 0.3 - n / 5000) for n in range(1, 613)), "created": 1.0,
        "started": time.time() - 900, "updated": time.time(), "plan": plan_dict(),
        "checkpoints": (Checkpoint(step=500, path=str(tmp_path / "x.safetensors")),)}
    return JobView(**(known | changes))


def plan_dict(verdict: str = "fits") -> dict[str, Any]:
    return {"machine": {"kind": "cuda", "name": "GPU", "total_mb": 8192.0, "free_mb": 7500.0,
                        "capability": [8, 6], "ram_mb": 0.0, "disk_mb": 40_000.0},
            "needs_mb": 7000.0, "peak": "train", "verdict": verdict, "learned": False,
            "phases": {"train": {"denoiser": 3000.0, "adapter": 100.0, "optimizer": 200.0,
                                 "gradients": 100.0, "activations": 2900.0}},
            "outside": {"context": 450.0, "workspace": 150.0, "new_part": 100.0}}


class Tags(HTMLParser):
    """Every tag that a browser would see; unbalanced ones fail."""

    VOID = frozenset({"img", "input", "br", "line", "circle", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def buttons(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.seen if tag == "button"]


# --- the run ---

@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_run_is_painted_in_both_languages(ctx: Context, tmp_path: Path,
                                                           state: str) -> None:
    shown = view(tmp_path, state=state, ended=time.time() if state in ENDED else 0.0)
    snap = Snapshot(runs=(shown,))
    text = run.head(ctx, shown, snap) + history(ctx, snap) + header(ctx, snap)
    tags = Tags(text)
    assert "gui." not in text                       # no sentence is missing
    for button in tags.buttons():
        if "disabled" in button:
            assert button["title"], "a disabled control says why"
    for panel in (run.buttons(ctx, shown, snap),):
        assert len(re.findall(r'class="act primary"', panel)) <= 1


def test_a_running_step_is_told_with_units_and_as_clock_and_duration(
        ctx: Context, tmp_path: Path) -> None:
    text = run.title(ctx, view(tmp_path))
    assert "612 / 1500" in text
    assert "1.52" in text                           # seconds a step
    assert re.search(r"22 (min|分钟)", text)
    assert re.search(r"[(（](\d\d-\d\d )?\d\d:\d\d", text)       # near midnight with the date


def test_buttons_follow_the_state(ctx: Context, tmp_path: Path) -> None:
    def acts(**changes: Any) -> dict[str, bool]:
        shown = view(tmp_path, **changes)
        return {str(b["data-act"]): "disabled" not in b
                for b in Tags(run.buttons(ctx, shown, Snapshot(runs=(shown,)))).buttons()}
    assert acts() == {"pause": True, "sample": True, "save": True, "stop": True}
    assert acts(state="paused") == {"go": True, "sample": True, "save": True, "stop": True}
    early = acts(phase="load", step=0)
    assert early == {"pause": False, "sample": False, "save": False, "stop": True}
    assert acts(state="stopping")["stop"] is False
    assert acts(state="queued") == {"stop": True}
    assert acts(state="interrupted")["resume"] is True
    assert acts(state="interrupted", checkpoints=())["resume"] is False
    assert "resume" not in acts(state="done")


def test_phases_tell_where_a_run_is(ctx: Context, tmp_path: Path) -> None:
    text = run.phases(ctx, view(tmp_path, phase="texts", phase_done=3, phase_total=20))
    assert text.count("✓") == 2
    assert "3/20 ●" in text
    assert run.phases(ctx, view(tmp_path, state="done", phase="verify")).count("✓") == 6
    assert "●" not in run.phases(ctx, view(tmp_path, state="failed", phase="train"))


def test_a_fault_is_a_card_with_its_fixes_and_no_traceback_first(
        ctx: Context, tmp_path: Path) -> None:
    fault = Faulted(code="jobs.out_of_gpu_memory", params={"reason": "CUDA out of memory"},
                    fixes=[Fix("smaller_batch", {"batch_size": 1}),
                           Fix("checkpointing", {"gradient_checkpointing": True})],
                    details="Traceback (most recent call last): boom")
    shown = view(tmp_path, state="failed", fault=fault, step=1)
    text = fault_card(ctx, shown)
    found = [(b["data-act"], b["data-id"]) for b in Tags(text).buttons() if "data-act" in b]
    assert found[:4] == [("fix", f"{shown.id}/0"), ("fix", f"{shown.id}/1"),
                         ("resume", shown.id), ("folder", shown.id)]
    assert {act for act, _ in found[4:]} == {"remedy"}
    assert f"/diagnostics/{shown.id}" in [b.get("data-copy") for b in Tags(text).buttons()]
    assert text.index("data-act") < text.index("<details>") < text.index("Traceback")
    assert fault_card(ctx, view(tmp_path)) == ""


def test_a_base_that_does_not_fit_stands_on_top(ctx: Context, tmp_path: Path) -> None:
    params = {"error": "1.39", "other_error": "0.08", "prediction": "epsilon",
              "other": "v_prediction"}
    for key, there in (("fits", False), ("near", False), ("new", False), ("wrong", True),
                       ("wrong_parts", True), ("predicts_other", True)):
        shown = view(tmp_path, notes=(Note(key=f"base_check.{key}", params=params),))
        head = run.head(ctx, shown, Snapshot(runs=(shown,)))
        assert ('class="card warning"' in head) == ("1.39" in head) == there
        assert "1.39" in run.notes(ctx, shown)


def test_far_too_few_updates_stand_on_top(ctx: Context, tmp_path: Path) -> None:
    params = {"looks": "2", "pictures": 6, "key": "epochs", "usual": 217, "value": 217}
    shown = view(tmp_path, notes=(Note(key="advisor.too_few", params=params),))
    assert "217" in run.head(ctx, shown, Snapshot(runs=(shown,)))


def test_what_comes_from_outside_is_escaped(ctx: Context, tmp_path: Path) -> None:
    shown = view(tmp_path, name=NASTY, state="failed", ended=5.0, notes=(
        Note(key="jobs.no_permission", params={"file": NASTY}),),
        samples=(Sample(step=1, path="x.png", prompt=NASTY, seed=1),),
        fault=Faulted(code="jobs.crash", params={"reason": NASTY}, details=NASTY))
    snap = Snapshot(runs=(shown, replace(shown, id="b", job="generate")))
    text = "".join((run.head(ctx, shown, snap), run.notes(ctx, shown), previews(ctx, shown),
                    history(ctx, snap), header(ctx, snap)))
    assert "<img src=x" not in text
    assert all("onerror" not in attributes for _, attributes in Tags(text).seen)


# --- chart and memory ---

def test_the_chart_draws_what_was_measured(ctx: Context) -> None:
    points = tuple((float(n), 1.0 - n / 200) for n in range(1, 101))
    text = loss_chart(ctx, points, ((50.0, 0.7), (100.0, 0.6)), 200)
    tags = Tags(text)
    lines = {a["class"]: a["points"] for tag, a in tags.seen if tag == "polyline"}
    assert set(lines) == {"raw", "smooth", "validation"}
    heights = [float(p.split(",")[1]) for p in str(lines["raw"]).split()]
    assert heights == sorted(heights)               # falling loss: y grows downwards
    assert len(heights) == 100
    assert "0.6000" in text
    assert "polyline" not in loss_chart(ctx, points[:1], (), 200)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60), st.integers(0, 500))
@example([0.0, 5e-324], 0)
def test_any_losses_make_a_chart(values: list[float], total: int) -> None:
    fake: Any = Context(None, "en", Page())  # type: ignore[arg-type]
    points = tuple((float(n + 1), value) for n, value in enumerate(values))
    text = loss_chart(fake, points, (), total)
    assert "nan" not in text
    assert "inf" not in text
    smooth = [value for _, value in ema(points)]
    assert min(values) - 1e-3 <= min(smooth) <= max(smooth) <= max(values) + 1e-3
    assert smooth[0] == pytest.approx(values[0])


def test_memory_is_grouped_and_nothing_is_lost(ctx: Context) -> None:
    shares = grouped(plan_dict())
    assert shares == {"base": 3000.0, "activations": 2900.0, "lora": 400.0, "system": 700.0}
    assert sum(shares.values()) == 7000.0
    for verdict, sign in (("fits", "✓"), ("tight", "⚠"), ("too_big", "✖")):
        text = memory_bar(ctx, plan_dict(verdict), held=6000)
        Tags(text)
        assert sign in text
        assert "6.8 GB" in text
        assert "5.9 GB" in text


def test_cards_say_whether_they_fit(ctx: Context) -> None:
    known = presets.list_presets(family="sd15")
    laptop = Machine("cuda", "GPU", 8188.0, 7500.0, (8, 6))
    text = preset_cards(ctx, known, "6gb-style", "style", laptop)
    by_id = {b["data-id"]: b for b in Tags(text).buttons()}
    assert len(by_id) == len([one for one in known if one.purpose == "style"])
    assert by_id["6gb-style"]["aria-pressed"] == "true"
    assert "badge fits" in text
    assert "badge too_big" in text
    assert "24 GB" in text
    assert "badge" not in preset_cards(ctx, known, "", "style", None)


@pytest.mark.parametrize("count", [1, 8, 9, 100])
def test_previews_keep_first_and_last(count: int) -> None:
    steps = picked(list(range(count)))
    assert (steps[0], steps[-1]) == (0, count - 1)
    assert len(steps) == min(count, 8) == len(set(steps))


# --- before the start ---

def answered(ctx: Context, **answer: Any) -> Snapshot:
    snap = ctx.app_state.snapshot()
    question = {"config": {"train_data_dir": snap.config.train_data_dir}}
    return replace(snap, plan_state=PlanState(question, question, {
        "plan": plan_dict(), "verdict": "fits", "lacking": {}, "pictures": 24, "updates": 960,
        **answer}))


def test_start_waits_for_folder_and_base(ctx: Context, tmp_path: Path) -> None:
    assert not checklist.ready(ctx, ctx.app_state.snapshot())
    ctx.app_state.projects.edit(train_data_dir=str(tmp_path), base_model="demo")
    assert checklist.ready(ctx, answered(ctx))
    assert "24" in checklist.html(ctx, answered(ctx))
    fault = {"code": "dataset.folder_missing", "params": {"folder": "x", "nearest": "y"}}
    assert not checklist.ready(ctx, answered(ctx, pictures_fault=fault))
    ctx.app_state.projects.edit(train_data_dir=str(tmp_path / "gone"))
    assert not checklist.ready(ctx, answered(ctx))


def test_what_cannot_be_used_stays_visible_and_blocks(ctx: Context, tmp_path: Path) -> None:
    app_state = ctx.app_state
    app_state.projects.edit(train_data_dir=str(tmp_path), base_model="demo", lora_rank=16)
    page_form = form.Form(ctx)
    page_form.edited("lora_rank", 9999)
    snap = answered(ctx)
    assert not checklist.ready(ctx, snap)
    assert "9999" in checklist.html(ctx, snap)
    assert "1024" in checklist.html(ctx, snap)
    assert snap.config.lora_rank == 16
    page_form.edited("lora_rank", 12)
    assert checklist.ready(ctx, answered(ctx))
    assert app_state.projects.now.edits["lora_rank"] == 12
    page_form.edited("lora_rank", None)             # emptied: back to what is below
    assert "lora_rank" not in app_state.projects.now.edits


def test_every_field_has_a_name_and_a_help_in_both_languages() -> None:
    for language in i18n.LANGUAGES:
        known = i18n.catalogue(language)
        for key in TrainConfig.model_fields:
            assert known.get(f"config_help.{key}"), key
            assert known.get(f"config_help.{key}_help"), key
    shown = [key for level in ("basic", "advanced", "expert")
             for key in form.keys_of(level)]
    assert set(shown) | form.ELSEWHERE == set(TrainConfig.model_fields)


@given(st.sampled_from(sorted(TrainConfig.model_fields)), st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=30)))
def test_whatever_is_typed_is_taken_or_refused(key: str, raw: Any) -> None:
    try:
        value = form.parsed(key, raw)
        if value is not None:
            TrainConfig.model_validate({key: value})
    except (ValidationError, ValueError):
        pass                                        # the two that Form.edited answers


@pytest.mark.parametrize("key", sorted(TrainConfig.model_fields))
def test_fields_survive_the_way_through_the_page(key: str) -> None:
    """Shown and sent back untouched, a field keeps its value."""
    value = getattr(TrainConfig(
        sample_prompts=["a", "b, c"], target_modules=["to_q", "to_k"],
        block_ranks={"mid_block": 4, "down_blocks.*.attentions.0": 0}, block_rates={"attn2": 0.5},
        optimizer_args={"betas": [0.9, 0.99], "beta3": None, "eps": 1e-8, "flag": True}), key)
    again = form.parsed(key, form.shown(key, value))
    if again is None:
        assert value in ("", None, [], {}, False)
    else:
        assert getattr(TrainConfig.model_validate({key: again}), key) == value


def test_the_suggestion_is_shown_with_reasons_and_can_be_taken(ctx: Context) -> None:
    found = {"fits": True, "values": {"lora_rank": 16, "learning_rate": 2e-4}, "needs_mb": 1.0,
             "reasons": {"lora_rank": "because", "learning_rate": "since"}, "notes": ["a note"]}
    snap = answered(ctx, suggestion=found)
    text = suggestion(ctx, snap)
    assert [b["data-act"] for b in Tags(text).buttons()] == ["advice"]
    assert "because" in text
    assert "a note" in text
    tight = answered(ctx, verdict="too_big", plan=plan_dict("too_big"), nearest={
        "changes": {"batch_size": 1}, "needs_mb": 5000.0})
    assert "nearest" in [b["data-act"] for b in Tags(suggestion(ctx, tight)).buttons()]


def test_a_checkpoint_folder_holds_its_lora(tmp_path: Path) -> None:
    point = Checkpoint(step=40, path=str(tmp_path / "mia-000040"))
    assert run_files.lora_file(point) == tmp_path / "mia-000040" / "mia-000040.safetensors"


# --- pages ---

class Thing:
    def __init__(self, number: int) -> None:
        self._id = number


def test_only_differences_are_sent() -> None:
    one, two = Thing(1), Thing(2)
    first = _difference({one: "a", two: "b"}, {}, [one, two])
    assert first[1:] == ["a", "b"]
    second = _difference({one: "a", two: "c"}, _seen(first[0]), [one, two])
    assert second[1] != "a"
    assert second[2] == "c"
    for lost in (None, "", "<i>", "<i>{</i>", "<i>[]</i>"):        # a page that shows nothing yet
        assert _difference({one: "a", two: "c"}, _seen(lost), [one, two])[1:] == ["a", "c"]


def test_snapshots_are_the_same_until_something_changes(app_state: AppState) -> None:
    first = app_state.snapshot()
    app_state.gauge = first.gauge
    again = app_state.snapshot()
    app_state.projects.edit(lora_rank=7)
    changed = app_state.snapshot()
    assert again.version == first.version or again.gauge != first.gauge
    assert changed.version != again.version
    assert changed.config.lora_rank == 7


@pytest.mark.parametrize(("seconds", "said"), [
    (0, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (5400, "1 h 30 min")])
def test_durations(app_state: AppState, seconds: float, said: str) -> None:
    assert html.duration(Context(app_state, "en", Page()), seconds) == said


def test_header_names_card_project_and_queue(ctx: Context, tmp_path: Path) -> None:
    gauge = Gauge("RTX 4060 Laptop", "cuda", 2150, 8188, 61)
    waiting = view(tmp_path, id="q", state="queued", created=9.0)
    text = header(ctx, Snapshot(runs=(waiting, view(tmp_path)), gauge=gauge))
    assert "RTX 4060 Laptop" in text
    assert "2.1 / 8.0 GB" in text
    assert "61 °C" in text
    assert "40 %" in text
    assert "+1" in text


def test_faults_of_handlers_become_messages(ctx: Context) -> None:
    from gui.state.page import _messages

    def fails() -> None:
        raise UserError("gui.no_lora")
    said, *_ = ctx.page._handled(ctx, fails, [], False, False)()
    (told,) = json.loads(said)
    assert told["text"] == i18n.tr("gui.no_lora", {}, ctx.language)
    assert told["kind"] == "warning"
    assert _messages.get() == [told]


def test_what_a_handler_didnt_foresee_is_told_and_logged(
        ctx: Context, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("<i>of nobody")
    said, *_ = ctx.page._handled(ctx, fails, [], False, False)()
    (told,) = json.loads(said)
    assert "RuntimeError: <i>of nobody" in told["text"]
    assert "<" not in said
    assert "of nobody" in caplog.text


def test_pages_are_sent_what_they_lack(ctx: Context) -> None:
    from gui.app import build
    page: Any = ctx.page
    build(ctx, page)
    first = page.live(ctx, "", {})
    assert first is not None
    assert {"header", "run-head", "tab-dataset-button"} <= set(first["panels"])
    marks = {name: mark for name, (mark, _) in first["panels"].items()}
    again = page.live(ctx, first["version"], marks)
    assert again is None or set(again["panels"]) <= {"header", "facts"}      # the memory gauge
    ctx.app_state.projects.refuse("lora_rank", "many")
    second = page.live(ctx, first["version"], marks)
    assert second is not None
    assert second["version"] != first["version"]
    assert "checklist" in second["panels"]
    assert len(second["panels"]) < len(first["panels"])
    assert second["filled"] == first["filled"]
    ctx.app_state.filled()
    third = page.live(ctx, second["version"], marks)
    assert third is not None
    assert third["filled"] != second["filled"]
