"""Draws docs/noise-levels.svg: how often each family trains on each noise level.

    python build/draw_noise_levels.py

Counts the draws of a run at 1024 px instead of using formulas, so that the picture is true.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from core.families.chroma import model as chroma  # noqa: E402
from core.families.flux import model as flux  # noqa: E402
from core.families.flux2 import model as flux2  # noqa: E402
from core.families.krea2 import model as krea2  # noqa: E402
from core.families.qwen import model as qwen  # noqa: E402
from core.families.sd3 import model as sd3  # noqa: E402
from core.families.timestep_sampling import TimestepSampling, shifted  # noqa: E402
from core.families.zimage import model as zimage  # noqa: E402

TARGET = ROOT / "docs" / "noise-levels.svg"
SIDE = 128                                  # latent pixels of 1024 px
DRAWS, BINS = 60_000, 40
SMOOTH = (1, 2, 3, 2, 1)                    # weights of neighbouring bins
# Label, rule, colour, and where the label stands: noise level, density.
CURVES: tuple[tuple[str, TimestepSampling, str, tuple[float, float]], ...] = (
    ("Flux.1 dev, Flux.2 klein, Lumina 2, SD 3, Sana", flux.DEV, "#c2410c", (0.26, 2.42)),
    ("Krea 2", krea2.Krea2.sampling, "#7c3aed", (0.6, 2.05)),
    ("Z-Image, Qwen-Image", zimage.ZImage.sampling, "#1d4ed8", (0.29, 1.78)),
    ("Flux.1 schnell", flux.SCHNELL, "#15803d", (0.16, 1.4)),
    ("Chroma", chroma.Chroma.sampling, "#525252", (0.03, 0.86)))
# Nearly the same: drawn as one.
TWINS = ((flux.DEV, flux2.Flux2.sampling), (flux.DEV, sd3.StableDiffusion3.sampling),
         (zimage.ZImage.sampling, qwen.QwenImage.sampling))
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 330, 44, 14, 14, 44      # px
HIGHEST = 2.6                               # density


def density(sampling: TimestepSampling) -> list[float]:
    """The density in each bin of the noise level, of mean 1."""
    generator, shift = torch.Generator().manual_seed(1), sampling.shift_at(SIDE, SIDE)
    counts = [0] * BINS
    for _ in range(DRAWS):
        counts[min(BINS - 1, int(shifted(sampling.draw(generator), shift) * BINS))] += 1
    half = len(SMOOTH) // 2
    smoothed = []
    for i in range(BINS):
        # At the ends, only the neighbours that exist.
        near = [(counts[i + d], weight) for d, weight in enumerate(SMOOTH, -half)
                if 0 <= i + d < BINS]
        smoothed.append(sum(n * w for n, w in near) / sum(w for _, w in near) * BINS / DRAWS)
    return smoothed


def at(level: float, value: float) -> tuple[float, float]:
    return (LEFT + level * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - value / HIGHEST * (HEIGHT - TOP - BOTTOM))


def line(sampling: TimestepSampling, colour: str) -> str:
    points = [at((i + 0.5) / BINS, value) for i, value in enumerate(density(sampling))]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'


def text(place: tuple[float, float], words: str, colour: str = "#404040", anchor: str = "start",
         more: str = "") -> str:
    return (f'<text x="{place[0]:.1f}" y="{place[1]:.1f}" fill="{colour}" '
            f'text-anchor="{anchor}"{more}>{words}</text>')


def axes() -> list[str]:
    (left, bottom), (right, top) = at(0, 0), at(1, HIGHEST)
    rows = [f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="#a3a3a3"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        rows.append(text((at(tick, 0)[0], bottom + 16), f"{tick:g}", anchor="middle"))
    for tick in (0, 1, 2):
        rows.append(text((left - 6, at(0, tick)[1] + 4), f"{tick}", anchor="end"))
    middle = (top + bottom) / 2
    return [*rows, text(((left + right) / 2, bottom + 34), "noise level (0: the picture, "
                        "1: noise alone)", anchor="middle"),
            text((14, middle), "how often learned", anchor="middle",
                 more=f' transform="rotate(-90 14 {middle:.0f})"')]


def main() -> None:
    for drawn, twin in TWINS:
        ratio = drawn.shift_at(SIDE, SIDE) / twin.shift_at(SIDE, SIDE)
        assert 0.9 < ratio < 1.1, f"no longer the same curve: {drawn}, {twin}"
    rows = [line(sampling, colour) for _, sampling, colour, _ in CURVES]
    rows += [text(at(*place), label, colour) for label, _, colour, place in CURVES]
    TARGET.write_text("\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>', *axes(), *rows, "</svg>", ""]),
        "utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
