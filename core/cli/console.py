"""What all commands share: parsers, one sentence instead of a traceback, Ctrl+C, answers.

Answers go to stdout (with --json: one JSON object in the last line), all else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from core import i18n, paths
from core.errors import UserError
from core.failures import disk_full

if TYPE_CHECKING:
    from core.cli.progress import Terminal
    from core.jobs.control import Control

FINE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

Run = Callable[[argparse.Namespace], int]           # a command: its options -> the exit code
Finish = Callable[[Mapping[str, Any], "Control", argparse.Namespace], int]    # of a job's result

tr = i18n.translator("commands")


# --- parsers ---

def new_parser(version: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkroom", description=tr("about"), epilog=tr("example", line="demo"),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"LoRA Darkroom {version}")
    add_common(parser, answers=False)
    return parser


def add_command(commands: Any, name: str, run: Run | None = None, *, line: str,
                answers: bool = False, key: str = "", says: Callable[..., str] = tr,
                **more: Any) -> argparse.ArgumentParser:
    """Adds a command with its help, its example `line`, --debug and, if it `answers`, --json.

    Its help is the sentence `help_<name>` of `says`, or `help_<key>`.
    """
    help_ = says(f"help_{key or name}")
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_, description=help_, epilog=tr("example", line=line),
        formatter_class=argparse.RawDescriptionHelpFormatter, **more)
    add_common(parser, answers)
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_group(commands: Any, group: str, line: str, says: Callable[..., str] = tr
              ) -> Callable[[str, Run, str], argparse.ArgumentParser]:
    """Adds a command that has actions, as `darkroom lora` has `info` and `merge`.

    Returns the function that adds an action: its name, its command, its example line.
    """
    actions = add_command(commands, group, line=line, says=says).add_subparsers(
        dest="action", metavar="ACTION", required=True)

    def add_action(name: str, run: Run, line: str) -> argparse.ArgumentParser:
        return add_command(actions, name, run, answers=True, line=line, key=f"{group}_{name}",
                           says=says)
    return add_action


def argument_adder(says: Callable[..., str]) -> Callable[..., None]:
    """add_argument(parser, "--no-window", ...): the argument's help is the sentence
    `arg_no_window` of `says`, or `arg_<key>`."""
    def add_argument(parser: argparse.ArgumentParser, name: str, key: str = "",
                     **more: Any) -> None:
        key = key or name.removeprefix("--").replace("-", "_")
        parser.add_argument(name, help=says(f"arg_{key}"), **more)
    return add_argument


add_argument = argument_adder(tr)


def add_common(parser: argparse.ArgumentParser, answers: bool) -> None:
    # SUPPRESS: the parser of an action would else reset what its group's parser read
    add_argument(parser, "--debug", action="store_true", default=argparse.SUPPRESS)
    if answers:
        add_argument(parser, "--json", action="store_true")


def model_path(name: str) -> Path:
    """The path of a base model as --base takes it; `demo` is the built-in one."""
    return paths.DEMO / "base" if name == "demo" else paths.expanded(name)


# --- one sentence instead of a traceback ---

def guarded(call: Callable[[], int], argv: Sequence[str],
            tell: Callable[[str], object] = bool) -> int:
    """Runs a command and returns its exit code. An error becomes one sentence on stderr, which
    `tell` gets too. What it prints holds no control characters of other people's files."""
    with (contextlib.redirect_stdout(Printable.over(sys.stdout)),
          contextlib.redirect_stderr(Printable.over(sys.stderr))):
        return _guarded(call, argv, tell)


class Printable:
    """A text file that shows control characters as signs; a pipe may end in a terminal, too.
    `beneath` takes what is meant for the terminal itself."""

    def __init__(self, beneath: Any) -> None:
        self.beneath = beneath

    @staticmethod
    def over(file: Any) -> Any:
        """A program without a console has no streams."""
        return file if file is None or isinstance(file, Printable) else Printable(file)

    def write(self, text: str) -> int:
        self.beneath.write(i18n.printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)


def _guarded(call: Callable[[], int], argv: Sequence[str], tell: Callable[[str], object]) -> int:
    try:
        return call()
    except SystemExit as ended:
        # argparse: 0 after --help, 2 after a wrong argument
        return ended.code if isinstance(ended.code, int) else FINE
    except KeyboardInterrupt:
        print(tr("aborted"), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `darkroom runs list | head`: the reader has enough. Python would complain once more when
        # it flushes stdout at its exit.
        _settle(sys.stdout)
        return FINE
    except Exception as error:
        if isinstance(error, UserError):
            code, sentence, exit_code = error.code, str(error), BAD_INPUT
        elif isinstance(error, OSError) and (
                error.filename or disk_full(error) or error.errno == errno.EROFS):
            code, exit_code = "gui.no_access", FAILED
            sentence = i18n.tr(code, {"reason": error})
        else:
            code, exit_code = "commands.unexpected", FAILED
            sentence = tr("unexpected", reason=f"{type(error).__name__}: {error}")
        tell(sentence)
        # a log on a full disk: the exit code still says what was wrong
        with contextlib.suppress(OSError):
            if "--debug" in argv or os.environ.get("DARKROOM_DEBUG") == "1":
                traceback.print_exc()
            print(sentence, file=sys.stderr)
        _settle(sys.stderr)
        with contextlib.suppress(OSError):
            if "--json" in argv:
                print_json({"ok": False, "fault": code, "message": sentence})
        _settle(sys.stdout)
        return exit_code


# --- jobs ---

def run_job(job: str, config: Any, name: str, options: argparse.Namespace, finish: Finish,
            resumed_from: str = "") -> int:
    """Runs a job in this process and returns the exit code; its folder under runs/ tells everyone
    else about it. `finish` answers where the job did not fail."""
    from core.config import dump_yaml
    from core.jobs import runs, worker
    paths.keep_private()
    folder = runs.create_run(job, dump_yaml(config), name, resumed_from=resumed_from, queued=False)
    with unwatched():
        with job_terminal() as (terminal, control):
            end = worker.run_job(job, config, folder, control, terminal)
        result = {"run": folder.name, "state": end.state, **end.result}
        if end.state != "failed":
            return finish(result, control, options)
        return _failed(terminal, result, options)


def _failed(terminal: Terminal, result: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Tells why a job failed and returns the exit code."""
    fault = terminal.fault
    code, params = (fault.code, fault.params) if fault else ("commands.unexpected", {})
    if fault and ("debug" in options or os.environ.get("DARKROOM_DEBUG") == "1"):
        print(fault.details, file=sys.stderr)
    sentence = i18n.tr(code, params)
    print(sentence, file=sys.stderr)
    if options.json:
        print_json({"ok": False, **result, "fault": code, "message": sentence})
    # What a user can mend before the first step is bad input; all else is a run that failed.
    return FAILED if terminal.stepped or code.startswith(("jobs.", "commands.")) else BAD_INPUT


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Around a job and its answer: it has the exit code of its own work, also where nobody reads
    what it writes any more, the terminal has closed, or the log's disk is full."""
    from core.cli.progress import Steady
    streams = sys.stdout, sys.stderr
    steady: Any = [Steady(stream) for stream in streams]
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            _settle(stream)


def _settle(stream: TextIO | None) -> None:
    """Drops what a stream can't take any more: Python would try once more when it exits, and make
    an exit code of that."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def job_terminal() -> Iterator[tuple[Terminal, Control]]:
    """A job's progress in the terminal, and the Control by which Ctrl+C asks it to stop."""
    from core.cli.progress import Terminal
    from core.jobs.control import Control
    control = Control()
    with Terminal() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        yield terminal, control


# --- Ctrl+C ---

# the terminal closed; Windows has no such signal
_HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


@contextlib.contextmanager
def stop_on_ctrl_c(control: Control, tell: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl+C, a SIGTERM or a terminal that closes asks for stop-and-save; a second
    Ctrl+C aborts.

    Where Ctrl+C is ignored (under nohup, behind a shell's `&`) it stays so, and SIGTERM stops.
    """
    # Python lets only the main thread set signal handlers.
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

def answer(options: argparse.Namespace, facts: Mapping[str, Any], lines: Iterable[str]) -> int:
    """Prints the answer of a command: with --json `facts` as one JSON object, else the lines.
    Returns FINE, the exit code of most commands that have an answer."""
    if options.json:
        print_json(facts)
    else:
        print("\n".join(lines))
    return FINE


def print_json(facts: Mapping[str, Any]) -> None:
    def plain(value: Any) -> Any:
        """The value of what JSON can't hold: numbers of numpy and torch, sets, paths."""
        if hasattr(value, "item"):
            return value.item()
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    # Inside its strings only: as the same characters, for whoever reads JSON.
    text = json.dumps(facts, ensure_ascii=False, default=plain)
    print(i18n.CONTROL.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text), flush=True)


def fact_lines(facts: Mapping[str, Any], group: str) -> list[str]:
    """A line for each fact that has a label `commands.<group>_<key>`; empty facts are left out."""
    from core.cli import progress
    labels = i18n.catalogue("en")
    return progress.table([
        (tr(f"{group}_{key}"), _text(value)) for key, value in facts.items()
        if f"commands.{group}_{key}" in labels and value not in ("", None, [], (), {})])


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return tr("yes" if value else "no")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
