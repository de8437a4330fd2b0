"""LoRA Darkroom's one door: double-click it, or `python3 launcher.py COMMAND`.

Standard library only until the packages are there; build/bootstrap.py puts them there. The
commands themselves belong to the rooms (core, later captioner and gui); this file composes them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
ROOMS = ("core.cli.commands", "core.cli.config", "core.cli.plan",
         "core.cli.dataset", "core.cli.models", "core.cli.families",
         "captioner.cli", "gui.cli")              # each has add_commands(subparsers)

RESTARTED = "DARKROOM_RESTARTED"        # as build/bootstrap.py has it
# OpenMP threads that spin while they wait make a run several times slower beside another program.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 fine, 1 a run failed, 2 bad input,
    130 Ctrl+C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    nested = RESTARTED in os.environ    # our own first half waits for us
    for name, value in QUIET_THREADS.items():
        os.environ.setdefault(name, value)
    _forgiving_streams()
    with _sigterm_interrupts():
        code = _prepared(arguments)
        if code is None:
            code = run(arguments)
    if not nested:
        _hold_window(code, arguments)
    return code


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A SIGTERM ends a command as Ctrl+C does, also where Ctrl+C is ignored: under nohup, behind a
    shell's `&`. Our children don't get it with us, so the interrupt carries its number."""
    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL):
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _prepared(argv: list[str]) -> int | None:
    """None where the packages are here; else the exit code of what was done about it."""
    if getattr(sys, "frozen", False) or not (ROOT / "build" / "bootstrap.py").exists():
        return None                     # a built app and a wheel bring their packages
    bootstrap = _bootstrap()
    extra, versions = _wanted(argv)
    try:
        if _wants_help(argv) and not (ROOT / ".venv").exists() and bootstrap.missing(ROOT):
            print(f"LoRA Darkroom {_version()}\n\n{bootstrap.tr('help')}")
            return 0
        if _command(argv) == "repair" and not _wants_help(argv):
            return int(bootstrap.repair(ROOT))
        python = bootstrap.prepare(ROOT, extra, versions)
        return None if python is None else bootstrap.restart(python, Path(__file__).resolve(), argv)
    except bootstrap.Stop as stop:
        print(stop, file=sys.stderr)
        _alert(str(stop), argv)
        return int(stop.exit_code)
    except KeyboardInterrupt:
        return 130


def _wanted(argv: list[str]) -> tuple[str, str]:
    """The packages' extra and versions, as build/bootstrap.py has them. Of a `setup` that argparse
    will refuse nothing: it is to judge before gigabytes come or go."""
    given = argv[_index_of_command(argv) + 1:]
    extras = [word[2:] for word in given if word in ("--test", "--app")]
    if _command(argv) == "test":
        return "test", ""
    if _command(argv) != "setup" or len(set(extras)) > 1 or not {
            "--test", "--app", "--newest"}.issuperset(given):
        return "", ""
    return "".join(extras[:1]), "newest" if "--newest" in given else "locked"


def run(argv: list[str]) -> int:
    """A command, or one of those that the program starts itself with; the packages are here."""
    from core.system.processes import run_inner
    if (code := run_inner(argv)) is not None:
        return code
    from core.cli.console import guarded
    at = _index_of_command(argv)
    own, rest = (argv[:at + 1], argv[at + 1:]) if _command(argv) == "test" else (argv, [])
    if rest[:1] in (["-h"], ["--help"]):
        own, rest = [*own, "--help"], []
    return guarded(lambda: _dispatch(own, rest), own, lambda sentence: _alert(sentence, argv))


def _dispatch(argv: list[str], pytest_arguments: list[str]) -> int:
    options = _parser().parse_args(argv)
    if options.command is None:
        return _window()
    if options.command == "test":
        return _test(pytest_arguments)
    if options.command == "repair":     # from source it was done before the packages were needed
        print(_tr("commands.repair_app"))
        return 1
    if options.command == "setup":
        print(_tr("commands.setup_done", {"python": sys.executable}))
        return 0
    return int(options.run(options))


def _parser() -> Any:
    from core.cli.console import add_command, new_parser
    parser = new_parser(_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for room in ROOMS:
        importlib.import_module(room).add_commands(commands)
    add_command(commands, "test", line="test tests/config/test_config.py -q",
                usage=_tr("commands.usage_test"))
    add_command(commands, "repair", line="repair")
    setup = add_command(commands, "setup", line="setup --test")
    setup.allow_abbrev = False          # what it means is read before argparse is there
    extras = setup.add_mutually_exclusive_group()
    extras.add_argument("--test", action="store_true", help=_tr("commands.arg_setup_test"))
    extras.add_argument("--app", action="store_true", help=_tr("commands.arg_setup_app"))
    setup.add_argument("--newest", action="store_true", help=_tr("commands.arg_setup_newest"))
    return parser


def _test(arguments: list[str]) -> int:
    """The project's own tests, run from the project's folder in a process of their own."""
    if not (ROOT / "tests").is_dir():
        from core.errors import UserError
        raise UserError("commands.no_tests", folder=ROOT)
    child = subprocess.Popen([sys.executable, "-m", "pytest", *arguments], cwd=ROOT)
    while True:
        try:
            code = child.wait()
            return 128 - code if code < 0 else code     # as a shell tells a signal
        except KeyboardInterrupt as interrupt:
            if interrupt.args:          # a SIGTERM; Ctrl+C pytest gets too, and ends in its own way
                child.terminate()


def _window() -> int:
    from gui.window import open_window
    return open_window()


def _tr(key: str, params: dict[str, Any] | None = None) -> str:
    from core import i18n
    return i18n.tr(key, params)


def _index_of_command(argv: list[str]) -> int:
    return next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))


def _command(argv: list[str]) -> str:
    return "".join(argv[_index_of_command(argv):][:1])


def _wants_help(argv: list[str]) -> bool:
    return any(word in ("-h", "--help", "--version") for word in argv)


def _version() -> str:
    """Read, not imported: this must also work before the packages are there."""
    text = (ROOT / "core" / "__init__.py").read_text("utf-8")
    found = re.search(r'__version__ = "([^"]+)"', text)
    return found.group(1) if found else "?"


def _bootstrap() -> Any:
    """build/ is no package, and a package named `build` exists: import from the folder itself."""
    sys.path.insert(0, str(ROOT / "build"))
    try:
        return importlib.import_module("bootstrap")
    finally:
        sys.path.remove(str(ROOT / "build"))


def _alert(sentence: str, argv: list[str]) -> None:
    """A double click has no arguments, and often no console."""
    if not argv:
        from core.system import message_box  # standard library only
        if message_box.unseen():
            message_box.show(sentence)


def _forgiving_streams() -> None:
    """A terminal that lacks a character shows its code instead of failing; pipes get UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        change = getattr(stream, "reconfigure", None)
        if change is not None and stream.isatty():
            change(errors="backslashreplace")
        elif change is not None:
            change(encoding="utf-8", errors="backslashreplace")


def _hold_window(code: int, argv: list[str]) -> None:
    """On Windows a double-clicked program's window closes before its words are read."""
    if os.name == "nt" and code and not argv and sys.stdin is not None and sys.stdin.isatty():
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            input("Enter ⏎ ")


if __name__ == "__main__":
    import multiprocessing
    multiprocessing.freeze_support()
    sys.exit(main())
