"""The commands of this program's own processes, from source and in the frozen app alike."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from core import paths

# Inner commands: "module:function", which takes the arguments and returns the exit code.
INNER = {"worker": "core.jobs.worker:main", "plan-service": "core.memory.service:main",
         "torch-facts": "core.system.doctor:tell_torch"}
_FROM_SOURCE = "import sys, launcher; sys.exit(launcher.run(sys.argv[1:]))"


def frozen() -> bool:
    return bool(getattr(sys, "frozen", False))


def command(name: str, *arguments: str) -> list[str]:
    """The command line of an inner command, or of one that users have."""
    if not frozen():
        # -P: the working folder is the user's, and a module there must not hide one of ours
        return [sys.executable, "-P", "-c", _FROM_SOURCE, name, *arguments]
    # the console program beside it: the window's program has no streams
    program = Path(sys.executable)
    return [str(program.with_name(f"darkroom-cli{program.suffix}")), name, *arguments]


def environment(**more: str) -> dict[str, str]:
    """A child's environment, in which it finds our modules and writes UTF-8."""
    # The user's own PYTHONPATH travels in DARKROOM_PYTHONPATH (core/system/surroundings.py).
    return {**os.environ, "PYTHONPATH": str(paths.ROOT), "PYTHONIOENCODING": "utf-8", **more}


def run_inner(argv: Sequence[str]) -> int | None:
    """Runs an inner command and returns its exit code; None where the arguments name none."""
    if not argv or argv[0] not in INNER:
        return None
    module, _, function = INNER[argv[0]].partition(":")
    main: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return main(argv[1:])
