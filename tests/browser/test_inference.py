"""Inference in a real browser: two LoRAs, completion, a sweep, a dropped picture, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.jobs import runs
from core.jobs.events import Checkpoint, JobEnded, JobStarted
from core.jobs.journal import Journal
from core.lora_files import files
from tests.browser.test_short_way import tab, until
from tests.tiny import MIDDLE, tiny_lora

pytestmark = pytest.mark.thorough


def trained(folder: Path, base: Path) -> None:
    """A finished run with two checkpoints, as its worker would have left it."""
    config = {"base_model": str(base), "trigger_word": "inky", "output_dir": str(folder)}
    run = runs.create_run("train", "".join(f"{key}: {value}\n" for key, value in config.items()),
                          "ink", queued=False)
    with Journal(run) as journal:
        journal.append(JobStarted(job="train", pid=1, config=config))
        for step, width in ((10, 1), (20, 2)):
            journal.append(Checkpoint(step=step, final=step == 20, path=str(tiny_lora(
                folder / f"ink-{step}.safetensors", rank=width))))
        journal.append(JobEnded(state="done"))


def test_loras_are_mixed_swept_and_exported(page: Any, served: Any, base: Path, tmp_path: Path
                                            ) -> None:
    tab(page, "inference")
    assert page.locator("#loras .added li").count() == 0
    trained(tmp_path / "out", base)
    row = page.locator("#loras .added li")
    row.first.wait_for()                            # ready without a reload, at 0.8
    assert page.locator("#loras input[type=number]").input_value() == "0.8"
    prompt = page.locator("#prompt textarea")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'inky'")

    other = tiny_lora(tmp_path / "wash.safetensors", (f"{MIDDLE}_to_v",))
    page.get_by_label("full path of a .safetensors").fill(str(other))
    page.keyboard.press("Enter")
    until(lambda: row.count() == 2)
    second = page.locator("#loras input[type=number]").nth(1)
    second.fill("0.35")
    until(lambda: served.app_state.projects.now.inference["loras"][1]["weight"] == 0.35)

    prompt.fill("a cat")
    page.locator("#loras [data-word=inky]").click()
    until(lambda: prompt.input_value() == "inky, a cat")
    prompt.press("End")
    prompt.press_sequentially(" <lora:in")
    names = page.locator("#lora-names-list li")
    until(lambda: names.all_inner_texts() == ["ink-20", "ink-10"])
    served.app_state.filled()                           # what is being typed is not written over
    page.wait_for_timeout(2500)
    assert prompt.input_value() == "inky, a cat <lora:in"
    prompt.press("ArrowDown")
    late = "box => { box.value = 'inky, a cat'; return fetch('?/gradio_api/run') }"
    prompt.evaluate(late)                           # an answer on its way is undone: live.js
    until(lambda: prompt.input_value() == "inky, a cat <lora:in")
    assert names.first.is_visible()                 # the caret is where it was: the list stays
    prompt.press("Enter")
    until(lambda: prompt.input_value() == "inky, a cat <lora:ink-10:0.8>")
    until(page.locator("#lora-names-list").is_hidden)
    prompt.blur()
    until(lambda: served.app_state.projects.now.inference.get("prompt", "").endswith(":0.8>"))
    prompt.fill("inky, a cat")

    page.locator("#draw-steps input").fill("2")
    page.locator("#draw-acts [data-act=checkpoints]").click()
    sheet = page.locator("#draw-large img.sheet")
    sheet.wait_for(state="visible")
    until(lambda: page.locator("#gallery figure").count() == 3)     # two pictures, their sheet
    until(lambda: page.locator("#gallery figcaption small").nth(1).inner_text().count(
        "ink-20 0.8") == 1)
    job = next(view for view in served.app_state.jobs.views() if view.job == "generate")
    first, last = (Path(sample.path) for sample in job.samples[:2])
    assert first.read_bytes() != last.read_bytes()

    page.locator("#loras [data-act=remove]").nth(1).click()
    until(lambda: row.count() == 1)
    page.locator("#draw-steps input").fill("7")
    page.locator("#inference-drop input[name=files]").set_input_files(str(first))
    until(lambda: row.count() == 2)                 # the picture's own LoRAs, steps and weights
    page.locator("#loras .added li").nth(1).wait_for()
    until(lambda: page.locator("#loras .name b").first.inner_text() == "ink · step 10")
    page.wait_for_function("document.querySelector('#draw-steps input').value === '2'")
    until(lambda: second.input_value() == "0.35")

    page.locator("#gallery [data-act=delete]").first.click()
    until(lambda: page.locator("#gallery figure").count() == 2)
    page.locator("#gallery [data-act=undelete]").click()
    until(lambda: page.locator("#gallery figure").count() == 3)

    mine = tmp_path / "mine"
    mine.mkdir()
    page.locator("#lora-export summary").click()
    page.locator("#lora-export select[name=program]").select_option("diffusers")
    page.locator("#lora-export input[name=folder]").fill(str(mine))
    page.locator("#lora-export form button").click()        # converted, by a process of its own
    page.locator("#lora-export [role=status]").wait_for()
    copy = mine / "ink-10.safetensors"
    until(copy.is_file, 90)
    assert files.describe(copy).format == "peft"        # diffusers' file has PEFT's names
    until(lambda: str(copy.parent) in page.locator("#lora-export [role=status]").inner_text())
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366
