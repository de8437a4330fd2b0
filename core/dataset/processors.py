"""Picture processors of the user's own, through which each picture passes before it is encoded.

Their names and sources are part of the latents' key in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from core import plugins


class Processors:
    """Functions of (image, path) that return the changed image; called in several threads.

    Raises UserError where one can't be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._loaded = [plugins.load(name, "picture_processors") for name in names]
        self._marks = tuple(plugins.mark(name) for name in names)

    def __call__(self, image: Image.Image, path: Path) -> Image.Image:
        """Passes an upright RGB image through all processors.

        Raises UserError where one returns anything but RGB of the same size.
        """
        for process in self._loaded:
            # A copy, as a processor may draw on what it gets and then return something else.
            result = process(image.copy(), path)
            if not isinstance(result, Image.Image) or (
                    result.mode, result.size) != ("RGB", image.size):
                raise process.wrong(f"RGB {image.width}x{image.height}", result)
            image = result
        return image

    def marks(self, path: Path) -> tuple[str, ...]:
        """Returns what the result depends on besides the picture's content."""
        # Processors get the path, so that they may go by the file's name.
        return (*self._marks, path.name) if self._marks else ()
