"""From dropped pictures to an exported LoRA, in a real browser, in both languages; and what each
thing that goes wrong looks like."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from core import i18n, paths
from tests.browser.test_accessibility import faults
from tests.browser.test_short_way import step_of, tab, until

pytestmark = pytest.mark.thorough

STEPS = 60
PICTURES = sorted((paths.DEMO / "pictures").glob("*.png"))[:8]
LANGUAGES = pytest.mark.parametrize("language", [        # daily English: test_short_way.py
    pytest.param("en", marks=pytest.mark.slow), "zh-CN"])


def speak(page: Any, served: Any, language: str) -> Any:
    """Opens the page in a language; -> what says things in it."""
    page.goto(f"http://127.0.0.1:{served.port}/language/{language}")
    page.wait_for_selector("#header .header")

    def tr(key: str, **params: Any) -> str:
        return i18n.tr(key if "." in key else f"gui.{key}", params, language)
    return tr


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).first.click()


@LANGUAGES
def test_from_pictures_to_an_exported_lora(page: Any, served: Any, language: str,
                                           tmp_path_factory: Any) -> None:
    tr, app_state = speak(page, served, language), served.app_state
    screens = tmp_path_factory.getbasetemp() / "screens"
    screens.mkdir(exist_ok=True)

    def keep(name: str) -> None:
        page.screenshot(path=screens / f"way-{name}-{language}.png")

    tab(page, "dataset")                                    # drop
    page.locator("#dataset-drop input[name=files]").set_input_files(PICTURES)
    until(lambda: "✓8" in page.locator("#tab-dataset-button").inner_text())
    page.locator("#dataset-grid .tile img").first.wait_for(state="visible")
    page.locator("#dataset-trigger textarea, #dataset-trigger input").first.fill("duskprint style")
    page.locator("#to-captions").click()
    until(lambda: app_state.projects.now.edits.get("trigger_word") == "duskprint style")
    keep("dataset")

    page.locator("#caption-start").click()                  # caption with the demo captioners
    until(lambda: "✓8/8" in page.locator("#tab-captioning-button").inner_text())
    until(lambda: page.locator("#caption-rows textarea").first.input_value())
    row = page.locator("#caption-rows textarea").first      # edit, and the next row by keyboard
    row.fill("duskprint style, a banana by the window")
    page.keyboard.press("Control+ArrowDown")
    folder = Path(app_state.snapshot().config.train_data_dir)
    until(lambda: "by the window" in (folder / f"{PICTURES[0].stem}.txt").read_text("utf-8"))
    keep("captions")

    tab(page, "parameters")                                 # preset, start
    app_state.projects.edit(base_model="demo")
    app_state.filled()
    page.locator("#presets button.preset").first.click()
    until(lambda: app_state.projects.now.preset)
    app_state.projects.edit(max_train_steps=STEPS, batch_size=1, sample_every=0, lr_warmup_steps=2,
                            sample_prompts=["a cat, duskprint style"], sample_inference_steps=4)
    page.wait_for_function("!document.querySelector('#start').disabled")
    keep("parameters")
    page.locator("#start").click()
    page.wait_for_selector("#run-head .title")
    until(lambda: step_of(page) > 0)

    page.reload()                                           # refresh in mid-run
    page.wait_for_selector("#run-head .title")
    press(page, tr("preview_now"))
    page.locator("#run-previews img").first.wait_for(state="visible")
    keep("run")
    press(page, tr("stop_and_save"))
    first = app_state.snapshot().shown
    until(lambda: app_state.jobs.view(first.id).over)
    if app_state.jobs.view(first.id).state == "stopped":        # quick machines have finished
        press(page, tr("resume"))
        until(lambda: app_state.snapshot().shown.id != first.id)
    until(lambda: app_state.snapshot().shown.state == "done", 180)
    done = app_state.snapshot().shown
    assert done.step == STEPS
    keep("done")

    press(page, tr("try_it"))                              # 0.8, compare slider
    weight = page.locator("#loras input[type=number]")
    weight.wait_for(state="visible")
    assert weight.input_value() == "0.8"
    page.locator("#draw-acts [data-act=compare]").click()
    page.locator("#draw-large .compare img").nth(1).wait_for(state="visible")
    drawn = next(view for view in app_state.jobs.views() if view.job == "generate")
    assert drawn.config["weights"] == [0.0, 0.8]
    keep("inference")
    assert not faults(page)

    forge = tmp_path_factory.mktemp("forge")                # export
    page.locator("#lora-export summary").click()
    page.locator("#lora-export select[name=program]").select_option("forge")
    page.locator("#lora-export input[name=folder]").fill(str(forge))
    page.locator("#lora-export form button").click()
    page.locator("#lora-export [role=status]").wait_for()
    (copied,) = forge.rglob("*.safetensors")
    assert copied.read_bytes() == Path(done.checkpoints[-1].path).read_bytes()


def test_two_pages_show_the_same(page: Any, served: Any) -> None:
    other = page.context.new_page()
    other.goto(f"http://127.0.0.1:{served.port}/zh-CN/")
    other.wait_for_selector("#header .header")
    served.app_state.projects.edit(output_name="from-one")
    served.app_state.filled()
    for one in (other, page):
        one.bring_to_front()                # pages that are hidden don't ask
        until(lambda one=one: one.locator("#field-output_name input, #field-output_name textarea")
              .first.input_value() == "from-one")
    page.locator("#field-output_name input, #field-output_name textarea").first.select_text()
    page.keyboard.type("by hand")
    until(lambda: served.app_state.projects.now.edits.get("output_name") == "by hand")
    page.locator("#header .menu summary").click()           # another project, on both
    page.locator("#header .menu form input").fill("second")
    page.keyboard.press("Enter")
    for one in (page, other):
        one.bring_to_front()
        until(lambda one=one: "second" in one.locator("#header .menu summary").inner_text())
        until(lambda one=one: one.locator("#field-output_name input, #field-output_name textarea")
              .first.input_value() != "by hand")
    other.close()


# --- what goes wrong ---

@LANGUAGES
def test_a_torn_picture_and_a_bad_yaml(page: Any, served: Any, language: str,
                                       tmp_path: Path) -> None:
    tr = speak(page, served, language)
    for path in PICTURES[:3]:
        shutil.copy(path, tmp_path)
    (tmp_path / "torn.png").write_bytes(PICTURES[0].read_bytes()[:200])
    tab(page, "dataset")
    page.locator("#dataset-folder textarea, #dataset-folder input").first.fill(str(tmp_path))
    page.keyboard.press("Enter")
    page.locator("#dataset-report .findings").wait_for()
    until(lambda: "torn.png" in page.locator("#dataset-report .findings").text_content())
    tab(page, "parameters")
    page.locator("#level-yaml button").first.click()
    page.locator("#level-yaml .cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("lora_rnk: 8")
    page.locator("#yaml-take").click()
    message = page.locator("#messages .message.warning")
    message.wait_for()
    assert tr("not_done") in message.inner_text()
    assert "lora_rank" in message.inner_text()              # the nearest key is named
    message.get_by_role("button").click()
    until(lambda: message.count() == 0)


def started(page: Any, served: Any, **edits: Any) -> Any:
    page.get_by_role("button", name=re.compile("demo world|演示世界")).first.click()
    until(lambda: served.app_state.settings.now.welcomed)
    served.app_state.projects.edit(sample_every=0, batch_size=1, lr_warmup_steps=2, **edits)
    page.wait_for_function("!document.querySelector('#start').disabled")
    page.locator("#start").click()
    page.wait_for_selector("#run-head .title")
    return until(lambda: served.app_state.snapshot().shown)


def test_a_killed_worker_can_be_resumed(page: Any, served: Any) -> None:
    run = started(page, served, max_train_steps=100_000, save_steps=5)
    until(lambda: served.app_state.jobs.view(run.id).checkpoints)
    os.kill(served.app_state.jobs.view(run.id).pid, signal.SIGKILL)
    card = page.locator("#run-head .card.fault")
    card.wait_for()
    assert card.locator("pre").is_hidden() or card.locator("pre").count() == 0
    card.get_by_role("button", name="Resume", exact=True).click()
    again = until(lambda: next((view for view in served.app_state.jobs.views()
                                if view.resumed_from == run.id and view.step), None), 150)
    assert again.step >= 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                    reason="only root can make a disk of its own")
def test_a_full_disk_is_told_and_nothing_is_lost(page: Any, served: Any, tmp_path: Path) -> None:
    import subprocess
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        run = started(page, served, max_train_steps=3, output_dir=str(disk))
        done = served.app_state.jobs.wait(run.id, 150)
        assert done.state == "done"
        until(lambda: str(disk) in page.locator("#run-notes").inner_text())
        saved = Path(done.checkpoints[-1].path)             # where it says
        assert saved.is_file()
        assert not saved.is_relative_to(disk)
        assert str(saved) in page.locator("#run-notes").inner_text()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
