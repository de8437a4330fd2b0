"""The window: start against an empty Gradio app, what an open page costs, Start to the first step,
the first page of 10,000 pictures. Needs chromium.

    python -m tests.bench.window [--rounds 3] [--pictures 10000]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import paths
from tests.browser.conftest import chromium

EMPTY = """
import os, sys, time
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import threading, urllib.request
import gradio as gr, uvicorn
from fastapi import FastAPI
with gr.Blocks(analytics_enabled=False) as blocks:
    pass
app = gr.mount_gradio_app(FastAPI(), blocks, path="/en", run_history=False, ssr_mode=False)
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(.01)
port = server.servers[0].sockets[0].getsockname()[1]
urllib.request.urlopen(f"http://127.0.0.1:{port}/en/").read()
print(time.process_time(), flush=True)
os._exit(0)
"""
OURS = """
import os, time, urllib.request
from gui.window import pages
served = pages().serve(warm=False)
opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
opener.open(served.url.replace("/?", "/en/?")).read()
told = urllib.request.Request(f"http://127.0.0.1:{served.port}/en/live", b"{}", {
    "content-type": "application/json"})
assert b"header" in opener.open(told).read()
print(time.process_time(), flush=True)
os._exit(0)
"""
# As `launcher.py` comes to it: what is shown while Gradio is imported.
WAITING = """
import os, time, urllib.request
import launcher
from gui import window
launcher._parser()
served = window.listen()
opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
assert b"starting" in opener.open(served.url).read()
print(time.process_time(), flush=True)
os._exit(0)
"""


def start(code: str) -> tuple[float, float]:
    """-> seconds until the page was served, CPU seconds of it."""
    with tempfile.TemporaryDirectory() as home:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True,
                              check=True, env=os.environ | {"DARKROOM_HOME": home,
                                                            "PYTHONPATH": str(paths.ROOT)})
        return time.perf_counter() - began, float(done.stdout.split()[-1])


def until(question: Callable[[], Any], seconds: float = 300) -> float:
    began = time.perf_counter()
    while not question():
        if time.perf_counter() - began > seconds:
            raise TimeoutError
        time.sleep(0.05)
    return time.perf_counter() - began


def share(page: Any, seconds: float) -> float:
    """Of one core, %: this process, which serves, and drives the browser with one call."""
    cpu, began = time.process_time(), time.perf_counter()
    page.wait_for_timeout(1000 * seconds)
    return 100 * (time.process_time() - cpu) / (time.perf_counter() - began)


def folder_of(count: int, folder: Path) -> Path:
    """Copies of the demo's prints, each under its own name."""
    prints = sorted((paths.DEMO / "pictures").glob("*.png"))
    folder.mkdir()
    for number in range(count):
        shutil.copyfile(prints[number % len(prints)], folder / f"{number:05}.png")
    return folder


def pages(pictures: int, home: Path) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    from gui.app import serve
    found: dict[str, float] = {}
    folder = folder_of(pictures, home / "pictures")
    served = serve(warm=False)
    app_state = served.app_state
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(served.url)
        page.wait_for_selector("#header .header")
        page.wait_for_timeout(4000)
        found["a page open, nothing runs, %"] = share(page, 15)

        page.get_by_role("button", name=re.compile("demo world")).first.click()
        until(lambda: app_state.projects.now.edits.get("base_model") == "demo")
        app_state.projects.edit(max_train_steps=20_000, sample_every=0, batch_size=1)
        app_state.jobs.warm()
        page.wait_for_timeout(25_000)               # the spare worker has imported torch
        page.wait_for_function("!document.querySelector('#start').disabled")
        page.locator("#start").click()
        found["click on Start to the first step, warm worker, s"] = until(
            lambda: any(view.step for view in app_state.jobs.views()))
        page.wait_for_timeout(4000)
        found["a page open during a run, %"] = share(page, 20)
        run = app_state.jobs.views()[0]
        app_state.jobs.stop(run.id)
        app_state.jobs.wait(run.id, 60)

        app_state.projects.edit(train_data_dir=str(folder))
        page.locator("#tab-dataset-button").click()
        found[f"first page of {pictures:,} pictures, s"] = until(
            lambda: page.locator("#dataset-grid .tile img").count() >= 60
            and page.evaluate("document.querySelector('#dataset-grid .tile img').naturalWidth"))
        began = time.perf_counter()
        page.locator("#dataset-grid button[data-act=page]").last.click()
        until(lambda: f"{pictures - 1:05}" in page.locator("#dataset-grid").inner_text())
        found["its last page, s"] = time.perf_counter() - began
        browser.close()
    served.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=10_000)
    asked = parser.parse_args()
    pairs = [(start(EMPTY), start(OURS)) for _ in range(asked.rounds)]
    print("| what | figure |\n|---|---|")
    first = [start(WAITING) for _ in range(asked.rounds)]
    print("| process start to the waiting page, seconds / CPU seconds | "
          + " / ".join(f"{statistics.median(one[at] for one in first):.1f}" for at in (0, 1))
          + " |")
    for name, at in (("seconds", 0), ("CPU seconds", 1)):
        empty, ours = (statistics.median(pair[n][at] for pair in pairs) for n in (0, 1))
        ratio = statistics.median(pair[1][at] / pair[0][at] for pair in pairs)
        print(f"| process start to a served page, {name}: ours / empty Gradio app / ratio "
              f"| {ours:.1f} / {empty:.1f} / {ratio:.2f} |")
    with tempfile.TemporaryDirectory() as home:
        os.environ["DARKROOM_HOME"] = home
        for what, figure in pages(asked.pictures, Path(home)).items():
            print(f"| {what} | {figure:.2f} |")


if __name__ == "__main__":
    main()
