"""Small pieces of HTML and of text.

Arguments called `label`, `title`, `text`, `hint` or `value` are plain text and are escaped here.
Arguments called `html` are HTML already: whoever builds them escapes what comes from outside.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gui.state.app_state import Context


# Scripts, styles and pictures of the page.
ASSETS = Path(__file__).parent / "assets"


def esc(value: object) -> str:
    return escape(str(value), quote=True)


def button(label: str, act: str, id: str = "", *, kind: str = "", why_not: str = "",
           hint: str = "", once: bool = False, pressed: bool | None = None) -> str:
    """A button that reports `act` and `id` to the handler of its panel.

    `kind`: primary | danger | link | "". `why_not`: the reason why it is disabled. `once`: a
    click disables it. `pressed`: the state of a toggle; None: it is no toggle.
    """
    extra = ""
    # Screen readers skip a lone sign such as "×": it needs a name in words.
    if len(label) <= 2 and not label.isalnum():
        extra += f' aria-label="{esc(hint or label)}"'
    if why_not:
        extra += ' disabled aria-disabled="true"'
    if title := why_not or hint:
        extra += f' title="{esc(title)}"'
    if pressed is not None:
        extra += f' aria-pressed="{str(pressed).lower()}"'
    if once:
        extra += " data-once"
    return (f'<button type="button" class="act {kind}" data-act="{esc(act)}" '
            f'data-id="{esc(id)}"{extra}>{esc(label)}</button>')


def field(act: str, label: str, go: str, value: str = "") -> str:
    """One line to type in with its button `go`: the handler gets (act, what was typed)."""
    return (f'<form class="field" data-act="{esc(act)}"><input required maxlength="400" '
            f'placeholder="{esc(label)}" aria-label="{esc(label)}" value="{esc(value)}">'
            f'<button class="act">{esc(go)}</button></form>')


def bar(done: float, total: float, label: str, kind: str = "") -> str:
    """A progress bar, empty while `total` is 0. `label` is what a screen reader says."""
    percent = 100 * min(1.0, max(0.0, done / total)) if total else 0.0
    return (f'<div class="bar {kind}" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent:.0f}" aria-label="{esc(label)}">'
            f'<i style="width:{percent:.1f}%"></i></div>')


def card(kind: str, title: str, text: str = "", *, html: str = "") -> str:
    """A coloured box with a sign. `kind`: fault | warning | good | info."""
    sign = {"fault": "✖", "warning": "⚠", "good": "✓", "info": "ⓘ"}[kind]
    role = "alert" if kind == "fault" else "status"
    body = f"<p>{esc(text)}</p>" if text else ""
    return (f'<section class="card {kind}" role="{role}"><h3><span aria-hidden="true">{sign}'
            f'</span> {esc(title)}</h3>{body}{html}</section>')


def box(title: str, html: str, kind: str = "box") -> str:
    """A section with a title."""
    return f'<section class="{kind}"><h3>{esc(title)}</h3>{html}</section>'


def small(text: str, *, status: bool = False) -> str:
    """A paragraph in small print, empty without a text. Screen readers announce a `status`."""
    role = ' role="status"' if status else ""
    return f'<p class="small"{role}>{esc(text)}</p>' if text else ""


def acts(*html: str) -> str:
    """A row of buttons; empty without any."""
    return f'<p class="acts">{"".join(html)}</p>' if any(html) else ""


def details(title: str, html: str, kind: str = "", key: str = "") -> str:
    """HTML that is folded away below its title. `kind`: CSS classes. `key`: with another
    key live.js takes it for another element when the panel is painted anew."""
    extra = (f' class="{kind}"' if kind else "") + (f' data-key="{key}"' if key else "")
    return f"<details{extra}><summary>{esc(title)}</summary>{html}</details>"


def option(value: str, label: str, selected: bool = False, extra: str = "") -> str:
    """An entry of a <select>. `extra`: more attributes, as HTML."""
    mark = " selected" if selected else ""
    return f'<option value="{esc(value)}"{extra}{mark}>{esc(label)}</option>'


def fact_table(facts: Iterable[tuple[str, object]]) -> str:
    """A table of (label, value)."""
    rows = (f"<tr><th>{esc(label)}</th><td>{esc(value)}</td></tr>" for label, value in facts)
    return f'<table class="facts">{"".join(rows)}</table>'


# --- numbers with their units ---

def clock(when: float) -> str:
    """The local time of a Unix time: 14:37, with the date if it isn't today."""
    then = time.localtime(when)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%m-%d %H:%M", then)


def duration(ctx: Context, seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    whole = max(0, round(seconds))
    minutes = round(whole / 60)
    if whole < 90:
        return ctx.tr("seconds", count=whole)
    if minutes < 90:
        return ctx.tr("minutes", count=minutes)
    return ctx.tr("hours", hours=minutes // 60, minutes=f"{minutes % 60:02d}")


def speed(ctx: Context, steps_per_s: float) -> str:
    """As the faster reading: 2.4 steps/s, or 1.52 s per step."""
    if steps_per_s <= 0:
        return ""
    if steps_per_s >= 1:
        return ctx.tr("steps_per_s", count=f"{steps_per_s:.1f}")
    return ctx.tr("s_per_step", count=f"{1 / steps_per_s:.2f}")
