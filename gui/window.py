"""From a start to a page: one server a user, a native window where pywebview is, else the
browser."""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.util
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, urlsplit

import psutil
from filelock import FileLock, Timeout

from core import i18n, paths
from core.errors import UserError
from core.system import logs, message_box, processes
from core.workspace import settings
from gui.server import Served, listen
from gui.state.desktop import WebviewWindow

ADDRESS = "window.json"                 # of the server that runs: address and process
PATIENCE_S = 10.0                       # with a first start that has no address yet, or is busy

_log = logging.getLogger("darkroom")


def open_window(port: int = 0, show: bool = True) -> int:
    """Blocks until the window is closed, or left alone for a while; Ctrl+C ends it too.

    A second start brings the first one's window forward, or opens a page of its server. Returns
    the exit code, 1 where the window shows why it has no pages. Raises UserError where no server
    can be opened: a port that is taken, a data folder that can't be used.
    """
    with _writable(paths.data_dir()):
        paths.data_dir().mkdir(parents=True, exist_ok=True)
    lock = _lock()
    if lock is None:
        _to_the_first(show)
        return 0
    with lock:
        logs.begin()
        return _serve(port, show)


def tr(key: str, **params: Any) -> str:
    return i18n.tr(f"window.{key}", params, _language())


def _language() -> str:
    with contextlib.suppress(Exception):
        return settings.read().spoken
    return i18n.language()


def _lock() -> FileLock | None:
    """None: another start has it. The system frees the lock of a process that died."""
    path = paths.data_dir() / "window.lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS) or not path.exists():
            raise _fault(error, paths.data_dir()) from None
        raise UserError("window.lock_broken", file=path, reason=error.strerror) from None
    return lock


@contextlib.contextmanager
def _writable(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise _fault(error, folder) from None


def _fault(error: OSError, folder: Path) -> UserError:
    if error.errno == errno.ENOSPC:
        return UserError("window.disk_full", folder=folder)
    return UserError("window.folder_locked", folder=error.filename or folder,
                     reason=error.strerror or error)


def _serve(port: int, show: bool) -> int:
    stage = _Stage(show)
    try:
        stage.served = served = listen(port, stage.focus)
    except (OSError, OverflowError) as error:
        raise UserError("window.port_taken", port=port, reason=error) from None
    file = paths.data_dir() / ADDRESS
    try:
        with _writable(paths.data_dir()):
            paths.write_atomic(file, json.dumps({"url": served.url, "pid": os.getpid()}))
        with contextlib.suppress(OSError):
            os.chmod(file, 0o600)       # it holds the token
        return stage.play()
    except KeyboardInterrupt:
        print(tr("closed"))
        return 0
    finally:
        served.close()
        file.unlink(missing_ok=True)


class _Stage:
    """One start: the pages are made in a thread, while the main one opens what shows them."""

    served: Served

    def __init__(self, show: bool) -> None:
        self.show = show
        self.window: WebviewWindow | None = None
        self._making = threading.Thread(target=self._make, name="pages", daemon=True)

    def play(self) -> int:
        self._making.start()
        if not self._native():
            if self.show and not message_box.browse(self.served.url):
                self._no_browser()
            self.served.wait()
        self._making.join()             # a closed window may be quicker
        return 1 if self.served.front.fault else 0

    def focus(self) -> bool:
        if self.window is None:
            return False
        self.window.forward()
        return True

    def _make(self) -> None:
        """Gradio's import is most of it. What goes wrong becomes the page that is shown."""
        try:
            pages().move_in(self.served)
            if self.window:
                self.served.app_state.desktop.window = self.window
            print(tr("open", url=self.served.url), flush=True)
        except BaseException as error:
            _log.exception("no pages")
            self.served.front.fault = _why_not(error)
            print(self.served.front.fault, file=sys.stderr, flush=True)

    def _native(self) -> bool:
        """A window of our own, until it is closed; False where none can be opened."""
        if not self.show or importlib.util.find_spec("webview") is None:
            return False
        # the window's own loop runs no Python in which a handler of ours would be called
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            return self._in_webview()
        except Exception as error:      # no display, no GTK: the browser is there
            _log.warning("no window of its own", exc_info=True)
            print(tr("no_native", reason=str(error).rstrip(".")))
            return False
        finally:
            signal.signal(signal.SIGTERM, handler)
            self._take(None)

    def _in_webview(self) -> bool:
        import webview
        complaints = logging.getLogger("pywebview")
        complaints.handlers.clear()     # to our log, not as tracebacks to the terminal
        webview.settings["ALLOW_DOWNLOADS"] = True
        window = webview.create_window("LoRA Darkroom", self.served.url, width=1366, height=860,
                                       min_size=(800, 600), text_select=True, zoomable=True)
        window.events.initialized += _can_show
        window.events.closing += self._may_close
        window.events.shown += lambda: self._take(WebviewWindow(window))
        webview.start(private_mode=False, storage_path=str(paths.data_dir() / "webview"))
        if window.events.shown.is_set():
            return True
        raise OSError(tr("no_webview"))

    def _take(self, window: WebviewWindow | None) -> None:
        self.window = window
        if self.served.rooms:
            self.served.rooms.desktop.window = window

    def _may_close(self) -> bool:
        """False: it stays, and the page asks."""
        return self.served.rooms is None or self.served.rooms.desktop.may_close()

    def _no_browser(self) -> None:
        told = tr("no_browser", url=self.served.url)
        print(told, flush=True)
        if message_box.unseen():
            threading.Thread(target=message_box.show, args=[told], daemon=True).start()


def pages() -> Any:
    """The module gui.app, which takes seconds to import.

    Gradio parses and rewrites a .pyi beside each component, unless its class tells no file: half
    of its import, and in a folder that may be read only.
    """
    find = inspect.getfile

    def nowhere(found: Any) -> str:
        if isinstance(found, type):
            raise OSError
        return find(found)
    with mock.patch.object(inspect, "getfile", nowhere):
        from gui import app
    return app


def _can_show(renderer: str) -> bool:
    """Windows without WebView2 falls back to Internet Explorer, which can't show the pages."""
    return renderer != "mshtml"


def _why_not(error: BaseException) -> str:
    if isinstance(error, UserError):
        return i18n.tr(error.code, error.params, _language())
    if isinstance(error, OSError):
        fault = _fault(error, paths.data_dir())
        return i18n.tr(fault.code, fault.params, _language())
    reason = f"{type(error).__name__}: {error}"
    return tr("broken_app" if processes.frozen() else "broken_packages", reason=reason,
              log=logs.file())


def _to_the_first(show: bool) -> None:
    """What a second start does. Raises UserError where the first one doesn't answer."""
    url = _running()
    print(tr("already", url=url))
    if show and not _brought_forward(url) and not message_box.browse(url):
        raise UserError("window.no_browser", url=url)


def _running() -> str:
    """The address of the server that holds the lock, which may be starting just now."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((paths.data_dir() / ADDRESS).read_text("utf-8"))
            if psutil.pid_exists(int(found["pid"])):
                return str(found["url"])
        time.sleep(0.2)
    raise UserError("window.starting")


def _brought_forward(url: str) -> bool:
    parts = urlsplit(url)
    token = parse_qs(parts.query)["token"][0]
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/focus", headers={
            "Host": parts.netloc, "Cookie": f"darkroom_{parts.port}={token}"})
        return bool(json.loads(connection.getresponse().read())["native"])
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        raise UserError("window.hangs", url=url) from None
    finally:
        connection.close()
