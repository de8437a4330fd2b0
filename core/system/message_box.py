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
OPENS_S = 3                             # xdg-open has failed by then, or works
PATIENCE_S = 3600                       # a box may stay open while its reader is away
# Linux has no message box of its own: the first of these that is installed. The text comes last.
BOXES = {"zenity": ["--error", "--no-markup", "--width=480", "--title", TITLE, "--text"],
         "kdialog": ["--title", TITLE, "--error"],
         "xmessage": ["-center", "-title", TITLE]}


def unseen() -> bool:
    """Whether nobody reads what we print."""
    stream = sys.stderr
    return stream is None or not getattr(stream, "isatty", bool)()


def show(text: str) -> bool:
    """Shows a message box of the system, else a page in the browser. Returns False where there is
    neither."""
    return _box(text) or _page(text)


def _box(text: str) -> bool:
    if sys.platform == "win32":
        import ctypes
        error, foreground = 0x10, 0x10000
        return bool(ctypes.windll.user32.MessageBoxW(None, text, TITLE, error | foreground))
    # the text is an argument, so that nothing in it is taken for AppleScript
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
    # 1: closed without OK
    return done.returncode in (0, 1)


def _page(text: str) -> bool:
    body = "".join("<p>" + html.escape(line) for line in text.splitlines())
    page = ('<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            f'<title>{TITLE}</title><body style="font:18px/1.6 system-ui,sans-serif;'
            f'max-width:40em;margin:15vh auto;overflow-wrap:anywhere"><h1>{TITLE}</h1>{body}')
    with contextlib.suppress(OSError):
        # the folder stays, as the browser reads it later
        folder = Path(tempfile.mkdtemp(prefix="darkroom-"))
        (folder / "message.html").write_text(page, "utf-8")
        return browse((folder / "message.html").as_uri())
    return False


def browse(address: str) -> bool:
    """Opens an address in the user's browser. Returns False where none could be started. Never a
    text browser, which would take the terminal and can't show the window's pages."""
    chosen = "BROWSER" in os.environ
    if not chosen and not on_desktop():
        return False
    try:
        # xdg-open alone says whether there is a browser; webbrowser says yes in any case
        if not chosen and sys.platform.startswith("linux") and (opener := shutil.which("xdg-open")):
            child = subprocess.Popen([opener, address], stdin=subprocess.DEVNULL,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                     start_new_session=True)
            return child.wait(OPENS_S) == 0
        return webbrowser.open(address)
    except subprocess.TimeoutExpired:
        # xdg-open became the browser itself
        return True
    except (OSError, webbrowser.Error):
        return False
