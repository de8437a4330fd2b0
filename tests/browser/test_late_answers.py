"""Answers that arrive in another order than they were asked for."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gui.state.app_state import Snapshot, Updates
from gui.state.page import Page
from tests.browser.test_short_way import until

pytestmark = pytest.mark.thorough

DISABLED = "document.querySelector('#start').disabled"
SHOWN, FILLED = (f"document.querySelector('#{name}-shown [data-shown]')?.dataset.shown"
                 for name in ("repaint", "refill"))


def quiet(page: Any) -> bool:
    """What is shown is not asked for again; plans may still come, on a busy machine late."""
    asked = list[str]()

    def note(request: Any) -> None:
        asked.append(request.url)

    page.on("request", note)
    page.wait_for_timeout(7000)
    page.remove_listener("request", note)
    return not [url for url in asked if "/gradio_api/" in url]


def test_an_old_answer_that_comes_late_does_not_stay(page: Any, served: Any) -> None:
    """The first painting of a page, held back until another page shows more."""
    other, held = page.context.new_page(), list[Any]()

    def hold(route: Any) -> None:
        if held or route.request.post_data_json["data"] == []:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    other.route("**/gradio_api/run/**", hold)
    other.goto(served.url)
    other.wait_for_selector("#header .header")
    page.get_by_role("button", name=re.compile("demo world")).click()
    until(lambda: not page.evaluate(DISABLED))
    assert other.evaluate(DISABLED)
    assert other.evaluate(SHOWN) is None
    route, answer = held[0]
    route.fulfill(response=answer)
    until(lambda: not other.evaluate(DISABLED))
    until(lambda: other.evaluate(FILLED) == str(served.app_state.fills))

    until(lambda: quiet(other))
    other.close()


def test_what_changed_unsaid_is_painted_once(page: Any, served: Any,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """What is painted is another thing than was announced, and no new version says so."""
    until(lambda: quiet(page))
    truly, announced = Page._painted, list[int]()

    def painted(self: Page, snap: Snapshot) -> tuple[dict[str, str], Updates]:
        panels, rest = truly(self, snap)
        announced.append(1)
        return panels, dict(reversed(rest.items())) if len(announced) == 1 else rest

    monkeypatch.setattr(Page, "_painted", painted)
    served.app_state.touch()
    snap = served.app_state.snapshot()
    monkeypatch.setattr(served.app_state, "snapshot", lambda: snap)
    until(lambda: len(announced) > 1)
    until(lambda: quiet(page), 40)
