"""What other programs left in the environment, and what of it we do without.

`settle` is called by every start (launcher.py): of a command, the window, a worker, the planning
process, the installer. Standard library only, and readable by Python 3.8.
"""

from __future__ import annotations

import contextlib
import os
import sys
import urllib.parse
from collections.abc import Iterator
from importlib.util import find_spec

# Folders with the user's own modules, which `PYTHONPATH` named: see _python_path.
OWN_MODULES = "DARKROOM_PYTHONPATH"
# Settings of other apps that share a library with us: Gradio's, its server's, a notebook's.
_OTHERS = ("GRADIO_", "UVICORN_")
# SSLKEYLOGFILE: of a network analyst; each connection fails where its file can't be written.
_OTHER_NAMES = ("FORWARDED_ALLOW_IPS", "WEB_CONCURRENCY", "MPLBACKEND", "SSLKEYLOGFILE")
# Whole numbers, or the hub's library can't be imported.
_NUMBERS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
# Python's own that change what it finds or runs: of another Python, or left by a debugging session.
_PYTHON = ("PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONWARNINGS",
           "PYTHONSAFEPATH", "PYTHONPLATLIBDIR", "PYTHONBREAKPOINT", "__PYVENV_LAUNCHER__")
# Certificates of an environment that is gone (conda leaves them), or files that hold none: without,
# the system's are taken.
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
                 "PIP_CERT", "PIP_CLIENT_CERT", "NODE_EXTRA_CA_CERTS")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def settle(root: str) -> None:
    """Takes out of the environment what would change our libraries or break them. `root`: the
    folder of our modules, which come before all others."""
    for name in list(os.environ):
        if name.startswith(_OTHERS) or name in _OTHER_NAMES or name in _PYTHON:
            del os.environ[name]
    for name in _CERTIFICATES:
        if name in os.environ and not _holds_certificates(os.environ[name]):
            del os.environ[name]
    for name in _NUMBERS:
        if not os.environ.get(name, "1").isdigit():
            del os.environ[name]
    try:
        os.getcwd()
    except OSError:
        # The terminal's folder has been deleted: whole paths work from anywhere.
        os.chdir(root)
    _python_path(root)
    _proxies()


def _python_path(root: str) -> None:
    """Takes away what `PYTHONPATH` names, another Python's numpy perhaps, and keeps it in a
    variable of our own for `own_modules`, also of children."""
    # Python reads "." and nothing between two colons as the working folder, and keeps that.
    named = [os.path.abspath(folder) for variable in ("PYTHONPATH", OWN_MODULES)
             if (value := os.environ.pop(variable, "")) for folder in value.split(os.pathsep)]
    own = list(dict.fromkeys(folder for folder in named if not _same(folder, root)))
    sys.path[:] = [root, *(folder for folder in sys.path
                           if os.path.abspath(folder) not in own and not _same(folder, root))]
    if own:
        os.environ[OWN_MODULES] = os.pathsep.join(own)


def own_modules() -> None:
    """Has modules found that the user's `PYTHONPATH` names, behind our packages: extensions."""
    sys.path += [folder for folder in os.environ.get(OWN_MODULES, "").split(os.pathsep)
                 if folder and folder not in sys.path]


def _holds_certificates(path: str) -> bool:
    """Whether it is a folder, or a file with a certificate."""
    try:
        with open(path, "rb") as file:
            return any(line.startswith(b"-----BEGIN") for line in file)
    except OSError:
        return os.path.isdir(path)


def _same(one: str, other: str) -> bool:
    return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))


def _proxies() -> None:
    """The HTTP library makes a connection to each proxy that is named before it uses any, and
    fails at one of a kind that it doesn't know. One that it would never use goes."""
    web = [os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES[:2]]
    if all(web) and not any(map(_unknown, web)):
        for name in ("all_proxy", "ALL_PROXY"):
            if _unknown(os.environ.get(name)):
                del os.environ[name]


def _unknown(proxy: str | None) -> bool:
    """Whether a proxy can't be used here: SOCKS without its package, or no address."""
    if not proxy:
        return False
    try:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        # It raises for what is no number.
        _ = parts.port
    except ValueError:
        return True
    return parts.scheme not in ("http", "https", *(
        ("socks5", "socks5h") if find_spec("socksio") else ()))


def unusable_proxy() -> str:
    """'ALL_PROXY=socks5://...': a proxy of the environment that downloads can't use; '': none."""
    for name in (*_PROXIES[:3], *(name.upper() for name in _PROXIES[:3])):
        if _unknown(proxy := os.environ.get(name)):
            scheme, sign, place = (proxy or "").rpartition("://")
            # Without the password: this is told.
            return f"{name}={scheme}{sign}{place.rpartition('@')[2]}"
    return ""


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """While it lasts no proxy and no certificate is named: a library that opens a connection when
    it is imported, and never uses it, must not fail by them."""
    names = [name for name in os.environ
             if name.lower() in _PROXIES or name in ("SSL_CERT_FILE", "SSL_CERT_DIR")]
    before = {name: os.environ.pop(name) for name in names}
    # The system's own settings count where the environment has none.
    os.environ["no_proxy"] = "*"
    try:
        yield
    finally:
        del os.environ["no_proxy"]
        os.environ.update(before)
