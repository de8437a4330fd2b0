"""Captioning with CLIP: the threaded, batched pipeline against the one-at-a-time loop of
open_clip's own documentation, same pictures, same random ViT-B/32, same embeddings.

Two plain loops: the documentation's as it stands, which encodes its three labels with every
picture, and the same with the labels encoded once, which isolates what the pipeline itself gives.

    python -m tests.bench.caption [--pictures 64] [--side 1280] [--batch 16]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # as core.jobs.worker starts its process
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from captioner.base import Description
from captioner.config import CaptionConfig
from captioner.models.clip import ClipTagger
from captioner.pipeline import describe_all
from core.jobs.control import Control


def make_pictures(folder: Path, count: int, side: int) -> list[Path]:
    """Photo-sized JPEGs of soft shapes and grain; decoding costs what a photo's does."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        size = (side, side * 2 // 3) if i % 2 else (side * 2 // 3, side)
        soft = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        shapes = np.asarray(soft.resize(size, Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 6, shapes.shape)
        made.append(folder / f"{i:03d}.jpg")
        Image.fromarray((shapes + grain).clip(0, 255).astype(np.uint8)).save(made[-1], quality=92)
    return made


def make_model(folder: Path) -> Path:
    """A full-size ViT-B/32 with random weights, as a folder in open_clip's format."""
    torch.manual_seed(0)
    cfg = open_clip.get_model_config("ViT-B-32")
    model = open_clip.CLIP(**cfg)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}), "utf-8")
    (folder / "vocabulary.yaml").write_text("thing: [cat, dog, tree, house]\n", "utf-8")
    return folder


def plain_loop(folder: Path, files: Sequence[Path], labels: bool
               ) -> tuple[float, float, list[Any]]:
    """README's way: open, preprocess, unsqueeze, encode, normalise.
    -> seconds, of which in the model, embeddings"""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    text = open_clip.tokenize(["a diagram", "a dog", "a cat"])
    found, inside = [], 0.0
    with torch.no_grad():
        model.encode_image(preprocess(Image.open(files[0])).unsqueeze(0))
        began = time.perf_counter()
        for path in files:
            image = preprocess(Image.open(path)).unsqueeze(0)
            start = time.perf_counter()
            features = model.encode_image(image)
            features /= features.norm(dim=-1, keepdim=True)
            if labels:
                told = model.encode_text(text)
                told /= told.norm(dim=-1, keepdim=True)
                (100.0 * features @ told.T).softmax(dim=-1)
            inside += time.perf_counter() - start
            found.append(features[0])
    return time.perf_counter() - began, inside, found


class Timed(ClipTagger):
    """Keeps the embeddings and the time spent in the model's own thread."""

    inside = 0.0

    def describe(self, batch: Sequence[Any]) -> list[Description]:
        start = time.perf_counter()
        said = super().describe(batch)
        self.inside += time.perf_counter() - start
        return said

    def embed_images(self, batch: Sequence[Any]) -> Any:
        self.seen = [*getattr(self, "seen", []), *(found := super().embed_images(batch))]
        return found


def pipeline(folder: Path, files: Sequence[Path], batch: int, precision: str
             ) -> tuple[float, float, list[Any]]:
    tagger = Timed(CaptionConfig(folder="x", models={"clip": str(folder)}, device="cpu",
                                 precision=precision))
    tagger.load()
    with warmed(tagger, files, batch):
        began = time.perf_counter()
        describe_all(tagger, files, batch, lambda path, said: None, Control())
        return time.perf_counter() - began, tagger.inside, tagger.seen


@contextlib.contextmanager
def warmed(tagger: Timed, files: Sequence[Path], batch: int) -> Iterator[None]:
    describe_all(tagger, files[:batch], batch, lambda path, said: None, Control())
    tagger.inside, tagger.seen = 0.0, []
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--side", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["DARKROOM_HOME"] = name
        folder = make_model(Path(name) / "model")
        files = make_pictures(Path(name), options.pictures, options.side)
        runs: dict[str, list[tuple[float, float, list[Any]]]] = {}
        for _ in range(options.rounds):
            for way, labels in (("README's loop", True), ("README's loop, labels once", False)):
                runs.setdefault(way, []).append(plain_loop(folder, files, labels))
            for precision in ("fp32", "bf16"):
                runs.setdefault(f"pipeline, {precision}", []).append(
                    pipeline(folder, files, options.batch, precision))
    report(runs, options.pictures)


def report(runs: dict[str, list[tuple[float, float, list[Any]]]], count: int) -> None:
    print(f"{torch.get_num_threads()} threads, {count} pictures; best of the rounds")
    print("| way | pictures/s | to README's | to labels once | outside the model | "
          "largest difference of embeddings |")
    print("|---|---|---|---|---|---|")
    best = {way: min(tries, key=lambda run: run[0]) for way, tries in runs.items()}
    (slow, _, reference), (once, _, _), *_ = best.values()
    for way, (seconds, inside, seen) in best.items():
        apart = max(float((a - b).abs().max()) for a, b in zip(reference, seen, strict=True))
        print(f"| {way} | {count / seconds:.1f} | {slow / seconds:.2f} | {once / seconds:.2f} | "
              f"{1 - inside / seconds:.0%} | {apart:.1e} |")


if __name__ == "__main__":
    main()
