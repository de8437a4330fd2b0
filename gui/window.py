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
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import psutil
from filelock import FileLock, Timeout

from core import i18n, paths
from core.errors import UserError
from core.failures import disk_full
from core.system import logs, message_box, processes, surroundings
from core.workspace import settings
from gui.server import Served, listen
from gui.state.desktop import WebviewWindow

# The file with address and process of the server that runs.
ADDRESS = "window.json"
# Seconds for a first start that has no address yet, or is busy.
PATIENCE_S = 10.0

_log = logging.getLogger("darkroom")


def open_window(port: int = 0, show: bool = True) -> int:
    """Blocks until the window is closed, or left alone for a while; Ctrl+C ends it too.

    A second start brings the first one's window forward, or opens a page of its server. Returns
    the exit code, 1 where the window shows why it has no pages. Raises UserError where no server
    can be opened: a port that is taken, a data folder that can't be used.
    """
    try:
        paths.data_dir().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _error_of(error) from None
    paths.keep_private()
    lock = _lock()
    if lock is None:
        first = _asked_for_page(_running())
        print(tr("already", url=first["url"]))
        if show and not first["native"] and not message_box.browse(first["shown"]):
            raise UserError("window.no_browser", url=first["url"])
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
    """The lock; None: another start has it. The system frees that of a dead process."""
    path = paths.data_dir() / "window.lock"
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        if disk_full(error) or error.errno == errno.EROFS or not path.exists():
            raise _error_of(error) from None
        raise UserError("window.lock_broken", file=path, reason=error.strerror) from None
    return lock


def _error_of(error: OSError) -> UserError:
    """The reason why the data folder can't be used."""
    if disk_full(error):
        return UserError("window.disk_full", folder=paths.data_dir())
    return UserError("window.folder_locked", folder=error.filename or paths.data_dir(),
                     reason=error.strerror or error)


def _serve(port: int, show: bool) -> int:
    start = _Start(show)
    try:
        start.served = served = listen(port, start.focus)
    except (OSError, OverflowError) as error:
        raise UserError("window.port_taken", port=port, reason=error) from None
    file = paths.data_dir() / ADDRESS
    try:
        try:
            with paths.atomic(file, private=True) as temporary:
                temporary.write_text(json.dumps({
                    "url": served.url, "cookie": served.guard.secret, "pid": os.getpid()}))
        except OSError as error:
            raise _error_of(error) from None
        return start.run()
    except KeyboardInterrupt:
        print(tr("closed"))
        return 0
    finally:
        served.close()
        file.unlink(missing_ok=True)


class _Start:
    """One start: the pages are made in a thread, while the main one opens what shows them."""

    served: Served

    def __init__(self, show: bool) -> None:
        self.show = show
        self.window: WebviewWindow | None = None
        self._maker = threading.Thread(target=self._make_pages, name="pages", daemon=True)

    def run(self) -> int:
        """Blocks until the window is closed, or nobody is left. Returns the exit code."""
        self._maker.start()
        if not self._native():
            if self.show and not message_box.browse(self.served.guard.address_to_show()):
                text = tr("no_browser", url=self.served.url)
                print(text, flush=True)
                # Without a terminal nobody sees it.
                if message_box.unseen():
                    threading.Thread(target=message_box.show, args=[text], daemon=True).start()
            self.served.wait()
        # A window may be closed before its pages are there.
        self._maker.join()
        return 1 if self.served.front.fault else 0

    def focus(self) -> bool:
        """Brings the native window forward; False where there is none."""
        if self.window:
            self.window.forward()
        return self.window is not None

    def _make_pages(self) -> None:
        """Gradio's import is most of it. What goes wrong becomes the page that is shown."""
        try:
            pages().add_pages(self.served)
            if self.window:
                self.served.app_state.desktop.window = self.window
            print(tr("open", url=self.served.url), flush=True)
        except BaseException as raised:
            _log.exception("no pages")
            # Of other files it is said as of a package: whose they are, nobody knows here.
            error = _error_of(raised) if isinstance(raised, OSError) and (
                disk_full(raised) or paths.is_ours(raised.filename)) else raised
            if isinstance(error, UserError):
                text = i18n.tr(error.code, error.params, _language())
            else:
                text = tr("broken_app" if processes.frozen() else "broken_packages",
                          reason=f"{type(error).__name__}: {error}", log=logs.file())
            self.served.front.fault = text
            print(text, file=sys.stderr, flush=True)

    def _native(self) -> bool:
        """A window of our own, until it is closed; False where none can be opened."""
        if not self.show or importlib.util.find_spec("webview") is None:
            return False
        # The window's own loop runs no Python in which a handler of ours would be called.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            # An optional package.
            import webview
            # Its complaints go to our log, not as tracebacks to the terminal.
            logging.getLogger("pywebview").handlers.clear()
            webview.settings["ALLOW_DOWNLOADS"] = True
            window = webview.create_window(
                "LoRA Darkroom", self.served.url, width=1366, height=860, min_size=(800, 600),
                text_select=True, zoomable=True)
            # False ends the start: Windows without WebView2 falls back to Internet Explorer,
            # which can't show the pages.
            window.events.initialized += lambda renderer: renderer != "mshtml"
            # False keeps the window open: the page asks.
            window.events.closing += lambda: (self.served.state is None
                                              or self.served.state.desktop.may_close())
            window.events.shown += lambda: self._take(WebviewWindow(window))
            webview.start(private_mode=False, storage_path=str(paths.data_dir() / "webview"))
            if not window.events.shown.is_set():
                raise OSError(tr("no_webview"))
            return True
        except Exception as error:
            # No display, no GTK: the browser is there.
            _log.warning("no window of its own", exc_info=True)
            print(tr("no_native", reason=str(error).rstrip(".")))
            return False
        finally:
            signal.signal(signal.SIGTERM, handler)
            self._take(None)

    def _take(self, window: WebviewWindow | None) -> None:
        self.window = window
        if self.served.state:
            self.served.state.desktop.window = window


def pages() -> Any:
    """The module gui.app, which takes seconds to import.

    Gradio parses and rewrites a .pyi beside each component, unless its class tells no file: half
    of its import, and in a folder that may be read only.
    """
    find = inspect.getfile

    def nowhere(item: Any) -> str:
        if isinstance(item, type):
            raise OSError
        return find(item)
    with mock.patch.object(inspect, "getfile", nowhere), surroundings.no_network():
        from gui import app
    return app


def _running() -> dict[str, Any]:
    """What the server told of itself that holds the lock; it may be starting just now. Raises
    UserError where it tells nothing in PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads((paths.data_dir() / ADDRESS).read_text("utf-8"))
            # The file of a server that was killed is still there.
            if psutil.pid_exists(int(known["pid"])) and urlsplit(str(known["url"])).port:
                return {"url": str(known["url"]), "cookie": str(known["cookie"])}
        time.sleep(0.2)
    raise UserError("window.starting")


def _asked_for_page(known: dict[str, Any]) -> dict[str, Any]:
    """Whether the first start has a native window, which it brings to the front ("native"), and
    addresses that open a page of it: "url", and "shown" for a browser's command line. Raises
    UserError where it doesn't answer."""
    place = urlsplit(known["url"])
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/focus", headers={
            "Host": place.netloc, "Cookie": f"darkroom_{place.port}={known['cookie']}"})
        told = json.loads(connection.getresponse().read())
        return {name: told[name] for name in ("native", "url", "shown")}
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        raise UserError("window.hangs", url=f"http://{place.netloc}/") from None
    finally:
        connection.close()
