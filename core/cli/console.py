"""What all commands share: parsers, one sentence instead of a traceback, Ctrl+C, answers.

Answers go to stdout (with --json: one JSON object in the last line), all else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from core import i18n
from core.errors import UserError

if TYPE_CHECKING:
    from core.jobs.control import Control

FINE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


# --- parsers ---

def new_parser(version: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="darkroom", description=tr("about"),
                                     epilog=example("demo"), formatter_class=_Plain)
    parser.add_argument("--version", action="version", version=f"LoRA Darkroom {version}")
    _add_debug(parser)
    return parser


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int] | None = None,
                *, line: str, answers: bool = False, **more: Any) -> argparse.ArgumentParser:
    """A command with its help, its example, --debug and, if it `answers`, --json."""
    key = f"help_{more.pop('key', name)}"
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=tr(key), description=tr(key), epilog=example(line),
        formatter_class=_Plain, **more)
    _add_debug(parser)
    if answers:
        parser.add_argument("--json", action="store_true", help=tr("arg_json"))
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def example(line: str) -> str:
    return tr("example", line=line)


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                        help=tr("arg_debug"))


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of our texts."""


# --- one sentence instead of a traceback ---

def guarded(call: Callable[[], int], argv: Sequence[str],
            tell: Callable[[str], object] = bool) -> int:
    """Runs a command and returns its exit code; what goes wrong becomes one sentence on stderr,
    which `tell` gets too."""
    try:
        return call()
    except SystemExit as ended:         # argparse: 0 after --help, 2 after a wrong argument
        return ended.code if isinstance(ended.code, int) else FINE
    except KeyboardInterrupt:
        print(tr("aborted"), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:             # `darkroom runs list | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except UserError as fault:
        tell(str(fault))
        return _told(fault.code, str(fault), BAD_INPUT, argv)
    except Exception as error:
        sentence = tr("unexpected", reason=f"{type(error).__name__}: {error}")
        tell(sentence)
        return _told("commands.unexpected", sentence, FAILED, argv)


def _told(code: str, sentence: str, exit_code: int, argv: Sequence[str]) -> int:
    if "--debug" in argv or os.environ.get("DARKROOM_DEBUG") == "1":
        traceback.print_exc()
    print(sentence, file=sys.stderr)
    if "--json" in argv:
        print_json({"ok": False, "fault": code, "message": sentence})
    return exit_code


def debugging(options: argparse.Namespace) -> bool:
    return "debug" in options or os.environ.get("DARKROOM_DEBUG") == "1"


# --- Ctrl+C ---

_HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []     # none on Windows


@contextlib.contextmanager
def stop_on_ctrl_c(control: Control, tell: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl+C, a SIGTERM or a terminal that closes asks for stop-and-save; a second
    Ctrl+C aborts.

    Where Ctrl+C is ignored (under nohup, behind a shell's `&`) it stays so, and SIGTERM stops.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # not from the handler itself: the main thread may hold Control's lock right now
        threading.Thread(target=control.ask, args=("stop",), daemon=True).start()
        tell(tr("stopping"))

    before = {number: signal.signal(number, on_signal)
              for number in (signal.SIGINT, signal.SIGTERM, *_HANGUP)
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- answers ---

def tr(key: str, **params: Any) -> str:
    return i18n.tr(f"commands.{key}", params)


def print_json(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer, ensure_ascii=False, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    """What JSON can't hold: paths, dataclasses, numbers of other libraries."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def print_rows(facts: Mapping[str, Any], group: str) -> None:
    """A line for every fact that has a label, in their order; empty ones are left out."""
    from core.cli import progress
    known = i18n.catalogue("en")
    rows = [(tr(f"{group}_{key}"), _text(value)) for key, value in facts.items()
            if f"commands.{group}_{key}" in known and value not in ("", None, [], (), {})]
    print("\n".join(progress.table(rows)))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return tr("yes" if value else "no")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
