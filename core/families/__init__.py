"""The model families by id. Strings only: listing families imports no torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import extensions, words
from core.faults import Fault

if TYPE_CHECKING:
    from core.families.base import Family

MODULES = {
    "sd15": "core.families.sd15:StableDiffusion1",
}


def get(family_id: str) -> Family:
    """Raises Fault `families.unknown` with the nearest known id."""
    if extensions.is_named(family_id):
        return _own(family_id)
    if family_id not in MODULES:
        close = words.nearest(family_id, MODULES, 1)
        raise Fault("families.unknown", family=family_id, known=", ".join(MODULES),
                    nearest=close[0] if close else next(iter(MODULES)))
    _quiet()
    module, name = MODULES[family_id].split(":")
    family: Family = getattr(importlib.import_module(module), name)()
    return family


def _own(name: str) -> Family:
    """A class of the user's own, all methods of the protocol there."""
    from core.families.base import Family
    _quiet()
    extension = extensions.load(name, "family")
    made = extension()
    wanted = [word for word in vars(Family) if not word.startswith("_")]
    if lacks := [word for word in ("spec", *wanted) if not hasattr(made, word)]:
        raise extension.wrong(", ".join(lacks), made)
    guarded: Any = extensions.Guarded(extension, made)
    return guarded  # type: ignore[no-any-return]


def detect(source: Path) -> str:
    """The family of a base, told from what it is. Raises Fault where nothing is there."""
    if not source.exists():
        raise Fault("families.missing", path=source, folder=source.parent)
    return "sd15"                       # its loader says what a file is that isn't one


def _quiet() -> None:
    """The libraries' own bars and hints would tear our progress display."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log
    for log in (diffusers_log, transformers_log):
        log.disable_progress_bar()
        log.set_verbosity_error()
