"""`darkroom gui`: the window."""

from __future__ import annotations

import argparse
from typing import Any

from core import words
from core.console import add_command


def add_commands(commands: Any) -> None:
    gui = add_command(commands, "gui", run, line="gui --port 7860")
    gui.add_argument("--port", type=int, default=0, metavar="N", help=say("arg_port"))
    gui.add_argument("--no-window", action="store_true", help=say("arg_no_window"))


def say(key: str, **params: Any) -> str:
    return words.say(f"window.{key}", params)


def run(options: argparse.Namespace) -> int:
    """Gradio comes in here, so that other commands stay quick."""
    from gui import window
    return window.open_window(options.port, show=not options.no_window)
