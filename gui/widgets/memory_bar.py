"""What a run holds in memory, by part, against what is there: planned, and live beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.memory.plan import MARGIN
from core.units import gigabytes
from gui.html import esc, small
from gui.state.app_state import Context

# Parts of the plan, in as few groups as an eye can tell apart.
_GROUPS = {
    "base": ("denoiser", "text_encoder", "vae"), "activations": ("activations",),
    "lora": ("adapter", "optimizer", "gradients", "average", "base_loras"),
    "system": ("context", "workspace", "fragments", "allocator", "process", "dataset", "offload")}
SIGNS = {"fits": "✓", "tight": "⚠", "too_big": "✖"}


def grouped(plan: Mapping[str, Any]) -> dict[str, float]:
    """MiB at the peak, by group; parts that no group names count as the system's."""
    groups = dict.fromkeys(_GROUPS, 0.0)
    for part, mb in {**plan["phases"].get(plan["peak"], {}), **plan["outside"]}.items():
        group = next((group for group, members in _GROUPS.items() if part in members), "system")
        groups[group] += mb
    return groups


def memory_bar(ctx: Context, plan: Mapping[str, Any], held: float = 0.0,
               pending: bool = False) -> str:
    """`plan`: core.memory.plan.as_dict's. `held`: what the run holds now, MiB; 0: not known."""
    try:
        return _drawn(ctx, plan, held, pending)
    except (KeyError, TypeError, ValueError, AttributeError):
        # A run of another version of the app, or a record that was edited.
        return small(ctx.tr("plan_unreadable"))


def _drawn(ctx: Context, plan: Mapping[str, Any], held: float, pending: bool) -> str:
    needs, free = plan["needs_mb"], plan["machine"]["free_mb"]
    scale = max(needs, plan["machine"]["total_mb"]) or 1.0
    # What is measured counts for more than what was planned.
    over = held > needs * (1 + MARGIN)
    verdict = ("too_big" if held > free else "tight") if over else plan["verdict"]
    text = ctx.tr("memory_over" if over else f"memory_{verdict}", needs=gigabytes(needs),
                  free=gigabytes(free), held=gigabytes(held))
    parts = legend = ""
    for group, mb in grouped(plan).items():
        name, amount = esc(ctx.tr(f"part_{group}")), gigabytes(mb)
        parts += (f'<i class="part {group}" style="width:{100 * mb / scale:.2f}%" '
                  f'title="{name} {amount}"></i>')
        legend += f'<span><i class="part {group}"></i>{name} <b>{amount}</b></span>'
    mark = (f'<u class="free" style="left:{100 * free / scale:.2f}%" '
            f'title="{esc(ctx.tr("free_now", free=gigabytes(free)))}"></u>')
    live = ""
    if held:
        now = ctx.tr("held_now", held=gigabytes(held))
        live = (f'<div class="track live" role="img" aria-label="{esc(now)}">'
                f'<i style="width:{min(100, 100 * held / scale):.2f}%"></i></div>{small(now)}')
    return (f'<div class="memory {verdict}{" pending" if pending else ""}"><p class="verdict">'
            f'{SIGNS[verdict]} {esc(text)}</p><div class="track" role="img" '
            f'aria-label="{esc(text)}">{parts}{mark}</div>{live}'
            f'<p class="legend">{legend}</p></div>')
