"""The user's own code, named in the YAML as `module:object`. It is looked for beside the YAML, then
among the installed modules. Whatever fails in it becomes a UserError with its file and line.

Without torch. An extension is one file or an installed module. It runs with the user's rights: by
the user's start of a job alone, never by a plan (`asleep`), and configs inside LoRA files, which
people pass on, may not name any.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from core import i18n
from core.errors import UserError
from core.failures import ran_out


@dataclass(frozen=True, slots=True)
class Extension:
    key: str                                # the config key that names it: callbacks, optimizer
    name: str                               # "module:object", as located
    file: Path                              # its source
    found: Any                              # the object

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.run(self.found, *args, **options)

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls a function of the extension. Raises UserError for whatever the function raises."""
        try:
            return function(*args, **options)
        except (Exception, SystemExit) as error:
            # The run itself knows what to do when memory runs out.
            if ran_out(error):
                raise
            raise self.failed(error) from error

    def failed(self, error: BaseException) -> UserError:
        return UserError("extensions.failed", key=self.key, name=self.name,
                         where=_where(error, self.file), reason=_reason(error))

    def wrong(self, expected: str, found: Any) -> UserError:
        """The fault that `found`, which the extension returned, can't be used."""
        # pictures by mode and size, all else by type
        size = getattr(found, "size", None) if hasattr(found, "mode") else None
        text = f"{found.mode} {size[0]}x{size[1]}" if size else type(found).__name__
        return UserError("extensions.wrong_answer", key=self.key, name=self.name, expected=expected,
                         found=text)


class Guarded:
    """An object that an extension made; its methods fail as the extension does. A UserError that
    they raise passes: a family's loader says itself what is wrong with a file."""

    def __init__(self, extension: Extension, inner: Any) -> None:
        self._extension, self._inner = extension, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def guarded(*args: Any, **options: Any) -> Any:
            try:
                return self._extension.run(value, *args, **options)
            except UserError as fault:
                if isinstance(fault.__cause__, UserError):
                    raise fault.__cause__ from None
                raise
        return guarded


_asleep = False


@contextlib.contextmanager
def asleep() -> Iterator[None]:
    """While it lasts no extension is loaded or run: of a config that was only looked at."""
    global _asleep
    before, _asleep = _asleep, True
    try:
        yield
    finally:
        _asleep = before


def is_named(value: str) -> bool:
    """Whether a config's value names an extension."""
    return ":" in value


def mark(name: str) -> str:
    """A key for caches that changes with the extension's name and source."""
    module, _, item = name.rpartition(":")
    file = _source(module)
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
    return f"{Path(module).name}:{item}:{digest}"


def load(name: str, key: str) -> Extension:
    """Loads the extension "module:object" that the config's `key` names. Raises UserError where the
    module or the object isn't there, or importing the module fails."""
    module, colon, item = name.rpartition(":")
    if not colon or not module or not item.isidentifier():
        raise UserError("extensions.bad_name", key=key, name=name)
    if _asleep:
        raise UserError("extensions.asleep", key=key, name=name)
    file = _source(module)
    if file is None:
        raise UserError("extensions.missing", key=key, name=name, module=module, folder=Path.cwd())
    try:
        loaded = _from_file(file) if module.endswith(".py") else importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise UserError("extensions.broken", key=key, name=name, where=_where(error, file),
                        reason=_reason(error)) from error
    if not callable(extension := getattr(loaded, item, None)):
        known = [word for word, value in vars(loaded).items()
                 if callable(value) and not word.startswith("_")]
        close = i18n.nearest(item, known, 1) or known[:1]
        raise UserError("extensions.no_object", key=key, name=name, item=item, file=file,
                        nearest=close[0] if close else "-")
    return Extension(key, name, file, extension)


def _source(module: str) -> Path | None:
    """The file of a module, or of a path that ends in .py; None: there is none."""
    if module.endswith(".py"):
        path = Path(module).absolute()
        return path if path.is_file() else None
    # To find a module in a package, Python runs the package.
    if _asleep and "." in module:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def _from_file(file: Path) -> ModuleType:
    """The module of a file, loaded once for each content: an edited file is another module."""
    content = file.read_bytes()
    name = "darkroom_" + hashlib.sha256(str(file).encode() + content).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up there
    sys.modules[name] = module
    try:
        exec(compile(content, file, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _where(error: BaseException, file: Path) -> str:
    """'file.py:12': the last line of the extension itself in the error's traceback."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file]
    return f"{file.name}:{lines[-1]}" if lines else file.name


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")
