"""Answers that arrive in another order than they were asked for."""

from __future__ import annotations

import re
from typing import Any

from tests.browser.test_short_way import until

DISABLED = "document.querySelector('#start').disabled"


def test_an_old_answer_that_comes_late_does_not_stay(page: Any, served: Any) -> None:
    """The first painting of a page, held back until newer ones are there."""
    other, held = page.context.new_page(), list[Any]()

    def hold(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    other.route("**/gradio_api/run/**", hold)
    other.goto(served.url)
    other.wait_for_selector("#header .header")
    page.get_by_role("button", name=re.compile("demo world")).click()
    until(lambda: served.house.settings.now.welcomed)
    until(lambda: not page.evaluate(DISABLED))
    until(lambda: not other.evaluate(DISABLED))
    route, answer = held[0]
    route.fulfill(response=answer)
    until(lambda: other.evaluate(DISABLED))         # what it painted is there
    until(lambda: not other.evaluate(DISABLED), 30)

    other.wait_for_timeout(1000)
    asked = list[str]()
    other.on("request", lambda request: asked.append(request.url))
    other.wait_for_timeout(7000)                    # what is shown is not asked for again
    assert [url for url in asked if "/gradio_api/" in url] == []
    other.close()
