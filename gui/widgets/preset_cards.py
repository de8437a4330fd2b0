"""Presets as cards: a title, what it does, and whether it fits this machine; and one's own."""

from __future__ import annotations

from collections.abc import Sequence

from core.memory.plan import Machine
from core.workspace import presets
from core.workspace.presets import Preset
from gui.html import button, details, esc, field, small
from gui.state.app_state import Context
from gui.widgets.memory_bar import SIGNS


def preset_cards(ctx: Context, known: Sequence[Preset], chosen: str, purpose: str,
                 machine: Machine | None) -> str:
    """The presets of one purpose. `machine` None: it isn't known yet, and cards have no badge."""
    shown = [preset for preset in known if preset.purpose == purpose]
    if not shown:
        return small(ctx.tr("no_presets"))
    cards = ""
    for preset in shown:
        badge, pressed = "", preset.slug == chosen
        if machine:
            verdict, needs = presets.badge(preset, machine), preset.needs
            text = ctx.tr(f"badge_{verdict}") if verdict != "too_big" else ctx.tr(
                "badge_needs_card" if needs.vram_gb else "badge_needs",
                gb=f"{needs.vram_gb or needs.ram_gb:g}")
            badge = f'<em class="badge {verdict}">{SIGNS[verdict]} {esc(text)}</em>'
        cards += (f'<button type="button" class="preset{" chosen" if pressed else ""}" '
                  f'data-act="preset" data-id="{esc(preset.slug)}" '
                  f'aria-pressed="{str(pressed).lower()}">'
                  f'<b>{esc(preset.localized("title", ctx.language))}</b>{badge}'
                  f'<span>{esc(preset.localized("about", ctx.language))}</span></button>')
    return f'<div class="presets" role="group" aria-label="{esc(ctx.tr("presets"))}">{cards}</div>'


def own_presets(ctx: Context, chosen: Preset | None, removed: str) -> str:
    """Saves the settings as a preset, and renames or deletes a preset of the user's own."""
    tr = ctx.tr
    html = field("save_preset", tr("presets.own_title"), tr("presets.own_save"))
    if chosen and presets.is_user_preset(chosen):
        html += (field("rename_preset", tr("presets.own_new_title"), tr("presets.own_rename"),
                       chosen.localized("title", ctx.language))
                 + button(tr("presets.own_remove"), "remove_preset", chosen.slug))
    if removed:
        html += (f'<span class="small" role="status">{esc(tr("presets.own_removed"))} '
                 f'{button(tr("run_history.undo"), "restore_preset", removed, kind="link")}</span>')
    return details(tr("presets.own"), f'<div class="acts">{html}</div>', "mine")
