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
# The user's PYTHONSAFEPATH keeps Python from looking beside this file.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from core.system import surroundings  # noqa: E402

ROOMS = ("core.cli.commands", "core.cli.config", "core.cli.plan",
         "core.cli.dataset", "core.cli.models", "core.cli.families",
         "captioner.cli", "gui.cli")              # each has add_commands(subparsers)

RESTARTED = "DARKROOM_RESTARTED"        # the same name is in build/bootstrap.py
# OpenMP threads that spin while they wait make a run several times slower beside another program.
QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 fine, 1 a run failed, 2 bad input,
    130 Ctrl+C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    surroundings.settle(str(ROOT))
    # bootstrap started us in the right environment, and the first process waits for us
    nested = RESTARTED in os.environ
    for name, value in QUIET_THREADS.items():
        os.environ.setdefault(name, value)
    # A terminal that lacks a character shows its code instead of failing; pipes get UTF-8.
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    with _sigterm_interrupts():
        code = _prepared(arguments)
        if code is None:
            code = run(arguments)
    # On Windows a double-clicked program's window closes before its words are read.
    if (os.name == "nt" and code and not arguments and not nested
            and sys.stdin is not None and sys.stdin.isatty()):
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            input("Enter ⏎ ")
    return code


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A SIGTERM ends a command as Ctrl+C does, also where Ctrl+C is ignored: under nohup, behind a
    shell's `&`. Our children don't get it with us, so the interrupt carries its number."""
    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    # Only the main thread may set handlers; one that someone set (nohup) stays.
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
    """Sees to the packages. Returns None where they are here, else the exit code of the program
    that was started with them, or of the attempt to get them."""
    # a built app and a wheel bring their packages
    if getattr(sys, "frozen", False) or not (ROOT / "build" / "bootstrap.py").exists():
        return None
    # build/ is no package, and a package named `build` exists: import from the folder itself.
    sys.path.insert(0, str(ROOT / "build"))
    try:
        bootstrap: Any = importlib.import_module("bootstrap")
    finally:
        sys.path.remove(str(ROOT / "build"))
    extra, versions = _packages_for(argv)
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


def _packages_for(argv: list[str]) -> tuple[str, str]:
    """The extra ("test", "app") and the versions ("newest", "locked") that build/bootstrap.py is to
    install; "" changes nothing."""
    options = argv[_index_of_command(argv) + 1:]
    extras = [word[2:] for word in options if word in ("--test", "--app")]
    if _command(argv) == "test":
        return "test", ""
    # A `setup` that argparse will refuse: nothing, before gigabytes come or go in vain.
    if _command(argv) != "setup" or len(set(extras)) > 1 or not {
            "--test", "--app", "--newest"}.issuperset(options):
        return "", ""
    return "".join(extras[:1]), "newest" if "--newest" in options else "locked"


def run(argv: list[str]) -> int:
    """Runs a command of the user, or one by which the program starts a process of its own. The
    packages are here."""
    surroundings.settle(str(ROOT))
    surroundings.own_modules()
    from core.system.processes import run_inner
    if (code := run_inner(argv)) is not None:
        return code
    from core.cli.console import guarded
    # What follows `test` is pytest's, apart from --help.
    end = _index_of_command(argv) + 1 if _command(argv) == "test" else len(argv)
    ours, pytest_arguments = argv[:end], argv[end:]
    if pytest_arguments[:1] in (["-h"], ["--help"]):
        ours, pytest_arguments = [*ours, "--help"], []
    return guarded(lambda: _dispatch(ours, pytest_arguments), ours,
                   lambda sentence: _alert(sentence, argv))


def _dispatch(argv: list[str], pytest_arguments: list[str]) -> int:
    from core.cli.console import tr
    options = _parser().parse_args(argv)
    if options.command is None:
        from gui.window import open_window
        return open_window()
    if options.command == "test":
        return _test(pytest_arguments)
    # From source `repair` and `setup` were done by _prepared, which needs no packages.
    if options.command == "repair":
        print(tr("repair_app"))
        return 1
    if options.command == "setup":
        print(tr("setup_done", python=sys.executable))
        return 0
    return int(options.run(options))


def _parser() -> Any:
    from core.cli.console import add_argument, add_command, new_parser, tr
    parser = new_parser(_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for room in ROOMS:
        importlib.import_module(room).add_commands(commands)
    add_command(commands, "test", line="test tests/config/test_config.py -q",
                usage=tr("usage_test"))
    add_command(commands, "repair", line="repair")
    setup = add_command(commands, "setup", line="setup --test")
    # _packages_for reads the options by their whole names, before argparse is there
    setup.allow_abbrev = False
    extras = setup.add_mutually_exclusive_group()
    add_argument(extras, "--test", "setup_test", action="store_true")
    add_argument(extras, "--app", "setup_app", action="store_true")
    add_argument(setup, "--newest", "setup_newest", action="store_true")
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
            # a signal's exit code as shells have it: 128 + its number
            return 128 - code if code < 0 else code
        except KeyboardInterrupt as interrupt:
            # Arguments: a SIGTERM. Ctrl+C reaches pytest by itself, which ends in its own way.
            if interrupt.args:
                child.terminate()


def _index_of_command(argv: list[str]) -> int:
    return next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))


def _command(argv: list[str]) -> str:
    return "".join(argv[_index_of_command(argv):][:1])


def _wants_help(argv: list[str]) -> bool:
    return any(word in ("-h", "--help", "--version") for word in argv)


def _version() -> str:
    """Read, not imported: this must also work before the packages are there."""
    text = (ROOT / "core" / "__init__.py").read_text("utf-8")
    match = re.search(r'__version__ = "([^"]+)"', text)
    return match.group(1) if match else "?"


def _alert(sentence: str, argv: list[str]) -> None:
    """Shows a sentence in a message box after a double click, which gives no arguments and often
    no console."""
    if not argv:
        from core.system import message_box
        if message_box.unseen():
            message_box.show(sentence)


if __name__ == "__main__":
    import multiprocessing
    multiprocessing.freeze_support()
    sys.exit(main())
