"""From a start to a page: one server a user, a native window where pywebview is, else the
browser."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import webbrowser
from typing import Any
from unittest import mock

import psutil
from filelock import FileLock, Timeout

from core import paths, words
from core.faults import Fault
from gui.desktop import WebviewWindow

ADDRESS = "window.json"                 # of the server that runs: address and process


def open_window(port: int = 0, show: bool = True) -> None:
    """Blocks until the window is closed, or left alone for a while; Ctrl+C ends it too.

    A second start opens a page of the first one's server. Raises Fault where the port is taken.
    """
    paths.data_dir().mkdir(parents=True, exist_ok=True)
    lock = FileLock(paths.data_dir() / "window.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        url = _running()
        print(say("already", url=url))
        if show:
            webbrowser.open(url)
        return
    with lock:
        _serve(port, show)


def say(key: str, **params: Any) -> str:
    return words.say(f"window.{key}", params)


def _serve(port: int, show: bool) -> None:
    try:
        served = served_by(port)
    except (OSError, OverflowError) as error:
        raise Fault("window.port_taken", port=port, reason=error) from None
    try:
        address = {"url": served.url, "pid": os.getpid()}
        file = paths.data_dir() / ADDRESS
        paths.write_atomic(file, json.dumps(address))
        with contextlib.suppress(OSError):
            os.chmod(file, 0o600)       # it holds the token
        print(say("open", url=served.url), flush=True)
        if show and importlib.util.find_spec("webview") and _native(served):
            return
        if show:
            webbrowser.open(served.url)
        served.wait()
    except KeyboardInterrupt:
        print(say("closed"))
    finally:
        served.close()
        (paths.data_dir() / ADDRESS).unlink(missing_ok=True)


def served_by(port: int, **options: Any) -> Any:
    """gui.app.serve(), whose module takes seconds to import.

    Gradio parses and rewrites a .pyi beside each component, unless its class tells no file: half
    of its import, and in a folder that may be read only.
    """
    find = inspect.getfile

    def nowhere(found: Any) -> str:
        if isinstance(found, type):
            raise OSError
        return find(found)
    with mock.patch.object(inspect, "getfile", nowhere):
        from gui.app import serve
    return serve(port, **options)


def _native(served: Any) -> bool:
    """A window of our own; False where none can be opened."""
    import webview
    desktop = served.house.desktop
    try:
        window = webview.create_window("LoRA Darkroom", served.url, width=1366, height=860,
                                       text_select=True)
        window.events.closing += desktop.may_close      # False: it stays, and the page asks
        desktop.window = WebviewWindow(window)
        webview.start()
    except Exception as error:          # no display, no WebView2, no GTK: the browser is there
        print(say("no_native", reason=error))
        return False
    finally:
        desktop.window = None
    return True                         # a run that goes on goes on in its own process


def _running() -> str:
    """The address of the server that holds the lock."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = json.loads((paths.data_dir() / ADDRESS).read_text("utf-8"))
        if psutil.pid_exists(int(found["pid"])):
            return str(found["url"])
    raise Fault("window.starting")
