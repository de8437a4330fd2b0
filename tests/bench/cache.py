"""Caching latents: the engine's batched, threaded pass against one picture at a time.

    python -m tests.bench.cache [--pictures 96]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core import families, paths
from core.config import TrainConfig
from core.dataset import buckets, images
from core.dataset.examples import Encoder, Examples, find
from core.jobs.control import Control
from core.weights.precision import Precision, choose


def make_pictures(folder: Path, count: int) -> None:
    """Photo-sized noise on a gradient: decoding costs what a photo's does."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 180, 1200)[None, :, None]
    for i in range(count):
        noise = rng.integers(0, 60, (900, 1200, 3))
        Image.fromarray((ramp + noise).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def one_at_a_time(examples: Examples, precision: Precision) -> float:
    family = families.get("sd15")
    parts = family.load(paths.DEMO / "base", precision, frozenset({"vae"}))
    began = time.perf_counter()
    for item in examples.items:
        array = buckets.fit_picture(images.open_picture(item.picture.path), item.bucket)
        x = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
        family.encode_image(parts, x)
    return time.perf_counter() - began


def batched(examples: Examples, config: TrainConfig, precision: Precision) -> float:
    encoder = Encoder(families.get("sd15"), paths.DEMO / "base", precision, config,
                      lambda event: None, Control())
    began = time.perf_counter()
    encoder.fill(examples)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=96)
    count = parser.parse_args().pictures
    precision = choose("fp32", "cpu")
    with tempfile.TemporaryDirectory() as name:
        make_pictures(Path(name), count)
        config = TrainConfig(train_data_dir=name, base_model="demo", cache_to_disk=False)
        examples = find(config, Path(name), None, 64, 16, lambda event: None)
        plain = one_at_a_time(examples, precision)
        fast = batched(examples, config, precision)
    print("| way | pictures/s |\n|---|---|")
    print(f"| one at a time | {count / plain:.1f} |\n| batched, decoding in threads (loading and "
          f"captions included) | {count / fast:.1f} |\n| ratio | {plain / fast:.2f} |")


if __name__ == "__main__":
    main()
