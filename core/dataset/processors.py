"""Picture processors of the user's own: each picture passes through them once, before its latents
are made. Their names and sources are part of the latents' key in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from core import plugins


class Processors:
    """Functions of (image, path) that give the image back, changed; called in several threads.
    Raises UserError where one can't be loaded."""

    def __init__(self, names: Sequence[str]) -> None:
        self._loaded = [plugins.load(name, "picture_processors") for name in names]
        self._marks = tuple(plugins.mark(name) for name in names)

    def __call__(self, image: Image.Image, path: Path) -> Image.Image:
        """`image`: RGB, upright, as large as before. Raises UserError for what isn't."""
        for one in self._loaded:
            made = one(image.copy(), path)
            if not isinstance(made, Image.Image) or (made.mode, made.size) != ("RGB", image.size):
                raise one.wrong(f"RGB {image.width}x{image.height}", made)
            image = made
        return image

    def marks(self, path: Path) -> tuple[str, ...]:
        """What the result depends on besides the picture's content."""
        return (*self._marks, path.name) if self._marks else ()
