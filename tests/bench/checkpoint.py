"""What checkpoints cost a run: the full-size random SD 1.5 UNet, a checkpoint every 100 steps.

    python -m tests.bench.checkpoint [--side 128] [--checkpoints 4] [--after 6]

A hundred steps take minutes here, so the cost is measured where it falls: the wait in the step's
own thread, and how much longer the steps beside the writing thread take than those without one.
Steps with and without a checkpoint come in turns within one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from core.training.output import OutputWriter
from core.training.output_names import Output
from tests.bench.step import full_trainer

EVERY = 100                     # save_steps


def measure(side: int, checkpoints: int, after: int) -> tuple[float, float, float]:
    """-> s of a step, s that a checkpoint waits in the step's thread, s that the steps beside
    its writing lose altogether; medians."""
    trainer = full_trainer()
    trainer.examples.latents = [torch.randn(4, side // 8, side // 8)
                                for _ in trainer.examples.latents]
    steps, waits, losses, number = [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        output = Output(Path(folder), trainer.config, trainer.emit)
        output.rename()
        writer = OutputWriter(trainer, output, time.time())
        trainer.update(0)
        for _ in range(checkpoints):
            times: dict[bool, list[float]] = {False: [], True: []}
            for saving in (False, True):
                began = time.perf_counter()
                if saving:
                    number += 1
                    writer.checkpoint(number)
                    waits.append(time.perf_counter() - began)
                for _ in range(after):
                    began = time.perf_counter()
                    trainer.update(number)
                    times[saving].append(time.perf_counter() - began)
                writer.settle()
            steps += times[False]
            losses.append(sum(times[True]) - sum(times[False]))
        writer.close()
    return statistics.median(steps), statistics.median(waits), statistics.median(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--after", type=int, default=6)
    args = parser.parse_args()
    step, wait, lost = measure(args.side, args.checkpoints, args.after)
    share = (wait + lost) / (EVERY * step)
    print("| step, s | wait, s | steps beside the writing lose, s | of 100 steps |")
    print("|---|---|---|---|")
    print(f"| {step:.3f} | {wait:.3f} | {lost:.3f} | {share:.2%} |")


if __name__ == "__main__":
    main()
