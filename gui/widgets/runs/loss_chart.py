"""The loss as inline SVG: raw, smoothed, validation. Colours come from CSS, so that both themes
draw the same picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from core.jobs.journal import Point
from core.units import MovingAverage
from gui.html import esc
from gui.state.app_state import Context

WIDTH, HEIGHT = 640, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
# The weight of the newest point; shorter curves give it more.
SMOOTHING = 0.06


def ema(points: Sequence[Point]) -> list[Point]:
    """The curve smoothed; few points are smoothed less."""
    average = MovingAverage(max(SMOOTHING, 2 / (len(points) + 1)))
    return [(step, average.add(value)) for step, value in points]


@dataclass(frozen=True, slots=True)
class Curve:
    # Its colour: a class of style.css.
    kind: str
    label: str
    points: tuple[Point, ...]
    dots: bool = False


def loss_chart(ctx: Context, losses: Sequence[Point], validations: Sequence[Point],
               total: int) -> str:
    if len(losses) < 2:
        return f'<div class="chart empty">{esc(ctx.tr("no_loss_yet"))}</div>'
    lines = [Curve("raw", ctx.tr("loss"), tuple(losses)),
             Curve("smooth", ctx.tr("loss_smooth"), tuple(ema(losses)))]
    if validations:
        lines.append(Curve("validation", ctx.tr("loss_validation"), tuple(validations), True))
    return curves(ctx, lines, total)


def curves(ctx: Context, lines: Sequence[Curve], total: int) -> str:
    """All curves on one scale. `total`: steps of the whole run, 0 where they aren't known."""
    last = max(total, *(int(curve.points[-1][0]) for curve in lines), 1)
    # Without the one in fifty highest: a single spike must not flatten the curve.
    values = sorted(value for curve in lines for _, value in curve.points)
    low, high = values[0], values[min(len(values) - 1, ceil(0.98 * len(values)))]
    # A flat curve gets a range around it, or `y` would divide by zero.
    if high - low <= 1e-12:
        low, high = low - 0.5 * abs(low) - 1e-6, high + 0.5 * abs(high) + 1e-6
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        clipped = min(high, max(low, value))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (clipped - low) / (high - low)

    def line(curve: Curve) -> str:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve.points)
        dots = "".join(f'<circle class="{curve.kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" '
                       f'r="3"/>' for step, value in curve.points if curve.dots)
        return f'<polyline class="{curve.kind}" points="{path}"/>{dots}'

    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in ticks)
    steps = "".join(
        f'<text x="{x(last * i / 4):.1f}" y="{HEIGHT - 8}" text-anchor="'
        f'{"start" if i == 0 else "end" if i == 4 else "middle"}">{round(last * i / 4)}</text>'
        for i in range(5))
    text = ctx.tr("comma").join(f"{curve.label} {curve.points[-1][1]:.4f}" for curve in lines)
    legend = "".join(
        f'<span><i class="{curve.kind}"></i>{esc(curve.label)} '
        f'<b>{curve.points[-1][1]:.4f}</b></span>' for curve in lines)
    return (f'<div class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{esc(text)}" preserveAspectRatio="none">{grid}{steps}'
            f'{"".join(map(line, lines))}</svg><p class="legend">{legend}'
            f'<span>{esc(ctx.tr("axis_steps"))}</span></p></div>')


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers, which enclose the range."""
    rough = (high - low) / 4
    power = 10 ** floor(log10(rough))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough)
    first = floor(low / step)
    return [round(step * (first + i), 10) for i in range(ceil((high - first * step) / step) + 1)]
