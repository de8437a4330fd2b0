"""Pictures drawn for tests: what a photo's statistics, a drawing and a subject look like."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from core.config import TrainConfig
from core.dataset.buckets import BucketRule
from core.dataset.crops import BaseFacts

Size = tuple[int, int]


def discs(size: Size = (256, 192), seed: int = 0, count: int = 1500) -> Image.Image:
    """Discs over each other, radii by a power law: the edges and scales of a photo (Lee,
    Mumford, Huang 2001, "Occlusion models for natural images")."""
    rng = np.random.default_rng(seed)
    width, height = size[0] * 2, size[1] * 2
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        radius = 4 / np.sqrt(rng.uniform((10 / size[0]) ** 2, 1))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius),
                     fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image.reduce(2)


def clouds(size: Size = (256, 192), seed: int = 0) -> Image.Image:
    """Grey noise with a 1/f spectrum."""
    rng = np.random.default_rng(seed)
    waves = np.hypot(np.fft.fftfreq(size[0])[None], np.fft.fftfreq(size[1])[:, None])
    waves[0, 0] = 1
    values = np.fft.ifft2(np.exp(2j * np.pi * rng.random(waves.shape)) / waves).real
    values = 128 + 45 * (values - values.mean()) / values.std()
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")


def drawing(size: Size = (256, 192), seed: int = 0) -> Image.Image:
    """A few large areas with outlines."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size[0] * 2, size[1] * 2), (250, 250, 240))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.uniform(0, 2 * size[0]), rng.uniform(0, 2 * size[1])
        radius = rng.uniform(0.1, 0.3) * size[0]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(0, 0, 0), width=6,
                     fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image.reduce(2)


DRAWN = {"discs": discs, "clouds": clouds, "drawing": drawing}


def subject(size: Size, at: tuple[float, float], radius: float,
            colour: tuple[int, int, int] = (200, 40, 30),
            ground: Image.Image | None = None) -> Image.Image:
    """A ball of `colour` at `at` (0..1), `radius` in px, before clouds or `ground`."""
    image = (ground or clouds(size)).copy()
    x, y = at[0] * size[0], at[1] * size[1]
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma)) if sigma else image


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def save(image: Image.Image, path: Path, caption: str | None = None,
         **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def facts_for(area: tuple[int, int], step: int, no_upscale: bool = False,
              count_tokens: Callable[[Sequence[str]], list[int]] | None = None) -> BaseFacts:
    """Of a base of sizes that are given."""
    config = TrainConfig(max_resolution="{}x{}".format(*area), bucket_no_upscale=no_upscale)
    rule = BucketRule.of(config, 0, step)
    return BaseFacts(**asdict(rule), count_tokens=count_tokens)
