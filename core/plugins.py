"""Code of the user's own, named in the YAML as `module:object`: looked for beside the YAML, then
among the installed modules. Whatever fails in it is a fault that names it, its file and line.

Without torch. An extension is one file (or an installed module); it runs with the user's rights,
so that configs inside LoRA files, which travel, may not name any.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from core import i18n
from core.errors import UserError


@dataclass(frozen=True, slots=True)
class Extension:
    key: str                                # of the config: callbacks, optimizer ...
    name: str                               # "module:object", as located
    file: Path                              # of its source
    found: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.run(self.found, *args, **options)

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Raises UserError for whatever the extension raises; memory that runs out passes, as the
        run knows what to do then."""
        try:
            return function(*args, **options)
        except (Exception, SystemExit) as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            raise self.failed(error) from error

    def failed(self, error: BaseException) -> UserError:
        return UserError("extensions.failed", key=self.key, name=self.name,
                         where=_where(error, self.file), reason=_reason(error))

    def wrong(self, expected: str, found: Any) -> UserError:
        """What it gave back can't be used."""
        shape = getattr(found, "size", None) if hasattr(found, "mode") else None
        told = f"{found.mode} {shape[0]}x{shape[1]}" if shape else type(found).__name__
        return UserError("extensions.wrong_answer", key=self.key, name=self.name, expected=expected,
                         found=told)


class Guarded:
    """An extension's object whose methods fail as its extension does; Faults pass, since a
    family's loader says itself what is wrong with a file."""

    def __init__(self, extension: Extension, inner: Any) -> None:
        self._extension, self._inner = extension, inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return functools.partial(self._call, found) if callable(found) else found

    def _call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return self._extension.run(method, *args, **options)
        except UserError as fault:
            if isinstance(fault.__cause__, UserError):
                raise fault.__cause__ from None
            raise


def is_named(value: str) -> bool:
    return ":" in value


def mark(name: str) -> str:
    """Changes with the extension's name and source: part of the key of whatever it makes."""
    module, _, item = name.rpartition(":")
    file = _source(module)
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
    return f"{Path(module).name}:{item}:{digest}"


def load(name: str, key: str) -> Extension:
    """Raises UserError where the module or the object isn't there, or the module fails by
    itself."""
    module, colon, item = name.rpartition(":")
    if not colon or not module or not item.isidentifier():
        raise UserError("extensions.bad_name", key=key, name=name)
    file = _source(module)
    if file is None:
        raise UserError("extensions.missing", key=key, name=name, module=module, folder=Path.cwd())
    try:
        loaded = _from_file(file) if module.endswith(".py") else importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise UserError("extensions.broken", key=key, name=name, where=_where(error, file),
                        reason=_reason(error)) from error
    if not callable(found := getattr(loaded, item, None)):
        known = [word for word, value in vars(loaded).items()
                 if callable(value) and not word.startswith("_")]
        close = i18n.nearest(item, known, 1) or known[:1]
        raise UserError("extensions.no_object", key=key, name=name, item=item, file=file,
                        nearest=close[0] if close else "-")
    return Extension(key, name, file, found)


def _source(module: str) -> Path | None:
    if module.endswith(".py"):
        path = Path(module).absolute()
        return path if path.is_file() else None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _from_file(file: Path) -> ModuleType:
    """Once for each content: a file that was edited is another module."""
    content = file.read_bytes()
    name = "darkroom_" + hashlib.sha256(str(file).encode() + content).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module              # dataclasses look themselves up there
    try:
        exec(compile(content, file, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _where(error: BaseException, file: Path) -> str:
    """file.py:12, the extension's own last line on the way to the error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == file]
    last = (own or frames)[-1:]
    return f"{Path(last[0].filename).name}:{last[0].lineno}" if own else file.name


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")
