"""Presets as cards: a title, what it does, and whether it fits this machine; and one's own."""

from __future__ import annotations

from collections.abc import Sequence

from core.memory.plan import Machine
from core.workspace import presets
from core.workspace.presets import Preset
from gui.html import button, esc, field
from gui.state.app_state import Context

_SIGNS = {"fits": "✓", "tight": "⚠", "too_big": "✖"}


def preset_cards(ctx: Context, known: Sequence[Preset], chosen: str, purpose: str,
                 machine: Machine | None) -> str:
    """Those of one purpose; `machine` None: not looked at yet, no badge."""
    here = [one for one in known if one.purpose == purpose]
    if not here:
        return f'<p class="small">{esc(ctx.tr("no_presets"))}</p>'
    return ('<div class="presets" role="group" aria-label="'
            f'{esc(ctx.tr("presets"))}">'
            + "".join(_card(ctx, one, one.slug == chosen, machine) for one in here) + "</div>")


def own_presets(ctx: Context, chosen: Preset | None, removed: str) -> str:
    """To save the settings, and for a preset of one's own to rename or delete it."""
    tr = ctx.tr
    save = field("save_preset", tr("presets.own_title"), tr("presets.own_save"))
    mine = ""
    if chosen is not None and presets.is_own(chosen):
        mine = (field("rename_preset", tr("presets.own_new_title"), tr("presets.own_rename"),
                      chosen.said("title", ctx.language))
                + button(tr("presets.own_remove"), "remove_preset", chosen.slug))
    undo = (f'<span class="small" role="status">{esc(tr("presets.own_removed"))} '
            f'{button(tr("run_history.undo"), "restore_preset", removed, kind="link")}</span>'
            if removed else "")
    return (f'<details class="mine"><summary>{esc(tr("presets.own"))}</summary>'
            f'<div class="acts">{save}{mine}{undo}</div></details>')


def _card(ctx: Context, preset: Preset, chosen: bool, machine: Machine | None) -> str:
    verdict = presets.badge(preset, machine) if machine else ""
    badge = (f'<em class="badge {verdict}">{_SIGNS[verdict]} {esc(_said(ctx, preset, verdict))}'
             f'</em>') if verdict else ""
    return (f'<button type="button" class="preset{" chosen" if chosen else ""}" '
            f'data-act="preset" data-id="{esc(preset.slug)}" aria-pressed="{str(chosen).lower()}">'
            f'<b>{esc(preset.said("title", ctx.language))}</b>{badge}'
            f'<span>{esc(preset.said("about", ctx.language))}</span></button>')


def _said(ctx: Context, preset: Preset, verdict: str) -> str:
    if verdict != "too_big":
        return ctx.tr(f"badge_{verdict}")
    needs = preset.needs.vram_gb or preset.needs.ram_gb
    return ctx.tr("badge_needs_card" if preset.needs.vram_gb else "badge_needs", gb=f"{needs:g}")
