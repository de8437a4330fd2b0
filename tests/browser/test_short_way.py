"""The short way on the demo world, in a real browser: demo -> Start -> steps -> refresh -> stop
and save -> Inference at 0.8; and a picture of every screen in both languages and themes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = 40


def until(question: Callable[[], Any], seconds: float = 180.0) -> Any:
    """The first answer that is true. Minutes, as a machine may be busy: what never comes fails."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.2)
    return answer


def step_of(page: Any) -> int:
    found = re.search(r"(?:step|第) (\d+) / ", page.locator("#run-head .title").inner_text())
    return int(found[1]) if found else 0


def tab(page: Any, name: str) -> None:
    page.locator(f"#tab-{name}-button").click()
    page.wait_for_timeout(300)


def begin(page: Any, served: Any, steps: int = STEPS) -> None:
    """The demo's config, shortened."""
    page.get_by_role("button", name=re.compile("demo world|演示世界")).click()
    until(lambda: served.app_state.settings.now.welcomed)
    served.app_state.projects.edit(max_train_steps=steps, sample_every=0, batch_size=1,
                                   sample_inference_steps=4, lr_warmup_steps=2)
    page.wait_for_function("!document.querySelector('#start').disabled")
    page.locator("#start").click()                          # planned first: long on a busy machine
    page.wait_for_selector("#run-head .title")


def test_the_short_way(page: Any, served: Any) -> None:
    begin(page, served, steps=2000)
    until(lambda: step_of(page) > 0)
    first = step_of(page)
    until(lambda: step_of(page) > first)            # painted by the timer, no hand moved

    page.reload()
    page.wait_for_selector("#run-head .title")      # refreshed in mid-run: the same picture
    again = until(lambda: step_of(page))
    assert again >= first
    page.locator("#start").wait_for(state="hidden")
    page.locator("#run-chart polyline.smooth").wait_for(state="attached")
    page.locator("#run-memory .track.live").wait_for(state="attached")
    assert page.locator("#run-chart polyline.smooth").count() == 1
    assert page.locator("#run-memory .track.live").count() == 1

    page.get_by_role("button", name="Preview now").click()
    image = page.locator("#run-previews img").first
    image.wait_for(state="visible")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64

    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Go on").wait_for()
    paused = until(lambda: step_of(page))
    page.wait_for_timeout(1500)
    assert step_of(page) <= paused + 1
    page.get_by_role("button", name="Go on").click()

    page.get_by_role("button", name="Stop and save").click()
    page.get_by_role("button", name="Try it: Inference").click()
    weight = page.locator("#loras input[type=number]")
    weight.wait_for(state="visible")
    assert weight.input_value() == "0.8"
    assert "duskprint style" in page.locator("#prompt textarea").input_value()

    page.locator("#draw-acts [data-act=compare]").click()
    page.locator("#draw-large .compare img").nth(1).wait_for(state="visible")
    sizes = page.locator("#draw-large .compare img").evaluate_all(
        "images => Promise.all(images.map(i => i.decode().then(() => i.naturalWidth)))")
    assert sizes == [64, 64]
    page.locator("#draw-large .compare input").focus()
    page.keyboard.press("End")
    assert "100%" in (page.locator("#draw-large .compare").get_attribute("style") or "")
    drawn = next(view for view in served.app_state.jobs.views() if view.job == "generate")
    assert drawn.config["weights"] == [0.0, 0.8]
    off, on = (Path(sample.path).read_bytes() for sample in drawn.samples[:2])
    assert off != on

    with page.expect_download() as download:        # the LoRA itself
        tab(page, "parameters")
        page.get_by_role("link", name="Save a copy").click()
    assert Path(download.value.path()).stat().st_size > 10_000


@pytest.mark.thorough
def test_a_second_page_shows_the_same_and_a_fault_is_mended_in_one_click(
        page: Any, served: Any) -> None:
    from core.jobs import runs
    from core.jobs.events import Faulted, JobEnded, JobStarted
    from core.jobs.journal import Journal
    text = served.app_state.snapshot()
    config = f"base_model: demo\ntrain_data_dir: {Path(__file__).parent}\nbatch_size: 4\n"
    folder = runs.create_run("train", config + f"output_dir: {text.config.output_dir}\n", "broken",
                             queued=False)      # our own: no worker is started, nobody is missed
    with Journal(folder) as journal:
        journal.append(JobStarted(job="train", pid=1, config={"batch_size": 4}))
        journal.append(Faulted(code="jobs.out_of_gpu_memory", params={"reason": "2 GB"}, fixes=[
            {"key": "smaller_batch", "changes": {"batch_size": 2}}], details="Traceback: x"))
        journal.append(JobEnded(state="failed"))
    page.locator("#history button[data-act=show]").first.click()
    card = page.locator("#run-head .card.fault")
    card.wait_for(state="visible")
    assert "GPU's memory ran out" in card.inner_text()
    assert card.locator("pre").is_hidden()          # never a traceback first

    other = page.context.new_page()
    other.goto(f"http://127.0.0.1:{served.port}/zh-CN/")
    other.locator("#run-head .card.fault").wait_for(state="visible")
    until(lambda: "失败" in other.locator("#run-head").inner_text())   # its last line may come late
    other.close()

    served.app_state.jobs._dispatch = False             # what is retried is what matters here
    card.locator("button[data-act=fix]").click()
    new = until(lambda: [v for v in served.app_state.jobs.views() if v.state == "queued"])[0]
    assert new.config["batch_size"] == 2
    page.get_by_role("button", name="Leave the queue").first.click()
    until(lambda: served.app_state.jobs.view(new.id).state == "stopped")


@pytest.mark.thorough
@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_wrong_numbers_block_and_presets_set_fields(page: Any, served: Any, language: str) -> None:
    app_state = served.app_state
    page.goto(f"http://127.0.0.1:{served.port}/language/{language}")
    page.get_by_role("button", name=re.compile("demo world|演示世界")).click()
    card = page.locator("#presets button.preset").first
    card.click()
    until(lambda: app_state.projects.now.preset == card.get_attribute("data-id"))
    rank = page.locator("#field-lora_rank input")
    until(lambda: rank.input_value() == "8")
    rank.fill("9999")
    until(lambda: "9999" in page.locator("#checklist").inner_text())
    page.wait_for_function("document.querySelector('#start').disabled")
    rank.fill("16")
    page.wait_for_function("!document.querySelector('#start').disabled")
    assert app_state.projects.now.edits["lora_rank"] == 16
    page.keyboard.press("Control+a")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366
    assert page.evaluate("document.documentElement.lang") == language


@pytest.mark.thorough
def test_every_screen_in_both_languages_and_themes(page: Any, served: Any,
                                                   tmp_path_factory: Any) -> None:
    """Kept as test output: <base temp>/screens. Nothing may be wider than the window."""
    folder = tmp_path_factory.getbasetemp() / "screens"
    folder.mkdir(exist_ok=True)
    for language in ("en", "zh-CN"):
        for theme in ("light", "dark"):
            page.goto(f"http://127.0.0.1:{served.port}/language/{language}")
            page.goto(f"http://127.0.0.1:{served.port}/theme/{theme}")
            page.wait_for_selector("#header .header")
            page.wait_for_timeout(700)
            dark = page.evaluate("document.body.classList.contains('dark')")
            assert dark == (theme == "dark")
            tabs = page.locator("[role=tab]:visible").evaluate_all(
                "all => all.map(one => one.id).filter(id => id.startsWith('tab-'))")
            assert len(tabs) >= 3
            for name in tabs:
                page.locator(f"#{name}").click()
                page.wait_for_timeout(400)
                page.screenshot(path=folder / f"{name.removeprefix('tab-').removesuffix('-button')}"
                                              f"-{language}-{theme}.png")
                assert page.evaluate("document.documentElement.scrollWidth") <= 1366
                assert "gui." not in page.locator("main").inner_text()


@pytest.mark.thorough
def test_a_page_whose_script_comes_late_is_whole(browser: Any, page: Any, served: Any) -> None:
    """Gradio adds it by itself, and on a busy machine after the panels that need it."""
    def late(route: Any) -> None:
        time.sleep(3)
        route.continue_()

    context = browser.new_context(viewport={"width": 1366, "height": 768})
    second, wrong = context.new_page(), []
    second.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    second.route("**/live.js", late)
    second.goto(served.url)
    second.wait_for_selector("#header .header")
    panels = ".panel:visible .live"
    until(lambda: second.locator(panels).count() == page.locator(panels).count() > 3)
    context.close()
    assert not wrong
