"""python -m tests.mutants [NAME ...]: tries each break in a copy of the tree, against its tests."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants import ROOT, Mutant, every

WANTED = 0.95                               # share that the tests must catch
TIMEOUT_S = 300.0
OWN = ("core", "captioner", "gui", "build", "tests", "launcher", "conftest")
# What these import from other packages is loaded once, and is there in each fork.
PRELOADED = ("core.training.trainer", "core.inference.generate", "core.adapters.from_file",
             "tests.tiny.families", "hypothesis", "pytest")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "output", "*.png")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants, or beginnings of their names; all")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="tried at the same time")
    parser.add_argument("-l", "--list", action="store_true", help="only names them")
    parser.add_argument("-v", "--verbose", action="store_true", help="what the tests of survivors "
                        "and errors printed")
    parser.add_argument("--trust", action="store_true",
                        help="doesn't try first whether the tests pass without a break")
    options = parser.parse_args()
    chosen = [m for m in every() if not options.names or m.name.startswith(tuple(options.names))]
    if problems := [found for m in chosen if (found := m.problem())] or (
            [] if chosen else [f"no mutant is called {' or '.join(options.names)}"]):
        print(*problems, sep="\n")
        return 1
    if options.list:
        print(*(f"{m.name:40} {m.file}" for m in chosen), sep="\n")
        return 0
    if not hasattr(os, "fork"):
        print("this needs a system with fork: Linux or macOS")
        return 1
    sys.dont_write_bytecode = True          # a break of the same second and size must be read
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return _try_all(chosen, Path(folder), options)


def _try_all(chosen: list[Mutant], folder: Path, options: argparse.Namespace) -> int:
    places = [folder / str(n) for n in range(min(options.jobs, len(chosen)))]
    for place in places:
        shutil.copytree(ROOT, place / "tree", ignore=_ignored, symlinks=True)
    if not options.trust:
        nodes = tuple(dict.fromkeys(test for m in chosen for test in m.tests))
        whole = Trial(Mutant("without a break", "", "", "", nodes), places[0])
        code, _ = whole.wait(len(nodes) * TIMEOUT_S)
        if code:
            print(whole.told(), f"the tests fail without a break: {code}", sep="\n")
            return 1
    caught, errors, waiting, running = 0, 0, list(reversed(chosen)), list[Trial]()
    while waiting or running:
        while waiting and len(running) < len(places):
            place = next(p for p in places if p not in [trial.place for trial in running])
            running.append(Trial(waiting.pop(), place))
        time.sleep(0.05)
        for trial in running[:]:
            if (code := trial.poll()) is None:
                continue
            running.remove(trial)
            trial.undo()
            result = {0: "SURVIVED", 1: "caught", -1: "caught"}.get(code, "ERROR")
            caught += result == "caught"
            errors += result == "ERROR"
            late = " (hung)" if code == -1 else ""
            print(f"{result:8} {trial.mutant.name:40} {trial.seconds:5.1f} s{late}", flush=True)
            if options.verbose and result != "caught":
                print(trial.told())
    print(f"caught {caught} of {len(chosen)} ({100 * caught / len(chosen):.0f} %)"
          + (f", {errors} errors" if errors else ""))
    return int(errors > 0 or caught < WANTED * len(chosen))


def _ignored(folder: str, names: list[str]) -> set[str]:
    """Pictures of the docs aren't needed, those of presets and tests are."""
    found = LEFT_OUT(folder, names)
    return {n for n in found if not n.endswith(".png") or Path(folder).name == "docs"}


class Trial:
    """One break in a copy of its own, and pytest in a fork."""

    def __init__(self, mutant: Mutant, place: Path) -> None:
        self.mutant, self.place = mutant, place
        self.file = place / "tree" / mutant.file
        self.before = self.file.read_text("utf-8") if mutant.file else ""
        if mutant.file:
            self.file.write_text(self.before.replace(mutant.old, mutant.new), "utf-8")
        shutil.rmtree(place / "tmp", ignore_errors=True)
        self.began, self.seconds = time.monotonic(), 0.0
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            try:
                code = _run(place, mutant.tests)
            except BaseException as error:
                print(repr(error), flush=True)
                code = 3
            os._exit(code)

    def poll(self, timeout_s: float = TIMEOUT_S) -> int | None:
        """pytest's exit code; -1: it hung; None: it runs."""
        self.seconds = time.monotonic() - self.began
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) % 256
        if self.seconds < timeout_s:
            return None
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return -1

    def wait(self, timeout_s: float) -> tuple[int, float]:
        while (code := self.poll(timeout_s)) is None:
            time.sleep(0.05)
        return code, self.seconds

    def undo(self) -> None:
        self.file.write_text(self.before, "utf-8")

    def told(self) -> str:
        return (self.place / "log").read_text("utf-8", "replace")[-4000:]


def _run(place: Path, tests: tuple[str, ...]) -> int:
    """In the fork: pytest on the copy, as if nothing of the project had been imported yet."""
    os.setsid()
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tree = place / "tree"
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] in OWN]:
        del sys.modules[name]
    import pytest
    return int(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider",
                            f"--basetemp={place / 'tmp'}", *(f"tests/{t}" for t in tests)]))


if __name__ == "__main__":
    sys.exit(main())
