"""Small pieces of HTML and of text: everything that comes from outside is escaped here."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gui.state.app_state import Context


ASSETS = Path(__file__).parent / "assets"    # scripts, styles and pictures of the page


def esc(value: object) -> str:
    return escape(str(value), quote=True)


def button(label: str, act: str, id: str = "", *, kind: str = "", why_not: str = "",
           hint: str = "", once: bool = False) -> str:
    """`kind`: primary | danger | link | "". `why_not`: disabled, and why."""
    title = esc(why_not or hint)
    name = "" if label.isalnum() or len(label) > 2 else f' aria-label="{esc(hint or label)}"'
    off = f' disabled aria-disabled="true" title="{title}"' if why_not else (
        f' title="{title}"' if title else "")
    again = " data-once" if once else ""
    return (f'<button type="button" class="act {kind}" data-act="{esc(act)}" '
            f'data-id="{esc(id)}"{name}{off}{again}>{esc(label)}</button>')


def field(act: str, label: str, go: str, value: str = "", *, optional: bool = False) -> str:
    """One line to type in with its button: the handler gets (act, what was typed)."""
    needed = "" if optional else " required"
    return (f'<form class="field" data-act="{esc(act)}"><input{needed} maxlength="400" '
            f'placeholder="{esc(label)}" aria-label="{esc(label)}" value="{esc(value)}">'
            f'<button class="act">{esc(go)}</button></form>')


def bar(share: float, label: str, kind: str = "") -> str:
    """A progress bar; `share` 0..1. `label` is what a screen reader says."""
    percent = 100 * min(1.0, max(0.0, share))
    return (f'<div class="bar {kind}" role="progressbar" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent:.0f}" aria-label="{esc(label)}">'
            f'<i style="width:{percent:.1f}%"></i></div>')


def card(kind: str, title: str, body: str = "", *, raw: str = "") -> str:
    """`kind`: fault | warning | good | info. `raw` is HTML already."""
    sign = {"fault": "✖", "warning": "⚠", "good": "✓", "info": "ⓘ"}[kind]
    role = "alert" if kind == "fault" else "status"
    text = f"<p>{esc(body)}</p>" if body else ""
    return (f'<section class="card {kind}" role="{role}"><h3><span aria-hidden="true">{sign}'
            f'</span> {esc(title)}</h3>{text}{raw}</section>')


# --- numbers with their units ---

def gigabytes(mb: float) -> str:
    return f"{mb / 1024:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB"


def clock(when: float) -> str:
    """14:37; with the date if it isn't today."""
    then, today = time.localtime(when), time.localtime()
    same = then[:3] == today[:3]
    return time.strftime("%H:%M" if same else "%m-%d %H:%M", then)


def duration(ctx: Context, seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 90:
        return ctx.tr("seconds", count=whole)
    minutes = round(whole / 60)
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
