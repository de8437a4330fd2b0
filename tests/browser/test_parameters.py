"""The Parameters tab in a real browser: first start, a fault's ways out, diagnostics, two runs
compared, a record removed and brought back, closing while something runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from core import paths
from core.jobs import runs
from core.jobs.events import Faulted, JobEnded, JobStarted, Phase, Sample, Step
from core.jobs.journal import Journal
from tests.browser.test_short_way import tab, until

pytestmark = pytest.mark.thorough

PICTURES = paths.DEMO / "pictures"


@pytest.fixture(autouse=True)
def nothing_starts(served: Any) -> None:
    """What waits stays in the queue: runs are written as a worker would have."""
    served.app_state.jobs.hold()


def run(served: Any, name: str, state: str = "done", steps: int = 30, fault: str = "",
        **config: Any) -> str:
    """A run's folder with its journal; `state` running: it has no end yet."""
    output = served.app_state.snapshot().settings.output_folder
    config = {"base_model": "demo", "train_data_dir": str(PICTURES), "output_dir": str(output),
              "output_name": name, **config}
    text = "".join(f"{key}: {value}\n" for key, value in config.items())
    folder = runs.create_run("train", text, name, queued=False)     # as one that has its worker
    with Journal(folder) as journal:
        journal.append(JobStarted(job="train", pid=1, config=config))
        journal.append(Phase(name="train"))
        for step in range(1, steps + 1):
            journal.append(Step(step=step, total=steps, loss=1 / step, epoch=1.0, lr=1e-4,
                                steps_per_s=1.0, eta_s=0.0))
        picture = next(PICTURES.glob("*.png"))
        journal.append(Sample(step=steps, path=str(picture), prompt="a cat", seed=1))
        if fault:
            journal.append(Faulted(code=fault, params={"reason": "x"}))
        if state != "running":
            journal.append(JobEnded(state=state))
    until(lambda: any(view.id == folder.name and view.samples and view.over != (state == "running")
                      for view in served.app_state.jobs.views()))      # read to its end
    return folder.name


def test_first_start_in_three_steps_by_keyboard(page: Any, served: Any, tmp_path: Path) -> None:
    app_state, card = served.app_state, page.locator("#welcome .first")
    card.wait_for()
    assert app_state.projects.now.edits["base_model"] == "demo"         # the box isn't empty
    field = card.locator("form[data-act=set_pictures] input")
    field.fill(str(PICTURES))
    field.press("Enter")
    until(lambda: app_state.projects.now.edits.get("train_data_dir") == str(PICTURES))
    output = card.locator("form[data-act=set_output] input")
    output.fill(str(tmp_path / "loras"))
    output.press("Enter")
    until(lambda: app_state.settings.now.output_root == str(tmp_path / "loras"))
    card.get_by_role("button", name="Next").focus()
    page.keyboard.press("Enter")
    card.locator(".fits li").first.wait_for()
    assert "demo world fits" in card.inner_text()
    page.reload()                                   # the step is kept
    card.locator(".fits li").first.wait_for()
    card.get_by_role("button", name="Next").click()
    card.locator("button.preset").first.click()
    until(lambda: app_state.projects.now.preset)
    card.get_by_role("button", name="Done").click()
    card.wait_for(state="detached")
    assert app_state.settings.now.welcomed


def test_a_fault_has_remedies_and_its_diagnostics_can_be_copied(page: Any, served: Any,
                                                               monkeypatch: Any) -> None:
    monkeypatch.setattr("core.system.doctor.torch_facts",
                        lambda: {"error": "left out: it takes seconds"})
    failed = run(served, "too-big", "failed", fault="jobs.out_of_gpu_memory", batch_size=4)
    key = f"{failed}/oom_run"
    app_state = served.app_state
    with app_state.planning._changed:                   # the planner itself: memory/test_service.py
        app_state.planning._mended(key, [{"key": "advisor.do_batch", "saves_mb": 2048.0, "params": {
            "now": 2, "before": 4, "times": 2}, "changes": {
                "batch_size": 2, "gradient_accumulation_steps": 2}}])
    page.locator(f"#history button[data-act=show][data-id='{failed}']").click()
    fixes = page.locator("#run-head .fixes li")
    fixes.first.wait_for()
    assert "2.0 GB" in fixes.first.inner_text()

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy diagnostics").first.click()
    page.locator("#messages .message").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "LoRA Darkroom" in copied
    assert "batch_size: 4" in copied
    assert str(paths.data_dir()) not in copied
    assert str(Path.home()) + "/" not in copied

    fixes.first.get_by_role("button").click()
    new = until(lambda: [v for v in app_state.jobs.views() if v.state == "queued"])[0]
    assert (new.config["batch_size"], new.config["gradient_accumulation_steps"]) == (2, 2)


def test_two_runs_side_by_side_and_a_record_removed_and_back(page: Any, served: Any) -> None:
    one, two = run(served, "first", lora_rank=4), run(served, "second", lora_rank=16)
    for id in (one, two):
        page.locator(f"#history button[data-act=compare][data-id='{id}']").click()
    compared = page.locator("#compared")
    compared.wait_for()
    compared.locator("img").nth(1).wait_for()
    assert compared.locator("img").count() == compared.locator("polyline").count() == 2
    rows = compared.locator(".differs tr").all_inner_texts()
    assert [row.split() for row in rows[1:]] == [["Rank", "4", "16"]]
    compared.get_by_role("button").click()
    compared.wait_for(state="detached")

    page.locator(f"#history button[data-act=remove][data-id='{one}']").click()
    page.locator(f"#history button[data-act=remove][data-id='{one}']").wait_for(state="detached")
    assert not (paths.runs_dir() / one).exists()
    page.get_by_role("button", name="Undo").click()
    page.locator(f"#history button[data-act=reload][data-id='{one}']").click()
    until(lambda: served.app_state.projects.now.edits.get("lora_rank") == 4)

    jobs = served.app_state.jobs
    first, second = (jobs.start(served.app_state.snapshot().config, name=name) for name in "ab")
    assert [view.id for view in jobs.queue()] == [first, second]
    page.locator(f"#history button[data-act=up][data-id='{second}']").click()
    until(lambda: [view.id for view in jobs.queue()] == [second, first])


def test_closing_asks_while_something_runs(page: Any, served: Any) -> None:
    going = run(served, "goes-on", "running")
    until(lambda: served.app_state.snapshot().active)
    desktop = served.app_state.desktop
    assert not desktop.may_close()                  # as the native window's event asks
    dialog = page.locator("dialog[open]")
    dialog.wait_for()
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")                   # Escape is Cancel
    dialog.wait_for(state="detached")
    assert not desktop.quit.is_set()

    page.get_by_role("button", name="Quit").click()
    dialog.wait_for()
    assert "goes-on" in dialog.inner_text()
    dialog.get_by_role("button", name="Keep it in the background").click()
    until(desktop.quit.is_set)
    until(lambda: "LoRA Darkroom is closed" in dialog.inner_text())
    assert not served.app_state.jobs.view(going).over
    with Journal(paths.runs_dir() / going) as journal:
        journal.append(JobEnded(state="done"))


def test_own_presets_and_dropped_settings(page: Any, served: Any, tmp_path: Path) -> None:
    app_state = served.app_state
    page.locator("#presets details.mine summary").click()
    app_state.projects.edit(lora_rank=13)
    field = page.locator("form[data-act=save_preset] input")
    field.fill("Mine")
    field.press("Enter")
    page.locator("#presets button.preset.chosen", has_text="Mine").wait_for()
    page.locator("form[data-act=rename_preset] input").fill("Mine too")
    page.get_by_role("button", name="Rename").click()
    page.locator("#presets button.preset.chosen", has_text="Mine too").wait_for()
    page.get_by_role("button", name="Delete this preset").click()
    page.locator("#presets button.preset", has_text="Mine too").wait_for(state="detached")
    page.get_by_role("button", name="Undo").click()
    page.locator("#presets button.preset.chosen", has_text="Mine too").wait_for()

    page.get_by_role("button", name=re.compile("^YAML")).click()
    file = tmp_path / "other.yaml"
    file.write_text(f"base_model: demo\nlora_rank: 21\ntrain_data_dir: {PICTURES}\n")
    page.locator("#yaml-file input[name=files]").set_input_files(file)
    until(lambda: app_state.projects.now.edits.get("lora_rank") == 21)
    tab(page, "settings")
    page.locator("#mirror input, #mirror textarea").first.fill("ftp://nowhere")
    page.locator("#save-settings").click()
    page.locator("#messages .message.warning").wait_for()
    assert app_state.settings.now.mirror == ""


def test_the_start_leaves_room_in_a_narrow_window(page: Any) -> None:
    """However long the list above the button is: the row is pinned to the window's foot."""
    page.set_viewport_size({"width": 360, "height": 760})
    tab(page, "parameters")
    page.locator("#checklist .checklist").wait_for()
    row, button = page.evaluate("""() => {
      const list = document.querySelector('#checklist .checklist');
      for (let n = 0; n < 20; n++) list.insertAdjacentHTML('beforeend',
        '<li class="warn">each of the 20 pictures will be looked at about 10 times</li>');
      return ['#start-row', '#start'].map(one => {
        const box = document.querySelector(one).getBoundingClientRect();
        return [box.top, box.width, box.height]; });
    }""")
    assert row[2] < 760 / 2
    assert button[1] > 360 * 0.7
