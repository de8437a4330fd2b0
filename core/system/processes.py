"""How this program starts processes of its own, from source and as the frozen app alike."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from core import paths

# Its inner commands: "module:function", which takes the arguments and returns the exit code.
INNER = {"worker": "core.jobs.worker:main", "plan-service": "core.memory.service:main",
         "torch-facts": "core.system.doctor:tell_torch"}
_FROM_SOURCE = "import sys, launcher; sys.exit(launcher.run(sys.argv[1:]))"


def frozen() -> bool:
    return bool(getattr(sys, "frozen", False))


def command(name: str, *arguments: str) -> list[str]:
    """The command line of an inner command, or of any that users have."""
    if not frozen():
        return [sys.executable, "-P", "-c", _FROM_SOURCE, name, *arguments]   # -P: no modules
    console = Path(sys.executable)      # of the working folder; the window's program has no
    return [str(console.with_name(f"darkroom-cli{console.suffix}")), name, *arguments]  # streams


def environment(**more: str) -> dict[str, str]:
    """Of a child: our modules are found, and its words are UTF-8."""
    path = filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONIOENCODING": "utf-8", **more}


def run_inner(argv: Sequence[str]) -> int | None:
    """The exit code of an inner command; None: it is none."""
    if not argv or argv[0] not in INNER:
        return None
    module, _, function = INNER[argv[0]].partition(":")
    main: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return main(argv[1:])
