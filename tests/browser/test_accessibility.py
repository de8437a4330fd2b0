"""axe-core on every tab: no serious fault, in both themes; the page can be used by keyboard."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.thorough

pytest.importorskip("axe_playwright_python")

TABS = ("dataset", "captioning", "parameters", "inference", "settings")
GRADE = ("serious", "critical")


def faults(page: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['target']} {node['failureSummary']}" for one in found
            if one["impact"] in GRADE for node in one["nodes"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_fault(page: Any, served: Any, theme: str) -> None:
    page.goto(f"http://127.0.0.1:{served.port}/theme/{theme}")
    page.wait_for_selector("#header .header")
    told = {}
    for name in TABS:
        page.locator(f"#tab-{name}-button").click()
        page.wait_for_timeout(500)
        if found := faults(page):
            told[name] = found
    assert not told, "\n".join(f"{name}: {line}" for name, lines in told.items()
                               for line in lines)


def test_tabs_by_keyboard(page: Any) -> None:
    page.locator("#tab-dataset-button").focus()
    page.keyboard.press("Enter")
    page.locator("#dataset-folder textarea, #dataset-folder input").first.wait_for()
    for _ in range(30):                             # every stop shows where the focus is
        page.keyboard.press("Tab")
        seen = page.evaluate("""() => {
          const one = document.activeElement, style = getComputedStyle(one);
          return one === document.body || style.outlineStyle !== 'none'
            || style.boxShadow !== 'none'
            || getComputedStyle(one.parentElement).boxShadow !== 'none'
            || one.type === 'file' || one.closest('.block, label, .wrap') !== null;
        }""")
        assert seen
