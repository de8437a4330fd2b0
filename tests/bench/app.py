"""Start to a usable page, the standalone app against the source, in turns, cold and warm. Needs
chromium.

    python -m tests.bench.app dist/darkroom [--rounds 3]

Cold: what either has on disk is dropped from the system's cache before (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from core import paths
from core.system import processes
from tests.browser.conftest import chromium


def drop(folders: Iterable[Path]) -> None:
    """Lets the system forget what it has read of these files."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(command: list[str], browser: Any) -> tuple[float, float]:
    """-> seconds to the page's header with all that it asked for; CPU seconds of the program."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        page = browser.new_page()
        began = time.perf_counter()
        child = subprocess.Popen([*command, "gui", "--no-window"], stdout=subprocess.DEVNULL,
                                             env=processes.environment(DARKROOM_HOME=home))
        address = Path(home, "window.json")
        while not address.exists():
            time.sleep(0.02)
        page.goto(json.loads(address.read_text("utf-8"))["url"])
        page.wait_for_selector("#header .header")
        page.wait_for_selector("#presets")
        took = time.perf_counter() - began
        cpu = psutil.Process(child.pid).cpu_times()
        page.close()
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        child.wait()
        return took, cpu.user + cpu.system


def main() -> None:
    from playwright.sync_api import sync_playwright
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("app", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    app = options.app.absolute()
    read = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    read += [paths.ROOT / room for room in ("core", "captioner", "gui")]
    ways = {"frozen": ([str(next(app.glob("darkroom-cli*")))], [app]),
            "source": ([sys.executable, "-P", "-c", "import sys, launcher; "
                        "sys.exit(launcher.run(sys.argv[1:]))"], read)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        print("| start | frozen, s | source, s | ratio | CPU frozen, s | CPU source, s | ratio |\n"
              "|---|---|---|---|---|---|---|")
        for kind in ("warm", "cold"):
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for number in range(options.rounds + 1):
                for way, (command, folders) in ways.items():
                    if kind == "cold":
                        drop(folders)
                    measured = start(command, browser)
                    if number or kind == "cold":        # the first warm one warms
                        found[way].append(measured)
            row = [[statistics.median(one[i] for one in found[way]) for way in ways]
                   for i in range(2)]
            print(f"| {kind} | " + " | ".join(
                f"{frozen:.1f} | {source:.1f} | {frozen / source:.2f}" for frozen, source in row)
                + " |", flush=True)


if __name__ == "__main__":
    main()
