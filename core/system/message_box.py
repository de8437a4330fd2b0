"""A sentence for someone who started the program by a double click and sees no console.

Standard library only, and readable by Python 3.8: it also tells why the packages are not there.
"""

from __future__ import annotations

import contextlib
import html
import os
import shutil
import subprocess
import sys
import tempfile
import webbrowser
from pathlib import Path

TITLE = "LoRA Darkroom"
OPENS_S = 3
PATIENCE_S = 3600                       # a box may stay open while its reader is away
# Linux has no message box of its own; the first of these that is there, text and title last.
BOXES = {"zenity": ["--error", "--no-markup", "--width=480", "--title", TITLE, "--text"],
         "kdialog": ["--title", TITLE, "--error"],
         "xmessage": ["-center", "-title", TITLE]}


def unseen() -> bool:
    """Whether what we print is read by nobody."""
    stream = sys.stderr
    return stream is None or not getattr(stream, "isatty", bool)()


def show(text: str) -> bool:
    """A message box of the system, else a page in the browser; False: there is neither."""
    return _box(text) or _page(text)


def _box(text: str) -> bool:
    if sys.platform == "win32":
        import ctypes
        error, foreground = 0x10, 0x10000
        return bool(ctypes.windll.user32.MessageBoxW(None, text, TITLE, error | foreground))
    if sys.platform == "darwin":
        script = "on run argv\ndisplay alert item 1 of argv message item 2 of argv as critical\nend"
        return _ran(["osascript", "-e", script, TITLE, text])
    return on_desktop() and any(_ran([name, *options, text]) for name, options in BOXES.items()
                                if shutil.which(name))


def on_desktop() -> bool:
    return os.name == "nt" or sys.platform == "darwin" or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _ran(command: list[str]) -> bool:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return True
    except OSError:
        return False
    return done.returncode in (0, 1)    # 1: closed without OK


def _page(text: str) -> bool:
    body = "".join("<p>" + html.escape(line) for line in text.splitlines())
    page = ('<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            f'<title>{TITLE}</title><body style="font:18px/1.6 system-ui,sans-serif;'
            f'max-width:40em;margin:15vh auto;overflow-wrap:anywhere"><h1>{TITLE}</h1>{body}')
    with contextlib.suppress(OSError):
        folder = Path(tempfile.mkdtemp(prefix="darkroom-"))     # stays: the browser reads it later
        (folder / "message.html").write_text(page, "utf-8")
        return browse((folder / "message.html").as_uri())
    return False


def browse(address: str) -> bool:
    """In the user's browser; False: none could be started. A text browser would take the terminal
    and can't show the pages."""
    if not on_desktop() and "BROWSER" not in os.environ:
        return False
    opener = shutil.which("xdg-open") if "BROWSER" not in os.environ else None
    try:
        if opener and sys.platform.startswith("linux"):     # it alone says whether there is one
            child = subprocess.Popen([opener, address], stdin=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                     start_new_session=True)
            return child.wait(OPENS_S) == 0
        return webbrowser.open(address)
    except subprocess.TimeoutExpired:   # it became the browser itself
        return True
    except (OSError, webbrowser.Error):
        return False
