"""The window in Debian's chromium, with a worker of its own. Skipped where there is no chromium."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.jobs import worker
from core.jobs.manager import JobManager

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
GENERATES = """
import sys
from core.jobs import worker
worker.JOBS.setdefault("generate", worker.Job("core.config.draw:load", "core.inference.draw:draw"))
sys.exit(worker.main(sys.argv[1:]))
"""


def chromium() -> str | None:
    return os.environ.get("DARKROOM_CHROMIUM") or next(
        (found for name in NAMES if (found := shutil.which(name))), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    try:
        import playwright  # noqa: F401
        reason = "" if chromium() else "no chromium found (apt-get install chromium)"
    except ImportError:
        reason = "playwright is not installed"
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.browser)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def served(own_home: Path) -> Iterator[Any]:
    from gui.app import serve
    before = os.getcwd()
    command = None if "generate" in worker.JOBS else [sys.executable, "-c", GENERATES]
    server = serve(jobs=JobManager(command=command), warm=False)
    yield server
    for view in server.app_state.jobs.views():
        if not view.over:
            server.app_state.jobs.stop(view.id)
            server.app_state.jobs.wait(view.id, 30)
    server.close()
    os.chdir(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, served: Any) -> Iterator[Any]:
    """A page that is open; what a browser complains of, or asks elsewhere for, fails the test."""
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("console", lambda line: wrong.append(f"console: {line.text}")
            if line.type == "error" else None)
    page.on("request", lambda request: wrong.append(f"outside: {request.url}")
            if not request.url.startswith((f"http://127.0.0.1:{served.port}/", "data:", "blob:"))
            else None)
    page.set_default_timeout(180_000)               # of a busy machine; what never comes fails
    page.goto(served.url)
    page.wait_for_selector("#header .header")
    yield page
    context.close()
    assert not wrong
