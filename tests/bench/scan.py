"""`dataset check` over many small pictures: seconds and peak memory, first and second look.

    python -m tests.bench.scan [--pictures 10000 100000]

64 px JPEGs, a caption beside each; one in fifty is an exact copy of another, one in fifty the same
picture saved at another quality. Each look runs in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from core import paths
from core.memory import plan

WORDS = ("red", "green", "house", "tree", "smile", "night", "snow", "street", "portrait", "river")


def make_pictures(folder: Path, count: int) -> None:
    """Patches of random colours: distinct pictures that compress as drawings do."""
    rng = np.random.default_rng(0)
    first, again = b"", b""
    for i in range(count):
        if i % 50 == 48:
            content = first
        elif i % 50 == 49:
            content = again
        else:
            patches = Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8))
            image = patches.resize((64, 64), Image.Resampling.NEAREST)
            content = _jpeg(image, 90)
            if i % 50 == 0:
                first, again = content, _jpeg(image, 70)
        (folder / f"{i:06}.jpg").write_bytes(content)
        tags = rng.choice(WORDS, 3, replace=False)
        (folder / f"{i:06}.txt").write_text(f"m1a, {', '.join(tags)}", "utf-8")


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def look(folder: Path) -> None:
    """In a process of its own: prints seconds, peak memory and what was found as JSON."""
    from core.dataset import crops
    from core.dataset.checks import report as dataset_report
    facts = crops.base_facts(paths.DEMO / "base", plan.sizes)
    report = dataset_report.check(folder, facts, trigger="m1a")
    copies = {one.code: len(one.subjects) for one in report.findings
              if one.code in ("checks.same_file", "checks.near_same")}
    print(json.dumps({"seconds": report.seconds, "cpu_s": time.process_time(),
                      "peak_mb": peak_mb(),
                      "pictures": len(report.names), "measured": report.measured, **copies}))


def peak_mb() -> float:
    """Of this process since its start."""
    if os.name == "nt":
        import psutil
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measured(folder: Path, home: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "tests.bench.scan", "--look", str(folder)],
                          cwd=paths.ROOT, env={**os.environ, "DARKROOM_HOME": str(home)},
                          check=True, capture_output=True, text=True)
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, nargs="+", default=[10_000])
    parser.add_argument("--look", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        look(options.look)
        return
    print("| pictures | look | seconds | of CPU | pictures/s | peak memory, MB | exact copies | "
          "near copies |\n|---|---|---|---|---|---|---|---|")
    for count in options.pictures:
        with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as home:
            make_pictures(Path(name), count)
            for which in ("first", "second"):
                facts = measured(Path(name), Path(home))
                print(f"| {count:,} | {which} | {facts['seconds']:.1f} | "
                      f"{facts['cpu_s']:.1f} | "
                      f"{count / facts['seconds']:,.0f} | {facts['peak_mb']:.0f} | "
                      f"{facts.get('checks.same_file', 0)} | "
                      f"{facts.get('checks.near_same', 0)} |", flush=True)


if __name__ == "__main__":
    main()
