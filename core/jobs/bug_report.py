"""The text of "copy diagnostics": doctor's report, versions, a run's config and last log lines.

The home folder and the user's name are taken out: the text is meant to be posted in public.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
from pathlib import Path

from core import __version__, paths
from core.jobs.journal import CONFIG
from core.jobs.runs import JobView, log_tail
from core.system import doctor, logs

LINES = 60                              # of each log


def text(view: JobView | None = None) -> str:
    """The whole report. Takes seconds: torch is asked in a process of its own. Never raises."""
    parts = [f"LoRA Darkroom {__version__}\n{platform.platform()}", "\n".join(
        line for finding in doctor.examine() for line in doctor.lines(finding))]
    if view is not None:
        parts.append(f"run {view.id}: {view.state}, step {view.step} / {view.total}, "
                     f"phase {view.phase}")
        if fault := view.fault:
            parts.append("\n".join(filter(None, (f"{fault.code} {fault.params}", fault.details))))
        with contextlib.suppress(OSError):
            config = (view.folder / CONFIG).read_text("utf-8", "replace")
            parts.append(f"--- {CONFIG} ---\n{config}")
        # the run may be deleted at this very moment
        with contextlib.suppress(Exception):
            parts.append(f"--- log ---\n{log_tail(view.id, LINES)}")
    if log := logs.tail(LINES):
        parts.append(f"--- {logs.NAME} ---\n{log}")
    return without_names("\n\n".join(parts)) + "\n"


def without_names(text: str) -> str:
    """The text with short names for the home and data folders, and the user's name nowhere."""
    for folder, short in ((str(paths.data_dir()), "<data>"), (str(paths.ROOT), "<app>"),
                          (str(Path.home()), "~")):
        # as Windows, URLs and JSON write it
        for spelling in {folder, folder.replace("\\", "/"), folder.replace("\\", "\\\\")}:
            # never "/" or "C:\", which would take every path apart
            if len(spelling) > 3:
                text = text.replace(spelling, short)
    # home folders of others, such as in a config that came from another machine
    text = re.sub(r"(?i)((?:/home|/Users|[a-z]:\\+Users|[a-z]:/Users)[\\/]+)"
                  r"(?:[^\\/'\":\n]{1,60}(?=[\\/])|[^\\/\s'\":]+)", r"\1<user>", text)
    name = ""
    with contextlib.suppress(Exception):
        name = getpass.getuser()
    # short and common names would damage other words, and tell nothing
    for word, short in ((name, "<user>"), (platform.node(), "<host>")):
        if len(word) > 2 and word not in ("root", "user", "localhost"):
            text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", short, text)
    return text


def log_folder() -> Path:
    """Where the logs of runs lie, as file managers show it."""
    return Path(os.path.realpath(paths.runs_dir()))
