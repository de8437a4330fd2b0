"""Answers that arrive in another order than they were asked for."""

from __future__ import annotations

import re
from typing import Any

from tests.browser.test_short_way import until

DISABLED = "document.querySelector('#start').disabled"
SHOWN, FILLED = (f"document.querySelector('#{name}-shown [data-shown]')?.dataset.shown"
                 for name in ("repaint", "refill"))


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
    until(lambda: other.evaluate(FILLED) == str(served.house.fills))

    asked = list[str]()
    other.on("request", lambda request: asked.append(request.url))

    def quiet() -> bool:
        """What is shown is not asked for again; plans may still come, on a busy machine late."""
        asked.clear()
        other.wait_for_timeout(7000)
        return not [url for url in asked if "/gradio_api/" in url]

    until(quiet)
    other.close()
