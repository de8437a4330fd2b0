"""What a run holds in memory, by part, against what is there: planned, and live beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.memory.plan import MARGIN
from gui.html import esc, gigabytes
from gui.state.app_state import Context

_GROUPS = {                             # parts of the plan, as few as an eye can tell apart
    "base": ("denoiser", "text_encoder", "vae"), "activations": ("activations",),
    "lora": ("adapter", "optimizer", "gradients", "average", "base_loras"),
    "system": ("context", "workspace", "fragments", "allocator", "process", "dataset", "offload")}


def grouped(plan: Mapping[str, Any]) -> dict[str, float]:
    """MiB at the peak, by group; parts that nobody foresaw count as the system's."""
    parts = {**plan["phases"].get(plan["peak"], {}), **plan["outside"]}
    known = {part: group for group, members in _GROUPS.items() for part in members}
    found = dict.fromkeys(_GROUPS, 0.0)
    for part, mb in parts.items():
        found[known.get(part, "system")] += mb
    return found


def memory_bar(ctx: Context, plan: Mapping[str, Any], live_mb: float | None = None,
               pending: bool = False) -> str:
    """`plan`: core.memory.plan.as_dict's. `live_mb`: what the run holds now."""
    machine = plan["machine"]
    needs, free, total = plan["needs_mb"], machine["free_mb"], machine["total_mb"]
    scale = max(needs, total) or 1.0
    over = (live_mb or 0.0) > needs * (1 + MARGIN)         # the verdict follows what is so
    verdict = ("too_big" if live_mb and live_mb > free else "tight") if over else plan["verdict"]
    shares = grouped(plan)
    said = ctx.tr("memory_over" if over else f"memory_{verdict}", needs=gigabytes(needs),
                  free=gigabytes(free), held=gigabytes(live_mb or 0.0))
    parts = "".join(f'<i class="part {name}" style="width:{100 * mb / scale:.2f}%" '
                    f'title="{esc(ctx.tr(f"part_{name}"))} {gigabytes(mb)}"></i>'
                    for name, mb in shares.items())
    legend = "".join(f'<span><i class="part {name}"></i>{esc(ctx.tr(f"part_{name}"))} '
                     f'<b>{gigabytes(mb)}</b></span>' for name, mb in shares.items())
    mark = (f'<u class="free" style="left:{100 * free / scale:.2f}%" '
            f'title="{esc(ctx.tr("free_now", free=gigabytes(free)))}"></u>')
    return (f'<div class="memory {verdict}{" pending" if pending else ""}"><p class="verdict">'
            f'{_SIGNS[verdict]} {esc(said)}</p><div class="track" role="img" '
            f'aria-label="{esc(said)}">{parts}{mark}</div>{_live(ctx, live_mb, scale)}'
            f'<p class="legend">{legend}</p></div>')


_SIGNS = {"fits": "✓", "tight": "⚠", "too_big": "✖"}


def _live(ctx: Context, live_mb: float | None, scale: float) -> str:
    if not live_mb:
        return ""
    said = ctx.tr("held_now", held=gigabytes(live_mb))
    return (f'<div class="track live" role="img" aria-label="{esc(said)}"><i style="width:'
            f'{min(100, 100 * live_mb / scale):.2f}%"></i></div><p class="small">{esc(said)}</p>')
