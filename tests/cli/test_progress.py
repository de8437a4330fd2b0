"""Events as people read them."""

from __future__ import annotations

import io
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from core import i18n, units
from core.cli import progress
from core.cli.progress import Bars, Lines, Terminal
from core.jobs.events import Checkpoint, Faulted, JobEnded, Note, Phase, Sample, Step
from core.units import MovingAverage


def step(number: int = 5, **more: object) -> Step:
    facts: dict[str, object] = {"loss": 0.25, "steps_per_s": 2.0, "eta_s": 47.5, "lr": 1e-4,
                                "total": 100, "epoch": 0.5, "memory_mb": 812.3} | more
    return Step(step=number, **facts)  # type: ignore[arg-type]


def told(*events: object, every_s: float = 0.0) -> list[str]:
    """What a pipe gets, without the clock in front."""
    out = io.StringIO()
    with Terminal(out, every_s) as shown:
        for event in events:
            shown(event)  # type: ignore[arg-type]
    lines = out.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    return [line[10:] for line in lines]


def test_a_run_in_lines() -> None:
    event = step(number=5)
    clock = time.strftime("%H:%M", time.localtime(event.at + 47.5))
    assert told(Phase(name="cache", done=3, total=20), event,
                Checkpoint(step=5, path="/x/最好.safetensors"),
                Sample(step=5, path="/x/1.png", prompt="[b]", seed=1),
                Note(key="config.not_a_mapping", params={"file": "[red]x"}),
                JobEnded(state="done")) == [
        "preparing pictures  3 / 20",
        f"training  5 / 100  loss 0.2500 · 2.0 steps/s · 0:48 left ({clock}) · 812 MB",
        "saved /x/最好.safetensors", "picture /x/1.png",
        "[red]x holds no settings. Each line needs the form `key: value`."]


def test_lines_are_seldom_but_the_last_is_told() -> None:
    steps = [step(number=n) for n in range(1, 101)]
    lines = told(Phase(name="load"), *steps, every_s=60)
    assert [line.split("  ")[:2] for line in lines] == [
        ["loading the model"], ["training", "1 / 100"], ["training", "100 / 100"]]
    cut = told(*steps[:50], Phase(name="save"), every_s=60)
    assert [line.split("  ")[:2] for line in cut] == [
        ["training", "1 / 100"], ["training", "50 / 100"], ["saving"]]


def test_a_fault_is_kept_for_the_last_word() -> None:
    out = io.StringIO()
    shown = Terminal(out)
    shown(Phase(name="scan"))
    assert not shown.stepped
    shown(step())
    shown(Faulted(code="config.missing", params={"file": "x"}))
    assert shown.stepped
    assert shown.fault is not None
    assert "config" not in out.getvalue()


def test_bars_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    shown = Terminal(console.file)  # type: ignore[arg-type]
    assert isinstance(shown.screen, Lines)
    shown.screen = Bars(console)
    with shown:
        shown(Phase(name="scan"))
        shown(Phase(name="cache", done=2, total=2))
        shown(step(number=40))
        shown.screen.write_line("[not markup] 图")
        shown(JobEnded(state="done"))
        shown(JobEnded(state="done"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    last = text.split("[not markup] 图")[1]
    for piece in ("reading the folder", "2 / 2", "40 / 100", "loss 0.2500", "left ("):
        assert piece in last


def test_a_terminal_gets_bars() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True
    assert isinstance(Terminal(Screen()).screen, Bars)


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3675, "1:01:15"), (-3, "0:00"),
    (360_000, "100:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


@given(st.floats(0, 1e7))
def test_durations_read_back(seconds: float) -> None:
    parts = [int(part) for part in units.duration(seconds).split(":")]
    assert sum(part * 60 ** place for place, part in enumerate(reversed(parts))) == round(seconds)


def test_slow_steps_are_told_the_other_way_round() -> None:
    assert units.speed(0.2) == "5.0 s/step"
    assert units.speed(12.34) == "12.3 steps/s"
    assert "left" not in progress.step_facts(step(steps_per_s=0.0), None)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_smooth_loss_stays_within_what_it_saw(values: list[float]) -> None:
    smooth = MovingAverage(progress.SMOOTHING)
    assert smooth.add(values[0]) == pytest.approx(values[0])
    last = [smooth.add(value) for value in values[1:]][-1:] or [values[0]]
    assert last[0] is not None
    assert min(values) - 1e-9 <= last[0] <= max(values) + 1e-9
    assert smooth.add(None) == pytest.approx(last[0])


def test_smooth_loss_before_any_value() -> None:
    assert MovingAverage(progress.SMOOTHING).add(None) is None


def test_summary() -> None:
    result = {"state": "done", "seconds": 131.2, "lora": "/x/a.safetensors", "sheet": "/x/s.png",
              "style_covered": 0.734, "content_kept": 0.9, "steps": 300, "other": 1,
              "steps_per_second": 4.126, "samples": ["/x/p/1.png"] * 3}
    result["memory"] = {"planned_mb": 1530.4, "real_mb": 1498.2}
    rows = [re.split(r"  +", line) for line in progress.summary(result)]
    assert rows == [
        ["LoRA", "/x/a.safetensors"], ["compare sheet", "/x/s.png"], ["steps", "300"],
        ["time", "2:11"], ["steps per second", "4.13"], ["way to the new style", "73 %"],
        ["subjects kept", "90 %"], ["memory", "1530 MB planned, 1498 MB at the most in use"],
        ["previews", "3 in /x/p"]]
    assert progress.summary({}) == []


def test_the_best_step_without_a_checkpoint_is_told() -> None:
    best = {"step": 4, "validation": 0.81534, "lora": None}
    for key, lora in (("terminal.best_not_saved", None), ("terminal.best", "/x/a.safetensors")):
        [line] = progress.summary({"best": best | {"lora": lora}})
        assert line.endswith(i18n.tr(key, {"step": 4, "loss": "0.8153", "path": lora}))
        assert "None" not in line


def test_tables_count_wide_characters_twice() -> None:
    assert progress.table([("图片", "a"), ("name", "b"), ("x", "c")]) == [
        "图片  a", "name  b", "x     c"]
