"""A real, small captioner for tests: names the colours that it sees, counted in the pixels.

Environment: COLOURS_SLOW_S seconds per picture; COLOURS_MOST_AT_ONCE pictures before memory
"runs out"; COLOURS_LOG a file that gets a line for each picture described.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from captioner.base import Description, Tag

PALETTE = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220),
           "yellow": (240, 220, 40), "black": (0, 0, 0), "white": (255, 255, 255),
           "grey": (128, 128, 128)}


class Colours:
    title = "Colours"

    def __init__(self, config):
        self.config = config

    def load(self):
        self.values = np.array(list(PALETTE.values()), dtype=np.int32)

    def prepare(self, image):
        return np.asarray(image.resize((16, 16)), dtype=np.int32).reshape(-1, 3)

    def describe(self, batch):
        if len(batch) > int(os.environ.get("COLOURS_MOST_AT_ONCE", "999")):
            raise MemoryError
        return [self._one(pixels) for pixels in batch]

    def _one(self, pixels):
        time.sleep(float(os.environ.get("COLOURS_SLOW_S", "0")))
        distances = ((pixels[:, None, :] - self.values) ** 2).sum(-1)
        names, counts = np.unique(distances.argmin(-1), return_counts=True)
        tags = sorted((Tag(list(PALETTE)[name], count / len(pixels), "colour")
                       for name, count in zip(names, counts, strict=True)),
                      key=lambda tag: (-tag.score, tag.name))
        if log := os.environ.get("COLOURS_LOG"):
            with open(log, "a") as file:
                file.write(f"{tags[0].name}\n")
        return Description(f"mostly {tags[0].name}", tuple(tags))

    def identity(self):
        return "colours:1"


class Silent(Colours):
    """Has nothing to say."""

    def _one(self, pixels):
        return Description()


if __name__ == "__main__":
    from core.jobs import worker
    worker.JOBS["caption"] = worker.Job("captioner.job:load", "captioner.job:caption")
    sys.exit(worker.main(sys.argv[1:]))
