"""The engine's step against the bare loop, interleaved in one process.

    python -m tests.bench.step [--full] [--rounds 15]
    python -m tests.bench.step --adapters [--rounds 15]

Prints the median seconds of both and their ratio: demo base at batch 8, and with --full a
full-size random SD 1.5 UNet at 64x64 px, batch 1 (about 6 GB of memory). --adapters: the step of
every kind of adapter against plain LoRA's, demo base at batch 8, CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch
from diffusers import UNet2DConditionModel

from core import families, paths
from core.config import AdapterKind, TrainConfig
from core.dataset.examples import Encoder, find
from core.families.base import Parts
from core.jobs.control import Control
from core.training.trainer import Trainer
from core.weights.precision import choose
from tests.bench.bare import BareLoop

CONFIGS = paths.family_configs("sd15")


def demo_trainer(batch: int = 8, **changes: object) -> Trainer:
    config = TrainConfig.model_validate({
        "base_model": str(paths.DEMO / "base"), "batch_size": batch, "device": "cpu",
        "train_data_dir": str(paths.DEMO / "pictures"), "cache_to_disk": False} | changes)
    family, precision = families.get("sd15"), choose("fp32", "cpu")
    source = Path(config.base_model)
    parts = family.load(source, precision)
    examples = find(config, Path(config.train_data_dir), None, parts.native_size,
                    parts.bucket_step, lambda event: None)
    Encoder(family, source, precision, config, lambda event: None, Control()).fill(examples)
    return Trainer(config, family, parts, precision, examples, lambda event: None, Control())


def full_trainer() -> Trainer:
    """SD 1.5's UNet with random weights; latents and embeddings of the right shapes."""
    small = demo_trainer(1)
    config = UNet2DConditionModel.load_config(CONFIGS / "unet")
    unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
    unet.to(memory_format=torch.channels_last)
    for text in small.examples.texts:
        small.examples.texts[text] = {"text": torch.randn(1, 77, 768)}
    small.examples.latents = [torch.randn(4, 8, 8) for _ in small.examples.latents]
    parts = Parts(small.parts.source, {**small.parts.scheduler, "prediction_type": "epsilon"},
                  "epsilon", 64, 64, denoiser=unet)
    return Trainer(small.config, small.family, parts, small.precision, small.examples,
                   small.emit, small.control)


def compare(trainer: Trainer, rounds: int) -> tuple[float, float, float]:
    """-> median seconds of engine and bare step, median of the pairwise ratios."""
    bare = BareLoop(trainer)
    numbers = iter(range(10**9))
    steps: dict[str, Callable[[], None]] = {
        "engine": lambda: trainer.update(_full(trainer, numbers)), "bare": bare.step}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(rounds):
        for name in sorted(steps, reverse=bool(n % 2)):      # neither is always first
            began = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - began)
    ratios = [e / b for e, b in zip(times["engine"], times["bare"], strict=True)]
    return (statistics.median(times["engine"]), statistics.median(times["bare"]),
            statistics.median(ratios))


def adapters(rounds: int) -> Iterator[tuple[str, float, float]]:
    """-> kind, median CPU seconds of its step, median ratio to LoRA's step just before."""
    plain = demo_trainer()
    for kind, changes in {**{k: {"adapter": k} for k in get_args(AdapterKind)},
                          "lora, LoCon": {"conv_rank": 8}}.items():
        trainer = plain if kind == "lora" else demo_trainer(**changes)
        ratios, own = [], []
        for n in range(-2, rounds):
            numbers = iter(range(10 * n + 20, 10**9))
            update = _full(trainer, numbers)
            first, second = (_cpu_seconds(plain, update), _cpu_seconds(trainer, update))
            if n >= 0:
                ratios.append(second / first)
                own.append(second)
        yield kind, statistics.median(own), statistics.median(ratios)


def _cpu_seconds(trainer: Trainer, update: int) -> float:
    began = time.process_time()
    trainer.update(update)
    return time.process_time() - began


def _full(trainer: Trainer, numbers: object) -> int:
    """The next update whose batch is as large as the bare loop's."""
    size = trainer.config.batch_size
    return next(n for n in numbers  # type: ignore[attr-defined]
                if len(trainer.sampler.update(n)[0].indices) == size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--adapters", action="store_true")
    args = parser.parse_args()
    if args.adapters:
        print("| adapter | CPU s/step | to lora |\n|---|---|---|")
        for kind, seconds, ratio in adapters(args.rounds):
            print(f"| {kind} | {seconds:.3f} | {ratio:.2f} |", flush=True)
        return
    rows = [("demo base, 64 px, batch 8", lambda: demo_trainer())]
    if args.full:
        rows.append(("SD 1.5 UNet, 64 px, batch 1", full_trainer))
    print("| model | engine s/step | bare s/step | ratio |\n|---|---|---|---|")
    for name, make in rows:
        engine, bare, ratio = compare(make(), args.rounds)
        print(f"| {name} | {engine:.3f} | {bare:.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
