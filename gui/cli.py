"""`darkroom gui`: the window; `darkroom selftest`: is this installation whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from core import i18n, paths
from core.cli.console import FAILED, FINE, add_command


def add_commands(commands: Any) -> None:
    gui = add_command(commands, "gui", run, line="gui --port 7860")
    gui.add_argument("--port", type=int, default=0, metavar="N", help=tr("arg_port"))
    gui.add_argument("--no-window", action="store_true", help=tr("arg_no_window"))
    test = add_command(commands, "selftest", selftest, line="selftest --json report.json")
    test.add_argument("--json", type=Path, metavar="FILE", help=tr("arg_selftest_json"))


def tr(key: str, **params: Any) -> str:
    return i18n.tr(f"window.{key}", params)


def run(options: argparse.Namespace) -> int:
    # Its imports take a while, which other commands needn't wait for.
    from gui import window
    return window.open_window(options.port, show=not options.no_window)


def selftest(options: argparse.Namespace) -> int:
    """0: all parts are fine. Takes about a minute."""
    from gui import selftest

    def tell(part: dict[str, Any]) -> None:
        mark = "[ok]" if part["ok"] else "[ x]"
        print(f"{mark} {tr('part_' + part['part'])} ({part['seconds']:.1f} s)", flush=True)
        if not part["ok"]:
            print(part.get("details") or part)
    # The window changes the working folder.
    file = options.json and options.json.absolute()
    report = selftest.run(tell)
    if file:
        paths.write_atomic(file, json.dumps(report, indent=1, ensure_ascii=False, default=str))
    print(tr("selftest_fine" if report["ok"] else "selftest_failed", seconds=report["seconds"]))
    return FINE if report["ok"] else FAILED
