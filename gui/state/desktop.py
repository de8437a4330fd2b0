"""What only this computer's desktop can do: native dialogs, a file manager, closing the app."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError

Closing = Literal["", "asked", "stopping", "closed"]


class Desktop:
    """`state` "asked" makes all pages show the question; `quit` is set to end the server."""

    def __init__(self, changed: Callable[[], None], busy: Callable[[], bool]) -> None:
        self.window: WebviewWindow | None = None
        self.state: Closing = ""
        self.quit = threading.Event()
        self._changed, self._busy = changed, busy

    def choose(self, folder: bool) -> str:
        """Opens a dialog and waits for it. Raises UserError where there is no native window."""
        if self.window is None:
            raise UserError("close.no_dialog")
        return self.window.choose(folder)

    def may_close(self) -> bool:
        """True: nothing runs, or the user has decided. Else the pages ask the user."""
        if self.quit.is_set() or not self._busy():
            return True
        self._set("asked")
        return False

    def stay(self) -> None:
        """Calls the closing off."""
        self._set("")

    def stop_first(self, stop: Callable[[], None]) -> None:
        """Ends the app once `stop` returns; the pages show it meanwhile, and `stay` still calls it
        off."""
        def work() -> None:
            stop()
            if self.state == "stopping":
                self.end()
        self._set("stopping")
        threading.Thread(target=work, name="closing", daemon=True).start()

    def end(self) -> None:
        """Closes the native window, and lets the server end."""
        self._set("closed")
        self.quit.set()
        if self.window:
            # Not in the window's own thread, which waits for the event that led here.
            threading.Thread(target=self.window.close, name="closing", daemon=True).start()

    def _set(self, state: Closing) -> None:
        self.state = state
        self._changed()


def open_folder(folder: Path) -> None:
    """Opens a folder in the system's file manager. Raises UserError where either is missing."""
    if not os.path.isdir(folder):
        raise UserError("close.folder_gone", folder=folder)
    if sys.platform == "win32":
        os.startfile(folder)
        return
    command = "open" if sys.platform == "darwin" else "xdg-open"
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    # xdg-open without a display would start a browser in the terminal.
    if command == "xdg-open" and not (display and shutil.which(command)):
        raise UserError("close.no_manager", folder=folder)
    subprocess.Popen([command, str(folder)], stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


class WebviewWindow:
    """pywebview's window, as far as it is needed here."""

    def __init__(self, window: Any) -> None:
        self._window = window
        # pywebview can't be asked for it, and restore() makes a maximised window small.
        self._minimised = False
        window.events.minimized += lambda: setattr(self, "_minimised", True)
        window.events.restored += lambda: setattr(self, "_minimised", False)
        window.events.maximized += lambda: setattr(self, "_minimised", False)

    def choose(self, folder: bool) -> str:
        """A path from the system's dialog; "": nothing was chosen."""
        import webview
        # pywebview 6 names the kinds otherwise than 5.
        kinds = getattr(webview, "FileDialog", None)
        kind = ((kinds.FOLDER if folder else kinds.OPEN) if kinds
                else webview.FOLDER_DIALOG if folder else webview.OPEN_DIALOG)
        chosen = self._window.create_file_dialog(kind)
        return str(chosen[0]) if chosen else ""

    def close(self) -> None:
        self._window.destroy()

    def forward(self) -> None:
        """Brings the window before all others."""
        if self._minimised:
            self._window.restore()
        self._window.show()
        # Systems keep programs from taking the front; a window that is on top for a moment may.
        self._window.on_top = True
        self._window.on_top = False
