"""Memory of a run: its peak against the bare loop's, and whether it grows with the pictures seen.

    python -m tests.bench.memory [--pictures 10000] [--full]

Each loop runs in a process of its own; peaks are the kernel's (ru_maxrss), growth is resident
memory after each tenth of the pictures. Demo base at batch 8; --full: the full-size random SD 1.5
UNet at 64x64 px, batch 1, peaks only.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from core.families.detection import Base
from core.training.memory_guard import MemoryGuard, memory_data
from core.training.recovery import Recovery
from core.training.trainer import Trainer
from tests.bench.bare import BareLoop
from tests.bench.step import demo_trainer, full_trainer

MB = 2**20


def run(which: str, full: bool, pictures: int) -> list[float]:
    """-> resident memory in MiB after each tenth; last the peak."""
    trainer = full_trainer() if full else demo_trainer()
    per_step = trainer.config.batch_size
    step = _bare(trainer) if which == "bare" else _rescued(trainer)
    seen, found, update = 0, [], 0
    while seen < pictures:
        step(update)
        update, seen = update + 1, seen + per_step
        if seen * 10 // pictures > len(found):
            found.append(psutil.Process().memory_info().rss / MB)
    return [*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


def _bare(trainer: Trainer) -> Callable[[int], None]:
    loop = BareLoop(trainer)
    return lambda number: loop.step()


def _rescued(trainer: Trainer) -> Callable[[int], None]:
    """The step as a run makes it, with its good states in RAM and its loss read now and then."""
    config = trainer.config
    guard = MemoryGuard(config, Base.of(Path(config.base_model)), trainer.precision.device,
                        memory_data(trainer.examples.items, config), lambda event: None)
    recovery = Recovery(trainer, guard, lambda event: None)
    recovery.begin(0)

    def step(number: int) -> None:
        recovery.update(number)
        if number % 5 == 0:
            trainer.mean_loss()
        recovery.look(number + 1)
        recovery.keep(number + 1)
    return step


def apart(which: str, full: bool, pictures: int) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.memory", "--only", which, "--pictures", str(pictures),
         *(["--full"] if full else [])], stdout=subprocess.PIPE, check=True, text=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=["engine", "bare"])
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run(args.only, args.full, args.pictures)))
        return
    few = 10 if args.full else 400
    engine, bare = (apart(which, args.full, few)[-1] for which in ("engine", "bare"))
    print(f"peak: engine {engine:.0f} MiB, bare {bare:.0f} MiB, ratio {engine / bare:.3f}")
    if not args.full:
        found = apart("engine", False, args.pictures)[:-1]
        print(f"resident after each tenth of {args.pictures} pictures, MiB:",
              ", ".join(f"{value:.0f}" for value in found))
        print(f"growth after the first tenth: {found[-1] - found[0]:+.1f} MiB")


if __name__ == "__main__":
    main()
