"""Other people's text in everything that the window shows: none of it becomes script or a tag."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from core.jobs import runs
from core.jobs.events import (
    Captioned,
    Checkpoint,
    Faulted,
    JobEnded,
    JobStarted,
    Note,
    Phase,
    Planned,
    Sample,
    Step,
)
from core.jobs.journal import Journal
from core.jobs.manager import JobManager
from gui.state.plan_client import Planning, PlanState

NAME = "<img src=x onerror=window.__pwned=1>"
RAN = "window.__pwned || document.querySelectorAll('img[src=x], [onerror], [onmouseover]').length"


def hostile(where: str) -> str:
    return (f"{where}\"'><img src=x onerror=\"window.__pwned='{where}'\"><script>window.__pwned="
            f"'{where}'</script>{{{{constructor.constructor('window.__pwned=1')()}}}}"
            f"${{window.__pwned='{where}'}} [l](javascript:window.__pwned=1) &lt;b&gt; \u202e"
            "' onmouseover=window.__pwned=1 x='")


class Told(Planning):
    """A planning process whose answers quote what it was asked about."""

    def _loop(self) -> None:
        says = {"key": hostile("key"), "params": {}}
        fault = {"code": "gui.plan_failed", "params": {"reason": hostile("plan")}}
        self.now = PlanState(answer={
            "fault": fault, "pictures_fault": fault, "length": says,
            "not_counted": {hostile("code"): hostile("name")}})


def fill(home: Path, folder: Path) -> None:
    """A data folder and a folder of pictures whose every word is hostile."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{hostile('png')} <lora:{NAME}:1>\nNegative prompt: "
                  f"{hostile('negative')}\nSteps: 20, Sampler: {NAME}, Seed: 5, Size: 64x64")
    picture = Image.effect_noise((64, 64), 70).convert("RGB")
    for name in (NAME, "x' onmouseover=window.__pwned=1 '", "&lt;i&gt;", "`${window.__pwned=1}`"):
        picture.save(folder / f"{name}.png", pnginfo=info)
        (folder / f"{name}.txt").write_text(f"{hostile('caption')}, {NAME}", "utf-8")
    (folder / f"{NAME}.jpg").write_bytes(b"torn")
    (folder / f"{NAME}.yaml").write_text(f'"{NAME}": 5\nadapter: "{NAME}"\n')
    (folder / f"{NAME}.toml").write_text(f'network_dim = 8\n"{NAME}" = 5\nlogging_dir = "{NAME}"')
    metadata = {name: hostile(name) for name in (
        "ss_output_name", "modelspec.title", "modelspec.trigger_phrase", "ss_base_model_version",
        "ss_network_module", "ss_optimizer", "modelspec.author", "modelspec.description")}
    down = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q."
            f"lora_{side}.weight": np.zeros(shape, "float16")
            for side, shape in (("down", (4, 32)), ("up", (32, 4)))}
    lora = folder / f"{NAME}.safetensors"
    save_file(down, lora, metadata | {"ss_tag_frequency": json.dumps({NAME: {hostile("tag"): 5}})})

    ends = {"failed": Faulted(code="jobs.crash", params={"reason": hostile("reason")}, fixes=[
        {"key": hostile("fix"), "changes": {NAME: NAME}}], details=hostile("details")),
        "done": Note(key=hostile("note"), params={})}
    config = {"base_model": NAME, "train_data_dir": str(folder), "output_name": NAME,
              "trigger_word": hostile("trigger"), "sample_prompts": [hostile("prompt")],
              "prompt": hostile("drawn"), "folder": str(folder)}
    for state, end in ends.items():
        for job in ("train", "generate", "caption"):
            made = runs.create_run(job, json.dumps(config), hostile("run"), queued=False)
            (made / "log.txt").write_text(hostile("log"))
            with Journal(made) as journal:
                for event in (
                        JobStarted(job=job, pid=1, config=config),
                        Planned(plan={"notes": [NAME], "parts": {NAME: 5}}),
                        Phase(name=hostile("phase"), done=1, total=2),
                        Note(key="engine.resumed", params={"step": NAME, "path": NAME}),
                        Step(step=5, total=10, epoch=1.0, loss=0.5, lr=1e-4,
                             steps_per_s=1.0, eta_s=5.0),
                        Sample(step=1, path=str(folder / f"{NAME}.png"), prompt=hostile("shown"),
                               seed=5),
                        Captioned(path=str(folder / f"{NAME}.png"), caption=hostile("said")),
                        Checkpoint(step=5, path=str(lora), final=True), end,
                        JobEnded(state=state, result={"lora": str(lora), "proof": {
                            "ok": False, "reason": hostile("proof")}})):
                    journal.append(event)
    for name in ("mia", NAME, "y' onmouseover=window.__pwned=1 '"):
        (home / "projects").mkdir(exist_ok=True)
        (home / "projects" / f"{name}.yaml").write_text(yaml.safe_dump({
            "edits": {"train_data_dir": str(folder), "trigger_word": hostile("own"),
                      "output_name": NAME, "sample_prompts": [hostile("own prompt")]},
            "invalid": {"learning_rate": hostile("typed")}, "preset": NAME, "run": NAME,
            "inference": {"prompt": hostile("inference"), "base": NAME, "lora": NAME,
                          "loras": [{"file": str(lora), "weight": 1.0}]},
            "tabs": {"captioning": {"endpoint": hostile("address"), "rules": hostile("rules")},
                     "runs": {"removed": NAME, "compare": [NAME, NAME]}}}))
    (home / "presets" / "sd15").mkdir(parents=True)
    (home / "presets" / "sd15" / f"{NAME}.yaml").write_text(f"title: {{en: '{NAME}'}}\nset: {NAME}")
    (home / "settings.yaml").write_text(yaml.safe_dump({
        "project": "mia", "welcomed": True, "first_step": 3, "model_folders": [NAME],
        "mirror": hostile("mirror"), "theme": NAME}))


@pytest.fixture
def served(own_home: Path, tmp_path: Path) -> Iterator[Any]:
    from gui.app import serve
    before = os.getcwd()
    (tmp_path / "pictures").mkdir()
    fill(own_home, tmp_path / "pictures")
    server = serve(jobs=JobManager(dispatch=False), planning=Told(), warm=False)
    yield server
    server.close()
    os.chdir(before)


def messages(page: Any) -> str:
    return str(page.evaluate(
        "[...document.querySelectorAll('#messages .message')].map(m => m.innerText).join('|')"))


@pytest.mark.thorough
@pytest.mark.parametrize("language", ["en", "zh-CN"])
def test_no_text_becomes_script(page: Any, served: Any, tmp_path: Path, language: str) -> None:
    """The page fixture fails, too, where the browser had to refuse a script."""
    page.goto(f"http://127.0.0.1:{served.port}/{language}/")
    page.wait_for_selector("#header .header")
    seen = ""
    for name in ("parameters", "dataset", "captioning", "inference", "settings"):
        page.locator(f"#tab-{name}-button").click()
        page.wait_for_timeout(700)
        # What can be pressed without a question, once each.
        for act in page.evaluate("""[...new Set([...document.querySelectorAll('[data-act]')]
                .filter(one => one.offsetParent && !one.disabled && one.tagName === 'BUTTON')
                .map(one => one.dataset.act))]"""):
            if act in ("show", "open", "select", "details", "compare", "look", "page", "pick"):
                page.evaluate("act => document.querySelector(`[data-act='${act}']`)?.click()", act)
                page.wait_for_timeout(300)
        seen += page.evaluate("document.body.innerText")
        assert not page.evaluate(RAN), name
    # Dropped: a picture's settings, a LoRA, others' configs; each answers with a message.
    folder, told = tmp_path / "pictures", ""
    for tab, files in (("inference", ("png", "safetensors")), ("parameters", ("yaml", "toml"))):
        page.locator(f"#tab-{tab}-button").click()
        page.wait_for_timeout(300)
        for suffix in files:
            for box in page.locator("input[type=file]").all():
                accepts = box.get_attribute("accept") or ""
                if f".{suffix}" in accepts.split(","):
                    box.set_input_files(str(folder / f"{NAME}.{suffix}"))
                    page.wait_for_timeout(1000)
                    told += messages(page)
        assert not page.evaluate(RAN), tab
    assert "window.__pwned" in told                         # quoted, as text
    assert "onerror" in seen
